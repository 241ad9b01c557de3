"""The rank layout agrees with megatron-core's on every legal size up to 64 ranks."""

from __future__ import annotations

import warnings

import pytest

from megatron_ext.config import parse
from megatron_ext.mesh.grid import ROWS, block_size, format_grid
from megatron_ext.mesh.layout import PP_BEFORE_DP, PP_LAST, Layout, layout_of

WORLDS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 18, 20, 24, 27, 30, 32, 36, 40, 48, 60, 64]
DENSE_GROUPS = ("tp", "cp", "dp", "pp", "dp-cp", "tp-cp", "tp-pp", "tp-dp", "tp-dp-cp", "tp-cp-pp")
EXPERT_GROUPS = {"tp": "etp", "ep": "ep", "dp": "edp", "tp-ep": "etp-ep", "tp-ep-pp": "etp-ep-pp"}


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def legal_layouts(world: int, order: str) -> list[Layout]:
    found = []
    for pp in divisors(world):
        stage = world // pp
        dense = [(tp, cp) for tp in divisors(stage) for cp in divisors(stage // tp)]
        expert = [(etp, ep) for etp in divisors(stage) for ep in divisors(stage // etp)]
        for tp, cp in dense:
            for etp, ep in expert:
                dp, edp = stage // (tp * cp), stage // (etp * ep)
                if order == PP_LAST or pp == 1 or dp == edp:
                    found.append(Layout(world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, order=order))
    return found


def folds_once(layouts: list[Layout]) -> list[Layout]:
    """One layout for each dense fold and each expert fold: groups depend on their own fold only."""
    seen: dict[tuple, Layout] = {}
    for x in layouts:
        seen.setdefault(("dense", x.pp, x.tp, x.cp, x.order), x)
        seen.setdefault(("expert", x.pp, x.etp, x.ep, x.order), x)
    return list({id(x): x for x in seen.values()}.values())


@pytest.fixture(scope="module")
def rank_generator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's deprecations while it is imported
        from megatron.core.parallel_state import RankGenerator

    return RankGenerator


@pytest.mark.parametrize("order", [PP_LAST, PP_BEFORE_DP])
@pytest.mark.parametrize("world", range(1, 65))
def test_groups_agree_with_megatron_core(world, order, rank_generator):
    layouts = legal_layouts(world, order)
    assert layouts
    for x in folds_once(layouts):
        dense = rank_generator(tp=x.tp, ep=1, dp=x.dp, pp=x.pp, cp=x.cp, order=order)
        for axes in DENSE_GROUPS:
            assert x.groups(axes) == sorted(dense.get_ranks(axes)), (x, axes)
        expert = rank_generator(tp=x.etp, ep=x.ep, dp=x.edp, pp=x.pp, cp=1, order=order)
        for theirs, ours in EXPERT_GROUPS.items():
            assert x.groups(ours) == sorted(expert.get_ranks(theirs)), (x, ours)
        assert sorted(expert.get_ranks("pp")) == sorted(dense.get_ranks("pp")) == x.groups("pp")


@pytest.mark.parametrize("world", [6, 8, 12])
def test_coordinates_and_groups_say_the_same(world):
    for x in legal_layouts(world, PP_LAST):
        for axes in ("tp", "dp-cp", "ep", "edp", "etp-ep"):
            groups = x.groups(axes)
            assert sorted(r for g in groups for r in g) == list(range(world))
            for group in groups:
                fixed = [
                    {a: c for a, c in x.coordinates(r).items() if a not in axes.split("-")}
                    for r in group
                ]
                dense = axes in ("tp", "dp-cp")
                same = ("pp", "dp", "cp", "tp") if dense else ("pp", "edp", "ep", "etp")
                kept = [{a: f[a] for a in same if a in f} for f in fixed]
                assert all(k == kept[0] for k in kept)
                assert all(x.group_of(r, axes) == group for r in group)


def test_the_example_of_the_docstring():
    x = Layout(8, tp=2, pp=2, ep=4, etp=1)
    assert x.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert x.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert x.coordinates(6) == {"pp": 1, "dp": 1, "cp": 0, "tp": 0, "edp": 0, "ep": 2, "etp": 0}


def test_axes_of_both_folds_do_not_mix():
    with pytest.raises(ValueError, match="must join axes"):
        Layout(4, tp=2, ep=2, etp=1).groups("tp-ep")


@pytest.mark.parametrize(
    "sizes", [{"tp": 3}, {"ep": 3}, {"pp": 2, "tp": 2, "ep": 4, "etp": 1, "order": PP_BEFORE_DP}]
)
def test_illegal_sizes_are_refused(sizes):
    with pytest.raises(AssertionError):
        Layout(8, **sizes)


def test_a_grid_of_any_size_has_at_most_sixteen_rows():
    for world in WORLDS + [97, 100, 1000, 4096, 8192]:
        text = format_grid(Layout(world))
        rows = text.splitlines()[2:-1]
        assert 1 <= len(rows) <= ROWS
        assert world // block_size(world) == len(rows)


def test_a_small_grid_shows_each_rank():
    lines = format_grid(Layout(8, tp=2, pp=2, ep=4, etp=1)).splitlines()
    assert lines[0] == "8 ranks = pp 2 x dp 2 x cp 1 x tp 2 = pp 2 x edp 1 x ep 4 x etp 1"
    assert lines[1].split() == ["ranks", "pp", "dp", "cp", "tp", "|", "edp", "ep", "etp"]
    assert lines[8].split() == ["6", "1", "1", "0", "0", "|", "0", "2", "0"]
    assert lines[-1] == "groups of rank 0: tp: 0 1; dp: 0 2; pp: 0 4; ep: 0 1 2 3"


def test_layout_of_flags():
    argv = "--world-size 16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    argv += " --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --print-config json"
    x = layout_of(parse(argv.split(), {}).parallel)
    assert (x.dp, x.edp, x.etp, x.order) == (4, 2, 1, PP_LAST)
