"""The matrix in about four minutes of a quiet machine: every row that is built here, with few
trials. FAULTS_SEED=N tries other faults; the seed is printed where a row fails. The whole one:
python -m tests.faults.
"""

from __future__ import annotations

import os

import pytest

from tests.faults import dashboard, points, ranks
from tests.faults.bench import Bench
from tests.faults.cell import Wrong, refused, run_cases
from tests.faults.outcome import TRIED, Outcome, folded, total
from tests.faults.registry import ROWS, chosen

SEED = int(os.environ.get("FAULTS_SEED", "1"))
CASES = {18: 500, 19: 500, 20: 500, 21: 20, 25: 20, 26: 400, 29: 6, 41: 20, 43: 30, 45: 60}
TRIALS = {
    **{1: 8, 2: 1, 4: 2, 5: 1, 7: 1, 8: 100, 9: 100, 10: 2, 11: 2, 17: 1, 27: 100, 28: 2},
    **{30: 1, 31: 1, 32: 1, 34: 1, 37: 1, 38: 1, 39: 1, 40: 1, 42: 1, 44: 1},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """One folder and its references for all rows; orphans of our ranks come to us meanwhile."""
    ranks.become_subreaper()
    yield Bench(tmp_path_factory.mktemp("faults"), SEED)
    ranks.become_subreaper(False)


def check(outcomes: list[Outcome]) -> None:
    """Nothing is silent, executed, hung, false or failed, and something was tried."""
    if not dashboard.is_clean(outcomes):
        pytest.fail(f"FAULTS_SEED={SEED}\n" + "\n".join(dashboard.complaints(outcomes)))
    if not total(outcomes, *TRIED):
        pytest.skip(outcomes[0].detail)


@pytest.mark.parametrize("row", sorted(CASES))
def test_files(row, tmp_path):
    check(ROWS[row].files(tmp_path / "row", SEED, CASES[row]))


@pytest.mark.parametrize("row", sorted(TRIALS))
def test_runs(row, bench):
    bench.begin(row)
    check(ROWS[row].runs(bench, TRIALS[row]))


def test_every_row_of_the_matrix_has_a_line():
    assert list(ROWS) == list(range(1, len(ROWS) + 1))
    for row in ROWS.values():
        assert sum(map(bool, (row.files, row.runs, row.tests, row.missing))) == 1
    assert chosen("3,8-10,8") == [3, 8, 9, 10]
    with pytest.raises(ValueError, match=f"no row {len(ROWS) + 1}"):
        chosen(f"40-{len(ROWS) + 1}")


def test_the_judge_sees_each_bad_end(tmp_path):
    def sleep():
        import time

        time.sleep(60)

    def die():
        os._exit(3)

    def silent():
        refused(lambda: None)

    def false():
        raise Wrong("false", "a good file was refused")

    def eat():
        return bytearray(b"x") * (600 << 20)

    canary = tmp_path / "canary"
    cases = [("s", silent), ("e", canary.touch), ("h", sleep), ("d", die), ("f", false)]
    cases += [("m", eat), ("p", lambda: None), ("b", lambda: 1 // 0)]
    found = run_cases(1, cases, canary, limit_s=3)
    assert [outcome.verdict for outcome in found] == [
        *("silent", "executed", "hung", "failed", "false", "failed", "passed", "failed")
    ]
    assert not canary.exists()
    assert len(dashboard.complaints(found)) == 7
    assert not dashboard.is_clean(found)
    assert total(folded(found), "passed") == 1


def test_faults_are_put_at_their_points(tmp_path):
    """Each wrapped name exists, so that no point is silently missed; kills are decided by the
    seed.
    """
    for name, point in points.POINTS.items():
        if point.wrap and not point.wrap.startswith("optimizer"):
            owner, attribute = points.find(point.wrap)
            assert callable(getattr(owner, attribute)), name
    one, other = (Bench(tmp_path / str(n), 5) for n in range(2))
    assert [one.kill() for _ in range(50)] == [other.kill() for _ in range(50)]
    drawn = {fault.point for fault in (one.kill() for _ in range(500))}
    assert drawn == set(points.POINTS)
