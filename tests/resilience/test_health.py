"""Each planted fault is found, named and reported once; healthy numbers give no verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_ext.config import parse
from megatron_ext.moe.stats import LOSS_NAMES, Look, RoutingRecord
from megatron_ext.resilience.health import Health, worst
from megatron_ext.resilience.spikes import Ring, StepNote
from tests.ranks.tiny import TINY

WINDOW = 6
EVEN = [100.0] * 8
COLLAPSED = [400.0, 400.0, 0, 0, 0, 0, 0, 0]


def _health(*flags: str) -> Health:
    return Health.of(parse([*TINY, "--health-window", str(WINDOW), *flags]))


def _routing(second=EVEN, balance=1.0, look=None, entropy=2.0) -> RoutingRecord:
    counts = torch.tensor([EVEN, second, [0.0] * 8], dtype=torch.float64)
    is_moe = torch.tensor([True, True, False])
    losses = {name: torch.zeros(3) for name in LOSS_NAMES}
    losses["load_balancing_loss"] = torch.tensor([1.0, balance, 0.0])
    zero, ones = torch.zeros(3), torch.ones(3)
    entropy_L = torch.tensor([2.0, entropy, 0.0])
    return RoutingRecord(
        counts, zero, losses, is_moe, ones, counts, entropy_L, ones, ones, look=look
    )


def _record(step: int, loss=3.0, norm=1.0, speed=1000.0) -> dict:
    wiggle = 1 + 0.01 * math.sin(step)
    values = {"lm_loss": loss * wiggle, "grad_norm": norm * wiggle, "tokens_per_s": speed * wiggle}
    return {"step": step, **values}


def _look(health: Health, record: dict, routing, step_s: float = 10.0):
    """Both looks at one step, of whose speed all ranks know at once."""
    before = health.before_update(
        record["step"], record["lm_loss"], record["grad_norm"], routing, None
    )
    return [*before, *health.look(record, routing, (step_s, record["tokens_per_s"]))]


def _found(health: Health, steps: int, record=_record, routing=lambda step: _routing()):
    made = (_look(health, record(step), routing(step)) for step in range(1, steps + 1))
    return [one for verdicts in made for one in verdicts]


def test_a_healthy_run_has_no_verdict():
    assert _found(_health(), 80) == []


def test_a_collapse_is_found_after_the_window_and_said_once():
    health = _health("--health-router-collapse", "stop")
    found = _found(health, 40, routing=lambda step: _routing(COLLAPSED if step >= 10 else EVEN))
    assert [(one.step, one.layer, one.expert) for one in found] == [(10 + WINDOW - 1, 2, 0)]
    text = str(found[0])
    assert "layer 2" in text and "expert 0 gets 50%" in text and "--moe-aux-loss-coeff" in text
    assert "6 of 8 experts dead" in text and worst(found) == "stop"


def test_a_collapse_that_goes_by_is_no_collapse():
    routing = lambda step: _routing(COLLAPSED if step % WINDOW else EVEN)  # noqa: E731
    assert _found(_health(), 40, routing=routing) == []


@pytest.mark.parametrize(
    ("second", "flags"),
    [
        ([280.0, 88, 88, 88, 88, 88, 80, 0], "--health-max-dead-share 0.1"),
        ([310.0, 70, 70, 70, 70, 70, 70, 70], "--health-max-violation 2"),
        ([310.0, 70, 70, 70, 70, 70, 70, 70], "--health-min-load-entropy 0.9"),
    ],
)
def test_each_threshold_finds_by_itself(second, flags):
    assert _found(_health(), 10, routing=lambda step: _routing(second)) == []
    found = _found(_health(*flags.split()), 10, routing=lambda step: _routing(second))
    assert [one.kind for one in found] == ["router_collapse"]


UNEVEN = [300.0, 300.0, 100, 40, 20, 20, 10, 10]


def test_a_sigmoid_router_that_cheats_is_named_and_softmax_is_not_asked():
    cheat = lambda step: _routing(UNEVEN, balance=0.7 if step > 3 else 1.0)  # noqa: E731
    found = _found(_health("--moe-router-score-function", "sigmoid"), 20, routing=cheat)
    assert [(one.kind, one.layer) for one in found] == [("balance_cheat", 2)]
    assert found[0].step == WINDOW
    assert _found(_health(), 20, routing=cheat) == []


def test_an_expert_bias_that_balances_with_a_small_loss_is_no_cheat():
    biased = lambda step: _routing(EVEN, balance=0.9)  # noqa: E731
    assert _found(_health("--moe-router-score-function", "sigmoid"), 20, routing=biased) == []


def test_spikes_of_loss_and_norm():
    record = lambda step: _record(step, loss=9.0 if step == 30 else 3.0)  # noqa: E731
    assert [(one.kind, one.step) for one in _found(_health(), 40, record)] == [("loss_spike", 30)]
    record = lambda step: _record(step, norm=50.0 if step in (30, 35) else 1.0)  # noqa: E731
    found = _found(_health("--health-grad-spike", "save"), 40, record)
    assert [(one.kind, one.step, one.action) for one in found] == [
        ("grad_spike", 30, "save"),
        ("grad_spike", 35, "save"),
    ]


def test_nan_names_the_first_router():
    found = _look(_health(), _record(1, loss=math.nan), _routing(entropy=math.nan))
    assert [one.kind for one in found] == ["nan"]
    assert "lm_loss" in found[0].what and "router of layer 2" in found[0].what


def _bad(*places: tuple[int, int]) -> torch.Tensor:
    table = torch.zeros(3, 8)
    for layer, expert in places:
        table[layer, expert] = 1
    return table


def _look_of(outputs=(), gradients=()) -> Look:
    pairs, domains = torch.zeros(3, 8, 8), torch.zeros(3, 1, 8)
    return Look(pairs, domains, torch.zeros(3), _bad(*gradients), _bad(*outputs))


@pytest.mark.parametrize(
    ("loss", "look", "where"),
    [
        (3.0, _look_of(gradients=[(0, 1), (0, 2), (1, 5)]), [(2, 5)]),  # spreads down from layer 2
        (math.nan, _look_of([(0, 3), (1, 0), (1, 1)], [(0, 3), (1, 0)]), [(1, 3)]),  # and up from 1
        (math.nan, _look_of(gradients=[(0, 1), (1, 5)]), []),  # of a loss that is NaN: all of them
    ],
)
def test_the_expert_that_began_it_is_named(loss, look, where):
    found = _look(
        _health("--health-expert-nan", "stop", "--health-nan", "off"),
        _record(1, loss=loss),
        _routing(look=look),
    )
    assert [(one.layer, one.expert) for one in found] == where
    assert {one.kind for one in found} <= {"expert_nan"} and all(one.do for one in found)


def test_weights_that_are_not_finite_name_their_expert():
    found = _health().before_update(7, math.nan, math.nan, _routing(), _bad((1, 4)))
    assert [(one.kind, one.layer, one.expert) for one in found] == [
        ("nan", None, None),
        ("expert_nan", 2, 4),
    ]
    assert found[1].record()["expert"] == 4 and "weights" in found[1].what


def test_a_lasting_drop_of_speed_and_not_a_short_one():
    flags = ["--health-window", "8", "--health-throughput-seconds", "60"]
    slow = lambda step: _record(step, speed=300.0 if step >= 20 else 1000.0)  # noqa: E731
    # half of the window are 4 slow steps, a minute 6 steps of 10 s
    found = _found(_health(*flags), 40, slow)
    assert [(one.kind, one.step) for one in found] == [("throughput", 25)]
    flags[-1] = "30"
    assert [one.step for one in _found(_health(*flags), 40, slow)] == [23]
    for burst in (1, 3):  # shorter than half of the window
        short = lambda step, n=burst: _record(  # noqa: E731
            step, speed=300.0 if step % 8 < n and step > 10 else 1000.0
        )
        assert _found(_health(*flags), 60, short) == []


def test_few_tokens_leave_experts_without_any_by_chance():
    few = lambda step: _routing([2.0, 1, 1, 1, 1, 0, 0, 0])  # noqa: E731
    assert _found(_health("--health-min-load-entropy", "0.1"), 20, routing=few) == []
    many = lambda step: _routing([200.0, 100, 100, 100, 100, 0, 0, 0])  # noqa: E731
    found = _found(_health("--health-min-load-entropy", "0.1"), 20, routing=many)
    assert [one.kind for one in found] == ["router_collapse"]


def _quickstarts() -> list[tuple[int, list, list]]:
    """(seed, [lm_loss, grad_norm, step_time_s, tokens_per_s] of each step, [layers][experts] of the
    first steps) of healthy runs of configs/quickstart.yaml on a machine that was busy.
    """
    made = json.loads(Path(__file__).with_name("quickstart_seeds.json").read_text())
    return [(one["seed"], one["steps"], one["counts"]) for one in made["runs"]]


@pytest.mark.parametrize(("seed", "steps", "counts"), _quickstarts(), ids=lambda one: str(one)[:4])
def test_five_recorded_quickstarts_have_no_false_alarm(seed, steps, counts):
    health = Health.of(parse(TINY))
    ring = Ring(64, 10.0)
    for step, (loss, norm, seconds, speed) in enumerate(steps, 1):
        record = {"step": step, "lm_loss": loss, "grad_norm": norm, "tokens_per_s": speed}
        routing = _of_counts(counts[step - 1]) if step <= len(counts) else None
        assert _look(health, record, routing, seconds) == []
        assert ring.spike(loss, norm) is None
        ring.add(StepNote(step, loss, norm, []))
    assert len(steps) == 130


def _of_counts(counts: list[list[int]]) -> RoutingRecord:
    counts_LE = torch.tensor(counts, dtype=torch.float64)
    ones = torch.ones(len(counts))
    losses = {name: ones for name in LOSS_NAMES}
    return RoutingRecord(counts_LE, ones, losses, ones.bool(), ones, counts_LE, ones, ones, ones)


def test_off_is_off():
    off = [word for name in ("router-collapse", "nan") for word in (f"--health-{name}", "off")]
    found = _found(
        _health(*off), 20, lambda s: _record(s, loss=math.nan), lambda s: _routing(COLLAPSED)
    )
    assert found == []
