"""The model that a table is about, in words that every candidate understands."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Shape:
    """A decoder of MoE layers: untied, RMSNorm, RoPE, SwiGLU, no biases, heads of hidden / heads.

    `flops_per_token` is megatron_ext.costs.flops: linear layers of top-k experts, router and
    output, and the causal half of attention, times three; no recomputation, no padding.
    """

    hidden: int
    layers: int
    heads: int
    experts: int
    topk: int
    width: int
    vocabulary: int
    sequence: int
    batch: int
    aux: float
    flops_per_token: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.sequence

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def to_dict(self) -> dict[str, Any]:
        """What JSON takes."""
        return asdict(self)


def add_flags(parser: argparse.ArgumentParser, sequences: str = "of a step") -> None:
    """What `flags_of` takes; `sequences` is the help of --sequences."""
    parser.add_argument("--model", default="bench-moe", help="of configs/, or a YAML file")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--sequences", type=int, default=4, help=sequences)


def config_file(model: str) -> str:
    """bench-moe -> configs/bench-moe.yaml; a path stays one."""
    return model if model.endswith(".yaml") else str(CONFIGS / f"{model}.yaml")


def flags_of(model: str, dtype: str, sequences: int) -> list[str]:
    """The trainer's flags of a table: the file, the precision, one step of `sequences`."""
    return [
        *("--config", config_file(model), "--bf16" if dtype == "bf16" else "--no-bf16"),
        *("--global-batch-size", str(sequences)),
    ]


def dtype_of(name: str) -> Any:
    """torch's dtype of --dtype."""
    import torch

    return torch.bfloat16 if name == "bf16" else torch.float32


def shape_of(cfg: Any) -> Shape:
    """The shape of a parsed configuration."""
    from megatron_ext.costs.flops import model_flops_per_token
    from megatron_ext.costs.parameters import padded_vocab_size

    t, size = cfg.transformer, (cfg.model.vocab_size or 0) + 1
    return Shape(
        hidden=t.hidden_size,
        layers=t.num_layers,
        heads=t.num_attention_heads,
        experts=t.num_moe_experts,
        topk=t.moe_router_topk,
        width=t.moe_ffn_hidden_size,
        vocabulary=padded_vocab_size(cfg, size),
        sequence=cfg.model.seq_length,
        batch=cfg.train.global_batch_size,
        aux=float(t.moe_aux_loss_coeff),
        flops_per_token=model_flops_per_token(cfg, size),
    )
