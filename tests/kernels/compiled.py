"""Compiles every kernel, as the program launches it, for a GPU that is not there.

    python -m tests.kernels.compiled 90 bfloat16 --all     a JSON line for each machine code

Triton's compiler and ptxas need no GPU; launches are replaced by compilations of the configurations
that the tuner would try (without --all the first and the last). A process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from megatron_ext.kernels import grouped_gemm, order, routed, rows

T, K, E, H, F = 64, 2, 8, 256, 128


class _Driver:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_instead_of_launching(seen: dict, every: bool) -> None:
    stock = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        meta, ptx = kernel.metadata, kernel.asm["ptx"]
        what = {name: kwargs[name] for name in sorted(kwargs) if name.startswith("BLOCK")}
        seen[kernel.hash] = {
            "kernel": self.fn.__name__,
            **what,
            "warps": meta.num_warps,
            "stages": meta.num_stages,
            "shared_bytes": meta.shared,
            "wgmma": "wgmma" in ptx,
            "mma": "mma.sync" in ptx,
            "cubin_bytes": len(kernel.asm["cubin"]),
        }
        return kernel

    def all_configs(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        configs = self.prune_configs(kwargs)
        for config in configs if every else {configs[0], configs[-1]}:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = run, all_configs


def _launch_all(dtype: torch.dtype) -> None:
    """The experts both ways, with many and with few rows, and the dispatcher's rows."""
    for tokens in (T, 64 * T):
        x = torch.zeros(tokens, H, dtype=dtype, requires_grad=True)
        probs = torch.zeros(tokens, K, requires_grad=True)
        fc1 = torch.zeros(E, 2, F, H, dtype=dtype, requires_grad=True)
        fc2 = torch.zeros(E, H, F, dtype=dtype, requires_grad=True)
        experts = torch.arange(tokens * K).view(tokens, K) % E
        placed = order.order_of(experts, torch.full((E,), tokens * K // E))
        out = routed.routed_experts(x, probs, fc1, fc2, placed, routed.TRITON)
        if tokens == T:
            continue  # few rows: other tiles of one kernel
        out.backward(torch.zeros_like(out))
        sent, _ = rows.permute(x, probs, placed.slots_R, placed.rows_TK)
        back = routed.sorted_experts(sent, fc1, fc2, placed.ends_E, routed.TRITON)
        out = rows.unpermute(back, placed.slots_R, placed.rows_TK, probs)
        out.backward(torch.zeros_like(out))


def compiled(capability: int, dtype: torch.dtype, every: bool) -> list[dict]:
    """What was compiled, one entry for each machine code."""
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET must not be set"
    assert grouped_gemm.INTERPRETED is False
    driver.set_active(_Driver(capability))
    seen: dict[str, dict] = {}
    _compile_instead_of_launching(seen, every)
    _launch_all(dtype)
    return list(seen.values())


if __name__ == "__main__":
    wanted = int(sys.argv[1]), getattr(torch, sys.argv[2])
    for one in compiled(*wanted, "--all" in sys.argv):
        print(json.dumps(one))
