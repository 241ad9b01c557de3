"""Our candidate: pretrain_moe.pretrain() itself, stopped before each of its steps.

Flags, process group, DDP, guard, heartbeat, instruments, metrics.jsonl, console: what a run has by
default is there, because it is a run. `loop._take_step` is wrapped by the gate, so that a step is
one turn of the training loop with all that it does around `_take_step`. Nothing is saved.
"""

from __future__ import annotations

from typing import Any

from tests.bench.gate import Gate

ENDLESS = (
    *("--train-iters", "1000000", "--hang-limit-s", "100000"),
    *("--lr-decay-style", "constant", "--lr-warmup-iters", "0"),
)
"""It waits for the turns of the others; the learning rate is theirs."""


def run(name: str, spec: dict[str, Any], gate: Gate) -> None:
    """Train for ever with spec["flags"]."""
    from megatron_ext.config import parse

    cfg = parse([*spec["flags"], *ENDLESS, "--run-dir", f"{spec['folder']}/run-{name}"])
    from megatron_ext.device import start

    start(cfg.parallel.device, cfg.parallel.distributed_backend)
    import pretrain_moe
    from megatron_ext.mesh import agree, groups  # noqa: F401  as pretrain() imports them
    from megatron_ext.model import gpt  # noqa: F401
    from megatron_ext.optim import build  # noqa: F401
    from megatron_ext.train import loop, setup  # noqa: F401
    from megatron_ext.train.stop import StopRequest

    gate.imported()
    take_step = loop._take_step

    def gated(run: loop.Run, *rest: Any) -> Any:
        if "parameters" not in gate.facts:
            gate.facts["parameters"] = sum(
                p.numel() for chunk in run.state.chunks for p in chunk.parameters()
            )
            gate.facts["note"] = "the real loop with default flags, gradient clipping, logging"
        gate.step()
        result = take_step(run, *rest)
        gate.loss(result.lm_loss)
        return result

    loop._take_step = gated
    with StopRequest(cfg.train) as stop:
        pretrain_moe.pretrain(cfg, stop)
