"""Small checkpoints on disk without ranks, and a recorder of what a save does to the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_ext.checkpoint import folder, manifest, tensor_file
from megatron_ext.checkpoint.spots import Spot
from megatron_ext.checkpoint.staging import Image, Pool
from megatron_ext.checkpoint.writer import write_image


def write_step(directory: Path, step: int, value: float, ranks: int = 2, rows: int = 64) -> Path:
    """A checkpoint of one [ranks * rows, 64] tensor of `value`, a band of rows in each file."""
    writing = folder.begin(directory, step)
    files, pieces = {}, []
    for rank in range(ranks):
        spot = Spot("weight", (ranks * rows, 64), (rank * rows, 0), (rows, 64), torch.float32)
        layout, name = tensor_file.arrange([spot]), tensor_file.file_name(rank)
        band = torch.full((rows, 64), value) + rank
        image = Image(layout.header, [(spot.num_bytes, band)], Pool())
        image.copy()
        files[name] = write_image(image, writing / name)
        pieces.append((spot, name, layout.places[0][1]))
    record = {"step": step, "layout": {}, "run": {}, "extra": {}}
    record |= {"progress": {"step": step, "consumed_samples": step}}
    record |= {"optimizer": None, "scheduler": None}
    return folder.publish(writing, directory, step, manifest.describe(record, files, iter(pieces)))


@contextmanager
def recorded(root: Path) -> Iterator[list[tuple]]:  # noqa: C901 - seven small functions
    """What happens under `root` through `os`, in order: mkdir, create, write, cut, sync, rename."""
    log: list[tuple] = []
    real = {name: getattr(os, name) for name in ("open", "write", "pwrite", "ftruncate", "fsync")}
    real |= {name: getattr(os, name) for name in ("rename", "replace", "mkdir")}
    paths: dict[int, str] = {}

    def name(path) -> str:
        return os.path.relpath(path, root)

    def open_(path, flags, *args, **more):
        descriptor = real["open"](path, flags, *args, **more)
        paths[descriptor] = name(path)
        if flags & os.O_CREAT:
            log.append(("create", name(path)))
        return descriptor

    def pwrite(descriptor, data, offset):
        count = real["pwrite"](descriptor, data, offset)
        log.append(("write", paths[descriptor], offset, bytes(data[:count])))
        return count

    def write(descriptor, data):
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        count = real["write"](descriptor, data)
        log.append(("write", paths[descriptor], at, bytes(data[:count])))
        return count

    def ftruncate(descriptor, size):
        real["ftruncate"](descriptor, size)
        log.append(("cut", paths[descriptor], size))

    def fsync(descriptor):
        log.append(("sync", paths[descriptor]))

    def rename(source, target):
        real["rename"](source, target)
        log.append(("rename", name(source), name(target)))

    def mkdir(path, *args, **more):
        real["mkdir"](path, *args, **more)
        log.append(("mkdir", name(path)))

    changed = dict(open=open_, write=write, pwrite=pwrite, ftruncate=ftruncate, fsync=fsync)
    changed |= dict(rename=rename, replace=rename, mkdir=mkdir)
    try:
        for key, function in changed.items():
            setattr(os, key, function)
        yield log
    finally:
        for key, function in real.items():
            setattr(os, key, function)


def replay(log: list[tuple], root: Path, lost: frozenset[int] = frozenset()) -> None:
    """Do the operations again under `root`, without those whose bytes never reached the disk."""
    for number, (kind, path, *more) in enumerate(log):
        target = root / path
        if kind == "mkdir":
            target.mkdir()
        elif kind == "create":
            target.touch()
        elif kind == "rename":
            os.rename(target, root / more[0])
        elif kind in ("write", "cut") and number not in lost:
            with open(target, "r+b") as file:
                if kind == "cut":
                    file.truncate(more[0])
                else:
                    file.seek(more[0])
                    file.write(more[1])
