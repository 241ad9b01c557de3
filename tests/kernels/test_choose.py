"""Which kernels a device gets; no Triton is needed to ask."""

import subprocess
import sys

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import choose

HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    "asked, device, installed, expected",
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        ("torch", "cuda", True, False),
        ("triton", "cuda", True, True),
    ],
)
def test_uses_triton(monkeypatch, asked, device, installed, expected):
    monkeypatch.setattr(choose, "has_triton", lambda: installed)
    assert choose.uses_triton(asked, device) is expected


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(choose, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="not installed"):
        choose.uses_triton("triton", "cuda")
    monkeypatch.setattr(choose, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose.uses_triton("triton", "cpu")


@pytest.mark.parametrize(
    "asked, dtype, capability, rows, expected",
    [
        ("auto", torch.bfloat16, HOPPER, 512, "grouped_mm"),
        ("auto", torch.bfloat16, HOPPER, 16, "triton"),
        ("auto", torch.float32, HOPPER, 512, "triton"),  # grouped_mm would ask the host
        ("auto", torch.bfloat16, AMPERE, 512, "triton"),
        ("triton", torch.bfloat16, HOPPER, 512, "triton"),
    ],
)
def test_product_kind(asked, dtype, capability, rows, expected):
    assert choose.product_kind(asked, dtype, capability, rows) == expected


def test_the_package_is_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; "
        "import megatron_ext.kernels, megatron_ext.kernels.choose, megatron_ext.kernels.order, "
        "megatron_ext.kernels.reference"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
