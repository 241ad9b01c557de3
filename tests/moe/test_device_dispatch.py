"""The MoE layer on Triton's kernels (interpreter here) against the sorted dispatcher; no host read.

On a GPU it is compared in a process of its own: the tests' process has megatron-core for the CPU.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.moe.host_reads import no_host_read
from tests.moe.test_dispatch import LAYOUTS
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

pytest.importorskip("triton", reason="Triton is not installed: requirements-test.txt brings it")

ROOT = Path(__file__).parents[2]
HAS_CUDA = torch.cuda.is_available()
PROGRAM = """
import json, sys
from megatron_ext.device import start
start(sys.argv[1])  # before megatron-core is imported
from tests.moe.test_device_dispatch import differences
print(json.dumps(differences([], sys.argv[1])))
"""


def _layer(cfg, dtype):
    """A MoE layer of one seed with DeviceExperts and the sorted dispatcher."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_ext.device import current_device
    from megatron_ext.model.initialise import Recorder
    from megatron_ext.model.layers import layer_spec
    from megatron_ext.model.run_config import transformer_config
    from megatron_ext.moe.device_experts import DeviceExperts
    from megatron_ext.moe.dispatch import use_sorted_dispatch
    from megatron_ext.moe.router import RouterOptions

    config = transformer_config(cfg, Recorder())
    config.params_dtype, config.bf16 = dtype, dtype == torch.bfloat16
    parts = layer_spec(config, is_moe=True, router=RouterOptions()).submodules.mlp.submodules
    parts.experts.module = DeviceExperts
    layer = MoELayer(config, parts, 1, get_default_pg_collection()).to(current_device())
    torch.manual_seed(11 + torch.distributed.get_rank())
    for name, weight in layer.named_parameters():
        torch.nn.init.normal_(weight, std=0.2)
        if "router" in name:
            torch.distributed.broadcast(weight.data, 0)
    layer.set_layer_number(1)
    use_sorted_dispatch(layer)
    return layer


def _seen(layer, x, up, watch=contextlib.nullcontext) -> dict:
    """The output and every gradient."""
    given = x.clone().requires_grad_()
    layer.zero_grad()
    with watch():
        out = layer(given)[0]
        out.backward(up.to(out.dtype))
    grads = {name: one.grad.float() for name, one in layer.named_parameters()}
    return {"out": out.detach().float(), "x": given.grad.float(), **grads}


CHANGES = {"plain": "", "capacity": "--moe-expert-capacity-factor 1.0"}


@contextlib.contextmanager
def _cuda_never_waits():
    """CUDA's own word: an error where an operation waits."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def differences(flags: list[str], device: str = "cpu") -> dict:
    """change -> {tensor: (difference between both dispatchers, its norm)}."""
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.moe.device_dispatch import DeviceDispatcher, use_device_dispatch

    flags = [*TINY, *flags, "--device", device]
    watch = no_host_read if device == "cpu" else _cuda_never_waits
    found, first = {}, parse(flags)
    with process_groups(first.parallel, start(device), first.train.seed):
        for name, change in CHANGES.items():
            layer = _layer(parse([*flags, *change.split()]), torch.float32)
            x, up = torch.randn(2, 7, 2, 64).to(device)
            with pytest.MonkeyPatch.context() as patch:  # torch's road
                patch.setattr(type(layer.experts), "forward", type(layer.experts).__base__.forward)
                expected = _seen(layer, x, up)
            use_device_dispatch(layer)
            assert isinstance(layer.token_dispatcher, DeviceDispatcher)
            got = _seen(layer, x, up)  # before the watch: the tuner waits
            if layer.token_dispatcher.is_local:
                got = _seen(layer, x, up, watch)
            found[name] = {
                key: ((got[key] - value).norm().item(), value.norm().item())
                for key, value in expected.items()
            }
    return found


def _check(found: dict) -> None:
    for change, tensors in found.items():
        for name, (difference, size) in tensors.items():
            assert difference <= 2e-6 * size + 1e-6, (change, name, difference, size)


@pytest.mark.skipif(HAS_CUDA, reason="the kernels run on the GPU, not in the interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_sorted_dispatcher(layout):
    """Outputs and gradients on every rank; on one rank without a read by the host."""
    world_size, flags = LAYOUTS[layout]
    for rank in run_ranks(differences, world_size, flags.split()):
        _check(rank)


@pytest.mark.skipif(not HAS_CUDA, reason="no GPU is found")
def test_equals_the_sorted_dispatcher_on_a_gpu():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "cuda"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    _check(json.loads(done.stdout.splitlines()[-1]))
