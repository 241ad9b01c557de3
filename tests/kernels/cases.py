"""What the tests of the kernels share: the device they run on, hostile routings, tolerances."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A GPU where one is found; else Triton's interpreter on the CPU (see tests/conftest.py)."""

pytest.importorskip("triton", reason="Triton is not installed: requirements-test.txt brings it")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
ROUTINGS = [  # tokens, experts, topk, experts that get nothing
    (13, 5, 2, (0, 3)),
    (9, 4, 4, ()),
    (1, 7, 1, ()),
    (18, 8, 3, (7,)),
]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """fp32 sums in another order; bf16 rounds its results to 8 bits."""
    return {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


def chosen(tokens: int, experts: int, topk: int, idle: tuple[int, ...]) -> torch.Tensor:
    """int64 [T, K] different experts in each row, none of the idle ones."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    scores[:, list(idle)] = -1
    return scores.topk(min(topk, experts - len(idle)), dim=1).indices.to(DEVICE)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """A random tensor that takes a gradient, on the device of the tests."""
    values = torch.randn(*shape, dtype=torch.float32) * scale
    return values.to(DEVICE, dtype).requires_grad_()


def assert_same(got, expected, inputs, dtype, upstream=None) -> None:
    """Outputs and all gradients are equal within the tolerance of `dtype`."""
    torch.testing.assert_close(got, expected, **tolerance(dtype))
    upstream = torch.randn_like(expected) if upstream is None else upstream
    grads = [
        torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (got, expected)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, **tolerance(dtype))
