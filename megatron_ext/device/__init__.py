"""Where a rank runs: CPU with gloo or CUDA with NCCL, and the one place that lifts megatron-core's
assumptions.

    from megatron_ext.device import start
    device = start("auto")            # before the first import of megatron.core
    device.kind                       # "cpu" | "cuda"
    device.backend                    # "gloo" | "nccl"

`start` chooses the device, tunes the process for it (threads, allocator, matrix product precision),
rewrites megatron-core for the CPU where that is the device (`lift`), and applies the corrections
(`corrections`).
"""

from megatron_ext.device.select import Device, current_device, start

__all__ = ["Device", "current_device", "start"]
