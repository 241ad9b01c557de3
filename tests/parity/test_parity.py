"""The parity check itself: names, comparisons, and that it finds planted errors."""

import numpy as np
import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.parity import cases
from megatron_ext.parity.compare import TOLERANCES, compare
from megatron_ext.parity.measure import assemble
from megatron_ext.parity.names import parse_layout
from tests.ranks.harness import run_ranks


def test_the_name_of_the_issue():
    layout = parse_layout("tp2-sp-pp2-vpp2-cp2.p2p-dp2-dopt-ep4-etp1-alltoall")
    assert layout.world_size == 16
    assert layout.sizes == {"tp": 2, "pp": 2, "vpp": 2, "cp": 2, "dp": 2, "ep": 4, "etp": 1}
    assert layout.flags[layout.flags.index("--cp-comm-type") + 1] == "p2p"
    assert "--use-distributed-optimizer" in layout.flags


def test_parts_in_any_order_and_left_out():
    one, other = parse_layout("dopt-dp2-tp2"), parse_layout("tp2-sp-dp2-dopt")
    assert one.flags == other.flags and one.world_size == 4


@pytest.mark.parametrize("name", ["tp2-xp3", "cp2.ring", "tp0", "pp2.p2p"])
def test_unknown_parts_are_refused(name):
    with pytest.raises(ConfigError, match="not a part of a layout"):
        parse_layout(name)


def test_switches():
    case = cases.parse_case("cp4.a2a+p2p-dp2+mtp+accumulate4")
    assert case.layout.cp_kind == "a2a+p2p" and case.switches == ("mtp", "accumulate4")
    assert case.batch_flags[-1] == "8" and "--mtp-num-layers" in case.model_flags
    with pytest.raises(ConfigError, match="not a switch"):
        cases.parse_case("tp2+nonsense")


def test_all_cases_cover_every_pair():
    """With a rule-free trainer every pair of factor values is in some case of up to 16 ranks."""
    chosen, impossible = cases.all_cases(lambda case: True, 16)
    assert len(chosen) >= 64 and all(case.layout.world_size <= 16 for case in chosen)
    assert cases.FIVE_DIMENSIONS in [case.name for case in chosen]
    # what cannot fit into 16 ranks: cp4 with dp4 and more
    assert all({"cp", "dp", "pp", "tp"} >= {pair[0][0], pair[1][0]} for pair in impossible)


def _side(**changes):
    gradients = {"a": np.ones((4, 3), np.float32), "b": np.arange(6, dtype=np.float32)}
    side = {"losses": [2.0, 1.5], "counts": [[3, 5]], "samples": [0, 1], "gradients": gradients}
    return {**side, **changes}


def test_equal_sides_pass():
    assert compare(_side(), _side(), TOLERANCES["fp32"]).passed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"losses": [2.00001, 1.5]}, "first loss"),
        ({"losses": [2.0, 1.501]}, "loss curve"),
        ({"counts": [[4, 4]]}, "assignments"),
        ({"samples": [0, 2]}, "samples"),
        ({"gradients": {"a": np.ones((4, 3), np.float32)}}, "only in one rank"),
        ({"gradients": {"a": np.ones((4, 3)), "b": np.arange(6) * 1.01}}, "gradient of b"),
        ({"gradients": {"a": np.full((4, 3), np.nan), "b": np.arange(6)}}, "gradient of a"),
    ],
)
def test_each_difference_is_found(changes, reason):
    comparison = compare(_side(**changes), _side(), TOLERANCES["fp32"])
    assert not comparison.passed and any(reason in text for text in comparison.reasons)


def test_assemble_places_pieces():
    pieces = [
        ("w", (2, 4), (0, 0), np.ones((4,), np.float32)),  # a prepended axis
        ("w", (2, 4), (1, 2), np.full((2,), 2.0, np.float32)),
    ]
    whole = assemble(pieces)["w"]
    assert whole[0].tolist() == [1, 1, 1, 1] and whole[1, 2:].tolist() == [2, 2]
    assert np.isnan(whole[1, :2]).all()


def _compare_with(layout: str, break_it: bool):
    """One case, run from here; with the stock gradient group of experts if `break_it`."""
    import argparse

    from megatron_ext.moe.experts import GroupedExperts
    from megatron_ext.parity import report

    if break_it:
        build = GroupedExperts._parameter

        def stock(self, shape, split_dim):
            parameter = build(self, shape, split_dim)
            parameter.allreduce = self.ep_group.size() == 1
            return parameter

        GroupedExperts._parameter = stock
    args = argparse.Namespace(dtype="fp32", steps=2, timeout_s=60)
    base = ["--config", "configs/parity.yaml", "--device", "cpu", "--train-iters", "2"]
    (row,) = report.run_all([cases.parse_case(layout)], base, args)
    return row.passed, row.comparison.worst_tensor, row.comparison.gradient, row.comparison.loss


def test_a_planted_error_is_found_and_named(monkeypatch):
    """Stock expert gradients at tp2 etp1 ep1: the loss agrees, the gradient does not."""
    from megatron_ext.moe import experts

    monkeypatch.setattr(experts.GroupedExperts, "_parameter", experts.GroupedExperts._parameter)
    passed, _, gradient, _ = _compare_with("tp2-sp", break_it=False)
    assert passed and gradient < 1e-5
    passed, tensor, gradient, loss = _compare_with("tp2-sp", break_it=True)
    assert not passed and "experts" in tensor
    assert gradient > 0.1 and loss < 1e-6


def test_run_ranks_names_a_dead_rank():
    import os

    from tests.ranks.harness import RanksFailedError

    with pytest.raises(RanksFailedError, match="rank 0: died with exit code"):
        run_ranks(os._exit, 1, 9)
