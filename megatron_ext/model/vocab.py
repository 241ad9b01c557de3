"""The vocabulary: its padded size, and logits that give the padding no probability.

Embedding and output rows are padded to a multiple of `--make-vocab-size-divisible-by` x tp so that
they divide over tp. Megatron-LM lets the padding take part in the softmax, so that the loss depends
on tp; here the padding columns are -inf, so the loss is that of the true vocabulary in every
layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """The smallest multiple of divisible_by * tp that holds vocab_size rows."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def num_true_columns(vocab_size: int, padded: int, tp_rank: int, tp: int) -> int:
    """How many columns of the logits of `tp_rank` belong to the true vocabulary."""
    width = padded // tp
    return min(max(vocab_size - tp_rank * width, 0), width)


def hide_padding(logits: Tensor, num_true: int) -> Tensor:
    """Set the padding columns of this tp rank's logits [..., padded/tp] to -inf, in place; their
    gradient is zero.
    """
    if num_true < logits.shape[-1]:
        logits[..., num_true:] = torch.finfo(logits.dtype).min
    return logits
