"""A folder that a person would name: a run, its checkpoints, one of its steps."""

from __future__ import annotations

import pytest

from megatron_ext.checkpoint import folder, starting
from megatron_ext.checkpoint.__main__ import run as command
from megatron_ext.config import parse
from megatron_ext.errors import ConfigError
from megatron_ext.hf.exporter import open_checkpoint
from tests.checkpoint.small_disk import write_step
from tests.ranks.tiny import TINY

NAMES = {
    "": (None, 8),
    "checkpoints": (None, 8),
    "checkpoints/": (None, 8),
    "checkpoints/step_00000004": (4, 4),
}
"""Name below the run -> (step that it says, step that is meant)."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    for step in (4, 8):
        write_step(root / "checkpoints", step, float(step))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_every_program_understands_it(run, name, capsys, monkeypatch):
    said, meant = NAMES[name]
    path, directory = run / name, run / "checkpoints"
    assert folder.named(path) == (directory, said)
    assert open_checkpoint(path, None).record["step"] == meant
    command(["verify", str(path)])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ([f"step={said}"] if said else ["step=8", "step=4"])
    command(["list", str(path)])
    assert capsys.readouterr().out.count("\n") == 3
    assert command(["diff", str(path), str(directory / folder.step_name(meant))]) == 0
    cfg = starting.named_load(parse([*TINY, "--load", str(path)], {}))
    assert (cfg.checkpoint.load, cfg.checkpoint.ckpt_step) == (str(directory), said)
    monkeypatch.chdir(run)
    if name:
        assert folder.named_step(type(run)(name), None)[1] == said


def test_two_steps_are_refused(run):
    path = run / "checkpoints/step_00000004"
    assert folder.named_step(path, 4) == (run / "checkpoints", 4)
    with pytest.raises(ConfigError, match="--ckpt-step 8, but .* is step 4"):
        folder.named_step(path, 8)
    with pytest.raises(ConfigError):
        starting.named_load(parse([*TINY, "--load", str(path), "--ckpt-step", "8"], {}))


def test_what_is_no_run_is_taken_as_it_is(tmp_path):
    for name in ("none", "step_00000004", "empty"):
        assert folder.named(tmp_path / name) == (tmp_path / name, None)


def test_a_step_of_the_own_run_goes_back(run):
    words = [*TINY, "--run-dir", str(run), "--load"]
    (run / "metrics.jsonl").write_text('{"step": 8}\n')
    assert starting.plan(parse([*words, str(run)], {}), {}).goes_on
    again = starting.plan(parse([*words, str(run / "checkpoints/step_00000004")], {}), {})
    assert again.goes_back and not again.goes_on
