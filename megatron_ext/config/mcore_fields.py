"""megatron-core's own option classes, read from the INSTALLED package's source (no import).

    transformer_fields()  TransformerConfig + what it inherits from ModelParallelConfig
    mla_fields()          what MLATransformerConfig adds or defaults differently
    optimizer_fields()    OptimizerConfig
    ddp_fields()          DistributedDataParallelConfig

megatron-core stays the source of its options: a new version brings new flags by itself, and a
renamed field makes the alias tables' test fail instead of a flag being silently ignored.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from megatron_ext.config.fields import Field, read_dataclass, read_enum
from megatron_ext.errors import ConfigError

PARALLEL_PY = "model_parallel_config.py"
TRANSFORMER_PY = "transformer/transformer_config.py"
OPTIMIZER_PY = "optimizer/optimizer_config.py"
DDP_PY = "distributed/distributed_data_parallel_config.py"
ENUMS_PY = "transformer/enums.py"


@lru_cache(maxsize=1)
def core_directory() -> Path:
    """The folder of the installed ``megatron.core``.

    Raises:
        ConfigError: megatron-core is not installed.
    """
    spec = importlib.util.find_spec("megatron")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / "core" / PARALLEL_PY).is_file():
            return Path(location) / "core"
    raise ConfigError(
        "megatron-core is not installed: its option classes are the source of most flags",
        do="pip install -r requirements.txt",
    )


def transformer_fields() -> dict[str, Field]:
    """Fields of TransformerConfig by name, inherited ones first."""
    core = core_directory()
    inherited = read_dataclass(core / PARALLEL_PY, "ModelParallelConfig")
    own = read_dataclass(core / TRANSFORMER_PY, "TransformerConfig")
    return {f.name: f for f in [*inherited, *own]}


def mla_fields() -> dict[str, Field]:
    """Fields that only MLATransformerConfig has, by name."""
    fields = read_dataclass(core_directory() / TRANSFORMER_PY, "MLATransformerConfig")
    base = transformer_fields()
    return {f.name: f for f in fields if f.name not in base}


def optimizer_fields() -> dict[str, Field]:
    """Fields of OptimizerConfig by name."""
    fields = read_dataclass(core_directory() / OPTIMIZER_PY, "OptimizerConfig")
    return {f.name: f for f in fields}


def ddp_fields() -> dict[str, Field]:
    """Fields of DistributedDataParallelConfig by name."""
    fields = read_dataclass(core_directory() / DDP_PY, "DistributedDataParallelConfig")
    return {f.name: f for f in fields}


def enum_members(class_name: str) -> tuple[str, ...]:
    """Member names of an enum of ``megatron.core.transformer.enums``, such as AttnBackend."""
    return read_enum(core_directory() / ENUMS_PY, class_name)
