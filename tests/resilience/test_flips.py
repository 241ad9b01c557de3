"""The trials of figure 11 measure what they say: a flip is found, and a trial leaves no trace."""

from tests.checkpoint.small_run import small_run
from tests.ranks.harness import run_ranks
from tests.resilience.flip_trials import KINDS, Flip, Trials


def _some(flags: str, flips: list[Flip]) -> list:
    with small_run(flags) as run:
        trials = Trials(run)
        first = [trials.run_one(flip) for flip in flips]
        for _ in range(4):
            trials.step(trials.guard())
        return [first, trials.hashes() == trials.clean]


def test_trials_start_from_the_same_state():
    flips = [
        Flip("weight", "mantissa low", 1, 5),
        Flip("gradient after", "sign", 0, 6),
        Flip("moment", "exponent", 1, 7),
    ]
    for outcomes, is_clean in run_ranks(_some, 2, KINDS["plain fp32"][0], flips):
        assert [(one.by, one.steps) for one in outcomes] == [("replicas", 2)] * 3
        assert is_clean
