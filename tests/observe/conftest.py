"""A real, small training with everything on, made once: 4 ranks, two pipeline stages of two chunks,
experts over 2, resumed once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.mesh.forks import run_ranks
from tests.launch.conftest import tokens
from tests.ranks.tiny import pretrain

__all__ = ["tokens"]
ROOT = Path(__file__).parent.parent.parent
SMALL = """
--train-iters 6 --lr-warmup-iters 1 --eval-interval 3 --eval-iters 1 --log-interval 1
--seq-length 64 --max-position-embeddings 64 --hidden-size 32 --ffn-hidden-size 64
--moe-ffn-hidden-size 64 --timing-log-level 1 --save-interval 3 --log-routing-interval 2
""".split()
TRACED = 3
PROFILED = 4


@pytest.fixture(scope="session")
def trained(tokens, tmp_path_factory) -> Path:
    """The run directory of configs/quickstart.yaml in small."""
    folder = tmp_path_factory.mktemp("observed") / "run"
    where = ["--run-dir", folder, "--tokenizer-model", tokens / "bpe.model"]
    data = ["--data-path", "0.5", tokens / "code", "0.5", tokens / "english"]
    profile = f"--profile --profile-ranks 1 --profile-step-start {PROFILED} --profile-step-end"
    looks = [*profile.split(), PROFILED + 1, "--trace-schedule", TRACED]
    sinks = ["--prometheus-textfile", folder / "moe.prom"]
    flags = ["--config", ROOT / "configs/quickstart.yaml", *SMALL, *where, *data]
    resume = ["--load", folder / "checkpoints", "--train-iters", 8]
    run_ranks(pretrain, 4, [str(word) for word in [*flags, *looks, *sinks]], timeout_s=240)
    more = [*flags, *resume, *sinks, "--override-opt-param-scheduler"]
    run_ranks(pretrain, 4, [str(word) for word in more], timeout_s=240)
    return folder
