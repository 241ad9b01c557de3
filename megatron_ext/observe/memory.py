"""What the memory holds, and what it held when it was not enough.

`split` counts storages once: weights, then gradients, then optimizer. `on_out_of_memory` turns a
failed allocation into one FATAL line and a page to read, RUN/logs/oom_rank_R.txt: the largest
tensors with their place (name of the weight, its gradient or state; else the variable of the frame
that holds it). On CUDA also torch's snapshot, RUN/logs/oom_rank_R.pickle, for
pytorch.org/memory_viz; with --record-memory-history it has the stacks of the allocations.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import resource
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import ResourceError

NUM_SHOWN = 40
RESERVE = 32 << 20
"""Bytes of addresses in which the page of a run out of memory is made."""

SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "DefaultCPUAllocator")
"""What torch says where the memory does not suffice."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for MemoryError and for what torch raises on a CPU and on CUDA."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def peak_bytes(device: torch.device) -> int:
    """Most memory that was used at once: of torch on CUDA, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _leaf_optimizers(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", None) or [optimizer]
    return [one.optimizer for one in chained if getattr(one, "optimizer", None) is not None]


def states(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """(what it is, tensor) of all that an optimizer keeps on this rank."""
    for leaf in _leaf_optimizers(optimizer):
        for group in leaf.param_groups:
            for number, parameter in enumerate(group["params"]):
                yield f"optimizer: master weight {number}", parameter
                for name, value in leaf.state.get(parameter, {}).items():
                    if torch.is_tensor(value):
                        yield f"optimizer: {name} of weight {number}", value


def _gradients(chunks: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for chunk in chunks:
        for kind in ("buffers", "expert_parallel_buffers"):
            buffers = getattr(chunk, kind, [])
            for number, one in enumerate(buffers if isinstance(buffers, list) else []):
                if getattr(one, "grad_data", None) is not None:
                    yield f"gradient buffer {number} of {kind}", one.grad_data


def weights(chunks: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """(name and chunk, tensor) of all parameters of this rank."""
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            yield f"weight {name} of chunk {index}", parameter


def _storage_bytes(named: Iterable[tuple[str, Tensor]], seen: set[int]) -> int:
    total = 0
    for _, tensor in named:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def split(state: Any) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer of this rank; a storage counts once."""
    seen: set[int] = set()
    return {
        "weights": _storage_bytes(weights(state.chunks), seen),
        "gradients": _storage_bytes(_gradients(state.chunks), seen),
        "optimizer": _storage_bytes(states(state.optimizer), seen),
    }


def _frame_variables(error: BaseException) -> Iterator[tuple[str, Tensor]]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        where = f"{Path(frame.f_code.co_filename).name}:{line} {frame.f_code.co_name}()"
        for name, value in list(frame.f_locals.items()):
            if isinstance(value, Tensor):
                yield f"variable {name} in {where}", value


def _alive() -> Iterator[tuple[str, Tensor]]:
    with warnings.catch_warnings():  # asking old objects for their class may warn
        warnings.simplefilter("ignore")
        for one in gc.get_objects():
            if isinstance(one, Tensor):
                yield "a tensor that another object holds", one


def largest(state: Any, error: BaseException) -> list[tuple[int, str, str]]:
    """(bytes, what it is, its place) of all tensors that Python knows, largest first."""
    found: dict[int, tuple[int, str, str]] = {}
    sources = (weights(state.chunks), _gradients(state.chunks), states(state.optimizer))
    for named in (*sources, _frame_variables(error), _alive()):
        for place, tensor in named:
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            if size and key not in found:
                found[key] = (size, f"{kind} on {tensor.device}", place)
    return sorted(found.values(), reverse=True)


def describe(state: Any, error: BaseException, device: torch.device) -> str:
    """The page."""
    tensors = largest(state, error)
    total = sum(size for size, _, _ in tensors)
    lines = [
        f"out of memory: {' '.join(str(error).split())}",
        f"peak so far {peak_bytes(device) / 2**20:,.1f} MiB",
        *(f"{name} {size / 2**20:,.1f} MiB" for name, size in split(state).items()),
        f"{len(tensors)} tensors known to Python, {total / 2**20:,.1f} MiB; those that only the"
        " backward pass holds are not among them",
        "",
        "      MiB  what, place",
    ]
    lines += [f"{size / 2**20:9.2f}  {what}, {place}" for size, what, place in tensors[:NUM_SHOWN]]
    lines += ["", "where it happened", *traceback.format_tb(error.__traceback__)]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def on_out_of_memory(state: Any, logs: Path, rank: int, device: torch.device) -> Iterator[None]:
    """A failed allocation inside becomes a page of logs/ and a ResourceError (69). Where addresses
    are limited (ulimit -v), those that the page needs are reserved before.
    """
    reserve = mmap.mmap(-1, RESERVE)  # never touched, so no memory
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reserve.close()
        if not is_out_of_memory(error):
            raise
        path = logs / f"oom_rank_{rank}.txt"
        do = (
            "lower --micro-batch-size, or add --recompute-granularity selective, ranks or"
            " --use-distributed-optimizer"
        )
        try:
            path.write_text(describe(state, error, device), encoding="utf-8")
            if device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
            do += "; the largest tensors are in the file"
        except OSError as refused:  # the disk is full as well
            do += f"; no page of the largest tensors: {refused.strerror}"
        raise ResourceError(
            f"out of memory: {str(error).splitlines()[0][:200] if str(error) else 'MemoryError'}",
            do=do,
            path=path,
        ) from error
    finally:
        reserve.close()
