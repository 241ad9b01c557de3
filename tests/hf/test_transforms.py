"""Every transform against a loop over heads or features, and back again bit for bit."""

import torch

from megatron_ext.hf import transforms as t


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_heads_go_group_by_group():
    heads, groups, size = 6, 2, 5
    q, k, v = _random(heads * size, 7), _random(groups * size, 7), _random(groups * size, 7) + 1
    transform = t.QueryKeyValue(groups, heads // groups)
    expected = []
    for group in range(groups):
        for head in range(3 * group, 3 * group + 3):
            expected.append(q[head * size : (head + 1) * size])
        expected += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
    joined = transform.join([q, k, v])
    assert torch.equal(joined, torch.cat(expected))
    assert all(torch.equal(a, b) for a, b in zip(transform.split(joined), (q, k, v)))
    bias = transform.join([q[:, 0], k[:, 0], v[:, 0]])
    assert torch.equal(bias, joined[:, 0])


def test_gate_and_up_alternate():
    theirs = _random(7, 10)
    ours = t.INTERLEAVED.join([theirs])
    for feature in range(5):
        assert torch.equal(ours[0, feature], theirs[:, 2 * feature])
        assert torch.equal(ours[1, feature], theirs[:, 2 * feature + 1])
    assert torch.equal(t.INTERLEAVED.split(ours)[0], theirs)
    assert torch.equal(t.INTERLEAVED.join([theirs[0]]), ours[..., 0])


def test_the_others_go_back():
    gate, up = _random(5, 7), _random(5, 7) + 1
    for transform, shape in ((t.GATE_THEN_UP, (10, 7)), (t.GATE_AND_UP, (2, 5, 7))):
        ours = transform.join([gate, up])
        assert ours.shape == shape
        assert all(torch.equal(a, b) for a, b in zip(transform.split(ours), (gate, up)))
    assert torch.equal(t.TRANSPOSED.split(t.TRANSPOSED.join([gate]))[0], gate)
    assert t.SAME.split(t.SAME.join([gate]))[0] is gate
