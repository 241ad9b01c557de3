"""The peers by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """`module` is a file here, `variant` what it is asked for; `is_installed_here`: it needs
    nothing but the trainer's own environment; `only_in`: the one precision in which it makes sense;
    `differs`: why its loss curve need not be ours.
    """

    label: str
    module: str
    variant: str
    is_compiled: bool = False
    is_installed_here: bool = False
    only_in: str = ""
    differs: str = ""


def _both(label: str, module: str, variant: str, **more) -> list[Peer]:
    return [
        Peer(label, module, variant, **more),
        Peer(f"{label}, compiled", module, variant, is_compiled=True, **more),
    ]


NORMS = "norms of q and k besides"
BIAS = "a bias per expert instead of a balance loss"
NO_AUX = "no balance loss"
DROPS = "drops tokens over the capacity"
PEERS = [
    *_both("plain PyTorch, grouped_mm", "plain", "", is_installed_here=True),
    *_both("HF Mixtral, eager", "hf", "mixtral:eager"),
    *_both("HF Mixtral, grouped_mm", "hf", "mixtral:grouped_mm"),
    *_both("HF Mixtral, batched_mm", "hf", "mixtral:batched_mm"),
    *_both("HF Qwen3-MoE, eager", "hf", "qwen3:eager", differs=NORMS),
    *_both("HF Qwen3-MoE, grouped_mm", "hf", "qwen3:grouped_mm", differs=NORMS),
    *_both("HF Qwen3-MoE, batched_mm", "hf", "qwen3:batched_mm", differs=NORMS),
    *_both("torchtitan MoE", "titan", "", differs=BIAS),
    *_both("torchtitan MoE, without casts", "titan", "whole", only_in="fp32", differs=BIAS),
    *_both("OLMo-core dropless", "olmo", "dropless"),
    *_both("litgpt LLaMAMoE", "lit", "", differs=NO_AUX),
    *_both("DeepSpeed MoE, capacity", "deep", "capacity", differs=DROPS),
    *_both("DeepSpeed MoE, dropless", "deep", "dropless"),
    Peer("megatron-core SequentialMLP", "megatron", "", is_installed_here=True),
]
DEFAULT = (
    "plain PyTorch, grouped_mm",
    "plain PyTorch, grouped_mm, compiled",
    "HF Mixtral, grouped_mm",
    "HF Mixtral, grouped_mm, compiled",
    "HF Qwen3-MoE, grouped_mm",
    "torchtitan MoE",
    "torchtitan MoE, compiled",
    "torchtitan MoE, without casts, compiled",
    "OLMo-core dropless",
    "litgpt LLaMAMoE",
    "DeepSpeed MoE, capacity",
    "DeepSpeed MoE, dropless",
    "megatron-core SequentialMLP",
)
"""Those that one run has memory and time for; the others were slower where measured."""


def chosen(patterns: list[str] | None, dtype: str = "bf16") -> list[Peer]:
    """The default ones; or those with that label, else with that in their label ("all": all)."""
    peers = [peer for peer in PEERS if peer.only_in in ("", dtype)]
    if not patterns:
        return [peer for peer in peers if peer.label in DEFAULT]
    return [peer for peer in peers if any(_fits(peer.label, text) for text in patterns)]


def _fits(label: str, pattern: str) -> bool:
    is_a_label = any(pattern == peer.label for peer in PEERS)
    return label == pattern if is_a_label else pattern == "all" or pattern.lower() in label.lower()
