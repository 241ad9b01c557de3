"""Point 6, rows 38 and 39: a run cut at any step goes on bit for bit.

One run of 12 steps without a stop, and the same run that stops at each of its cuts (by
--exit-interval) and is started again: history (loss, gradient norm, samples) and each rank's final
state are equal. The cuts lie in the middle of the warm-up and of the batch ramp, at an evaluation,
at a step that is no save step, at the end of an epoch, and before the last step; saves are
asynchronous.
"""

import pytest

from tests.ranks.fingerprint import (
    differing,
    history,
    recorded,
    recorded_marks,
    repeated_steps,
)
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain

STEPS = 12
FLAGS = (
    "--train-samples 84 --lr-warmup-samples 16 --rampup-batch-size 4 4 12 --eval-iters 1"
    " --eval-interval 4 --save-interval 2 --async-save --hidden-dropout 0.1"
    " --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    " --use-distributed-optimizer --pipeline-model-parallel-size 2"
    " --expert-model-parallel-size 2"
).split()
CUTS = {"bf16": (2, 4, 5, 7, 11), "fp32": (7,)}


def _corpus(folder):
    """3200 tokens: 36 documents train, 44 samples an epoch, which end with step 7."""
    import numpy as np

    from data.indexed import write_pair

    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 250, size=80) for _ in range(40)]
    write_pair(folder / "corpus", documents, np.uint16)
    return folder / "corpus"


def _recorded(argv: list[str], folder) -> None:
    """pretrain_moe.py with these flags; the final state of each rank is noted in `folder`."""
    with recorded(folder):
        pretrain(argv)


@pytest.mark.parametrize("precision", CUTS)
def test_resume_is_bitwise(precision, tmp_path):
    base = [flag for flag in TINY if flag != "--mock-data"]
    del base[base.index("--train-iters") : base.index("--train-iters") + 2]
    base += FLAGS + (["--bf16"] if precision == "bf16" else [])
    base += ["--data-path", str(_corpus(tmp_path)), "--split", "90,10,0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(_recorded, 4, [*base, "--run-dir", str(whole)], whole / "state")
    load: list[str] = []
    for cut in CUTS[precision]:
        argv = [*base, "--run-dir", str(parts), "--exit-interval", str(cut), *load]
        run_ranks(pretrain, 4, argv)
        assert max(history(parts)) == cut
        load = ["--load", str(parts / "checkpoints")]
    run_ranks(_recorded, 4, [*base, "--run-dir", str(parts), *load], parts / "state")
    assert sorted(history(whole)) == list(range(1, STEPS + 1))
    assert history(parts) == history(whole)
    assert repeated_steps(parts) == []
    marks, again = recorded_marks(whole / "state"), recorded_marks(parts / "state")
    assert len(marks) == 4
    for rank, wanted in marks.items():
        assert differing(wanted, again[rank]) == []
