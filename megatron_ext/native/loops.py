"""The loops of loops.cpp as functions of tensors: float32 or bfloat16, on a CPU, contiguous.

Callers ask `serves` first and have torch's form for when it says no. What a function writes it
writes into tensors that it is given or makes; nothing here knows autograd. Numbers are computed in
fp32 and rounded once; a row's result depends on neither the other rows nor the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_ext.native import build

SOURCE = Path(__file__).with_name("loops.cpp")
ASKED = "MOE_CPU_KERNELS"
"""Of the environment, so that forked ranks and their children agree: --cpu-kernels."""

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
Loops = dict[tuple[str, torch.dtype], Callable[..., None]]
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "t": ctypes.c_int}
_ARGUMENTS = {
    "rms_norm": "ppppnnft",
    "rms_norm_backward": "ppppppnnt",
    "swiglu": "ppnnt",
    "swiglu_backward": "ppppnnt",
    "softmax_statistics": "ppppppnnnt",
    "causal_softmax": "ppnnnnnt",
    "collect": "ppppppnnnt",
    "collect_backward": "pppppppnnnt",
    "rotate_halves": "ppppnnnnnffnnnnnnt",
}
_BLOCK_ROWS = 64  # of rms_norm_backward's sums


@functools.lru_cache(maxsize=1)
def _found() -> tuple[Loops, str]:
    """(the loop of each name and dtype, "") or ({}, why there are none)."""
    if os.environ.get(ASKED) == "torch":
        return {}, "--cpu-kernels torch"
    try:
        library = build.load(SOURCE)
    except build.BuildError as error:
        return {}, str(error)
    loops = {}
    for name, arguments in _ARGUMENTS.items():
        kind = ctypes.CFUNCTYPE(None, *(_TYPES[one] for one in arguments))
        for dtype, suffix in _SUFFIX.items():
            loops[name, dtype] = kind.in_dll(library, f"{name}_{suffix}")
    return loops, ""


def use(asked: str) -> str:
    """Choose for this process and its children: "auto", "native" or "torch"; -> why the loops are
    not used, or an empty string.
    """
    os.environ[ASKED] = asked
    _found.cache_clear()
    return _found()[1]


def serves(*tensors: Tensor) -> bool:
    """Whether the loops take these: compiled, plain tensors of one served dtype on a CPU."""
    dtype = tensors[0].dtype
    return (
        dtype in _SUFFIX
        and all(
            type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == dtype
            for x in tensors
        )
        and bool(_found()[0])
    )


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    values = (one.data_ptr() if isinstance(one, Tensor) else one for one in arguments)
    _found()[0][name, dtype](*values, torch.get_num_threads())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., H], weight [H] -> (x / rms * weight, 1 / rms fp32 [rows, 1])."""
    x, width = x.contiguous(), x.shape[-1]
    y, rows = torch.empty_like(x), x.numel() // width
    per_rms = x.new_empty(rows, 1, dtype=torch.float32)
    _call("rms_norm", x.dtype, x, weight.contiguous(), y, per_rms, rows, width, eps)
    return y, per_rms


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, per_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """-> (gradient of x in its dtype, of the weight in fp32)."""
    grad, x, width = grad.contiguous(), x.contiguous(), x.shape[-1]
    dx, rows = torch.empty_like(x), x.numel() // width
    sums = x.new_empty(-(-rows // _BLOCK_ROWS), width, dtype=torch.float32)
    given = (grad, x, weight.contiguous(), per_rms, dx, sums)
    _call("rms_norm_backward", x.dtype, *given, rows, width)
    return dx, sums.sum(dim=0)


def swiglu(hidden: Tensor, out: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F] into `out` [..., F]."""
    width = out.shape[-1]
    _call("swiglu", out.dtype, hidden, out, out.numel() // width, width)
    return out


def swiglu_backward(grad: Tensor, hidden: Tensor, grad_hidden: Tensor, out: Tensor) -> None:
    """d activation `grad` [..., F] -> `grad_hidden` [..., 2F]; the activation comes into `out`."""
    width = out.shape[-1]
    given = (grad, hidden, grad_hidden, out)
    _call("swiglu_backward", out.dtype, *given, out.numel() // width, width)


def softmax_statistics(
    logits: Tensor, place: Tensor, peak: Tensor, rest: Tensor, label: Tensor, num_true: int
) -> None:
    """Logits [r, V] become the softmax over their first `num_true` columns, 0 in the others.

    Into `peak`, `rest`, `label` fp32 [r]: the largest logit, the logsumexp less that, and the logit
    in column `place` [r] int64.
    """
    rows, width = logits.shape
    work = torch.empty(torch.get_num_threads(), num_true)
    given = (logits, place, work, peak, rest, label)
    _call("softmax_statistics", logits.dtype, *given, rows, width, num_true)


def causal_softmax(scores: Tensor, first: int, together: int) -> Tensor:
    """Scores [heads, rows, keys] become their softmax over the keys up to each row's position,
    first + row // together, 0 behind it.
    """
    work = torch.empty(torch.get_num_threads(), scores.shape[2])
    _call("causal_softmax", scores.dtype, scores, work, *scores.shape, first, together)
    return scores


def collect(rows: Tensor, places: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """[T, H]: of the assignments that begin at starts[t], up to starts[t + 1], the sum of rows
    [P, H] at their places [A], times their weights [A] (None: 1).
    """
    rows, width = rows.contiguous(), rows.shape[1]
    out, work = rows.new_empty(len(starts), width), torch.empty(torch.get_num_threads(), width)
    weights = None if weights is None else weights.float().contiguous()
    sizes = (len(starts), len(places), width)
    _call("collect", rows.dtype, rows, places, starts, weights, work, out, *sizes)
    return out


def collect_backward(
    grad: Tensor, rows: Tensor, places: Tensor, starts: Tensor, weights: Tensor, drows: Tensor
) -> Tensor:
    """Gradient [T, H] of `collect` -> that of the weights, fp32 [A]; that of the rows comes into
    `drows` [P, H] at the places of assignments, other places are left as they are.
    """
    dweights = grad.new_empty(len(places), dtype=torch.float32)
    given = (grad.contiguous(), rows.contiguous(), places, starts, weights.float().contiguous())
    sizes = (len(starts), len(places), grad.shape[1])
    _call("collect_backward", grad.dtype, *given, drows, dweights, *sizes)
    return dweights


def rotate_halves(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, scale: float, sign: int
) -> Tensor:
    """x [M, S, h, D] turned into `out`, both with any strides but 1 in D: of the first R numbers
    the pairs (j, j + R/2) by cos and sign * sin [S, .., R/2] contiguous, the others times `scale`.
    """
    half = cos.shape[-1]
    strides = (*x.stride()[:3], *out.stride()[:3])
    _call("rotate_halves", x.dtype, x, out, cos, sin, *x.shape, half, scale, sign, *strides)
    return out
