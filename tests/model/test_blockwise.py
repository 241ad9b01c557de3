"""Attention in blocks against torch's own on rotated heads, gradients included."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch.nn import functional as F

from megatron_ext.costs import cpu_blocks
from megatron_ext.costs.attention_activations import kept_score_share
from megatron_ext.model import causal
from megatron_ext.model.blockwise import BlockwiseAttention, Form, ProjectedAttention
from megatron_ext.model.rotary import rotate, rotation

SIZES = {
    "one block": (37, 2, 2, 1, 8, 8),
    "odd blocks, grouped queries": (130, 2, 2, 3, 16, 8),
    "one key head": (300, 1, 1, 4, 8, 8),
    "one token": (1, 2, 2, 2, 8, 4),
    "no rotation": (96, 2, 2, 2, 8, 0),
}
"""S, B, key heads, query heads per key head, D, rotated numbers of a head."""


def _angles(s: int, width: int, interleaved: bool) -> torch.Tensor | None:
    """[S, 1, 1, width] with every angle twice, as megatron-core hands them out."""
    if not width:
        return None
    once = torch.rand(s, 1, 1, width // 2) * 6
    return once.repeat_interleave(2, -1) if interleaved else torch.cat((once, once), -1)


def _split(mixed, groups, r, d):
    """[S, B, G * (r + 2) * D] -> q [S, B, N, D], k and v [S, B, G, D]."""
    heads = mixed.view(*mixed.shape[:2], groups, r + 2, d)
    return heads[..., :r, :].flatten(2, 3), heads[..., r, :], heads[..., r + 1, :]


def _reference(q, k, v, angles, interleaved):
    """megatron-core's rotation and torch's attention -> [S, B, N * Dv]."""
    if angles is not None:
        q, k = (_apply_rotary_pos_emb_bshd(x, angles, interleaved) for x in (q, k))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def _form(groups, d, angles, interleaved, dtype, keep):
    if angles is None:
        return Form(groups, d**-0.5, None, keep)
    given = {"interleaved": interleaved}
    turns = rotation(angles, dtype, scale=d**-0.5, **given), rotation(angles, dtype, **given)
    return Form(groups, d**-0.5, turns, keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("cpu_kernels")
def test_projection_and_heads_equal_the_reference(size, interleaved, keep):
    torch.manual_seed(1)
    s, b, groups, r, d, width = SIZES[size]
    angles = _angles(s, width, interleaved)
    mixed = torch.randn(s, b, groups * (r + 2) * d, requires_grad=True)
    form = _form(groups, d, angles, interleaved, torch.float32, keep)
    parts = _split(mixed, groups, r, d)
    expected = _reference(*parts, angles, interleaved)
    grad = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, mixed, grad, retain_graph=True)
    for out in (ProjectedAttention.apply(mixed, d, form), BlockwiseAttention.apply(*parts, form)):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
        (got,) = torch.autograd.grad(out, mixed, grad)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [512, 600])
@pytest.mark.usefixtures("cpu_kernels")
def test_sixteen_bits_stay_near_fp32(length, monkeypatch):
    """In bf16 every tensor is within 1% (in norm) of attention in fp32 on the same numbers, with
    gradients of keys summed in bf16 (4 blocks) and by way of fp32 (10 blocks)."""
    if length == 600:
        monkeypatch.setattr(cpu_blocks, "BLOCKS", 10)
    torch.manual_seed(2)
    parts = [torch.randn(length, 1, heads, 16).bfloat16() for heads in (4, 2, 2)]
    grad = torch.randn(length, 1, 64).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in parts]
        if dtype == torch.float32:
            out = _reference(*inputs, None, False)
        else:
            out = BlockwiseAttention.apply(*inputs, Form(2, 16**-0.5, None, True))
        results.append((out, *torch.autograd.grad(out, inputs, grad.to(dtype))))
    for exact, got in zip(*results):
        assert (got.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.usefixtures("cpu_kernels")
def test_value_heads_may_have_another_width():
    """Latent attention: q and k of 24, v of 16."""
    torch.manual_seed(3)
    q, k = (torch.randn(70, 2, 3, 24, requires_grad=True) for _ in range(2))
    v = torch.randn(70, 2, 3, 16, requires_grad=True)
    expected = _reference(q, k, v, None, False)
    out = BlockwiseAttention.apply(q, k, v, Form(3, 24**-0.5))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    grad = torch.randn_like(out)
    for got, wanted in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("cpu_kernels")
def test_groups_of_heads_equal_all_heads(monkeypatch):
    """Tiles that hold two heads only (long sequences) give the same numbers."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(100, 2, 3, 8) for _ in range(3))
    whole = BlockwiseAttention.apply(q, k, v, Form(3, 8**-0.5))
    monkeypatch.setattr(causal, "TILE_NUMBERS", 2 * 64 * 100)
    assert len({tile.first for tile in causal.tiles(6, 100, 1)}) > 1
    torch.testing.assert_close(BlockwiseAttention.apply(q, k, v, Form(3, 8**-0.5)), whole)


@pytest.mark.parametrize("m, s, r", [(4, 512, 1), (2, 300, 4), (1, 1000, 2), (3, 5, 1)])
def test_tiles_cover_the_lower_triangle_once(m, s, r):
    rows = [(n, i) for tile in causal.tiles(m, s, r) for n in range(tile.first, tile.last)
            for i in range(tile.start, tile.end)]  # fmt: skip
    assert sorted(rows) == [(n, i) for n in range(m) for i in range(s)]
    kept = sum((t.last - t.first) * (t.end - t.start) * t.end for t in causal.tiles(m, s, r))
    assert kept == pytest.approx(m * s * s * kept_score_share(s, r))


@pytest.mark.usefixtures("cpu_kernels")
def test_yarn_scales_what_turns():
    angles = _angles(9, 4, False)
    turn = rotation(angles, torch.float32, concentration=1.5, scale=0.5)
    x = torch.randn(2, 9, 1, 6)
    got = rotate(x, turn, torch.empty_like(x))
    mcore = _apply_rotary_pos_emb_bshd(x.permute(1, 0, 2, 3), angles, mscale=1.5)
    torch.testing.assert_close(got, 0.5 * mcore.permute(1, 0, 2, 3))
