"""The trials of flips.py.

A trial starts from the same trained state, flips one bit of one element of one rank, and takes
`STEPS` steps with the guard (not finite, spikes) and the comparison of replicas every `INTERVAL`
steps. Sites: this rank's gradient before it is reduced, its reduced gradient (its own shard with
the distributed optimizer), a weight, an Adam moment, a master weight. "found" counts every
detection; "gone" those of the rest whose weights are, at the end, bit for bit the undisturbed ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from megatron.core import parallel_state

from data.loader import make_batch, micro_batch_ids
from data.mock import MockDataset
from data.rules import Rules
from megatron_ext.errors import Fatal
from megatron_ext.resilience.guard import Guard
from megatron_ext.resilience.replicas import differences, hash_of, weights_of
from megatron_ext.resilience.spikes import Ring
from megatron_ext.train.step import StepSettings, prepare_config, train_step
from tests.checkpoint.small_run import GLOBAL, MICRO, SEQUENCE, small_run
from tests.ranks.harness import run_ranks

WARM, STEPS, INTERVAL = 20, 4, 2
BITS = {
    torch.float32: {
        "sign": (31, 32),
        "exponent": (23, 31),
        "mantissa high": (12, 23),
        "mantissa low": (0, 12),
    },
    torch.bfloat16: {
        "sign": (15, 16),
        "exponent": (7, 15),
        "mantissa high": (4, 7),
        "mantissa low": (0, 4),
    },
}
CLASSES = tuple(BITS[torch.float32])
SITES = ("gradient before", "gradient after", "weight", "moment", "master")
KINDS = {
    "plain fp32": ("--hidden-dropout 0 --lr 1e-3", SITES[:4]),
    "distributed bf16": ("--hidden-dropout 0 --lr 1e-3 --bf16 --use-distributed-optimizer", SITES),
}
NUM_CELLS = 2 * len(CLASSES) * sum(len(sites) for _, sites in KINDS.values())


@dataclass(frozen=True)
class Flip:
    """One trial; `rank` is the victim's, `bit` is drawn from the class, all from `seed`."""

    site: str
    kind: str
    rank: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """`steps`: until it was noticed, 1 is the step of the flip; None: it was not."""

    by: str
    steps: int | None
    is_gone: bool


@dataclass(frozen=True)
class _Listening(Guard):
    """A guard that notes what it would have said."""

    heard: list[str] = field(default_factory=list)

    def _tell(self, made, again, step, batches) -> None:
        self.heard.append("not finite" if made.problem() else "spike")


class Trials:
    """A trained tiny run on this rank that can be put back."""

    def __init__(self, run) -> None:
        self.run, self.state = run, run.state
        self.config = self.state.chunks[0].config
        prepare_config(
            self.config, self.state.optimizer, self.state.chunks, self.state.chunks[0].ddp_config
        )
        self.reduce = self.config.finalize_model_grads_func
        self.data = MockDataset(10_000, SEQUENCE, 120, Rules(120, False, False, False), 1, 0)
        self.settings = StepSettings.of(run.cfg)
        self.ring = Ring(64, 10.0)
        self.times = [self.step(self.guard()) for _ in range(WARM)]
        self.kept = [(tensor, tensor.detach().clone()) for tensor in self._tensors()]
        self.groups = [dict(group) for group in self._groups()]
        self.notes = list(self.ring.notes)
        for _ in range(STEPS):
            self.step(self.guard())
        self.clean = self.hashes()
        self.restore()

    def _leaves(self) -> list:
        return self.state.optimizer.chained_optimizers

    def _groups(self) -> Iterator[dict]:
        for leaf in self._leaves():
            yield from leaf.optimizer.param_groups

    def moments(self) -> list[torch.Tensor]:
        """Both of Adam's, of this rank."""
        states = (one for leaf in self._leaves() for one in leaf.optimizer.state.values())
        return [s[name] for s in states for name in ("exp_avg", "exp_avg_sq")]

    def masters(self) -> list[torch.Tensor]:
        """What the optimizer updates."""
        return [p for group in self._groups() for p in group["params"] if p.numel()]

    def weights(self) -> list[torch.Tensor]:
        """Those of the model."""
        return [p.data for chunk in self.state.chunks for p in chunk.parameters()]

    def gradients(self, own: bool) -> list[torch.Tensor]:
        """Gradient buffers; `own`: the part whose sum this rank uses."""
        chunk, found = self.state.chunks[0], []
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            size = buffer.data_parallel_group.size() if own and self._is_sharded() else 1
            rank = buffer.data_parallel_group.rank() if size > 1 else 0
            found += [one.grad_data.view(size, -1)[rank] for one in buffer.buckets]
        return found

    def _is_sharded(self) -> bool:
        return bool(self.run.cfg.ddp.use_distributed_optimizer)

    def _tensors(self) -> list[torch.Tensor]:
        buffers = [b for chunk in self.state.chunks for b in chunk.module.buffers()]
        states = [s for leaf in self._leaves() for s in leaf.optimizer.state.values()]
        values = [v for state in states for v in state.values() if torch.is_tensor(v)]
        return [*self.weights(), *buffers, *values, *self.masters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the end of the warm steps."""
        for tensor, value in self.kept:
            tensor.copy_(value)
        for group, values in zip(self._groups(), self.groups):
            group.update({k: v for k, v in values.items() if k != "params"})
        self.state.progress.step = WARM
        self.ring.notes.clear()
        self.ring.notes.extend(self.notes)
        self.config.finalize_model_grads_func = self.reduce

    def guard(self) -> _Listening:
        """A guard over the ring of this run."""
        return _Listening("validate_results", None, self.ring)

    def hashes(self) -> list[int]:
        """Of each weight."""
        return [int(hash_of(one, weights_of(4096))) for one in self.weights()]

    def step(self, guard: Guard) -> float:
        """One; its seconds."""
        dp, rank = (
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
        )
        first = self.state.progress.step * GLOBAL
        batches = [
            make_batch(self.data, micro_batch_ids(first + number, MICRO, rank))
            for number in range(0, GLOBAL, MICRO * dp)
        ]
        start = time.perf_counter()
        train_step(self.state, batches, self.settings, lambda: (False, False), guard)
        self.state.progress.step += 1
        return time.perf_counter() - start

    def targets(self, site: str) -> list[torch.Tensor]:
        """What a flip at `site` may hit on this rank."""
        return {
            "gradient before": lambda: self.gradients(own=False),
            "gradient after": lambda: self.gradients(own=True),
            "weight": self.weights,
            "moment": self.moments,
            "master": self.masters,
        }[site]()

    def inject(self, flip: Flip) -> None:
        """Now, or within the next reduction."""
        if torch.distributed.get_rank() != flip.rank:
            return
        if not flip.site.startswith("gradient"):
            strike(self.targets(flip.site), flip)
            return

        def reduce(*args, **kwargs):
            self.config.finalize_model_grads_func = self.reduce  # not in the replay
            if flip.site == "gradient before":
                strike(self.targets(flip.site), flip)
            self.reduce(*args, **kwargs)
            if flip.site == "gradient after":
                strike(self.targets(flip.site), flip)

        self.config.finalize_model_grads_func = reduce

    def run_one(self, flip: Flip) -> Outcome:
        """Flip, train, look."""
        guard = self.guard()
        self.inject(flip)
        try:
            for number in range(1, STEPS + 1):
                self.step(guard)
                if guard.heard:
                    return self._end(guard.heard[0], number)
                if number % INTERVAL == 0 and self._differ():
                    return self._end("replicas", number)
        except Fatal:
            return self._end("not finite", number)
        return self._end("", None)

    def _differ(self) -> bool:
        flag = torch.tensor(len(differences(self.state.chunks, self.state.optimizer)))
        torch.distributed.all_reduce(flag)
        return bool(flag)

    def _end(self, by: str, steps: int | None) -> Outcome:
        is_gone = self.hashes() == self.clean
        self.restore()
        return Outcome(by, steps, is_gone)

    def overhead(self) -> tuple[float, float]:
        """(seconds of a step, seconds of a comparison of all replicas), medians."""
        looks = []
        for _ in range(5):
            start = time.perf_counter()
            differences(self.state.chunks, self.state.optimizer)
            looks.append(time.perf_counter() - start)
        return median(self.times[1:]), median(looks)


def strike(tensors: list[torch.Tensor], flip: Flip) -> None:
    """Flip one bit of an element that is not 0."""
    generator = torch.Generator().manual_seed(flip.seed)
    sizes = torch.tensor([float(tensor.numel()) for tensor in tensors])
    for _ in range(100):
        tensor = tensors[int(torch.multinomial(sizes, 1, generator=generator))].detach().view(-1)
        at = int(torch.randint(tensor.numel(), (1,), generator=generator))
        if tensor[at] != 0:
            break
    first, stop = BITS[tensor.dtype][flip.kind]
    bit = int(torch.randint(first, stop, (1,), generator=generator))
    whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    width = 31 if whole == torch.int32 else 15
    tensor.view(whole)[at] ^= torch.tensor(-(2**width) if bit == width else 2**bit, dtype=whole)


def _trials(flags: str, flips: list[Flip]) -> tuple[list[Outcome], tuple[float, float]]:
    with small_run(flags) as run:
        trials = Trials(run)
        return [trials.run_one(flip) for flip in flips], trials.overhead()


def _cell(outcomes: list[Outcome]) -> str:
    found = [one.steps for one in outcomes if one.steps]
    gone = sum(one.is_gone for one in outcomes if not one.steps)
    text = f"{len(found)}/{len(outcomes)}"
    text += f" in {median(found):g}" if found else ""
    return text + (f", {gone} gone" if gone else "")


def measure(seed: int, per_cell: int, say: Callable[[str], None] = print) -> None:
    """Run all cells and print the table."""
    say(f"| optimizer | site | dp | {' | '.join(CLASSES)} | by |")
    say(f"|{'---|' * (len(CLASSES) + 4)}")
    costs = []
    for name, (flags, sites) in KINDS.items():
        for dp in (2, 4):
            flips = [
                Flip(site, kind, (seed + n) % dp, seed * 1_000_003 + 1009 * n + 31 * i + j)
                for i, site in enumerate(sites)
                for j, kind in enumerate(CLASSES)
                for n in range(per_cell)
            ]
            results = run_ranks(_trials, dp, flags, flips, timeout_s=3600)
            outcomes, (step_s, look_s) = results[0]
            costs.append(f"{name} dp {dp}: {100 * look_s / step_s:.1f}%")
            for site in sites:
                mine = [(f, o) for f, o in zip(flips, outcomes) if f.site == site]
                cells = [_cell([o for f, o in mine if f.kind == kind]) for kind in CLASSES]
                by = ", ".join(sorted({o.by for _, o in mine if o.by})) or "nothing"
                say(f"| {name} | {site} | {dp} | {' | '.join(cells)} | {by} |")
    say(f"one comparison of the replicas, in % of a step: {'; '.join(costs)}")
