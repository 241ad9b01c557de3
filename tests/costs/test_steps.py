"""Where a run ends: the batch ramp against its definition, and one rule for steps and samples."""

import random
from types import SimpleNamespace

import pytest

from megatron_ext.costs.steps import End, end_of, global_batch_size, size


def _train(batch, *, iters=None, samples=None, ramp=None, round_down=False):
    return SimpleNamespace(
        global_batch_size=batch,
        train_iters=iters,
        train_samples=samples,
        rampup_batch_size=ramp,
        decrease_batch_size_if_needed=round_down,
    )


def test_constant():
    assert global_batch_size(12345, 64) == 64
    assert end_of(_train(64, iters=10), 1) == End(10, 640)


@pytest.mark.parametrize(
    ("consumed", "batch"),
    [(0, 16), (99, 16), (100, 24), (299, 32), (300, 40), (399, 40), (400, 48), (10**9, 48)],
)
def test_ramp(consumed, batch):
    assert global_batch_size(consumed, 48, [16, 8, 400]) == batch


def test_ramp_rounds_down_where_asked():
    assert global_batch_size(100, 48, [16, 8, 400], multiple=16, round_down=True) == 16


@pytest.mark.parametrize(
    ("train", "at", "end"),
    [
        (_train(8, samples=100), (0, 0), (12, 96)),  # the last 4 are dropped
        (_train(8, samples=96), (0, 0), (12, 96)),
        (_train(8, samples=100, ramp=[2, 2, 20]), (0, 0), (16, 94)),  # 2 2 2 2 4 4 6, then 8s
        (_train(4, iters=12), (6, 48), (12, 72)),  # resumed with half the batch
        (_train(16, iters=12), (6, 48), (12, 144)),  # with twice
        (_train(4, samples=100), (6, 48), (19, 100)),
        (_train(32, samples=100), (6, 48), (7, 80)),
        (_train(8, iters=4), (6, 48), (6, 48)),  # beyond the end: nothing more
        (_train(8, samples=20), (6, 48), (6, 48)),
        (_train(8, samples=7), (0, 0), (0, 0)),
    ],
)
def test_the_end(train, at, end):
    assert end_of(train, 1, *at) == end


def test_any_run_ends_where_its_steps_end():
    """Any batch, ramp, length, dp, and resume with another batch: stepping one by one while a whole
    batch is left arrives at `end_of`, and asking again on the way gives the same end.
    """
    dice = random.Random(13)
    for _ in range(600):
        unit = dice.choice([1, 2, 3, 4])
        batch = unit * dice.randint(1, 9)
        start, growth = dice.randint(unit, batch), dice.randint(1, batch)
        ramp = [start, growth, dice.randint(1, 300)] if dice.random() < 0.6 else None
        length = dice.randint(batch, 500)
        kind = {"samples": length} if ramp or dice.random() < 0.5 else {"iters": length // batch}
        train = _train(batch, ramp=ramp, round_down=ramp is not None, **kind)
        step = dice.randint(0, 20)
        at = (step, step * unit * dice.randint(1, 9))
        end = end_of(train, unit, *at)
        step, consumed = at
        while (train.train_iters is None or step < train.train_iters) and (
            train.train_samples is None
            or consumed + size(train, unit, consumed) <= train.train_samples
        ):
            assert end_of(train, unit, step, consumed) == end
            assert size(train, unit, consumed) % unit == 0
            step, consumed = step + 1, consumed + size(train, unit, consumed)
        assert End(step, consumed) == end
