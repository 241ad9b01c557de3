"""The scripts of launch/recipes and launch/slurm: one for each recipe, thin, and as they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from megatron_ext.config.recipes import CONFIGS
from tests.policy.test_configs import ROOT, ranks_of
from tests.recipes.published import MODELS

SHARED = ("ntasks-per-node", "gpus-per-node", "exclusive", "signal", "requeue", "open-mode")


def directives(name: str) -> dict[str, str]:
    """The #SBATCH lines of a file in launch/slurm."""
    text = (ROOT / "launch/slurm" / name).read_text()
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("model", [model.name for model in MODELS])
def test_the_job_has_the_nodes_of_the_layout_and_what_train_sbatch_asks_for(model):
    own, train = directives(f"{model}.sbatch"), directives("train.sbatch")
    ranks = ranks_of(CONFIGS / "layouts" / f"{model}.h100.yaml")
    assert int(own["nodes"]) * int(own["gpus-per-node"]) == ranks
    assert {name: own.get(name) for name in SHARED} == {name: train.get(name) for name in SHARED}
    text = (ROOT / "launch/slurm" / f"{model}.sbatch").read_text()
    assert f'exec bash launch/slurm/train.sbatch --config "{model}.${{MACHINE:-h100}}" "$@"' in text


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    command = ["bash", ROOT / "launch" / script, *words]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("machine", "ranks"), [("h100", 64), ("h200", 64), ("gb200", 16)])
def test_a_recipe_checks_the_layout_of_a_machine(machine, ranks):
    done = run("recipes/mixtral-8x7b.sh", "--dry-run", MACHINE=machine)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{ranks} ranks = ")


def test_a_recipe_takes_another_number_of_ranks_or_says_which():
    done = run("recipes/mixtral-8x7b.sh", "--dry-run", RANKS="128")
    assert done.stdout.startswith("128 ranks = ")
    done = run("recipes/mixtral-8x7b.sh", "--dry-run", RANKS="100")
    assert done.returncode == 64 and "use 32, 64, 128" in done.stderr


def test_an_unknown_recipe_gets_the_nearest_names():
    done = run("recipe.sh", "mixtral-7b", "--dry-run")
    assert done.returncode == 64 and "use mixtral-8x7b" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_of_a_scaled_recipe_shows_what_it_would_train():
    done = run("recipes/deepseek-v3.sh", "--dry-run", "--scale-down")
    assert done.stdout.startswith("4 ranks = pp 2 x dp 1 x cp 1 x tp 2")
    assert "scale-down: --num-experts 256 -> 8" in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_has_no_complaint():
    scripts = [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")]
    command = ["shellcheck", "-x", *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
