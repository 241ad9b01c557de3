"""The compiled loops against torch's operations in fp64, for every size that leaves a rest behind
the vectors, and their habits: threads, numbers that are not finite, nothing to do.
"""

import pytest
import torch
from torch.nn import functional as F

from megatron_ext.native import loops
from tests.ranks.harness import run_ranks

SIZES = [(1, 1), (3, 5), (64, 16), (65, 33), (200, 256), (7, 1000)]
TYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _compiled():
    if why := loops.use("auto"):
        pytest.skip(f"no compiled loops here: {why}")


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def _random(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    return (spread * torch.randn(*shape)).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size, dtype):
    torch.manual_seed(0)
    x, grad = _random(*size, dtype=dtype), _random(*size, dtype=dtype)
    weight = _random(size[1], dtype=dtype)
    exact_x, exact_w = (t.double().requires_grad_() for t in (x, weight))
    exact = F.rms_norm(exact_x, weight.shape, exact_w, 1e-5)
    exact.backward(grad.double())
    y, per_rms = loops.rms_norm(x, weight, 1e-5)
    dx, dw = loops.rms_norm_backward(grad, x, weight, per_rms)
    for found, wanted in ((y, exact.detach()), (dx, exact_x.grad), (dw, exact_w.grad)):
        assert _error(found, wanted) < TYPES[dtype] or size[1] == 1  # one number: dx cancels to 0
    assert y.dtype == dx.dtype == dtype and dw.dtype == torch.float32


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_swiglu(size, dtype):
    torch.manual_seed(1)
    number, width = size
    hidden = _random(number, 2 * width, dtype=dtype, spread=4.0)
    grad = _random(*size, dtype=dtype)
    exact_hidden = hidden.double().requires_grad_()
    gate, up = exact_hidden.chunk(2, dim=-1)
    exact = F.silu(gate) * up
    exact.backward(grad.double())
    act, again, grad_hidden = grad.new_empty(size), grad.new_empty(size), torch.empty_like(hidden)
    loops.swiglu(hidden, act)
    loops.swiglu_backward(grad, hidden, grad_hidden, again)
    assert torch.equal(act, again)
    assert _error(act, exact.detach()) < TYPES[dtype]
    assert _error(grad_hidden, exact_hidden.grad) < TYPES[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_softmax_and_its_statistics(size, dtype):
    """Over the first columns only, the others become 0."""
    torch.manual_seed(2)
    number, width = size
    true = max(1, width - 3)
    logits = _random(*size, dtype=dtype, spread=5.0)
    place = torch.randint(true, (number,))
    exact = logits.double()[:, :true]
    at_label = exact.gather(1, place[:, None])[:, 0]
    peak, rest, label = torch.empty(3, number)
    loops.softmax_statistics(logits, place, peak, rest, label, true)
    assert torch.equal(peak.double(), exact.amax(-1)) and torch.equal(label.double(), at_label)
    assert (peak + rest - exact.logsumexp(-1)).abs().max() < 5e-6
    assert _error(logits[:, :true], exact.softmax(-1)) < TYPES[dtype]
    assert not logits[:, true:].any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("first, together", [(0, 1), (24, 1), (8, 3)])
def test_causal_softmax(first, together, dtype):
    torch.manual_seed(3)
    length = 17
    keys = first + length
    scores = _random(3, length * together, keys, dtype=dtype, spread=3.0)
    position = first + torch.arange(length).repeat_interleave(together)
    hidden = torch.arange(keys) > position[:, None]
    exact = scores.double().masked_fill(hidden, -torch.inf).softmax(-1)
    loops.causal_softmax(scores, first, together)
    assert _error(scores, exact) < TYPES[dtype]
    assert not scores.masked_select(hidden).any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_of_views(dtype, sign):
    """Heads of a projection into [M, S, h, D]; numbers behind the rotated ones are scaled."""
    torch.manual_seed(4)
    m, s, heads, width, half = 4, 9, 3, 24, 10
    mixed = _random(s, m * heads * width, dtype=dtype)
    x = mixed.view(s, m, heads, width).transpose(0, 1)[:, :, 1:]
    cos, sin = (_random(s, 1, half, dtype=dtype) for _ in range(2))
    out = mixed.new_empty(m, s, heads - 1, width)
    loops.rotate_halves(x, out, cos, sin, 0.5, sign)
    a, b, rest = x.double().split([half, half, width - 2 * half], dim=-1)
    c, n = cos.double(), sign * sin.double()
    exact = torch.cat((a * c - b * n, b * c + a * n, 0.5 * rest), dim=-1)
    assert _error(out, exact) < TYPES[dtype]


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_collect(dtype, is_weighted):
    """Tokens with none, one and several rows, the last with none."""
    torch.manual_seed(7)
    counts = torch.tensor([2, 0, 1, 3, 0, 2, 1, 0])
    starts, number, width = counts.cumsum(0) - counts, int(counts.sum()), 37
    places = torch.randperm(number + 4)[:number]
    table, grad = _random(number + 4, width, dtype=dtype), _random(8, width, dtype=dtype)
    weights = torch.rand(number)
    exact_rows, exact_weights = (t.double().requires_grad_() for t in (table, weights))
    tokens = torch.arange(8).repeat_interleave(counts)
    factor = exact_weights[:, None] if is_weighted else 1.0
    zeros = torch.zeros(8, width, dtype=torch.float64)
    exact = zeros.index_add(0, tokens, exact_rows[places] * factor)
    exact.backward(grad.double())
    out = loops.collect(table, places, starts, weights if is_weighted else None)
    assert _error(out, exact.detach()) < TYPES[dtype]
    if is_weighted:
        drows = torch.zeros_like(table)
        dweights = loops.collect_backward(grad, table, places, starts, weights, drows)
        assert _error(drows, exact_rows.grad) < TYPES[dtype]
        assert _error(dweights, exact_weights.grad) < 2e-6


def _everything(x: torch.Tensor) -> list[torch.Tensor]:
    """x [n, 2 F] through every loop."""
    y, per_rms = loops.rms_norm(x, x[0].clone(), 1e-5)
    dx, dw = loops.rms_norm_backward(y, x, x[0].clone(), per_rms)
    act = loops.swiglu(x, x.new_empty(len(x), x.shape[1] // 2))
    dhidden, again = torch.empty_like(x), torch.empty_like(act)
    loops.swiglu_backward(act, x, dhidden, again)
    causal = loops.causal_softmax(x.repeat(2, 1, 1)[:, : x.shape[1]], 0, 1)
    softmax, statistics = x.clone(), torch.empty(3, len(x))
    place = torch.zeros(len(x), dtype=torch.long)
    loops.softmax_statistics(softmax, place, *statistics, x.shape[1])
    return [y, per_rms, dx, dw, act, dhidden, again, causal, softmax, statistics]


def _same_bits(dtype: torch.dtype) -> list[bool]:
    torch.manual_seed(5)
    x = _random(301, 326, dtype=dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(_everything(x))
    return [torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other)]


@pytest.mark.parametrize("dtype", TYPES)
def test_bits_do_not_depend_on_threads(dtype):
    """In a process of its own: ranks cannot be forked from one with several threads."""
    (same,) = run_ranks(_same_bits, 1, dtype)
    assert len(same) == 20 and all(same)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_spoils_its_row_alone(bad, dtype):
    torch.manual_seed(6)
    x = _random(70, 64, dtype=dtype)
    x[33, 40] = bad
    y, per_rms = loops.rms_norm(x, torch.ones(64, dtype=dtype), 1e-5)
    dx, dw = loops.rms_norm_backward(x, x, torch.ones(64, dtype=dtype), per_rms)
    act = loops.swiglu(x, x.new_empty(70, 32))
    softmax, place = x.clone(), torch.zeros(70, dtype=torch.long)
    peak, rest, label = torch.empty(3, 70)
    loops.softmax_statistics(softmax, place, peak, rest, label, 64)
    for found in (y, dx, act, softmax, rest[:, None]):
        is_good = found.float().isfinite().all(dim=-1)
        assert not is_good[33] and is_good.sum() == 69
    assert not dw.isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_far_ends_of_the_range(dtype):
    """Where exp would overflow or vanish, both sides agree with torch to what a float can hold."""
    gate = torch.tensor([-1e30, -300.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 300.0, 1e30]).to(dtype)
    hidden = torch.cat((gate, torch.ones_like(gate)))[None]
    act = loops.swiglu(hidden, hidden.new_empty(1, len(gate)))[0]
    torch.testing.assert_close(act, F.silu(gate), rtol=4e-3, atol=1e-6)
    logits = torch.tensor([[-1e4, 0.0, 1e4]]).to(dtype)
    peak, rest, label = torch.empty(3, 1)
    loops.softmax_statistics(logits, torch.zeros(1, dtype=torch.long), peak, rest, label, 3)
    assert logits.float().sum() == 1 and rest == 0 and label == torch.tensor(-1e4).to(dtype)


def test_nothing_to_do():
    empty = torch.empty(0, 8)
    assert all(found.numel() == 0 or not found.any() for found in _everything_of(empty))


def _everything_of(empty: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.ones(8)
    y, per_rms = loops.rms_norm(empty, weight, 1e-5)
    dx, dw = loops.rms_norm_backward(y, empty, weight, per_rms)
    act = loops.swiglu(empty, torch.empty(0, 4))
    loops.softmax_statistics(empty, torch.empty(0, dtype=torch.long), *torch.empty(3, 0), 8)
    return [y, dx, dw, act]


@pytest.mark.parametrize(
    "tensors, is_served",
    [
        ((torch.ones(2),), True),
        ((torch.nn.Parameter(torch.ones(2)),), True),
        ((torch.ones(2), torch.ones(2).bfloat16()), False),
        ((torch.ones(2).half(),), False),
        ((torch.ones(2).double(),), False),
        ((torch.ones(2, device="meta"),), False),
    ],
)
def test_who_is_served(tensors, is_served):
    assert loops.serves(*tensors) is is_served


def test_fake_tensors_are_not_served():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not loops.serves(torch.ones(2))
