"""Permute and unpermute kernels against indexing in plain torch."""

import pytest
import torch

from tests.kernels import cases  # first: it skips where Triton cannot run

from megatron_ext.kernels import reference, rows  # isort: skip
from megatron_ext.kernels.order import order_of  # isort: skip


def _order(routing):
    tokens, experts, topk, idle = routing
    experts_TK = cases.chosen(tokens, experts, topk, idle)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=cases.DEVICE)
    counts_E.scatter_add_(0, experts_TK.flatten(), torch.ones_like(experts_TK.flatten()))
    return experts_TK, counts_E, order_of(experts_TK, counts_E)


def _without(order, dropped: list[int]):
    """The order with some slots dropped: their rows are padding."""
    slots, rows_TK = order.slots_R.clone(), order.rows_TK.clone()
    places = rows_TK.view(-1)[dropped].long()
    slots[places] = -1
    rows_TK.view(-1)[dropped] = -1
    return slots, rows_TK


def test_order_of_the_worked_example():
    experts_TK = torch.tensor([[2, 0], [0, 3], [2, 3]])
    order = order_of(experts_TK, torch.tensor([2, 0, 2, 2]))
    assert order.slots_R.tolist() == [1, 2, 0, 4, 3, 5]
    assert order.rows_TK.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert order.ends_E.tolist() == [2, 2, 4, 6]


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("hidden", [8, 37])
@pytest.mark.parametrize("drops", [False, True])
def test_permute(routing, dtype, hidden, drops):
    experts_TK, _, order = _order(routing)
    slots, rows_TK = _without(order, [0] if drops else [])
    x, probs = cases.leaf(routing[0], hidden, dtype=dtype), cases.leaf(*experts_TK.shape)
    got = rows.permute(x, probs, slots, rows_TK)
    expected = reference.permute(x, probs, slots, rows_TK)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)
    upstream = [torch.randn_like(part) for part in expected]
    grads = [torch.autograd.grad(out, [x, probs], upstream) for out in (got, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, **cases.tolerance(dtype))


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_unpermute(routing, dtype, weighted, drops):
    experts_TK, _, order = _order(routing)
    slots, rows_TK = _without(order, [0] if drops else [])
    y = cases.leaf(experts_TK.numel(), 37, dtype=dtype)
    weights = cases.leaf(*experts_TK.shape) if weighted else None
    got = rows.unpermute(y, slots, rows_TK, weights)
    expected = reference.unpermute(y, slots, rows_TK, weights)
    cases.assert_same(got, expected, [y, weights] if weighted else [y], dtype)


def test_gradients_that_are_views():
    """A sum's gradient is expanded (stride 0), a slice's has long rows."""
    experts_TK, _, order = _order(cases.ROUTINGS[0])
    y = cases.leaf(experts_TK.numel(), 16)
    out = rows.unpermute(y, order.slots_R, order.rows_TK)
    (grad,) = torch.autograd.grad(out.sum(), [y])
    assert torch.equal(grad, torch.ones_like(grad))
    wide = torch.cat([y, y], dim=1).detach()
    got = rows.collect(wide[:, 16:], order.rows_TK)
    assert torch.equal(got, rows.collect(y.detach(), order.rows_TK))


def test_no_tokens():
    empty = torch.zeros(0, dtype=torch.int32, device=cases.DEVICE)
    x, probs = cases.leaf(0, 8), cases.leaf(0, 2)
    x_RH, probs_R = rows.permute(x, probs, empty, empty.view(0, 2))
    assert x_RH.shape == (0, 8) and probs_R.shape == (0,)
    assert rows.unpermute(x_RH, empty, empty.view(0, 2)).shape == (0, 8)
