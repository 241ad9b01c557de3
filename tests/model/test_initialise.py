"""A piece of a weight gets the numbers that it has in the whole, however the weight is cut."""

import itertools

import pytest
import torch

from megatron_ext.model.initialise import Recorder, fill_normal, output_std


def _whole(shape, name="w", std=0.02, seed=7):
    tensor = torch.empty(shape)
    fill_normal(tensor, name, (0,) * len(shape), shape, std, seed)
    return tensor


@pytest.mark.parametrize("cuts", list(itertools.product([1, 2, 5], repeat=2)))
def test_any_cut_of_a_matrix_is_the_same(cuts):
    shape = (190, 70)
    whole = _whole(shape)
    rows, cols = shape[0] // cuts[0], shape[1] // cuts[1]
    for i, j in itertools.product(range(cuts[0]), range(cuts[1])):
        piece = torch.empty(rows, cols)
        fill_normal(piece, "w", (i * rows, j * cols), shape, 0.02, 7)
        assert torch.equal(piece, whole[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols])


def test_experts_and_layers_are_leading_indices():
    """Global [layers 3, experts 4, gates 2, F 6, H 5]; a rank holds layer 2, experts 1-2, columns F
    3-5.
    """
    shape = (3, 4, 2, 6, 5)
    whole = _whole(shape)
    piece = torch.empty(2, 2, 3, 5)
    fill_normal(piece, "w", (2, 1, 0, 3, 0), shape, 0.02, 7)
    assert torch.equal(piece, whole[2, 1:3, :, 3:6])
    assert not torch.equal(whole[0, 0], whole[0, 1]) and not torch.equal(whole[0, 0], whole[1, 0])


def test_padding_rows_do_not_move_the_others():
    assert torch.equal(_whole((250, 16)), _whole((384, 16))[:250])


def test_names_and_seeds_matter_and_the_deviation_is_right():
    a, b, c = _whole((400, 400)), _whole((400, 400), name="v"), _whole((400, 400), seed=8)
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert abs(a.std().item() - 0.02) < 2e-4 and abs(a.mean().item()) < 2e-4


def test_vectors():
    assert _whole((11,)).shape == (11,) and _whole((11,)).std() > 0


def test_recorder_follows_data_that_moved():
    recorder = Recorder()
    weight = torch.nn.Parameter(torch.empty(4))
    recorder.normal(0.5)(weight)
    weight.data = weight.data.to(torch.bfloat16)
    assert recorder.by_storage() == {weight.untyped_storage().data_ptr(): 0.5}


def test_output_std():
    assert output_std(0.02, 8) == pytest.approx(0.005)
