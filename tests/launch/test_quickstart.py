"""The steps of launch/quickstart.sh in small: tokens, training, resume, text, summary page."""

from __future__ import annotations

import json
import sys

import pytest

from data import unigram
from tests.launch.programs import ROOT, launch, run

SMALL = """
--train-iters 4 --lr-warmup-iters 1 --eval-iters 1 --log-interval 1 --global-batch-size 16
--seq-length 64 --max-position-embeddings 64 --hidden-size 32 --ffn-hidden-size 64
--moe-ffn-hidden-size 64 --expert-model-parallel-size 1
""".split()


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    """A run directory: configs/quickstart.yaml in small on 2 ranks, resumed once."""
    folder = tmp_path_factory.mktemp("run")
    where = ["--run-dir", folder, "--tokenizer-model", tokens / "bpe.model"]
    data = ["--data-path", "0.5", tokens / "code", "0.5", tokens / "english"]
    flags = ["--config", ROOT / "configs/quickstart.yaml", *SMALL, *where, *data]
    resume = ["--load", folder / "checkpoints", "--train-iters", "6"]
    for more in ([], [*resume, "--override-opt-param-scheduler"]):
        done = launch(2, *flags, *more)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_page_shows_everything(trained, tokens):
    """Generation from the checkpoint, the baseline, and the page that quickstart.sh ends with."""
    writing = [sys.executable, "-m", "megatron_ext.generate", "--load", trained / "checkpoints"]
    sample = run([*writing, "--prompt", "def ", "--max-new-tokens", "8"])
    assert sample.returncode == 0 and sample.stdout.startswith("def "), sample.stderr[-2000:]
    (trained / "sample.txt").write_text(sample.stdout)
    kind = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {tokens}/bpe.model"
    blend = f"--data-path 0.5 {tokens}/code 0.5 {tokens}/english --split 95,5,0"
    unigram.main([*blend.split(), *kind.split(), "--out", str(trained / "data/unigram.json")])
    shown = run([sys.executable, "-m", "megatron_ext.observe.summary", trained])
    assert (shown.returncode, shown.stderr) == (0, "")
    page = shown.stdout
    baseline = json.loads((trained / "data/unigram.json").read_text())["bits_per_byte"]
    assert page.startswith(f"{trained}: 6 steps, 6,144 tokens")
    assert "2 ranks = pp 2 x dp 1" in page
    assert f"unigram baseline   {baseline:.3f} bits a byte" in page
    assert "Expert load of step 6" in page and page.count("busiest") == 4
    assert "step      1   lm loss" in page and "step      6   lm loss" in page
    assert f"--load {trained}/checkpoints --train-iters 66" in page
    assert "  def " in page
    assert "tests        bash tests/run.sh" in page


def test_the_resume_command_of_the_page_works(trained):
    """Also with another number of ranks than config.yaml names."""
    config = ["--config", trained / "config.yaml", "--load", trained / "checkpoints"]
    fewer = ["--pipeline-model-parallel-size", "1", "--num-virtual-stages-per-pipeline-rank", "1"]
    more = ["--train-iters", "7", "--override-opt-param-scheduler", "--run-dir", trained / "more"]
    done = launch(1, *config, *more, *fewer)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at step 6" in done.stdout
