"""Every command of README and the documents: a training is read as its launch would read it, a plan
is made, and what neither is has its place in ELSEWHERE with the test that runs it, or the reason
why none can.
"""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_ext.config import parse
from megatron_ext.config.recipes import CONFIGS, models
from megatron_ext.costs.dryrun import dry_run
from megatron_ext.planner.command import main as plan
from tests.policy.test_configs import ranks_of
from tests.policy.test_documents import DOCUMENTS, ROOT, commands

ELSEWHERE = {
    r"bash launch/quickstart\.sh|source \.venv": "tests/launch/test_quickstart.py",
    r"bash tests/run\.sh|make check": ".ci/run",
    r"python -m megatron_ext\.(generate|observe\.summary)": "tests/launch/test_quickstart.py",
    r"python -m megatron_ext\.observe\.report": "tests/observe/test_report.py",
    r"python -m megatron_ext\.checkpoint": "tests/checkpoint/test_same_run.py",
    r"python -m megatron_ext\.parity": "tests/parity/test_parity.py",
    r"python -m megatron_ext\.replay": "tests/resilience/test_replay.py",
    r"python -m megatron_ext\.hf": "tests/hf/test_training.py",
    r"python -m megatron_ext\.upcycle": "tests/upcycle/test_upcycle.py",
    r"python -m megatron_ext\.planner calibrate": "tests/planner/test_cluster.py",
    r"python -m data\.": "tests/data/test_prepare.py",
    r"python -m tests\.bench": "tests/bench/test_front_door.py",
    r"python -m tests\.faults|FAULTS_SEED": "tests/faults/test_short.py",
    r"(\.venv/bin/)?python -m pytest": "the tests that it names",
    r"(APEX\S+ APEX\S+ )?(\.venv-peers/bin/)?pip install": "needs a network or a compiler",
    r"git clone": "needs a network",
    r".* --load (DIR|DENSE/)": "a reader's own files; its flags: test_documents.py",
    r"python3\.11 -m venv": "makes an environment",
}
"""Beginning of a command -> the test that runs its like, or the reason why none does."""

TRAINING = re.compile(
    r"(?P<environment>(?:[A-Z_]+=\S+ )*)"
    r"(?:bash launch/recipes/(?P<recipe>\S+)\.sh"
    r"|sbatch (?P<options>(?:--\S+ )*)launch/slurm/(?P<job>\S+)\.sbatch"
    r"|(?:bash launch/run\.sh|python launch/local\.py) (?P<local>\d+)"
    r"|torchrun --nproc-per-node (?P<torchrun>\d+) pretrain_moe\.py"
    r"|(?:python )?pretrain_moe\.py)(?P<flags>.*)"
)
LAUNCHERS = re.compile(r"--restarts \d+")


def _documented() -> list[str]:
    return sorted({line for path in DOCUMENTS for line in commands(path.read_text())})


def _words(line: str) -> list[str] | None:
    """The flags that a command gives to pretrain_moe.py, with its number of ranks; None where the
    command is no training.
    """
    found = TRAINING.fullmatch(line)
    if found is None or any(re.match(own, line) for own in ELSEWHERE):
        return None
    words = shlex.split(LAUNCHERS.sub("", found["flags"]))
    model = found["recipe"] or found["job"]
    if model and model != "train":
        machine = re.search(r"MACHINE=(\S+)", found["environment"])
        name = f"{model}.{machine[1] if machine else 'h100'}"
        words = ["--config", name, *words]
        ranks = _of_job(found) or ranks_of(CONFIGS / "layouts" / f"{name}.yaml")
    else:
        ranks = int(found["local"] or found["torchrun"] or _of_job(found) or 4)
    return words if "--world-size" in words else [*words, "--world-size", str(ranks)]


def _of_job(found: re.Match[str]) -> int | None:
    """Ranks of all nodes, where the command names those of a node; the jobs have two nodes."""
    of_node = re.search(r"RANKS_PER_NODE=(\d+)", found["environment"])
    nodes = re.search(r"--nodes=(\d+)", found["options"] or "--nodes=2")
    return int(of_node[1]) * int(nodes[1] if nodes else 2) if of_node else None


@pytest.mark.parametrize("line", [line for line in _documented() if _words(line)])
def test_a_training_is_accepted(line, capsys):
    words = _words(line)
    if "--explain-flags" in words:
        assert parse(words, {}).action == "explain"
        return
    cfg = parse([*words, *([] if "--print-config" in words else ["--dry-run"])], {})
    assert cfg.action == "print-config" or "ranks = pp" in dry_run(cfg)


@pytest.mark.parametrize("line", [x for x in _documented() if "megatron_ext.planner " in x])
def test_a_plan_is_made(line, tmp_path, monkeypatch, capsys):
    words = shlex.split(line)[3:]
    if words[0] in ("calibrate", "search"):  # tests/planner: seconds and files of their own
        return
    monkeypatch.chdir(tmp_path)
    plan(words)
    assert capsys.readouterr().out


def test_every_other_command_has_a_test_or_a_reason():
    for line in _documented():
        if _words(line) or "megatron_ext.planner " in line:
            continue
        assert any(re.match(pattern, line) for pattern in ELSEWHERE), f"who runs {line!r}?"
    for place in ELSEWHERE.values():
        assert " " in place or (ROOT / place).exists(), place


@pytest.mark.parametrize("model", [m for m in models() if (CONFIGS / "layouts").glob(f"{m}.*")])
def test_every_recipe_can_be_tried_without_data_for_fifty_steps(model):
    """README's five minutes: the warm-up and the last decay keep their shares, no tokenizer of a
    hub is read, and the vocabulary stays.
    """
    layout = CONFIGS / "layouts" / f"{model}.h100.yaml"
    if not layout.exists():
        pytest.skip("no recipe of a published model")
    ranks = ["--world-size", str(ranks_of(layout)), "--dry-run"]
    cfg = parse(["--config", f"{model}.h100", "--mock-data", "--train-iters", "50", *ranks], {})
    published = parse(["--config", f"{model}.h100", "--mock-data", *ranks], {})
    assert (cfg.train.train_iters, cfg.train.train_samples) == (50, None)
    assert 0 < cfg.schedule.lr_warmup_iters < 5
    assert cfg.data.tokenizer_type == "NullTokenizer" and cfg.data.tokenizer_model is None
    assert cfg.model.vocab_size + 1 == cfg.model.padded_vocab_size
    assert any("is a trial of the file's schedule" in text for text in cfg.warnings)
    own = (CONFIGS / f"{model}.yaml").read_text()
    for unit in ("iters", "samples"):
        warmup = getattr(published.schedule, f"lr_warmup_{unit}")
        written = re.search(rf"^lr-warmup-{unit}: (\d+)", own, re.M)
        assert (warmup or None) == (int(written[1]) if written else None)


def test_a_flag_of_the_same_command_wins():
    words = ["--config", "qwen3-30b-a3b.h100", "--world-size", "32", "--train-iters", "50"]
    cfg = parse([*words, "--mock-data", "--lr-warmup-iters", "7", "--dry-run"], {})
    assert cfg.schedule.lr_warmup_iters == 7
    long = parse([*words[:4], "--mock-data", "--train-iters", "3000", "--dry-run"], {})
    assert long.schedule.lr_warmup_iters == 2000
