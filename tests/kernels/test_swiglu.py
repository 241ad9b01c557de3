"""SwiGLU times probability against autograd through plain torch."""

import pytest
import torch

from tests.kernels import cases  # first: it skips where Triton cannot run

from megatron_ext.kernels import reference, swiglu  # isort: skip


@pytest.mark.parametrize("rows", [0, 1, 19])
@pytest.mark.parametrize("width", [8, 33, 1500])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_swiglu(rows, width, dtype):
    hidden, probs = cases.leaf(rows, 2, width, dtype=dtype), cases.leaf(rows)
    got = swiglu.swiglu(hidden, probs)
    expected = reference.swiglu(hidden, probs)
    upstream = torch.randn_like(expected) * width**-0.5
    cases.assert_same(got, expected, [hidden, probs], dtype, upstream)


def test_the_backward_pass_gives_the_output_again():
    hidden, probs = cases.leaf(6, 2, 24, dtype=torch.bfloat16).detach(), cases.leaf(6).detach()
    out = swiglu.swiglu_forward(hidden, probs)
    assert torch.equal(swiglu.swiglu_backward(hidden, probs, out, again=True)[2], out)


def test_an_expanded_gradient():
    hidden, probs = cases.leaf(6, 2, 24), cases.leaf(6)
    grads = [
        torch.autograd.grad(function(hidden, probs).sum(), [hidden, probs])
        for function in (swiglu.swiglu, reference.swiglu)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, **cases.tolerance(torch.float32))
