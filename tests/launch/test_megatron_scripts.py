"""Launch scripts of Megatron-LM for `pretrain_gpt.py`: only the program's name is changed.

tests/launch/megatron/*.sh have the shapes of public scripts (an example, a benchmark zoo, a model
kit, a framework's output); `torchrun` there stands in for the launcher, at the script's world size.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.programs import ROOT, environment
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import pretrain, read_metrics

FOLDER = ROOT / "tests/launch/megatron"
WORLD = {"mixtral_8x7b": 64, "deepseek_v3": 1024, "qwen3_30b_a3b": 32, "mixtral_8x22b": 256}
PUBLISHED = {"qwen3_30b_a3b": (30.53e9, 3.35e9), "mixtral_8x7b": (46.70e9, 12.88e9)}
"""Parameters, and those a token meets, where the script says its vocabulary or it is small."""


def start(script: str, extra: str, program: Path, tmp_path: Path) -> str:
    """Output of a script in which only `pretrain_gpt.py` was replaced; `extra` comes last."""
    changed = tmp_path / f"{script}.sh"
    text = (FOLDER / f"{script}.sh").read_text(encoding="utf-8")
    assert text.count(" pretrain_gpt.py ") == 1
    changed.write_text(text.replace(" pretrain_gpt.py ", f" {program} "), encoding="utf-8")
    env = environment()
    env |= {"PATH": f"{FOLDER}{os.pathsep}{env['PATH']}", "PRETRAIN_EXTRA": extra}
    done = subprocess.run(
        ["bash", str(changed)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def words_of(script: str, tmp_path: Path) -> list[str]:
    """The words that the program of a script is given."""
    program = tmp_path / "words.py"
    program.write_text("import json, sys\nprint(json.dumps(sys.argv[1:-1]))\n", encoding="utf-8")
    return json.loads(start(script, "--end", program, tmp_path))


@pytest.mark.parametrize("script", WORLD)
def test_every_rule_holds_at_the_scripts_world_size(script, tmp_path):
    shown = start(script, "--dry-run --no-check-files", ROOT / "pretrain_moe.py", tmp_path)
    assert f"{WORLD[script]} ranks = " in shown
    assert shown.rstrip().endswith("dry run: every rule holds; nothing was started")
    assert shown.count("warning: no effect") <= 1
    if script in PUBLISHED:
        line = next(x for x in shown.splitlines() if x.startswith("parameters: "))
        total, active = (int(part.split(")")[0]) for part in line.split("(")[1:3])
        for count, published in zip((total, active), PUBLISHED[script], strict=True):
            assert abs(count / published - 1) < 0.025  # Mixtral: without its tables
    assert not list(tmp_path.glob("runs*"))


def test_a_real_command_line_is_explained(tmp_path):
    shown = start("deepseek_v3", "--explain-flags", ROOT / "pretrain_moe.py", tmp_path)
    used, no_effect, other, derived, _ = shown.split("\n\n")
    given = [word for word in words_of("deepseek_v3", tmp_path) if word.startswith("--")]
    for flag in given:
        rows = [x for g in (used, no_effect, other) for x in g.splitlines() if x.split()[0] == flag]
        assert len(rows) == 1, flag
    assert "--fp8-recipe" in no_effect and "fp8 and fp4 are not built yet" in no_effect
    assert "--moe-enable-deepep" in other and "--moe-flex-dispatcher-backend deepep" in other
    assert "--ckpt-local-dir" in derived and "/nvme/checkpoints" in derived


def test_the_words_of_a_script_train_a_tiny_model_of_the_same_kind(tmp_path):
    words = words_of("deepseek_v3", tmp_path)
    run = tmp_path / "run"
    run_ranks(pretrain, 4, [*words, "--scale-down", "--run-dir", str(run)])
    losses = read_metrics(run)
    assert len(losses) == 3
    assert all(abs(loss - math.log(250)) < 1.0 for loss in losses), losses
