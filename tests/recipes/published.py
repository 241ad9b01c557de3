"""What is published about the models of configs/: shape (config.json) and numbers of parameters.

Exact totals are those of the published checkpoints' tensors. Vendors print the active ones with two
or three digits, some rounded and some cut, and differ in what is active: all of them count the
output table, and the embedding's look-up is counted (`lookup`) or not. The choice here is the one
that gives the printed figure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Model:
    """One published model.

    Attributes:
        total: parameters without MTP layers; `buffers` of them are none of ours.
        active: as printed, in billions, a text with its digits.
        lookup: whether `active` counts the embedding table.
        family, shape: model_type and values of config.json; what is left out does not shape it.
    """

    name: str
    total: float
    total_source: str
    active: str
    active_source: str
    lookup: bool
    family: str
    shape: dict[str, Any] = field(default_factory=dict)
    buffers: int = 0


def _gqa(layers, hidden, heads, groups, vocab, **more) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **more,
    }


def _qwen(layers, hidden, heads, width, expert) -> dict[str, Any]:
    more = {"head_dim": 128, "intermediate_size": width, "moe_intermediate_size": expert}
    more |= {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    more |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960}
    return _gqa(layers, hidden, heads, 4, 151936, **more)


def _mixtral(layers, hidden, heads, width, longest) -> dict[str, Any]:
    more = {"intermediate_size": width, "num_local_experts": 8, "num_experts_per_tok": 2}
    more |= {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": longest}
    return _gqa(layers, hidden, heads, 8, 32000, **more)


def _deepseek(layers, hidden, heads, vocab, **more) -> dict[str, Any]:
    found = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    found |= {"v_head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
    return _gqa(layers, hidden, heads, heads, vocab, **found, **more)


_V3 = {
    "q_lora_rank": 1536,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}

MODELS = (
    Model(
        "olmoe-1b-7b",
        6_919_161_856,
        "tensors of allenai/OLMoE-1B-7B-0924",
        "1.3",
        "arXiv:2409.02060, table 1",
        True,
        "olmoe",
        _gqa(
            *(16, 2048, 16, 16, 50304),
            intermediate_size=1024,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            max_position_embeddings=4096,
        ),
    ),
    Model(
        "mixtral-8x7b",
        46_702_792_704,
        "tensors of mistralai/Mixtral-8x7B-v0.1",
        "12.9",
        "mistral.ai, Mixtral of experts",
        True,
        "mixtral",
        _mixtral(32, 4096, 32, 14336, 32768),
    ),
    Model(
        "mixtral-8x22b",
        140_620_634_112,
        "tensors of mistralai/Mixtral-8x22B-v0.1",
        "39",
        "mistral.ai, Cheaper, better, faster, stronger",
        True,
        "mixtral",
        _mixtral(56, 6144, 48, 16384, 65536),
    ),
    Model(
        "qwen3-30b-a3b",
        30_532_122_624,
        "tensors of Qwen/Qwen3-30B-A3B",
        "3.3",
        "its model card",
        True,
        "qwen3_moe",
        _qwen(48, 2048, 32, 6144, 768),
    ),
    Model(
        "qwen3-235b-a22b",
        235e9,
        "model card of Qwen/Qwen3-235B-A22B",
        "22",
        "the same",
        True,
        "qwen3_moe",
        _qwen(94, 4096, 64, 12288, 1536),
    ),
    Model(
        "deepseek-v2-lite",
        15.7e9,
        "arXiv:2405.04434, appendix B",
        "2.4",
        "the same",
        False,
        "deepseek_v2",
        _deepseek(
            *(27, 2048, 16, 102400),
            q_lora_rank=None,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            routed_scaling_factor=1.0,
            rope_theta=1e4,
        ),
    ),
    Model(
        "deepseek-v3",
        671e9,
        "arXiv:2412.19437; the MTP layer comes on top",
        "36.7",
        "README_WEIGHTS.md of deepseek-ai/DeepSeek-V3 (the paper: 37)",
        False,
        "deepseek_v3",
        _deepseek(
            *(61, 7168, 128, 129280),
            **_V3,
            n_routed_experts=256,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            rope_theta=1e4,
        ),
    ),
    Model(
        "kimi-k2",
        1_026_408_232_448,
        "tensors of moonshotai/Kimi-K2-Instruct, biases of experts included",
        "32",
        "model card (arXiv:2507.20534: 32.6, and 1.04T, which its shape does not give)",
        True,
        "deepseek_v3",
        _deepseek(
            *(61, 7168, 64, 163840),
            **_V3,
            n_routed_experts=384,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
            rope_theta=5e4,
        ),
        buffers=60 * 384,
    ),
    Model(
        "gpt-oss-20b",
        20.91e9,
        "arXiv:2508.10925, table 1",
        "3.61",
        "the same",
        False,
        "gpt_oss",
        _gqa(
            *(24, 2880, 64, 8, 201088),
            head_dim=64,
            intermediate_size=2880,
            num_local_experts=32,
            num_experts_per_tok=4,
            attention_bias=True,
            swiglu_limit=7.0,
            sliding_window=128,
            rms_norm_eps=1e-5,
            rope_theta=150000.0,
            max_position_embeddings=131072,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        ),
    ),
)
