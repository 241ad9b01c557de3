"""The batch ramp against its definition."""

import pytest

from megatron_ext.train.batch_size import global_batch_size, samples_of_steps


def test_constant():
    assert global_batch_size(12345, 64) == 64
    assert samples_of_steps(10, 64) == 640


@pytest.mark.parametrize(
    ("consumed", "size"),
    [(0, 16), (99, 16), (100, 24), (299, 32), (300, 40), (399, 40), (400, 48), (10**9, 48)],
)
def test_ramp(consumed, size):
    assert global_batch_size(consumed, 48, [16, 8, 400]) == size


def test_ramp_rounds_down_where_asked():
    assert global_batch_size(100, 48, [16, 8, 400], multiple=16, round_down=True) == 16


def test_samples_of_steps_follows_the_ramp():
    consumed, ramp = 0, [16, 8, 400]
    for step in range(40):
        assert samples_of_steps(step, 48, ramp) == consumed
        consumed += global_batch_size(consumed, 48, ramp)
