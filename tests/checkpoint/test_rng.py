"""Random streams as tensors: what is drawn next is the same after a round trip."""

import random

import numpy as np
import torch

from megatron_ext.checkpoint import rng


def _draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist()


def test_all_streams_continue():
    random.seed(3)
    random.gauss(0, 1)  # leaves a spare Gaussian, which is part of the state
    np.random.seed(4)
    np.random.randn()
    torch.manual_seed(5)
    streams = {name: stream.clone() for name, stream in rng.capture().items()}
    wanted = [_draw() for _ in range(3)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    rng.restore(streams)
    assert [_draw() for _ in range(3)] == wanted


def test_encodings_have_a_fixed_length():
    """Rows of one tensor over all ranks: with and without a spare Gaussian."""
    random.seed(1)
    without = rng.encode_python(random.getstate())
    random.gauss(0, 1)
    with_spare = rng.encode_python(random.getstate())
    assert without.shape == with_spare.shape == (628,)
    assert rng.decode_python(with_spare) == random.getstate()
    assert rng.encode_numpy(np.random.get_state()).shape == (627,)
