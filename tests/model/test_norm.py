"""Norms against their formulas."""

import types

import pytest
import torch
from torch.nn import functional as F

from megatron_ext.model.norm import Norm, RowNorm


def _config(kind: str, centered: bool):
    return types.SimpleNamespace(
        normalization=kind,
        layernorm_zero_centered_gamma=centered,
        params_dtype=torch.float32,
        sequence_parallel=True,
    )


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.usefixtures("cpu_kernels")
def test_norm_equals_its_formula(kind, centered):
    torch.manual_seed(0)
    norm = Norm(_config(kind, centered), 63, eps=1e-5)
    with torch.no_grad():
        norm.weight.add_(torch.randn(63) * 0.1)
    x = torch.randn(5, 2, 63, requires_grad=True)
    w = norm.weight + 1 if centered else norm.weight
    if kind == "RMSNorm":
        expected = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w
    else:
        var, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
        expected = (x - mean) / torch.sqrt(var + 1e-5) * w
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y.sin().sum(), [x, norm.weight]) for y in (norm(x), expected)]
    for got, wanted in zip(*grads):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_weight_is_marked_for_sequence_parallelism():
    norm = Norm(_config("LayerNorm", False), 8)
    assert norm.weight.sequence_parallel and norm.bias.sequence_parallel


def test_bfloat16_keeps_its_dtype():
    norm = Norm(_config("RMSNorm", False), 8)
    assert norm(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(512, 256), (5, 2, 63), (7, 3, 2, 8)])
@pytest.mark.usefixtures("cpu_kernels")
def test_sixteen_bits_stay_near_fp32(shape):
    """Output and both gradients in bf16 are within 0.5% (in norm) of fp32 on the same numbers."""
    torch.manual_seed(0)
    x, grad = (torch.randn(shape).bfloat16() for _ in range(2))
    weight = (torch.rand(shape[-1]) + 0.5).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        a, w = (t.to(dtype).requires_grad_() for t in (x, weight))
        fast = dtype == torch.bfloat16
        out = RowNorm.apply(a, w, 1e-5) if fast else F.rms_norm(a, w.shape, w, 1e-5)
        results.append((out, *torch.autograd.grad(out, (a, w), grad.to(dtype))))
    for exact, got in zip(*results):
        assert (got.float() - exact).norm() < 0.005 * exact.norm()
