"""The norm over all heads: its formula on one rank; output and gradients the same on two."""

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from megatron_ext.config import parse
from megatron_ext.device import start
from megatron_ext.mesh.forks import run_ranks
from megatron_ext.mesh.groups import process_groups
from megatron_ext.model.head_norm import HeadsNorm
from tests.ranks.tiny import TINY

HEADS, SIZE, EPS = 4, 6, 1e-3


def _inputs():
    generator = torch.Generator().manual_seed(0)
    shape = (5, 2, HEADS, SIZE)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, g, torch.randn(HEADS * SIZE, generator=generator)


def _norm(tp):
    """Output and gradients of this rank's heads; the weight's gradient is whole."""
    flags = ["--tensor-model-parallel-size", str(tp)] + ["--sequence-parallel"] * (tp > 1)
    cfg = parse([*TINY, *flags])
    device = start("cpu")
    with process_groups(cfg.parallel, device, cfg.train.seed):
        norm = HeadsNorm(SimpleNamespace(params_dtype=torch.float32), SIZE, EPS, HEADS)
        rank = norm.tp_group.rank()
        x, g, weight = _inputs()
        x, g = (t.chunk(tp, dim=2)[rank].clone() for t in (x, g))
        x.requires_grad_()
        with torch.no_grad():
            norm.weight.copy_(weight)
        out = norm(x)
        out.backward(g)
        return [t.numpy() for t in (out.detach(), x.grad, norm.weight.grad)]


def _reference():
    x, g, weight = _inputs()
    x.requires_grad_()
    weight.requires_grad_()
    out = F.rms_norm(x.flatten(2), weight.shape, weight, EPS).view_as(x)
    out.backward(g)
    return [t.numpy() for t in (out.detach(), x.grad, weight.grad)]


def test_one_rank_is_the_norm_of_the_flat_heads():
    (found,) = run_ranks(_norm, 1, 1)
    for ours, expected in zip(found, _reference()):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_two_ranks_are_one():
    """megatron-core sums the weight's gradient over tp, as it does for whatever has this name."""
    ranks = run_ranks(_norm, 2, 2)
    out, gradient = (np.concatenate([rank[i] for rank in ranks], axis=2) for i in (0, 1))
    weight = sum(rank[2] for rank in ranks)
    for ours, expected in zip((out, gradient, weight), _reference()):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
