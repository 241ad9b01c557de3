"""Which layouts and model switches to check: a list that holds every pair of features at least
once.

A case is a layout name and model switches, `tp2-sp-cp2.p2p-ep2-etp1+mtp+tied`. Switches apply to
the layout's run and to its one-rank reference alike. `all_cases` builds the list greedily and with
a fixed seed: it draws legal combinations of up to `max_ranks` ranks and keeps the one that covers
the most pairs that no case has yet. Legal is what the trainer's own rules accept.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_ext.errors import ConfigError
from megatron_ext.parity.names import NamedLayout, parse_layout

SWITCHES: dict[str, str] = {
    "full-recompute": "--recompute-granularity full --recompute-method uniform"
    " --recompute-num-layers 1",
    "selective-recompute": "--recompute-granularity selective"
    " --recompute-modules core_attn moe_act layernorm",
    "per-token-loss": "--calculate-per-token-loss",
    "tied": "--no-untie-embeddings-and-output-weights",
    "shared-experts": "--moe-shared-expert-intermediate-size 64",
    "mtp": "--mtp-num-layers 1",
    "mla": "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8"
    " --v-head-dim 16 --no-group-query-attention",
    "capacity": "--moe-expert-capacity-factor 1.0",
    "uneven": "--decoder-first-pipeline-num-layers 1",
    "seq-aux": "--moe-router-load-balancing-type seq_aux_loss",
    "global-aux": "--moe-router-load-balancing-type global_aux_loss --moe-global-aux-mode exact",
    "no-z": "--moe-z-loss-coeff 0",
    "expert-bias": "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "accumulate4": "",
}
"""Name -> flags. `uneven` goes to the layout's run only, `accumulate4` sets the global batch."""

FACTORS: dict[str, tuple[str, ...]] = {
    "tp": ("", "tp2-sp"),
    "pp": ("", "pp2", "pp2-vpp2", "pp4"),
    "cp": ("", "cp2.p2p", "cp2.all_gather", "cp2.a2a", "cp4.a2a+p2p", "cp4.p2p"),
    "dp": ("", "dp2", "dp2-dopt", "dp4-dopt-overlap"),
    "ep": ("", "ep2", "ep4"),
    "etp": ("", "etp2"),
    "dispatcher": ("alltoall", "allgather"),
    "recompute": ("", "full-recompute", "selective-recompute"),
    "loss": ("", "seq-aux", "global-aux", "no-z"),
    "bias": ("", "expert-bias"),
    "token": ("", "per-token-loss"),
    "tied": ("", "tied"),
    "shared": ("", "shared-experts"),
    "mtp": ("", "mtp"),
    "mla": ("", "mla"),
    "capacity": ("", "capacity"),
    "uneven": ("", "uneven"),
    "accumulate": ("", "accumulate4"),
}

FIVE_DIMENSIONS = "tp2-sp-pp2-vpp2-cp2.p2p-dp2-dopt-ep4-etp1-alltoall+accumulate4"

SMALL = (
    "tp2-sp",
    "tp2-sp-etp2",
    "pp2-vpp2+accumulate4",
    "ep2-dp2-alltoall",
    "ep2-dp2-allgather",
    "dp2-dopt+global-aux",
    "cp2.p2p",
    "cp2.all_gather+per-token-loss",
    "cp2.a2a-tp2-sp",
    "tp2-sp-pp2-ep2+mtp+tied",
    "dp2-dopt-pp2+mla+selective-recompute",
    "tp2-sp-ep2-dp2-dopt+capacity+expert-bias+shared-experts",
)
"""The subset of the test suite."""


SINGLES = (
    *("tp2-sp", "tp2-sp-etp2", "pp2", "pp4", "pp2-vpp2", "pp2+uneven", "dp2", "dp2-dopt"),
    *("dp4-dopt-overlap", "dp2-ep2-alltoall", "dp2-ep2-allgather", "dp4-ep4", "tp2-sp-ep2"),
    *("cp2.p2p", "cp2.all_gather", "cp2.a2a", "cp4.p2p", "cp4.a2a+p2p"),
)
"""One dimension at a time."""

SWITCHED = "tp2-sp-dp2-dopt-ep2"
"""The layout in which each model switch is tried by itself."""


@dataclass(frozen=True)
class Case:
    """A layout and its model switches."""

    layout: NamedLayout
    switches: tuple[str, ...]

    @property
    def name(self) -> str:
        """`LAYOUT+switch+switch`."""
        return "+".join((self.layout.name or "1", *self.switches))

    @property
    def batch_flags(self) -> list[str]:
        """Micro-batches of one sample; one of them, or four, per data-parallel rank."""
        count = 4 if "accumulate4" in self.switches else 1
        if self.layout.sizes["vpp"] > 1:
            count = max(count, self.layout.sizes["pp"])
        batch = count * self.layout.sizes["dp"]
        return ["--micro-batch-size", "1", "--global-batch-size", str(batch)]

    @property
    def model_flags(self) -> list[str]:
        """Flags of both runs."""
        names = [name for name in self.switches if name != "uneven"]
        flags = [flag for name in names for flag in SWITCHES[name].split()]
        return flags + self.batch_flags

    @property
    def layout_flags(self) -> list[str]:
        """Flags of the layout's run alone."""
        uneven = SWITCHES["uneven"].split() if "uneven" in self.switches else []
        return self.layout.flags + uneven


def parse_case(text: str) -> Case:
    """`LAYOUT+switch+...`. Raises ConfigError for an unknown part or switch."""
    layout, *switches = text.replace("a2a+p2p", "a2a&p2p").split("+")
    unknown = [name for name in switches if name not in SWITCHES]
    if unknown:
        raise ConfigError(
            f"--layouts {text}: {unknown[0]!r} is not a switch", do=f"use {', '.join(SWITCHES)}"
        )
    return Case(parse_layout(layout.replace("a2a&p2p", "a2a+p2p")), tuple(switches))


def _case_of(values: dict[str, str]) -> Case:
    parts = [values[axis] for axis in ("tp", "pp", "cp", "dp", "ep", "etp", "dispatcher")]
    switches = [values[f] for f in FACTORS if values[f] in SWITCHES]
    return Case(parse_layout("-".join(part for part in parts if part)), tuple(switches))


def pairs_of(values: dict[str, str]) -> Iterator[tuple]:
    """Every pair of (factor, value) of a combination."""
    yield from itertools.combinations(sorted(values.items()), 2)


def _draw(rng: random.Random, seed_pair: tuple) -> dict[str, str]:
    values = {factor: rng.choice(choices) for factor, choices in FACTORS.items()}
    return {**values, **dict(seed_pair)}


def all_cases(
    is_legal: Callable[[Case], bool], max_ranks: int, tries: int = 60
) -> tuple[list[Case], set[tuple]]:
    """(cases, pairs that no legal case of up to `max_ranks` was found for): one dimension or switch
    at a time, then combinations that hold every pair, then the five dimensions at once.
    """
    switched = [f"{SWITCHED}+{name}" for name in SWITCHES if name != "uneven"]
    simple = [parse_case(name) for name in (*SINGLES, *switched)]
    rng = random.Random(20260)
    values = [[(f, v) for v in choices] for f, choices in FACTORS.items()]
    todo = {
        tuple(sorted(pair))
        for first, second in itertools.combinations(values, 2)
        for pair in itertools.product(first, second)
    }
    cases = [case for case in simple if case.layout.world_size <= max_ranks]
    impossible: set[tuple] = set()
    while todo:
        target = min(todo)
        best: tuple[int, Case, set] | None = None
        for attempt in range(tries * 8):
            drawn = _draw(rng, target)
            case = _case_of(drawn)
            if case.layout.world_size > max_ranks or not is_legal(case):
                continue
            gained = todo.intersection(pairs_of(drawn))
            if best is None or len(gained) > best[0]:
                best = (len(gained), case, gained)
            if attempt > tries:
                break
        if best is None:
            impossible.add(target)
            todo.discard(target)
            continue
        cases.append(best[1])
        todo -= best[2]
    five = parse_case(FIVE_DIMENSIONS)
    if five.layout.world_size <= max_ranks:
        cases.append(five)
    return cases, impossible


def named_cases(text: str) -> list[Case]:
    """The cases of a comma-separated list."""
    return [parse_case(name) for name in text.split(",") if name.strip()]


def small_cases() -> Iterable[Case]:
    """Twelve cases that touch every dimension."""
    return map(parse_case, SMALL)
