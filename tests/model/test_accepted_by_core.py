"""What the rules let pass, megatron-core's own option classes accept: nobody meets their texts."""

from __future__ import annotations

import pytest

from megatron_ext.config import parse
from megatron_ext.config.flags import Flag, all_flags
from megatron_ext.errors import ConfigError
from megatron_ext.model.initialise import Recorder
from megatron_ext.model.run_config import (
    _FIELD,
    _as_flag,
    ddp_config,
    optimizer_config,
    transformer_config,
)

DENSE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 1 --seq-length 64"
    " --max-position-embeddings 64 --train-iters 5 --lr 1e-3 --mock-data --vocab-size 100"
    " --global-batch-size 8 --device cpu --dry-run"
)
MOE = DENSE + " --num-experts 8 --position-embedding-type rope --disable-bias-linear --swiglu"
SECTIONS = ("parallel", "model", "moe", "transformer", "optimizer", "ddp")


def words_of(flag: Flag) -> list[list[str]]:
    """The other value of a switch, each other choice; a number inside its range."""
    kind = flag.kind
    if kind.base == "bool":
        return [[(flag.negatives if flag.default else flag.names)[0]]]
    if kind.choices:
        return [[flag.names[0], str(choice)] for choice in kind.choices if choice != flag.default]
    return [[flag.names[0], "1"]] if kind.range and kind.range.holds(1) else []


@pytest.mark.parametrize("base", [DENSE, MOE], ids=["dense", "moe"])
def test_each_flag_alone_is_refused_by_a_rule_or_built(base):
    built = 0
    for flag in all_flags().values():
        for extra in words_of(flag) if flag.section in SECTIONS else ():
            try:
                cfg = parse([*base.split(), *extra], {})
            except ConfigError:
                continue
            transformer_config(cfg, Recorder())
            optimizer_config(cfg)
            ddp_config(cfg)
            built += 1
    assert built > 250


def test_its_words_name_flags():
    said = "layernorm_epsilon, self.num_moe_experts (4) and --moe-router-topk of a_thing"
    assert _FIELD.sub(_as_flag, said) == (
        "--norm-epsilon, --num-experts (4) and --moe-router-topk of a_thing"
    )
