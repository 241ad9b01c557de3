"""What makes the host of a GPU wait, watched on a machine without one.

A value that the host reads stops a GPU's queue: `.item()`, a mask as an index (its result's size is
a value), a copy to or from the CPU. `no_host_read` refuses them all. Tensors of the device `meta`
have no values at all and are not on the CPU: they take the road of CUDA as far as it is chosen by
`device.type != "cpu"`. Where a GPU is, `torch.cuda.set_sync_debug_mode("error")` says the same.
"""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {  # operations whose result, or its size, the host must know
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
    "aten::unique_dim",
}
COPIES = {"aten::_to_copy", "aten::copy_"}
READS = {"item", "tolist", "numpy", "cpu", "__int__", "__bool__", "__float__", "__index__"}


class HostReadError(AssertionError):
    """The layer asked for a value."""


def _name_of(func) -> str:
    if func._overloadname == "default":
        return func._schema.name
    return str(func).replace(".", "::", 1)


def _devices(name: str, args, kwargs) -> set[str]:
    """The devices between which a copy goes."""
    to = [kwargs["device"]] if kwargs.get("device") is not None else []
    tensors = args[:2] if name == "aten::copy_" else args[:1]
    return {torch.device(one).type for one in to} | {one.device.type for one in tensors}


class _NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = _name_of(func), kwargs or {}
        indices = args[1] if name.startswith("aten::index") and len(args) > 1 else ()
        masks = indices if isinstance(indices, (list, tuple)) else ()
        if name in WAITS or any(getattr(one, "dtype", None) == torch.bool for one in masks):
            raise HostReadError(name)
        if name in COPIES and len(_devices(name, args, kwargs)) > 1:
            raise HostReadError(f"{name} between devices")
        return func(*args, **kwargs)


class _NoRead(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            raise HostReadError(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _interpreter_unwatched() -> Iterator[None]:
    """Triton's interpreter copies what its kernels take."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    stock = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return stock(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = stock


@contextlib.contextmanager
def no_host_read() -> Iterator[None]:
    """Refuse what would make a GPU's host wait."""
    with _interpreter_unwatched(), _NoWait(), _NoRead():
        yield
