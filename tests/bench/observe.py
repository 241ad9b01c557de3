"""What watching costs: python -m tests.bench observe [--config FILE] [--ranks N] [--steps N]

1. Steps of configs/bench-moe.yaml (on 2 ranks with experts over both) with everything on: scores of
   the routing, a close look every 20th step, spans of every pass and collective, time split and
   memory, metrics.jsonl, TensorBoard with all of its flags, weights' norm, health, console; against
   steps with none of it, in one process, every other step. Medians of wall-clock and CPU time (all
   threads) and their ratio, which the median over pairs of neighbours gives as well: that one is
   deaf to what else the machine does for longer than a step.
2. Logging a synthetic record of 64 layers x 256 experts: milliseconds a step on the logging rank,
   and of a step with pictures (they are drawn in a thread).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

LAYERS, EXPERTS, DOMAINS = 64, 256, 5
WARM = 4
EVERYTHING = (
    "--log-interval 10 --log-routing-interval 20 --log-throughput --log-timers-to-tensorboard"
    " --log-memory-to-tensorboard --log-params-norm --peak-tflops 1 --timing-log-level 1"
).split()
OF_RANKS = {1: [], 2: ["--expert-model-parallel-size", "2"]}


def synthetic(with_look: bool):
    """A routing record of 64 layers x 256 experts."""
    import torch

    from megatron_ext.moe.stats import LOSS_NAMES, Look, RoutingRecord

    made = torch.Generator().manual_seed(0)
    shape = (LAYERS, EXPERTS)
    counts = torch.randint(0, 4000, shape, generator=made).double()
    ones = torch.ones(LAYERS, dtype=torch.float64)
    look = None
    if with_look:
        pairs = torch.rand(LAYERS, EXPERTS, EXPERTS, generator=made).double()
        domains = torch.rand(LAYERS, DOMAINS, EXPERTS, generator=made).double()
        look = Look(pairs + pairs.transpose(1, 2), domains, ones, torch.zeros(shape).double())
    return RoutingRecord(
        counts,
        ones * 0,
        {name: torch.rand(LAYERS, generator=made).double() for name in LOSS_NAMES},
        torch.ones(LAYERS, dtype=torch.bool),
        ones * 1e6,
        counts / counts.sum(dim=1, keepdim=True),
        ones * 5,
        ones,
        ones,
        look=look,
    )


def record_of(step: int, routing) -> dict:
    """A step's line of metrics.jsonl around that routing."""
    from megatron_ext.observe.kinds import KINDS
    from megatron_ext.observe.metrics import routing_values

    plain = {"lm_loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-4, "loss_scale": 1.0}
    counters = {"consumed_samples": step * 16, "global_batch_size": 16, "num_zeros": None}
    speed = {"step_time_s": 1.0, "tokens_per_s": 1e6, "model_tflop_per_s_per_rank": 400.0}
    seen = {f"domain {number}": 10**9 for number in range(DOMAINS)}
    times = {f"time_{kind}_s": 0.1 for kind in KINDS} | {"memory_peak_max_bytes": 10**10}
    return {
        "step": step,
        **plain,
        **counters,
        **speed,
        **times,
        **routing_values(routing, 64, 8),
        "num_skipped": 0,
        "num_nan": 0,
        "tokens_seen_per_domain": seen,
    }


def logging_cost(steps: int) -> tuple[float, float]:
    """Milliseconds of a usual step and of one with pictures, medians."""
    from megatron_ext.config import parse
    from megatron_ext.observe.observers import Observers
    from megatron_ext.observe.run_dir import create, places
    from megatron_ext.resilience.health import Health
    from tests.ranks.tiny import TINY

    with tempfile.TemporaryDirectory() as folder:
        size = ["--num-layers", str(LAYERS), "--num-experts", str(EXPERTS), "--log-interval", "1"]
        cfg = parse([*TINY, *size, "--run-dir", folder])
        where = places(cfg, folder)
        create(cfg, where)
        observers = Observers(cfg, where, first_step=0, num_steps=steps, is_active=True)
        observers.say = lambda text: None
        health, times = Health.of(cfg), {False: [], True: []}
        for step in range(1, steps + 1):
            with_look = step % 10 == 0
            routing = synthetic(with_look)
            start = time.perf_counter()
            record = record_of(step, routing)
            observers.step(record, routing)
            health.look(record, routing, (1.0, 1e6))
            times[with_look].append((time.perf_counter() - start) * 1000)
            time.sleep(0.2 if with_look else 0.005)
        observers.close()
        assert (Path(folder) / "routing.jsonl").stat().st_size > 0
    return statistics.median(times[False]), statistics.median(times[True])


class Training:
    """A model in training whose steps can be taken with everything on or off."""

    def __init__(self, cfg, folder: str, stack: contextlib.ExitStack) -> None:
        import torch

        from megatron_ext.device import current_device
        from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
        from megatron_ext.observe.instruments import Instruments
        from megatron_ext.observe.observers import Observers
        from megatron_ext.observe.run_dir import create, places
        from megatron_ext.optim.build import build_optimizer, build_scheduler
        from megatron_ext.train import loop, setup
        from megatron_ext.train.observed import Observed
        from megatron_ext.train.step import prepare_config

        self.cfg, where = cfg, places(cfg, folder)
        rank = torch.distributed.get_rank()
        if rank == 0:
            create(cfg, where)
        torch.distributed.barrier()
        words = setup.tokenizer(cfg)
        chunks = wrap_for_training(cfg, build_chunks(cfg, vocabulary(cfg, words.vocab_size)))
        optimizer = build_optimizer(cfg, chunks)
        state = setup.train_state(chunks, optimizer, build_scheduler(cfg, optimizer))
        prepare_config(chunks[0].config, optimizer, chunks, chunks[0].ddp_config)
        observers = Observers(cfg, where, first_step=0, num_steps=10**6, is_active=rank == 0)
        observers.say = lambda text: None
        stack.callback(observers.close)
        instruments = Instruments(cfg, where.root, state, current_device())
        splits = setup.datasets(cfg, words)
        self.run = loop.Run(cfg, state, splits, None, observers, instruments, None, 1e9)
        self.observed = Observed(cfg, splits.train, 0, self.run)
        self.micro_batches = self._batches()

    def _batches(self) -> list:
        from megatron.core import parallel_state

        from data.loader import make_batch
        from megatron_ext.device import current_device
        from megatron_ext.train.step import to_device

        train = self.cfg.train
        size, dp = train.micro_batch_size, parallel_state.get_data_parallel_world_size()
        first = parallel_state.get_data_parallel_rank() * size
        return [
            to_device(make_batch(self.run.splits.train, range(n, n + size)), current_device())
            for n in range(first, train.global_batch_size, size * dp)
        ]

    def off(self) -> None:
        """A step that nobody watches."""
        from megatron_ext.moe.stats import Tally
        from megatron_ext.train.step import StepSettings, train_step

        stock = Tally.add_scores, Tally.add_sums
        Tally.add_scores = Tally.add_sums = lambda *_: None
        try:
            settings = StepSettings.of(self.cfg)
            train_step(self.run.state, self.micro_batches, settings, lambda: (False, False))
        finally:
            Tally.add_scores, Tally.add_sums = stock

    def on(self) -> None:
        """A step with everything, as loop._take_step does it."""
        from megatron_ext.observe.watch import watching
        from megatron_ext.train.loop import _record
        from megatron_ext.train.step import train_step

        run, state = self.run, self.run.state
        tools, step, start = run.instruments, state.progress.step + 1, time.perf_counter()
        with watching(tools.recorder, tools.calls, tools.passes, state.optimizer, None):
            tools.before(step)
            settings = self.observed.settings(step)
            result = train_step(state, self.micro_batches, settings, lambda: (False, False))
            seconds = time.perf_counter() - start
            state.progress.step = step
            state.progress.consumed_samples += self.cfg.train.global_batch_size
            measured = tools.after(step, seconds)
            batch = self.cfg.train.global_batch_size
            record = {**_record(run, result, seconds, batch), **measured}
            record |= self.observed.values(result, state, 1.0)
            run.observers.step(record, result.routing)
            for verdict in self.observed.judge(record, result):
                run.observers.verdict(verdict)
            tools.lines(measured)


def step_cost(steps: int, flags: list[str], folder: str) -> dict[str, list[tuple[float, float]]]:
    """ "off", "on" -> (seconds, CPU seconds) of each step of this rank."""
    import torch

    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups

    cfg = parse([*flags, "--run-dir", folder])
    found: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_groups(cfg.parallel, start("cpu"), cfg.train.seed))
        training = Training(cfg, folder, stack)
        for number in range(2 * (steps + WARM)):
            # off on, on off, ...: neither is always the first of its pair
            name = ("off", "on", "on", "off")[number % 4]
            torch.distributed.barrier()
            begin = time.perf_counter(), time.process_time()
            getattr(training, name)()
            torch.distributed.barrier()
            found[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return {name: values[WARM:] for name, values in found.items()}


def compared(off: list[float], on: list[float]) -> str:
    """Medians in ms, their ratio, and the median of the ratios of neighbours."""
    usual, watched = statistics.median(off), statistics.median(on)
    pairs = statistics.median(b / a for a, b in zip(off, on))
    return (
        f"off {usual * 1000:8.1f} ms, on {watched * 1000:8.1f} ms,"
        f" {watched / usual - 1:+.2%}; pairs {pairs - 1:+.2%}"
    )


def main(argv: list[str]) -> int:
    """Print both figures."""
    from megatron_ext.mesh.forks import run_ranks

    parser = argparse.ArgumentParser(prog="python -m tests.bench observe", description=__doc__)
    parser.add_argument("--config", default="configs/bench-moe.yaml")
    parser.add_argument("--ranks", type=int, choices=sorted(OF_RANKS), nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind")
    args = parser.parse_args(argv)
    usual, pictured = logging_cost(60)
    print(f"logging {LAYERS} layers x {EXPERTS} experts: {usual:.1f} ms a step,", end=" ")
    print(f"{pictured:.1f} ms in a step with pictures (drawn in a thread)", flush=True)
    for ranks in args.ranks:
        flags = ["--config", args.config, *EVERYTHING, *OF_RANKS[ranks]]
        with tempfile.TemporaryDirectory() as folder:
            rows = run_ranks(step_cost, ranks, args.steps, flags, folder, timeout_s=3000)
        wall = [[seconds for seconds, _ in rows[0][name]] for name in ("off", "on")]
        cpu = [
            [sum(step) for step in zip(*([cpu for _, cpu in row[name]] for row in rows))]
            for name in ("off", "on")
        ]
        print(f"{ranks} ranks, wall clock: {compared(*wall)}")
        print(f"{ranks} ranks, CPU time:   {compared(*cpu)}", flush=True)
    return 0
