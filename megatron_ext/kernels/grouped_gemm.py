"""Grouped matrix products for sorted rows, for many experts with few tokens each.

    rows_times_weights:  out[r] = A[source r] @ B[expert of r]     (forward; dX with B transposed)
    weight_gradient:     dW[e] = sum over rows r of e of A[source r]^T B[source' r]

The rows of expert e are ends[e-1]..ends[e]. The grid is as large as any routing needs: ceil(R / BM)
tiles of rows plus one more for each expert, times the tiles of columns; a program finds its expert
from the running sum of tiles, in registers. So no count leaves the device, and no row is padded.
`source` lets the rows be gathered while they are read: a permuted copy is then never written.

Against `torch.nn.functional.grouped_mm`: that one is CUTLASS for bf16 on compute capability 9 and
10 with tiles of 64 to 128 rows, and elsewhere a loop over experts that copies `offs` to the host.
Here the tile is as low as 16 rows, and fp32 and older GPUs keep clear of the host.

Numerics: products of bf16 accumulate in fp32 and are rounded once; fp32 is exact fp32 unless
`torch.set_float32_matmul_precision` allows TF32. The block along each sum is the same in every
configuration of the tuner. The interpreter multiplies bf16 as integers (Triton 3.7 and 3.9), so
there, and only there, WIDENED turns the factors into fp32 first: the same exact products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.launch import INTERPRETED, bucket, precision, rows_contiguous, tuned

_TILES = (  # rows, columns, warps, stages
    (64, 128, 4, 3),
    (16, 128, 4, 4),
    (32, 128, 4, 4),
    (128, 128, 8, 3),
    (128, 256, 8, 3),
)
_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in ([(16, 32, 4, 1)] if INTERPRETED else _TILES)
]
_WEIGHT_TILES = ((64, 64, 4, 4), (64, 128, 4, 3), (128, 128, 8, 3), (128, 256, 8, 3))
_WEIGHT_CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for n, k, warps, stages in ([(32, 32, 4, 1)] if INTERPRETED else _WEIGHT_TILES)
]
FEW_ROWS = 64
"""Mean rows of an expert under which tiles of 16 or 32 rows are tried, else of 64 or more. On
compute capability 9 the compiler gives the former to mma, the latter to wgmma."""


def _offered(configs, given, **more):
    """The tiles for so many rows of an expert; one of them for fp32, of which they are long code
    without tensor cores (16 to 100 s of compilation for all).
    """
    given = given | more
    is_few = given["ROWS_BUCKET"] < FEW_ROWS * given["E"]
    fitting = [one for one in configs if (one.kwargs["BLOCK_M"] < FEW_ROWS) == is_few]
    return fitting[:1] if given["a"].dtype == torch.float32 else fitting


def _offered_for_weights(configs, given, **more):
    """All, for fp32 the smallest."""
    return configs[:1] if given["x"].dtype == torch.float32 else configs


SUM_BLOCK_K = 64
"""Step of the sum over a row's K columns: part of the result's order of summation."""
SUM_BLOCK_R = 64
"""Step of the sum over an expert's rows, likewise."""


@triton.jit
def _tile_of(tile_m, ends, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row of this tile, end of the expert's rows); expert E: no rows are left."""
    experts = tl.arange(0, BLOCK_E)
    expert_ends = tl.load(ends + experts, mask=experts < E, other=0)
    expert_starts = tl.load(ends + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = tl.where(experts < E, tl.cdiv(expert_ends - expert_starts, BLOCK_M), 0)
    tile_ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((tile_ends <= tile_m).to(tl.int32), axis=0)
    mine = experts == expert
    tile_in_expert = tile_m - tl.sum(tl.where(mine, tile_ends - tiles, 0), axis=0)
    first = tl.sum(tl.where(mine, expert_starts, 0), axis=0) + tile_in_expert * BLOCK_M
    return expert, first, tl.sum(tl.where(mine, expert_ends, 0), axis=0)


@tuned(_CONFIGS, key=["N", "K", "E", "ROWS_BUCKET"], offered=_offered)
@triton.jit
def _rows_times_weights(
    a,
    b,
    out,
    ends,
    source,
    N,
    K,
    E,
    a_stride,
    b_stride_e,
    b_stride_k,
    b_stride_n,
    ROWS_BUCKET,
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # squares of 8 tiles of rows by all columns: neighbours in time share rows and weights in L2
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.num_programs(0) // tiles_n
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    expert, first, last = _tile_of(tile_m, ends, E, BLOCK_E, BLOCK_M)
    if expert < E:
        m = first + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)
        if GATHERED:
            row = tl.load(source + m, mask=m < last, other=0).to(tl.int64)
        b_tile = b + expert.to(tl.int64) * b_stride_e
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(
                a + row[:, None] * a_stride + k[None, :],
                mask=(m[:, None] < last) & (k[None, :] < K),
                other=0.0,
            )
            right = tl.load(
                b_tile
                + k[:, None].to(tl.int64) * b_stride_k
                + n[None, :].to(tl.int64) * b_stride_n,
                mask=(k[:, None] < K) & (n[None, :] < N),
                other=0.0,
            )
            if WIDENED:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        tl.store(
            out + m[:, None].to(tl.int64) * N + n[None, :],
            total.to(out.dtype.element_ty),
            mask=(m[:, None] < last) & (n[None, :] < N),
        )


@tuned(_WEIGHT_CONFIGS, key=["N", "K", "E", "ROWS_BUCKET"], offered=_offered_for_weights)
@triton.jit
def _weight_gradient(
    grad,
    x,
    out,
    ends,
    grad_source,
    x_source,
    N,
    K,
    E,
    grad_stride,
    x_stride,
    ROWS_BUCKET,
    GRAD_GATHERED: tl.constexpr,
    X_GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one tile of one expert a program; an expert without rows writes zeros
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        grad_row = r.to(tl.int64)
        x_row = r.to(tl.int64)
        if GRAD_GATHERED:
            grad_row = tl.load(grad_source + r, mask=r < last, other=0).to(tl.int64)
        if X_GATHERED:
            x_row = tl.load(x_source + r, mask=r < last, other=0).to(tl.int64)
        left = tl.load(
            grad + grad_row[None, :] * grad_stride + n[:, None],
            mask=(r[None, :] < last) & (n[:, None] < N),
            other=0.0,
        )
        right = tl.load(
            x + x_row[:, None] * x_stride + k[None, :],
            mask=(r[:, None] < last) & (k[None, :] < K),
            other=0.0,
        )
        if WIDENED:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    place = (expert.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


def _block(size: int) -> int:
    """Step of a sum over `size`: fixed for a shape; small only in the interpreter."""
    return min(size, 32) if INTERPRETED else size


def rows_times_weights(
    a_RK: Tensor, b_EKN: Tensor, ends_E: Tensor, source_R: Tensor | None = None
) -> Tensor:
    """out[r] = A[source r] @ B[expert of r] [R, N]; without `source` row r itself. B may be a
    transposed view. Rows beyond ends[-1] are not written.
    """
    num_rows = a_RK.shape[0] if source_R is None else source_R.shape[0]
    num_experts, depth, width = b_EKN.shape
    a_RK = rows_contiguous(a_RK)
    out_RN = a_RK.new_empty(num_rows, width)
    if not num_rows:
        return out_RN

    def grid(meta):
        tiles_m = triton.cdiv(num_rows, meta["BLOCK_M"]) + num_experts
        return (tiles_m * triton.cdiv(width, meta["BLOCK_N"]),)

    _rows_times_weights[grid](
        a_RK,
        b_EKN,
        out_RN,
        ends_E,
        source_R,
        width,
        depth,
        num_experts,
        a_RK.stride(0),
        *b_EKN.stride(),
        ROWS_BUCKET=bucket(num_rows),
        GATHERED=source_R is not None,
        PRECISION=precision(a_RK),
        WIDENED=INTERPRETED,
        BLOCK_E=max(bucket(num_experts), 2),
        BLOCK_K=_block(SUM_BLOCK_K),
    )
    return out_RN


def weight_gradient(
    grad_RN: Tensor,
    x_RK: Tensor,
    ends_E: Tensor,
    *,
    grad_source_R: Tensor | None = None,
    x_source_R: Tensor | None = None,
) -> Tensor:
    """dW[e] = sum over e's rows of grad[source r] (outer) x[source r]: [E, N, K]."""
    num_experts, width, depth = ends_E.shape[0], grad_RN.shape[1], x_RK.shape[1]
    grad_RN, x_RK = rows_contiguous(grad_RN), rows_contiguous(x_RK)
    out_ENK = x_RK.new_empty(num_experts, width, depth)
    rows = x_RK.shape[0] if x_source_R is None else x_source_R.shape[0]

    def grid(meta):
        tiles = triton.cdiv(width, meta["BLOCK_N"]) * triton.cdiv(depth, meta["BLOCK_K"])
        return (num_experts * tiles,)

    _weight_gradient[grid](
        grad_RN,
        x_RK,
        out_ENK,
        ends_E,
        grad_source_R,
        x_source_R,
        width,
        depth,
        num_experts,
        grad_RN.stride(0),
        x_RK.stride(0),
        ROWS_BUCKET=bucket(rows),
        GRAD_GATHERED=grad_source_R is not None,
        X_GATHERED=x_source_R is not None,
        PRECISION=precision(x_RK),
        WIDENED=INTERPRETED,
        BLOCK_R=_block(SUM_BLOCK_R),
    )
    return out_ENK


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RK, weight_ENK, ends_E):
        ctx.save_for_backward(x_RK, weight_ENK, ends_E)
        return rows_times_weights(x_RK, weight_ENK.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx, grad_RN):
        x_RK, weight_ENK, ends_E = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = rows_times_weights(grad_RN, weight_ENK, ends_E)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad_RN, x_RK, ends_E)
        return grad_x, grad_weight, None


def grouped_linear(x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """y[r] = weight[expert of r] @ x[r] [R, N] for rows sorted by expert; the drop-in for
    `megatron_ext.moe.experts.grouped_linear`.
    """
    return _GroupedLinear.apply(x_RK, weight_ENK, ends_E)
