"""A checkpoint read and written tensor by tensor, without a model, an optimizer or ranks.

    source = StoredTensors(DIR / "step_00000100")
    source.read("decoder.layers.0.mlp.experts.fc1_weight", (3, 0, 0, 0), (1, 2, 96, 64))
    write(DIR, [Piece("decoder...", shape, place, size, dtype, make), ...], run_info={...})

Converters use it: memory holds one piece at a time. What is written is read by every layout, like
what a run saves: pieces have global names and places (see the package's docstring).
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.checkpoint import folder, manifest, tensor_file
from megatron_ext.checkpoint.reader import StoredTensors
from megatron_ext.checkpoint.spots import Spot, check_whole
from megatron_ext.checkpoint.staging import Image, Pool
from megatron_ext.checkpoint.writer import write_image

__all__ = ["Piece", "StoredTensors", "whole_folder", "write"]
POOL_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece(Spot):
    """A box of a global tensor and `make()`, which gives its values."""

    make: Callable[[], Tensor]

    def values(self) -> Tensor:
        """The box's values, checked."""
        tensor = self.make().reshape(self.size)
        assert tensor.dtype == self.dtype, f"{self.name}: {tensor.dtype}, not {self.dtype}"
        return tensor


def _record(run_info: dict[str, Any]) -> dict[str, Any]:
    one = dict.fromkeys(("world_size", "tp", "pp", "cp", "ep", "etp", "dp"), 1)
    return {
        "step": 0,
        "id": uuid.uuid4().hex,
        "time": time.time(),
        "layout": {**one, "vpp": None},
        "progress": {"step": 0},
        "extra": {},
        "scheduler": None,
        "optimizer": None,
        "model": {},
        "run": run_info,
    }


def write(directory: Path, pieces: Sequence[Piece], run_info: dict[str, Any]) -> Path:
    """Write weights as step 0 of `directory`, which holds no checkpoint; the folder of that step.

    Raises DiskError, and whatever `make` of a piece raises: the caller drops the folder then
    (`whole_folder`).
    """
    assert not folder.steps(directory), f"{directory} holds checkpoints already"
    check_whole(pieces)
    folder.check_space(directory, sum(piece.num_bytes for piece in pieces))
    try:
        return _write(folder.begin(directory, 0), directory, pieces, run_info)
    except OSError as error:
        raise folder.disk_error(error, directory) from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; at the end of the block it gets the name `path`, which
    is new or empty. After an error nothing is left. Raises DiskError.
    """
    writing = path.with_name(f".writing_{path.name}_{uuid.uuid4().hex[:8]}")
    try:
        writing.mkdir(parents=True)
        yield writing
        if path.exists():
            path.rmdir()
        writing.rename(path)
        folder.sync(path.parent)
    except OSError as error:
        raise folder.disk_error(error, path) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _write(writing: Path, directory: Path, pieces: Sequence[Piece], run_info: dict) -> Path:
    layout, name = tensor_file.arrange(pieces), tensor_file.file_name(0)
    ordered = [pieces[index] for index, _ in layout.places]
    sources = [(piece.num_bytes, piece.values) for piece in ordered]
    image = Image(layout.header, sources, Pool(POOL_BYTES))
    threading.Thread(target=image.copy, name=f"make {name}", daemon=True).start()
    files = {name: write_image(image, writing / name)}
    places = ((pieces[index], name, offset) for index, offset in layout.places)
    text = manifest.describe(_record(run_info), files, places)
    return folder.publish(writing, directory, 0, text)
