"""What one start does and the next one must not do again, though RUN/config.yaml holds all flags.

`ONCE` is written there as a comment. `OF_A_LOAD` says how the folder of --load is read: it stays
beside that folder, so that the same start can be made again, and falls away where a later --load
names the run's own checkpoints, as the printed resume command does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_ext.config.argv import Setting

ONCE: dict[str, str] = {
    "eval_only": "evaluates what is there; the run it belongs to trains",
    "skip_train": "the same by its old name",
    "overwrite_run": "the old run is moved aside",
}
"""dest -> why the next start does not take it from config.yaml."""

FOLLOWS = frozenset(
    {"lr_decay_iters", "lr_decay_samples", "start_weight_decay", "end_weight_decay"}
)
"""Written as a comment, too, where it was derived: with more --train-iters the next start has a
longer decay, not the lowest learning rate behind the end of the first one's."""

OF_A_LOAD: dict[str, object] = {
    "finetune": False,
    "moe_use_upcycling": False,
    "ckpt_step": None,
    "no_load_optim": False,
    "no_load_rng": False,
}
"""dest -> its value for a run that goes on from its own newest checkpoint."""


def without_first_load(settings: Sequence[Setting]) -> tuple[list[Setting], list[str]]:
    """The settings without `OF_A_LOAD` and old names of it that a file gives beside a --load of its
    own, where a later --load is the run's own folder; and a note for each.
    """
    loads = [s for s in settings if s.dest == "load"]
    own = _own_checkpoints(settings)
    if not loads or own is None or not _same(loads[-1].value, own):
        return list(settings), []
    first = {
        s.origin: s.value
        for s in settings
        if s.dest in ("load", "pretrained_checkpoint") and s.value and not _same(s.value, own)
    }
    first.pop(loads[-1].origin, None)
    gone = [s for s in settings if s.origin in first and s.dest in _NAMES and s.value]
    notes = [
        f"{s.flag} of {s.origin.removeprefix('file:')} was for its --load {first[s.origin]},"
        f" not for {loads[-1].value}: left out"
        for s in gone
    ]
    return [s for s in settings if s not in gone], notes


_NAMES = {*OF_A_LOAD, "pretrained_checkpoint"}


def _own_checkpoints(settings: Sequence[Setting]) -> str | None:
    last = {s.dest: s.value for s in settings}
    if last.get("save"):
        return str(last["save"])
    return os.path.join(str(last["run_dir"]), "checkpoints") if last.get("run_dir") else None


def _same(one: object, other: object) -> bool:
    return os.path.abspath(str(one)) == os.path.abspath(str(other))
