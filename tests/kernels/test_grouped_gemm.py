"""Grouped products in Triton against a loop over experts."""

import pytest
import torch

from tests.kernels import cases  # first: it skips where Triton cannot run

from megatron_ext.kernels import grouped_gemm, reference  # isort: skip

COUNTS = [[5, 0, 7, 1], [0, 0, 37, 0], [16, 16, 16, 16], [0, 0, 0, 0], [1, 33, 0, 18], [17]]


def _ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, device=cases.DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(16, 24), (40, 36)])
def test_grouped_linear(counts, dtype, shape):
    depth, width = shape
    x = cases.leaf(sum(counts), depth, dtype=dtype)
    weight = cases.leaf(len(counts), width, depth, dtype=dtype, scale=depth**-0.5)
    got = grouped_gemm.grouped_linear(x, weight, _ends(counts))
    expected = reference.grouped_gemm(x, weight, _ends(counts))
    assert got.dtype == dtype
    upstream = torch.randn_like(expected)
    cases.assert_same(got, expected, [x], dtype, upstream)
    grads = [torch.autograd.grad(out, [weight], upstream)[0] for out in (got, expected)]
    size = max(counts, default=1) ** 0.5 + 1
    torch.testing.assert_close(grads[0] / size, grads[1] / size, **cases.tolerance(dtype))
    assert torch.all(grads[0][torch.tensor(counts) == 0] == 0)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rows_that_are_gathered(dtype):
    counts, generator = [9, 0, 40, 3], torch.Generator().manual_seed(1)
    ends, rows = _ends(counts), sum(counts)
    x, grad = (cases.leaf(20, width, dtype=dtype).detach() for width in (24, 36))
    source = torch.randint(20, (rows,), generator=generator).to(cases.DEVICE, torch.int32)
    weight = cases.leaf(4, 36, 24, dtype=dtype, scale=0.2).detach()
    got = grouped_gemm.rows_times_weights(x, weight.transpose(1, 2), ends, source)
    expected = reference.grouped_gemm(x, weight, ends, source)
    torch.testing.assert_close(got, expected, **cases.tolerance(dtype))
    written = x[source.long()], grad[source.long()]
    expected = grouped_gemm.weight_gradient(written[1], written[0], ends)
    for sources in ({"x_source_R": source}, {"grad_source_R": source}):
        inputs = {"x": written[0], "grad": written[1]}
        inputs |= {"x": x} if "x_source_R" in sources else {"grad": grad}
        got = grouped_gemm.weight_gradient(inputs["grad"], inputs["x"], ends, **sources)
        assert torch.equal(got, expected)


def test_rows_beyond_the_last_end_are_left_alone():
    """A buffer may be longer than what was routed: no row of it reaches a weight."""
    x = cases.leaf(50, 16)
    with torch.no_grad():
        x[20:] = float("nan")
    weight = cases.leaf(3, 24, 16)
    out = grouped_gemm.grouped_linear(x, weight, _ends([5, 15, 0]))
    assert torch.isfinite(out[:20]).all()
    upstream = torch.zeros_like(out)
    upstream[:20] = 1
    (grad,) = torch.autograd.grad(out, [weight], upstream)
    assert torch.isfinite(grad).all()


def test_many_experts_with_a_token_or_none():
    counts = [int(i % 7 == 3) for i in range(66)]
    x, weight = cases.leaf(sum(counts), 20), cases.leaf(66, 8, 20, scale=0.3)
    got = grouped_gemm.grouped_linear(x, weight, _ends(counts))
    cases.assert_same(
        got, reference.grouped_gemm(x, weight, _ends(counts)), [x, weight], torch.float32
    )
