"""A weight that breaks between two steps is in no checkpoint, and is named."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

from megatron_ext.checkpoint import folder
from megatron_ext.checkpoint.reader import StoredTensors
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

FLAGS = "--train-iters 6 --save-interval 1 --bf16 --use-distributed-optimizer".split()


def _train(flags: list[str], kind: str, value: float) -> tuple[int, str]:
    """Before step 4 one number of rank 1 breaks; the exit code and stderr of this rank."""
    from megatron_ext.observe import memory
    from megatron_ext.train import loop

    stock, text = loop.train_step, io.StringIO()

    def step(state, *args, **kwargs):
        if state.progress.step == 3 and torch.distributed.get_rank() == 1:
            places = [one for name, one in memory.states(state.optimizer) if kind in name]
            places[0].view(-1)[-1] = value
        return stock(state, *args, **kwargs)

    loop.train_step = step
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        try:
            pretrain(flags)
        except SystemExit as error:
            return error.code, text.getvalue()
    return 0, text.getvalue()


@pytest.mark.parametrize("kind", ["master weight", "exp_avg of"])
def test_no_checkpoint_holds_it(tmp_path, kind):
    flags = [*TINY, *FLAGS, "--run-dir", str(tmp_path)]
    outcomes = run_ranks(_train, 2, flags, kind, float("nan"))
    assert [code for code, _ in outcomes] == [76, 76]
    (line,) = [x for _, text in outcomes for x in text.splitlines() if x.startswith("FATAL")]
    # the update has spread it: every rank holds the broken weight, the first one names it
    assert "after step 4 1 of" in line and "values of weight decoder." in line
    assert "on rank 0 are not finite" in line
    save = tmp_path / "checkpoints"
    assert folder.steps(save) == [3, 2, 1] and folder.latest_step(save) == 3
    stored = StoredTensors(save / folder.step_name(3))
    numbers = [stored.read(name) for name in stored.names()]
    assert all(bool(torch.isfinite(one).all()) for one in numbers if one.is_floating_point())
    assert read_metrics(tmp_path, "step") == [1, 2, 3, 4]
