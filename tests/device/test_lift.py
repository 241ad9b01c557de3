"""The rewriting import hook: what it replaces and what it leaves alone."""

import ast
import subprocess
import sys

import pytest
import torch

from megatron_ext.device import lift


@pytest.mark.parametrize(
    ("stock", "lifted"),
    [
        ("x = torch.cuda.current_device()", "x = _cuda_standin.current_device()"),
        ("x = torch.empty(2, device='cuda')", "x = torch.empty(2, device='cpu')"),
        ("y = x.cuda(non_blocking=True)", "y = x.cpu()"),
        ("ok = t.type() == 'torch.cuda.FloatTensor'", "ok = t.type() == 'torch.FloatTensor'"),
        ("from torch.cuda import device", "from megatron_ext.device.standin import device"),
        ("s = 'a cuda word in a sentence'", "s = 'a cuda word in a sentence'"),
        ("k = state['cuda_rng_state']", "k = state['cuda_rng_state']"),
    ],
)
def test_rewrite(stock, lifted):
    body = lift.rewrite(stock).body
    assert ast.unparse(body[0]) == "import megatron_ext.device.standin as _cuda_standin"
    assert ast.unparse(body[1]) == lifted


def test_the_import_comes_after_docstring_and_future():
    body = lift.rewrite(
        '"""doc"""\nfrom __future__ import annotations\nx = torch.cuda.Stream()'
    ).body
    assert isinstance(body[0].value, ast.Constant)
    assert body[1].module == "__future__"
    assert isinstance(body[2], ast.Import)


def test_torch_itself_is_untouched():
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.is_available() is False or torch.version.cuda


def test_stock_megatron_core_cannot_make_a_parallel_linear_on_a_cpu():
    """The reason for the hook: without it the first parallel layer asks for a CUDA device."""
    code = """
import warnings; warnings.simplefilter('ignore')
import torch, sys
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core import ModelParallelConfig
store = torch.distributed.HashStore()
torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
ps.initialize_model_parallel()
try:
    model_parallel_cuda_manual_seed(1)
    ColumnParallelLinear(4, 4, config=ModelParallelConfig(), init_method=torch.nn.init.zeros_)
except (RuntimeError, AssertionError) as error:
    print('refused', type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused"), done.stderr[-500:]


def test_rewritten_bytecode_has_its_own_cache_name(tmp_path):
    """Python's own .pyc of megatron-core is never the rewritten one."""
    from megatron.core.tensor_parallel import layers

    assert type(layers.__spec__.loader).__name__ == "_CpuLoader"
    assert not layers.__spec__.cached or "opt-cpu" not in layers.__spec__.cached


def test_jit_fuser_is_off_on_a_cpu():
    """Stock: torch.compile on every fused function, so that a run needs a C++ compiler."""
    code = (
        "import warnings; warnings.simplefilter('ignore');"
        "from megatron.core import jit; print(jit.jit_fuser.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "compile"
    from megatron.core import jit

    assert jit.jit_fuser.__name__ == "noop_decorator"
