"""The experts of one rank as one function against a loop over experts in fp32."""

import pytest
import torch

from tests.kernels import cases  # first: it skips where Triton cannot run

from megatron_ext.kernels import reference, routed  # isort: skip
from megatron_ext.kernels.order import experts_of_map, order_of  # isort: skip

PRODUCTS = {"triton": routed.TRITON, "grouped_mm": routed.GROUPED_MM}


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("products", PRODUCTS)
def test_routed_experts(routing, dtype, products):
    tokens, experts, topk, idle = routing
    experts_TK = cases.chosen(tokens, experts, topk, idle)
    x = cases.leaf(tokens, 32, dtype=dtype)
    probs = cases.leaf(*experts_TK.shape)
    fc1 = cases.leaf(experts, 2, 16, 32, dtype=dtype, scale=0.2)
    fc2 = cases.leaf(experts, 32, 16, dtype=dtype, scale=0.2)
    counts_E = torch.bincount(experts_TK.flatten(), minlength=experts)
    order = order_of(experts_TK, counts_E)
    got = routed.routed_experts(x, probs, fc1, fc2, order, PRODUCTS[products])
    expected = reference.routed_experts(x, probs, fc1, fc2, experts_TK)
    upstream = torch.randn_like(expected)
    grads = [
        torch.autograd.grad(out, [x, probs, fc1, fc2], upstream.to(out.dtype))
        for out in (got, expected)
    ]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip((got, *grads[0]), (expected, *grads[1])):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < bound
    for expert in idle:
        assert not grads[0][2][expert].any() and not grads[0][3][expert].any()


@pytest.mark.parametrize("products", PRODUCTS)
def test_assignments_that_a_capacity_dropped(products):
    """No value is read: rows that were dropped lie behind the last expert's and are not used."""
    tokens, experts, topk = 21, 4, 2
    experts_TK = cases.chosen(tokens, experts, topk, ())
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=cases.DEVICE)
    map_TE.scatter_(1, experts_TK, True)
    map_TE &= map_TE.cumsum(dim=0) <= 7
    assert (map_TE.sum(dim=1) < topk).any()
    x, probs = cases.leaf(tokens, 16), cases.leaf(tokens, experts)
    fc1, fc2 = cases.leaf(experts, 2, 8, 16, scale=0.3), cases.leaf(experts, 16, 8, scale=0.3)
    found_TK, probs_TK, counts_E = experts_of_map(map_TE, probs * map_TE, topk)
    order = order_of(found_TK, counts_E)
    got = routed.routed_experts(x, probs_TK, fc1, fc2, order, PRODUCTS[products])
    every_TE = torch.arange(experts, device=cases.DEVICE).expand(tokens, -1)
    expected = reference.routed_experts(x, probs * map_TE, fc1, fc2, every_TE)
    cases.assert_same(got, expected, [x, probs, fc1, fc2], torch.float32)


@pytest.mark.parametrize("products", PRODUCTS)
def test_sorted_experts(products):
    counts_E = torch.tensor([5, 0, 9], device=cases.DEVICE)
    experts_R1 = torch.arange(3, device=cases.DEVICE).repeat_interleave(counts_E)[:, None]
    x = cases.leaf(14, 16)
    fc1, fc2 = cases.leaf(3, 2, 8, 16, scale=0.3), cases.leaf(3, 16, 8, scale=0.3)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    got = routed.sorted_experts(x, fc1, fc2, ends_E, PRODUCTS[products])
    expected = reference.routed_experts(x, torch.ones_like(x[:, :1]), fc1, fc2, experts_R1)
    cases.assert_same(got, expected, [x, fc1, fc2], torch.float32)
