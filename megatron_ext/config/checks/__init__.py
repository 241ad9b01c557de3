"""Cross-group rules: all broken ones, with their numbers and the nearest values that work.

    required  what must be given              pipeline  layers over pp x vpp, interleaving
    layout    world = pp*dp*cp*tp, experts    moe       routing, losses, capacity, dispatch
    model     sizes, positions, recompute     training  batch, schedule, gradients
    context   sequence over cp and tp, strategies
    support   what this release or this machine cannot do
    world     ranks that a file's layout cannot hold
    megatron  what megatron-core's classes would refuse
    kernels   what the kernels of --moe-kernels triton serve

A rule is a generator of `Violation` over the resolved `RunConfig`.  A rule whose inputs are missing
stays silent: `required` has named them.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ext.config.checks import (
    context,
    kernels,
    layout,
    megatron,
    model,
    moe,
    pipeline,
    required,
    support,
    training,
    world,
)
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation


def violations_of(
    cfg: RunConfig, environ: Mapping[str, str], sizes_hold: bool = True
) -> list[Violation]:
    """All broken rules of a configuration; only what is missing where a size is out of its range
    (`bounds`), which makes every other rule meaningless.
    """
    found = list(required.rules(cfg))
    if not sizes_hold:
        return found
    found += layout.world_agrees_with_environment(cfg, environ)
    wrong = list(world.rules(cfg))
    if wrong:
        return found + wrong
    for group in (layout, context, pipeline, model, moe, training, support, megatron):
        found += group.rules(cfg)
    found += kernels.rules(cfg, environ)
    return found
