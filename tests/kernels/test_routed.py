"""The experts of one rank as one function against a loop over experts in fp32."""

import pytest
import torch

from tests.kernels import cases  # first: it skips where Triton cannot run

from megatron_ext.kernels import reference, routed  # isort: skip
from megatron_ext.kernels.order import order_of  # isort: skip

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
