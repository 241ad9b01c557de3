"""Small models of every supported family with random weights, saved as transformers saves them.

Every variant turns on what its family can do: dense layers among expert layers, windows, YaRN,
groups of experts, tied tables, odd vocabularies.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
QWEN = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
LATENT = {
    **BASE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
VARIANTS: dict[str, tuple[str, dict]] = {
    "mixtral": ("MixtralConfig", {**BASE, "intermediate_size": 48, "num_local_experts": 4}),
    "mixtral-window-tied": (
        "MixtralConfig",
        {
            **BASE,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "sliding_window": 7,
            "tie_word_embeddings": True,
            "head_dim": 16,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**BASE, **QWEN, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "qwen2_moe-windows-normalised": (
        "Qwen2MoeConfig",
        {
            **BASE,
            **QWEN,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 5,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**BASE, **QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-raw-yarn": (
        "Qwen3MoeConfig",
        {**BASE, **QWEN, "head_dim": 16, "norm_topk_prob": False, "rope_parameters": YARN},
    ),
    "olmoe": (
        "OlmoeConfig",
        {**BASE, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "deepseek_v2-lite": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None}),
    "deepseek_v2-groups-yarn": (
        "DeepseekV2Config",
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **LATENT,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **BASE,
            "num_hidden_layers": 4,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 6,
            "swiglu_limit": 0.7,
            "rope_parameters": {**YARN, "rope_theta": 150000.0, "truncate": False},
        },
    ),
}


def random_model(variant: str, seed: int = 0):
    """A transformers model in fp32 whose every parameter and buffer of weight is random."""
    import transformers

    transformers.logging.set_verbosity_error()
    class_name, values = VARIANTS[variant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, class_name)(**values)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in state.items():
            if name.endswith("inv_freq"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm = "norm" in name
            tensor.copy_(1 + 0.2 * noise if is_norm else 0.15 * noise)
    return model.eval()


def save(model, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Save as the hub has it, in several shards."""
    import huggingface_hub.utils

    huggingface_hub.utils.disable_progress_bars()
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB", **options)
    return folder
