"""The twelve cases of `--layouts small`: every dimension and most switches against one rank."""

import argparse

import pytest

from megatron_ext.parity import report
from megatron_ext.parity.cases import SMALL, parse_case
from megatron_ext.parity.measure import assemble

STEPS = 20
BASE = ["--config", "configs/parity.yaml", "--device", "cpu", "--train-iters", str(STEPS)]


@pytest.mark.parametrize("name", SMALL)
def test_layout_is_the_same_training(name):
    args = argparse.Namespace(dtype="fp32", steps=STEPS, timeout_s=120)
    (row,) = report.run_all([parse_case(name)], BASE, args)
    assert row.error is None, row.error
    assert row.passed, row.comparison.reasons


@pytest.mark.parametrize("name", ["tp2-sp-pp2-ep2", "dp2-dopt-pp2-vpp2+accumulate4"])
def test_bf16_stays_in_its_band(name):
    args = argparse.Namespace(dtype="bf16", steps=STEPS, timeout_s=120)
    (row,) = report.run_all([parse_case(name)], [*BASE, "--bf16"], args)
    assert row.error is None, row.error
    assert row.passed, row.comparison.reasons


def test_gradients_are_whole():
    """Every part of every gradient is held by exactly one first replica."""
    from tests.ranks.harness import run_ranks

    flags = parse_case("tp2-sp-pp2-ep2-etp1").layout_flags
    parts = run_ranks(report._quiet_measure, 4, [*BASE, *flags], 1)
    pieces = [piece for one in parts for piece in one.pieces]
    whole = assemble(pieces)
    assert sum(values.size for *_, values in pieces) == sum(one.size for one in whole.values())
