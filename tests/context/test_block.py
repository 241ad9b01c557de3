"""One block: the kernels against plain arithmetic, the merge, rows that see nothing."""

import pytest
import torch

from megatron_ext.context import block

SIZES = [(7, 7, 4, 2, 8, 8), (1, 5, 4, 1, 8, 8), (13, 3, 6, 6, 5, 5), (4, 4, 2, 2, 12, 8)]


def _tensors(size, dtype=torch.float32):
    s, t, heads, groups, width, value_width = size
    rng = torch.Generator().manual_seed(s)
    q = torch.randn(s, 2, heads, width, generator=rng).permute(1, 2, 0, 3)
    k = torch.randn(t, 2, groups, width, generator=rng).permute(1, 2, 0, 3)
    v = torch.randn(t, 2, groups, value_width, generator=rng).permute(1, 2, 0, 3)
    dout = torch.randn(s, 2, heads, value_width, generator=rng).permute(1, 2, 0, 3)
    return [x.to(dtype) for x in (q, k, v, dout)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_kernel_and_plain_path_and_autograd_agree(size, causal):
    q, k, v, dout = _tensors(size)
    if causal and q.shape[2] != k.shape[2]:
        pytest.skip("causal blocks are square")
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    seen = (seen.tril() if causal else seen)[None, None]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in leaves[1:])
    scores = (leaves[0] @ keys.transpose(-1, -2) * 0.3).masked_fill(~seen, float("-inf"))
    wanted = torch.softmax(scores, -1) @ values
    gradients = torch.autograd.grad((wanted * dout).sum(), leaves)
    for allowed in (None, seen):  # the kernel, the plain path
        options = {"scale": 0.3, "causal": causal, "allowed": allowed}
        out, lse = block.forward(q, k, v, **options)
        torch.testing.assert_close(out, wanted.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, torch.logsumexp(scores, -1).detach(), rtol=1e-5, atol=1e-5)
        for got, want in zip(block.backward(dout, q, k, v, out, lse, **options), gradients):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_two_halves_of_the_keys_merge_to_the_whole_and_share_its_gradients():
    q, k, v, dout = _tensors((6, 10, 4, 2, 8, 8))
    options = {"scale": 0.3, "causal": False}
    halves = [(k[:, :, part], v[:, :, part]) for part in (slice(0, 3), slice(3, 10))]
    (out_a, lse_a), (out_b, lse_b) = (block.forward(q, *half, **options) for half in halves)
    out, lse = block.merge(out_a, lse_a, out_b, lse_b)
    whole, whole_lse = block.forward(q, k, v, **options)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-6)
    parts = [block.backward(dout, q, *half, out, lse, **options) for half in halves]
    dq, dk, dv = block.backward(dout, q, k, v, whole, whole_lse, **options)
    torch.testing.assert_close(parts[0][0] + parts[1][0], dq, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat((parts[0][1], parts[1][1]), 2), dk, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat((parts[0][2], parts[1][2]), 2), dv, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_weigh_nothing():
    """A document mask can hide a whole block from a query: no nan, forward or backward."""
    q, k, v, dout = _tensors((3, 4, 4, 2, 8, 8))
    allowed = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    allowed[..., 1, :] = False
    options = {"scale": 0.3, "causal": False, "allowed": allowed}
    out, lse = block.forward(q, k, v, **options)
    assert torch.all(lse[:, :, 1] == float("-inf")) and torch.all(out[:, :, 1] == 0)
    merged, merged_lse = block.merge(out, lse, out, lse)
    assert torch.isfinite(merged).all() and torch.all(merged_lse[:, :, 1] == float("-inf"))
    torch.testing.assert_close(merged, out)
    dq, dk, dv = block.backward(dout, q, k, v, out, lse, **options)
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv)) and torch.all(dq[:, :, 1] == 0)


def test_large_scores_do_not_overflow():
    q, k, v, _ = _tensors((4, 4, 2, 2, 8, 8))
    for part in (slice(0, 2), slice(2, 4)):
        out, lse = block.forward(q * 1e4, k[:, :, part], v[:, :, part], scale=1.0, causal=False)
        assert torch.isfinite(block.merge(out, lse, out, lse - 1e5)[0]).all()


@pytest.mark.needs_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [(64, 64, 4, 2, 32, 32), (48, 80, 4, 1, 24, 16)])
def test_cuda_kernel_equals_the_plain_path(size):
    """bf16: four roundings, 2^-7 of the norm (see test_strategies.py)."""
    q, k, v, dout = (x.cuda() for x in _tensors(size, torch.bfloat16))
    causal = size[0] == size[1]
    seen = torch.ones(*size[:2], dtype=torch.bool, device="cuda")
    plain = (seen.tril() if causal else seen)[None, None]
    answers = []
    for allowed in (None, plain):
        options = {"scale": 0.3, "causal": causal, "allowed": allowed}
        out, lse = block.forward(q, k, v, **options)
        answers.append((out, lse, *block.backward(dout, q, k, v, out, lse, **options)))
    for got, wanted in zip(*answers):
        assert (got.float() - wanted.float()).norm() < 2**-7 * wanted.float().norm()
