"""Padding of the vocabulary and its absence from the loss."""

import pytest
import torch

from megatron_ext.model import vocab


@pytest.mark.parametrize(
    ("size", "divisible_by", "tp", "padded"),
    [
        (250, 128, 1, 256),
        (256, 128, 2, 256),
        (257, 128, 2, 512),
        (32000, 128, 8, 32768),
        (7, 1, 1, 7),
    ],
)
def test_padded_size(size, divisible_by, tp, padded):
    assert vocab.padded_vocab_size(size, divisible_by, tp) == padded


def test_true_columns_of_each_tp_rank():
    assert [vocab.num_true_columns(250, 512, rank, 4) for rank in range(4)] == [128, 122, 0, 0]


def test_hidden_padding_has_no_probability_and_no_gradient():
    logits = torch.randn(3, 8, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        vocab.hide_padding(logits * 1, 5), torch.tensor([0, 4, 2])
    )
    plain = torch.nn.functional.cross_entropy(logits[:, :5], torch.tensor([0, 4, 2]))
    torch.testing.assert_close(loss, plain)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.all(grad[:, 5:] == 0) and torch.all(grad[:, :5] != 0)
