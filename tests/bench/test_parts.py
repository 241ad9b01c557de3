"""Time by part: outermost ranges count once, a backward node goes to the part that made it."""

from types import SimpleNamespace

from tests.bench.parts import BACKWARD, RANGE, floors, milliseconds
from tests.bench.shapes import Shape


def _event(name: str, start: int, end: int, number: int = -1):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, sequence_nr=number)


def test_backward_nodes_go_to_the_part_that_made_them():
    seen = [
        _event(RANGE + "experts", 0, 4000),
        _event("aten::mm", 1000, 2000, 7),
        _event(RANGE + "norms", 2500, 3000),  # inside of another part: counts there
        _event("aten::add", 5000, 6000, 8),
        _event(BACKWARD + "AddBackward0", 7000, 7500, 8),
        _event(BACKWARD + "MmBackward0", 8000, 11000, 7),
        _event("aten::mm", 8500, 10000, 7),
        _event(BACKWARD + "torch::autograd::AccumulateGrad", 12000, 12250),
    ]
    found = milliseconds(reversed(seen))
    assert (found["experts"], found["norms"], found["gradients"]) == (7.0, 0.0, 0.25)
    assert found["other operations"] == 1.5


def test_floors_are_work_over_rates():
    shape = Shape(64, 2, 2, 4, 2, 32, 128, 16, 2, 0.01)
    least = floors(shape, parameters=1000, width=2, gflops=1.0, copy=1.0)
    assert least["experts"] == 3 * 2 * 32 * 6 * 64 * 32 * 2 / 1e6
    assert least["optimizer"] == 30 * 1000 / 1e6
