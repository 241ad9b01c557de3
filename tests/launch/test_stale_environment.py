"""What another launch has left in the shell misleads neither the launcher nor the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.attempts import forget_ranks, rank_environment
from launch.words import Options

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
WHOLE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GROUP_RANK": "1"}
OF_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
OF_TORCHRUN |= {"TORCHELASTIC_RESTART_COUNT": "2"}
STALE = {
    "RANK alone": {"RANK": "3"},
    "RANK and WORLD_SIZE": {"RANK": "3", "WORLD_SIZE": "4"},
    "a whole launch": WHOLE,
    "torchrun's": {**WHOLE, **OF_TORCHRUN},
    "srun's": {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "MASTER_ADDR": "127.0.0.1"},
}


def _run(program, words, stale):
    clean = {name: value for name, value in os.environ.items() if name not in WHOLE}
    command = [sys.executable, str(ROOT / program), *words]
    return subprocess.run(
        command, env={**clean, **stale}, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("name", STALE)
def test_the_launcher_says_what_is_wrong(name):
    done = _run("launch/local.py", ["2", "--no-such-flag"], STALE[name])
    assert done.returncode == 64
    assert done.stderr.startswith("FATAL 64 rank=0 what=--no-such-flag"), done.stderr


def test_the_launcher_takes_its_own_number_of_ranks():
    """WORLD_SIZE=4 of another launch: `run.sh 2` has two."""
    words = ["2", "--config", "quickstart", "--pipeline-model-parallel-size", "3"]
    done = _run("launch/local.py", words, WHOLE)
    assert done.returncode == 64 and "--world-size 2 " in done.stderr and "= 4" not in done.stderr


def test_ranks_get_nothing_of_another_launch(monkeypatch):
    for name, value in {**WHOLE, **OF_TORCHRUN, "KEPT": "1"}.items():
        monkeypatch.setenv(name, value)
    environ = dict(os.environ)
    forget_ranks(environ)
    left = [name for name in environ if name in WHOLE or name.startswith("TORCHELASTIC_")]
    assert left == [] and environ["KEPT"] == "1"
    monkeypatch.setattr(os, "environ", environ)
    mine = rank_environment(Options(2, ()), 1, 0)
    assert (mine["RANK"], mine["WORLD_SIZE"], mine["LOCAL_WORLD_SIZE"]) == ("1", "2", "2")
    assert "MASTER_PORT" not in mine and "TORCHELASTIC_RUN_ID" not in mine
