"""The MoE layer on Triton's kernels (interpreter here) against the sorted dispatcher; no host read.

A value that the host reads stops a GPU's queue. On a CPU the same road is watched: operations that
would wait on a GPU are refused while the layer runs forward and backward.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.moe.test_dispatch import LAYOUTS
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

pytest.importorskip("triton", reason="Triton is not installed: requirements-test.txt brings it")

WAITS = {  # operations whose result, or its size, the host must know
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
    "aten::unique_dim",
}
READS = {"item", "tolist", "numpy", "cpu", "__int__", "__bool__", "__float__", "__index__"}


class HostReadError(AssertionError):
    """The layer asked for a value."""


class _NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = (
            func._schema.name
            if func._overloadname == "default"
            else str(func).replace(".", "::", 1)
        )
        indices = args[1] if name.startswith("aten::index") and len(args) > 1 else ()
        masks = indices if isinstance(indices, (list, tuple)) else ()
        if name in WAITS or any(getattr(one, "dtype", None) == torch.bool for one in masks):
            raise HostReadError(name)
        return func(*args, **(kwargs or {}))


class _NoRead(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            raise HostReadError(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_read():
    """Refuse what would make a GPU's host wait; the interpreter's own copies are let through."""
    from triton.runtime import interpreter

    stock = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return stock(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call
    try:
        with _NoWait(), _NoRead():
            yield
    finally:
        interpreter.GridExecutor.__call__ = stock


def _layer(cfg, dtype):
    """A MoE layer of one seed with DeviceExperts and the sorted dispatcher."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

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
    layer = MoELayer(config, parts, 1, get_default_pg_collection())
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


def _differences(flags: list[str]) -> dict:
    """change -> {tensor: (difference between both dispatchers, its norm)}."""
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.moe.device_dispatch import DeviceDispatcher, use_device_dispatch

    found, first = {}, parse([*TINY, *flags])
    with process_groups(first.parallel, start("cpu"), first.train.seed):
        for name, change in CHANGES.items():
            cfg = parse([*TINY, *flags, *change.split()])
            layer = _layer(cfg, torch.float32)
            x, up = torch.randn(2, 7, 2, 64)
            with pytest.MonkeyPatch.context() as patch:  # the base class's way, as on a CPU
                patch.setattr(type(layer.experts), "forward", type(layer.experts).__base__.forward)
                expected = _seen(layer, x, up)
            use_device_dispatch(layer)
            assert isinstance(layer.token_dispatcher, DeviceDispatcher)
            watched = layer.token_dispatcher.is_local and name == "plain"
            got = _seen(layer, x, up, no_host_read if watched else contextlib.nullcontext)
            found[name] = {
                key: ((got[key] - value).norm().item(), value.norm().item())
                for key, value in expected.items()
            }
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_sorted_dispatcher(layout):
    """Outputs and gradients on every rank; on one rank without a read by the host."""
    world_size, flags = LAYOUTS[layout]
    for rank in run_ranks(_differences, world_size, flags.split()):
        for change, tensors in rank.items():
            for name, (difference, size) in tensors.items():
                assert difference <= 2e-6 * size + 1e-6, (change, name, difference, size)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: int(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64)),
        lambda x: x.cpu(),
    ],
)
def test_a_read_is_seen(ask):
    with pytest.raises(HostReadError), no_host_read():
        ask(torch.ones(3))
