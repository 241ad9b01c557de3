"""RunConfig -> megatron-core's config objects. The only place that knows both.

cfg.mcore_values() carries every value that is plain data; here the objects join: dtypes, functions,
init methods. What megatron-core refuses in its own checks becomes one ConfigError line instead of a
traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.nn import functional as F

from megatron_ext.config import RunConfig
from megatron_ext.config.flags import all_flags
from megatron_ext.device import current_device
from megatron_ext.errors import ConfigError
from megatron_ext.model.initialise import Recorder, output_std

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,
}
ACTIVATIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}


def _built(made_by: Callable[..., Any], values: dict[str, Any]) -> Any:
    """An option class of megatron-core. Raises ConfigError with its words where it refuses the
    values, its fields named as flags.
    """
    try:
        return made_by(**values)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"megatron-core 0.16.1 refuses this configuration: {_FIELD.sub(_as_flag, str(error))}",
            do="change the flags that it names",
        ) from error


_FIELD = re.compile(r"(?<![-\w])(?:self\.)?([a-z]\w*_\w+)\b")


def _as_flag(name: re.Match[str]) -> str:
    flag = all_flags().get(name[1])
    return flag.names[0] if flag else name[0]


def embedding_std(cfg: RunConfig) -> float:
    """Deviation of the word and position embeddings."""
    return cfg.transformer.embedding_init_method_std or cfg.transformer.init_method_std


def _may_free_sent_outputs(values: dict) -> bool:
    """Freeing a stage's output right after its send was issued is safe in CUDA's stream order only:
    gloo reads the memory later, and the interleaved schedule then sends garbage now and then (a
    gradient norm of 33 for 1.9).
    """
    return values["deallocate_pipeline_outputs"] and current_device().type == "cuda"


def transformer_config(cfg: RunConfig, recorder: Recorder) -> TransformerConfig:
    """TransformerConfig (or MLATransformerConfig) of the run; `recorder` notes every weight's
    deviation.

    Raises ConfigError with megatron-core's own words where it refuses the values.
    """
    values = cfg.mcore_values()
    std, layers = cfg.transformer.init_method_std, cfg.transformer.num_layers
    params_dtype = DTYPES[cfg.train.params_dtype]
    values.update(
        activation_func=ACTIVATIONS[cfg.model.activation],
        attention_backend=AttnBackend[str(cfg.transformer.attention_backend).rpartition(".")[2]],
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=cfg.train.bf16,
        fp16=cfg.train.fp16,
        init_method=recorder.normal(std),
        output_layer_init_method=recorder.normal(output_std(std, layers)),
        embedding_init_method=recorder.normal(embedding_std(cfg)),
        use_cpu_initialization=False,
        perform_initialization=True,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=_may_free_sent_outputs(values),
        moe_grouped_gemm=cfg.transformer.num_moe_experts is not None,
    )
    latent = cfg.transformer.multi_latent_attention
    config = _built(MLATransformerConfig if latent else TransformerConfig, values)
    if cfg.model.position_embedding_type == "yarn":
        _add_yarn(config, cfg)
    _number_comm_types_from_one(config)
    config.qk_layernorm_over_heads = cfg.model.qk_layernorm_over_heads
    return config


def _number_comm_types_from_one(config: TransformerConfig) -> None:
    """TransformerLayer of 0.16.1 reads cp_comm_type[layer_number] where layer numbers start at 1
    (the last layer finds nothing), and MTP layers continue them: put a name in front, and the last
    layer's behind.
    """
    types = config.cp_comm_type
    if isinstance(types, list):
        config.cp_comm_type = [types[0], *types, *[types[-1]] * (config.mtp_num_layers or 0)]


def _add_yarn(config: TransformerConfig, cfg: RunConfig) -> None:
    """GPTModel reads YaRN's numbers (Peng et al. 2023, arXiv:2309.00071) as extra attributes of its
    config.
    """
    model, transformer = cfg.model, cfg.transformer
    given = {
        "yarn_rotary_scaling_factor": transformer.rotary_scaling_factor,
        "yarn_original_max_position_embeddings": model.yarn_original_max_position_embeddings
        or model.max_position_embeddings,
        "yarn_beta_fast": 32.0 if model.yarn_beta_fast is None else model.yarn_beta_fast,
        "yarn_beta_slow": 1.0 if model.yarn_beta_slow is None else model.yarn_beta_slow,
        "yarn_mscale": transformer.mscale,
        "yarn_mscale_all_dim": transformer.mscale_all_dim,
        "yarn_correction_range_round_to_int": model.yarn_correction_range_round_to_int is not False,
    }
    for name, value in given.items():
        setattr(config, name, value)


def ddp_config(cfg: RunConfig) -> DistributedDataParallelConfig:
    """How gradients are bucketed and reduced. Numbers are checked by train/step.py, not inside the
    buckets.
    """
    values = cfg.ddp_values()
    values["check_for_nan_in_grad"] = False
    return _built(DistributedDataParallelConfig, values)


def optimizer_config(cfg: RunConfig) -> OptimizerConfig:
    """OptimizerConfig of the run with dtypes as objects."""
    values = cfg.optimizer_values()
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if isinstance(values.get(name), str):
            values[name] = DTYPES[values[name]]
    values.update(
        lr=cfg.schedule.lr,
        min_lr=cfg.schedule.min_lr,
        bf16=cfg.train.bf16,
        fp16=cfg.train.fp16,
        params_dtype=DTYPES[cfg.train.params_dtype],
    )
    return _built(OptimizerConfig, values)
