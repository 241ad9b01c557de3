"""What `python -m megatron_ext.checkpoint` does with folders that no run needs to hold open."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import complete, folder, manifest
from megatron_ext.checkpoint.hashes import Damaged
from megatron_ext.checkpoint.ledger import Ledger, verified_steps
from megatron_ext.checkpoint.lock import Lease
from megatron_ext.checkpoint.manifest import Manifest
from megatron_ext.checkpoint.patience import patiently
from megatron_ext.checkpoint.reader import StoredTensors, check_share
from megatron_ext.checkpoint.tiers import STORE, Tier, to_prune
from megatron_ext.errors import DataError

_AXES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")


def found_steps(directory: Path) -> list[int]:
    """The steps of a folder, newest first. Raises DataError where there is none."""
    steps = patiently(lambda: folder.steps(directory), directory)
    if not steps:
        raise DataError("no checkpoint here", do="name a folder with step_...", path=directory)
    return steps


def pick(directory: Path, step: int | None) -> Path:
    """The folder of a step, by default of the newest. Raises DataError."""
    steps = found_steps(directory)
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise DataError(f"--step {step} is not there", do=f"use one of: {known}", path=directory)
    return directory / folder.step_name(steps[0] if step is None else step)


def step_folder(path: Path) -> Path:
    """The folder of a step: `path` itself, or the newest of the run or folder that it names."""
    directory, step = folder.named(path)
    return pick(directory, step) if step is not None or folder.steps(directory) else path


def layout_text(layout: Mapping[str, Any]) -> str:
    """`tp2,pp2` : the axes that are larger than 1."""
    shown = [f"{axis}{layout[axis]}" for axis in _AXES if (layout.get(axis) or 1) != 1]
    return ",".join(shown) or "one rank"


def list_(directory: Path) -> None:
    """Print the table, newest first."""
    verified = verified_steps(directory)
    print(f"{'step':>10}  {'written':19}  {'bytes':>15}  {'verified':8}  layout")
    for step in found_steps(directory):
        try:
            found = manifest.read(directory / folder.step_name(step))
        except DataError as error:
            print(f"{step:>10}  {error.what}")
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.record.get("time", 0)))
        is_read = "yes" if verified.get(step) else "no"
        where = layout_text(found.record["layout"])
        print(f"{step:>10}  {when}  {found.num_bytes:>15}  {is_read:8}  {where}")


def check(path: Path) -> Manifest:
    """Every byte and the model's completeness. Raises Damaged."""
    found = manifest.read(path)
    check_share(found, 0, 1)
    shapes = (
        (name, pieces[0].spot.shape)
        for name, pieces in found.tensors.items()
        if not name.startswith(("optimizer.", "rng.", "object."))
    )
    lacking = complete.missing(shapes, found.record.get("model") or {})
    if lacking:
        raise Damaged(f"checkpoint is incomplete: {lacking}", path=path)
    return found


def verify(directory: Path, step: int | None) -> None:
    """Check one step or all."""
    steps = found_steps(directory) if step is None else [step]
    for number in steps:
        begin = time.perf_counter()
        found = check(pick(directory, number))
        seconds = time.perf_counter() - begin
        print(
            f"step={number} bytes={found.num_bytes} files={len(found.files)}"
            f" tensors={len(found.tensors)} seconds={seconds:.2f} verified"
        )


def prune(directory: Path, keep_last: int, keep_every: int | None, is_dry: bool) -> None:
    """Delete what the rule does not keep; the newest must read back first. Refused (73) while a run
    holds the folder.
    """
    steps = found_steps(directory)
    tier = Tier(STORE, directory, None, keep_last, keep_every)
    gone = to_prune(steps, steps[0], tier)
    if is_dry or not gone:
        print(f"would delete: {', '.join(map(str, gone)) or 'nothing'}")
        return
    check(pick(directory, steps[0]))
    lease = Lease(directory)
    lease.take()
    try:
        for step in gone:
            folder.remove_step(directory, step)
            Ledger(directory).add("pruned", step)
            print(f"deleted: {step}")
    except OSError as error:
        raise folder.disk_error(error, directory) from error
    finally:
        lease.release()


_TABLES = ("word_embeddings.weight", "output_layer.weight")


def diff(one: Path, other: Path, padding_may_differ: bool = False) -> bool:
    """Print what differs: progress, layout, fingerprint and every tensor; True where nothing does
    but the layout. `padding_may_differ`: the tables of the vocabulary, and the optimizer's states
    of them, are compared over the rows that both have.
    """
    a, b = StoredTensors(one), StoredTensors(other)
    same = _diff_records(a.record, b.record)
    for name in sorted({*a.names(), *b.names()} - _random(a) - _random(b)):
        is_table = padding_may_differ and name.endswith(_TABLES)
        same &= _diff_tensor(name, a, b, is_table)
    print("equal" if same else "different")
    return same


def _random(stored: StoredTensors) -> set[str]:
    """Random streams belong to ranks, not to the model."""
    return {name for name in stored.names() if name.startswith("rng.")}


def _diff_records(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    print(f"layout: {layout_text(a['layout'])} | {layout_text(b['layout'])}")
    same = True
    for part in ("progress", "scheduler", "optimizer", "model"):
        if a.get(part) != b.get(part):
            print(f"{part}: {a.get(part)} | {b.get(part)}")
            same = False
    mine, theirs = (x["run"].get("fingerprint") or {} for x in (a, b))
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            print(f"{name}: {mine[name]} | {theirs[name]}")
            same = False
    return same


def _diff_tensor(name: str, a: StoredTensors, b: StoredTensors, common_rows: bool) -> bool:
    for stored, side in ((a, "second"), (b, "first")):
        if name not in stored:
            print(f"{name}: only in the {side}")
            return False
    rows = 1 if common_rows else 0
    shapes = a.shape(name)[rows:], b.shape(name)[rows:]
    if shapes[0] != shapes[1] or a.dtype(name) != b.dtype(name):
        print(f"{name}: {a.dtype(name)} {a.shape(name)} | {b.dtype(name)} {b.shape(name)}")
        return False
    x, y = a.read(name).contiguous(), b.read(name).contiguous()
    if common_rows:
        x, y = x[: len(y)], y[: len(x)]
    if torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)):
        return True
    largest = (x.double() - y.double()).abs().max().item()
    print(f"{name}: max_abs_difference={largest:.3e}")
    return False
