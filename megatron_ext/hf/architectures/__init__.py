"""The supported families. Adding one: a file with rows, flags and config, a line here, a test
model.

An exported checkpoint becomes the first family whose config.json says the same flags again.
"""

from __future__ import annotations

from megatron_ext.hf.architectures.decoder import Architecture
from megatron_ext.hf.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_ext.hf.architectures.gpt_oss import GPT_OSS
from megatron_ext.hf.architectures.mixtral import MIXTRAL
from megatron_ext.hf.architectures.olmoe import OLMOE
from megatron_ext.hf.architectures.qwen import QWEN2_MOE, QWEN3_MOE

ARCHITECTURES: tuple[Architecture, ...] = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
)


def by_model_type() -> dict[str, Architecture]:
    """model_type of config.json -> family."""
    return {one.model_type: one for one in ARCHITECTURES}
