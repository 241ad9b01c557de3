"""Every test process imports torch and megatron-core once, lifted to the CPU; ranks are forked from
it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # before anything imports Triton: tests/kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

from megatron_ext.device import start

torch.set_num_threads(1)
start("cpu")

import pytest
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_ext.native import loops


@pytest.fixture(autouse=True)
def _no_scale_of_an_earlier_test():
    """megatron-core keeps the scale of the balance losses, and a table of as many rows as the first
    model had depths, in classes: later ranks would fork them.
    """
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossLoggingHelper.tracker = {}


@pytest.fixture(params=["auto", "torch"])
def cpu_kernels(request):
    """Once with the compiled loops, where there is a compiler, once with torch's operations."""
    loops.use(request.param)
    yield
    loops.use("auto")


@pytest.fixture
def tiny_flags() -> list[str]:
    """Flags of a model that trains a step in milliseconds: 4 layers, 8 experts, mock data."""
    from tests.ranks.tiny import TINY

    return list(TINY)
