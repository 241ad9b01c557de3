"""RunConfig: every resolved value, by section, with its origin.

    argv -> Setting -> Values (merged, resolved) -> RunConfig(parallel, transformer, ...)
    RunConfig.mcore_values() -> TransformerConfig(**values)

The generated sections (transformer, optimizer, ddp) are frozen dataclasses made from
megatron-core's fields; their attributes have megatron-core's names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, make_dataclass
from functools import lru_cache
from typing import Any

from megatron_ext.config import flags
from megatron_ext.config.argv import Setting
from megatron_ext.config.mcore_fields import transformer_fields
from megatron_ext.config.once import FOLLOWS, ONCE
from megatron_ext.config.resolve import Values
from megatron_ext.config.sections.checkpoint import CheckpointSection
from megatron_ext.config.sections.data import DataSection
from megatron_ext.config.sections.health import HealthSection
from megatron_ext.config.sections.model import ModelSection, MoeSection
from megatron_ext.config.sections.observe import ObserveSection
from megatron_ext.config.sections.parallel import ParallelSection
from megatron_ext.config.sections.resilience import ResilienceSection
from megatron_ext.config.sections.train import ScheduleSection, TrainSection
from megatron_ext.config.stages import Chunk, Split, split_layers
from megatron_ext.errors import Violation


@lru_cache(maxsize=8)
def _generated(section: str) -> type:
    names = [(m.name, Any) for m in flags.members()[section]]
    return make_dataclass(f"{section.capitalize()}Section", names, frozen=True)


@dataclass(frozen=True)
class RunConfig:
    """What was asked, resolved.  ``transformer``, ``optimizer`` and ``ddp`` are generated.

    Attributes:
        megatron_only: dest -> value of Megatron-LM's flags that nothing here reads.
        origins: dest -> 'default', 'file:PATH', 'flag', 'environment', 'scale-down' or 'derived'.
        ignored: flag as it was given -> why it has no effect.
        warnings: one line each; rank 0 prints them.
        action: 'train', 'dry-run', 'explain' or 'print-config'.
        print_format: 'json' or 'yaml' with 'print-config'.
        scaled: one line for each value that --scale-down changed.
        given: the settings of files and flags, in order.
        broken: the rules that it breaks; only with 'explain', else they are raised.
    """

    parallel: ParallelSection
    transformer: Any
    optimizer: Any
    ddp: Any
    model: ModelSection
    moe: MoeSection
    data: DataSection
    train: TrainSection
    schedule: ScheduleSection
    checkpoint: CheckpointSection
    observe: ObserveSection
    resilience: ResilienceSection
    health: HealthSection
    megatron_only: dict[str, Any]
    origins: dict[str, str]
    ignored: dict[str, str]
    warnings: tuple[str, ...]
    action: str
    print_format: str | None = None
    scaled: tuple[str, ...] = ()
    given: tuple[Setting, ...] = ()
    broken: tuple[Violation, ...] = ()

    def mcore_values(self) -> dict[str, Any]:
        """Keyword arguments of TransformerConfig, or of MLATransformerConfig with
        --multi-latent-attention: parallel sizes included, values without effect left out.

        Not included, because they are objects: dtypes, functions (activation_func, init_method).
        ``attention_backend`` is the enum member's name.
        """
        mla = self.transformer.multi_latent_attention
        known = transformer_fields()
        values = {
            f.name: getattr(self.parallel, f.name) for f in fields(self.parallel) if f.name in known
        }
        for member in flags.members()["transformer"]:
            value = getattr(self.transformer, member.name)
            if (mla or not member.mla_only) and not self._dropped(member.dest, value):
                values[member.name] = value
        values["gated_linear_unit"] = self.model.swiglu or self.model.quick_geglu
        values["bias_activation_fusion"] = self._bias_activation_fusion()
        return values

    def optimizer_values(self) -> dict[str, Any]:
        """Keyword arguments of OptimizerConfig, without params_dtype.

        The other dtypes stay names ('fp32'), and only with Transformer Engine are they present.
        """
        return self._class_values("optimizer")

    def ddp_values(self) -> dict[str, Any]:
        """Keyword arguments of DistributedDataParallelConfig."""
        return self._class_values("ddp")

    def _class_values(self, section: str) -> dict[str, Any]:
        shown = getattr(self, section)
        pairs = ((m.name, m.dest, getattr(shown, m.name)) for m in flags.members()[section])
        return {name: value for name, dest, value in pairs if not self._dropped(dest, value)}

    def _dropped(self, dest: str, value: object) -> bool:
        """True where megatron-core keeps its own default: no effect, or None without a meaning."""
        flag = flags.all_flags()[dest]
        return dest in self._without_effect() or (value is None and not flag.kind.optional)

    def _without_effect(self) -> frozenset[str]:
        from megatron_ext.config.ignored import reasons

        return frozenset(reasons({"transformer_impl": self.model.transformer_impl}))

    def _bias_activation_fusion(self) -> bool:
        if self.model.transformer_impl == "local" or self.model.squared_relu:
            return False
        if self.model.swiglu or self.model.quick_geglu:
            return self.model.bias_swiglu_fusion
        return self.model.bias_gelu_fusion and self.transformer.add_bias_linear

    @property
    def stages(self) -> list[list[Chunk]]:
        """``table[pp_rank][chunk]``: layers, embedding, MTP and loss of each model chunk.

        Raises:
            ValueError: the layers cannot be split so (parse() has refused such a configuration).
        """
        return split_layers(self.split)

    @property
    def split(self) -> Split:
        """What the flags say about the pipeline's split."""
        t, p = self.transformer, self.parallel
        return Split(
            num_layers=t.num_layers or 0,
            pp=p.pipeline_model_parallel_size,
            vpp=p.virtual_pipeline_model_parallel_size or 1,
            first=t.num_layers_in_first_pipeline_stage,
            last=t.num_layers_in_last_pipeline_stage,
            account_for_embedding=t.account_for_embedding_in_pipeline_split,
            account_for_loss=t.account_for_loss_in_pipeline_split,
            layout=t.pipeline_model_parallel_layout,
            mtp_layers=t.mtp_num_layers or 0,
        )

    def sections(self) -> dict[str, Any]:
        """Section name -> section, in print order."""
        return {name: getattr(self, name) for name in flags.members()}

    def to_dict(self) -> dict[str, Any]:
        """{section: {attribute: {"value": ..., "origin": ...}}, "no_effect": ..., "warnings": ...}

        The section ``megatron_only`` holds the flags that are parsed and not acted on.
        """
        shown: dict[str, Any] = {}
        for name, members in flags.members().items():
            section = getattr(self, name)
            shown[name] = {
                m.name: {"value": getattr(section, m.name), "origin": self.origins[m.dest]}
                for m in members
            }
        shown["megatron_only"] = {
            dest: {"value": value, "origin": self.origins[dest]}
            for dest, value in self.megatron_only.items()
        }
        return {**shown, "no_effect": self.ignored, "warnings": list(self.warnings)}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_yaml(self) -> str:
        """One section a block, ``attribute: value  # origin``; --config reads it back."""
        shown = self.to_dict()
        lines = [f"# warning: {text}" for text in shown.pop("warnings")]
        shown.pop("no_effect")
        for name, section in shown.items():
            lines.append(f"{name}:")
            for attribute, entry in section.items():
                text = f"  {attribute}: {json.dumps(entry['value'])}  # {entry['origin']}"
                # what this launch's environment said is no setting of the next one, nor what it
                # was to do once
                is_past = entry["origin"] == "environment" or (attribute in ONCE and entry["value"])
                is_past = is_past or (attribute in FOLLOWS and entry["origin"] == "derived")
                lines.append(f"# {text}" if is_past else text)
        return "\n".join(lines) + "\n"


def build(
    values: Values, *, ignored: dict[str, str], warnings: tuple[str, ...], action: str, **rest: Any
) -> RunConfig:
    """The RunConfig of resolved values."""
    classes: dict[str, type] = {
        "parallel": ParallelSection,
        "model": ModelSection,
        "moe": MoeSection,
        "data": DataSection,
        "train": TrainSection,
        "schedule": ScheduleSection,
        "checkpoint": CheckpointSection,
        "observe": ObserveSection,
        "resilience": ResilienceSection,
        "health": HealthSection,
    }
    made = {}
    for section, members in flags.members().items():
        cls = classes.get(section) or _generated(section)
        made[section] = cls(**{m.name: values[m.dest] for m in members})
    inert = {d: values[d] for d, f in flags.all_flags().items() if f.section == "megatron_only"}
    return RunConfig(
        **made,
        megatron_only=inert,
        origins=dict(values.origin),
        ignored=ignored,
        warnings=warnings,
        action=action,
        **rest,
    )
