"""A flat range as boxes: the boxes hold exactly the elements of the range, in its order."""

import pytest
import torch

from megatron_ext.checkpoint.shards import boxes


def _elements(shape, start, stop):
    """The flat indices that the boxes cover, box after box."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    found = []
    for offset, size in boxes(shape, start, stop):
        found += numbers[tuple(slice(o, o + s) for o, s in zip(offset, size))].flatten().tolist()
    return found


def test_the_example_of_the_docstring():
    assert list(boxes((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 1, 4), (2, 3, 2, 3), (1, 1), (5, 1)])
def test_every_range_of_every_shape(shape):
    size = torch.Size(shape).numel()
    for start in range(size + 1):
        for stop in range(start, size + 1):
            assert _elements(shape, start, stop) == list(range(start, stop))


def test_few_boxes_however_long_the_range():
    """At most 2 * dims - 1 boxes: a head and a tail for each dim and one body."""
    shape = (6, 5, 4, 3)
    counts = [len(list(boxes(shape, a, b))) for a in range(360) for b in range(a, 361, 7)]
    assert max(counts) == 7
