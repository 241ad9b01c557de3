"""Where the time of a training step goes, part by part, beside each part's floor.

    python -m tests.bench parts --model bench-moe --dtype bf16 --json parts.json

Modules of the model are ranges of torch's profiler in the forward pass; a node of the backward pass
belongs to the part whose operation made it (the profiler's sequence numbers say which). "Python" is
what lies between operations, and the profiler itself adds to it. One process, one micro-batch a
step, default flags.

Floor: FLOPs by the rate of a dense matrix product, or bytes by the rate of a copy (read and written
bytes), both measured in this run; forward and backward together. Norms: 2 rows forward, 3 backward.
Permute and unpermute: rows read and written. Optimizer: 30 bytes a parameter in bf16 (28 in fp32).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.bench import ceilings, table
from tests.bench.shapes import Shape, add_flags, flags_of, shape_of

BACKWARD = "autograd::engine::evaluate_function: "
RANGE = "part: "
PARTS = (
    *("attention", "router", "permute", "experts", "unpermute", "norms", "embedding"),
    *("output and loss", "gradients", "optimizer", "other operations"),
)
OF_DISPATCHER = {
    "dispatch_preprocess": "permute",
    "dispatch_postprocess": "permute",
    "combine_preprocess": "unpermute",
    "combine_postprocess": "unpermute",
}


def _ranged(owner: Any, name: str, part: str) -> None:
    """Make a call a range of the profiler."""
    from torch.profiler import record_function

    stock = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + part):
            return stock(*args, **kwargs)

    setattr(owner, name, run)


def _mark_module(name: str, module: Any) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_ext.model.norm import Norm

    if isinstance(module, MoELayer):
        _ranged(module.router, "forward", "router")
        _ranged(module.experts, "forward", "experts")
        for call, part in OF_DISPATCHER.items():
            _ranged(module.token_dispatcher, call, part)
    elif isinstance(module, Norm):
        _ranged(module, "forward", "norms")
    elif name.endswith("self_attention"):
        _ranged(module, "forward", "attention")
    elif name.endswith("module.embedding"):
        _ranged(module, "forward", "embedding")
    elif name.endswith("output_layer"):
        _ranged(module, "forward", "output and loss")
    elif hasattr(module, "compute_language_model_loss"):
        _ranged(module, "compute_language_model_loss", "output and loss")


def mark(state: Any) -> None:
    """Ranges around the parts of the chunks and the optimizer of a training state."""
    for chunk in state.chunks:
        for name, module in chunk.named_modules():
            _mark_module(name, module)
    for call in ("prepare_grads", "get_grad_norm", "step_with_ready_grads"):
        _ranged(state.optimizer, call, "optimizer")


def milliseconds(events: Any) -> dict[str, float]:
    """Part -> ms of the outermost ranges, operations and backward nodes of the busiest thread."""
    totals = dict.fromkeys(PARTS, 0.0)
    makers: dict[int, str] = {}
    end, part = -1.0, ""
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        is_root = event.time_range.start >= end
        if is_root:
            end = event.time_range.end
            part = _part_of(event, makers)
            totals[part] += event.time_range.elapsed_us() / 1000
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            makers.setdefault(event.sequence_nr, part)
    return totals


def _part_of(event: Any, makers: dict[int, str]) -> str:
    if event.name.startswith(RANGE):
        return event.name.removeprefix(RANGE)
    if "AccumulateGrad" in event.name:
        return "gradients"
    if event.name.startswith(BACKWARD):
        return makers.get(event.sequence_nr, "other operations")
    return "other operations"


def floors(shape: Shape, parameters: int, width: int, gflops: float, copy: float) -> dict:
    """Part -> ms at the machine's ceilings; `width`: bytes of a number."""
    tokens, hidden, rows = shape.tokens, shape.hidden, shape.tokens * shape.topk
    flops = {
        "attention": 2 * 4 * hidden**2 + 2 * shape.sequence * hidden,
        "router": 2 * hidden * shape.experts,
        "experts": 6 * hidden * shape.width * shape.topk,
    }
    work = {name: 3 * shape.layers * tokens * each for name, each in flops.items()}
    work["output and loss"] = 6 * tokens * hidden * shape.vocabulary
    moved = (3 * rows + tokens) * hidden * width
    traffic = {
        "norms": (2 * shape.layers + 1) * 5 * tokens * hidden * width,
        "permute": shape.layers * moved,
        "unpermute": shape.layers * moved,
        "embedding": 4 * tokens * hidden * width,
        "optimizer": parameters * (30 if width == 2 else 28),
    }
    found = {name: each / gflops / 1e6 for name, each in work.items()}
    return found | {name: each / copy / 1e6 for name, each in traffic.items()}


@contextlib.contextmanager
def training(flags: list[str]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """(the training state, one step of it) in this process."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.forks import free_port
    from megatron_ext.mesh.groups import process_groups

    os.environ["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cfg = parse([*flags, "--run-dir", folder])
        stack.enter_context(process_groups(cfg.parallel, start("cpu"), cfg.train.seed))
        from megatron_ext.train.step import StepSettings, train_step
        from tests.bench.observe import Training

        made = Training(cfg, folder, stack)
        state, settings = made.run.state, StepSettings.of(cfg)
        yield state, lambda: train_step(state, made.micro_batches, settings, lambda: (False, False))


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = table.parser("parts", __doc__, rounds="profiled steps")
    add_flags(parser)
    args = parser.parse_args(argv)
    flags = flags_of(args.model, args.dtype, args.sequences)
    from torch.profiler import ProfilerActivity, profile

    from megatron_ext.config import parse

    shape = shape_of(parse([*flags, "--run-dir", "unused"]))
    limits = ceilings.measure()
    with training(flags) as (state, step):
        parameters = sum(p.numel() for chunk in state.chunks for p in chunk.parameters())
        for _ in range(4):
            step()
        plain = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            step()
            plain.append(1000 * (time.perf_counter() - begin))
        mark(state)
        step()
        rounds = []
        for _ in range(args.rounds):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                begin = time.perf_counter()
                step()
                wall = 1000 * (time.perf_counter() - begin)
            found = milliseconds([e for e in seen.events() if not e.is_async])
            rounds.append(found | {"Python": max(0.0, wall - sum(found.values()))})
    width = 2 if args.dtype == "bf16" else 4
    gflops = ceilings.of_dtype(limits, args.dtype)
    least = floors(shape, parameters, width, gflops, limits["copy GB/s"])
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    total = sum(medians.values())
    rows = [
        [
            name,
            f"{value:.1f}",
            f"{value / total:.0%}",
            f"{least[name]:.1f}" if name in least else None,
            f"{least[name] / value:.0%}" if name in least and value else None,
        ]
        for name, value in medians.items()
    ]
    rows.append(["sum", f"{total:.1f}", "100%", f"{sum(least.values()):.1f}", None])
    where = table.machine()
    print(f"{args.model} {args.dtype}: {shape.batch} x {shape.sequence} tokens a step, load")
    print(f"{where['load']}; {statistics.median(plain):.1f} ms a step without the profiler\n")
    print(table.markdown(("part", "ms", "share", "floor ms", "of the floor"), rows))
    print("\n" + ceilings.as_line(limits))
    table.write_json(
        args.json,
        {"table": "parts", "ms": medians, "floor_ms": least, "ceilings": limits, "rounds": rounds},
    )
    return 0
