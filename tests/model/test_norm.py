"""Norms against their formulas."""

import types

import pytest
import torch

from megatron_ext.model.norm import Norm


def _config(kind: str, centered: bool):
    return types.SimpleNamespace(
        normalization=kind,
        layernorm_zero_centered_gamma=centered,
        params_dtype=torch.float32,
        sequence_parallel=True,
    )


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("centered", [False, True])
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
