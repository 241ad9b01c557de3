"""Core attention against explicit softmax, gradients included."""

import types

import pytest
import torch

from megatron_ext.model.attention import CoreAttention, attention_mask


def _group():
    return types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def _attention(**changes):
    values = {
        "attention_dropout": 0.0,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "context_parallel_size": 1,
        "apply_query_key_layer_scaling": False,
        "window_size": None,
        "window_attn_skip_freq": None,
        "softmax_type": "vanilla",
        "params_dtype": torch.float32,
        "init_method": torch.nn.init.normal_,
    }
    config = types.SimpleNamespace(**{**values, **changes})
    return CoreAttention(config, 1, None, "self", pg_collection=types.SimpleNamespace(tp=_group()))


def _reference(q, k, v, scale, allowed, sink=None):
    """[S, B, N, D] -> [S, B, N*D] by the textbook."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sink is not None:
        column = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        probs = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    else:
        probs = torch.softmax(scores, -1)
    return torch.einsum("bnst,tbnd->sbnd", probs, v).flatten(2)


CASES = {
    "causal": {},
    "window": {"window_size": (3, 0)},
    "documents": {"documents": True},
    "window and documents": {"window_size": (2, 0), "documents": True},
    "off-by-one": {"softmax_type": "off-by-one"},
    "learnable": {"softmax_type": "learnable"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_groups", [4, 2, 1])
def test_equals_explicit_softmax(case, num_groups):
    torch.manual_seed(1)
    changes = dict(CASES[case])
    documents = changes.pop("documents", False)
    attention = _attention(**changes)
    seq, batch = 13, 2
    q = torch.randn(seq, batch, 4, 8, requires_grad=True)
    k, v = (torch.randn(seq, batch, num_groups, 8, requires_grad=True) for _ in range(2))
    ids = torch.tensor([[0] * 5 + [1] * 8, [0] * 1 + [1] * 2 + [2] * 10]) if documents else None
    allowed = attention_mask(seq, seq, changes.get("window_size"), ids)
    expected = _reference(q, k, v, 8**-0.5, allowed, attention.softmax_offset)
    got = attention(q, k, v, ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    inputs = [q, k, v]
    if isinstance(attention.softmax_offset, torch.nn.Parameter):
        inputs.append(attention.softmax_offset)
    for a, b in zip(
        torch.autograd.grad(got.cos().sum(), inputs),
        torch.autograd.grad(expected.cos().sum(), inputs),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_documents_do_not_see_each_other():
    """Changing a token of document 0 changes nothing in document 1."""
    attention = _attention()
    q, k, v = (torch.randn(10, 1, 4, 8) for _ in range(3))
    ids = torch.tensor([[0] * 4 + [1] * 6])
    before = attention(q, k, v, ids)
    k2, v2 = k.clone(), v.clone()
    k2[1], v2[1] = 7.0, -7.0
    after = attention(q, k2, v2, ids)
    assert torch.equal(before[4:], after[4:]) and not torch.equal(before[1:4], after[1:4])


def test_mask_of_cached_queries_stands_at_the_end():
    assert attention_mask(2, 5)[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]
