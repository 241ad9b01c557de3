"""Output layer and cross-entropy in one function: losses and gradients are those of the naive form,
whatever the sizes, the upstream gradient and the ranks that share the vocabulary.
"""

import pytest
import torch

from megatron_ext.model import gpt
from megatron_ext.model.cross_entropy import (
    Columns,
    Settings,
    linear_cross_entropy,
    reference_loss,
    softmax_,
)
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

SIZES = [(64, 256, 32, 256), (37, 300, 64, 257), (1, 8, 8, 3), (130, 33, 16, 33)]
"""(tokens, padded vocabulary, hidden, true vocabulary)."""
WAYS = {
    "kept": Settings(kept_bytes=1 << 30, product_bytes=4096, block_bytes=2048),
    "kept, one block": Settings(kept_bytes=1 << 30, product_bytes=1 << 30, block_bytes=1 << 30),
    "made again": Settings(kept_bytes=0, product_bytes=4096, block_bytes=2048),
    "made again, one block": Settings(kept_bytes=0, product_bytes=1 << 30, block_bytes=1 << 30),
}


def _inputs(tokens, padded, hidden, true, spread=1.0):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weight = (torch.randn(padded, hidden, generator=generator) * spread).bfloat16()
    labels = torch.randint(0, true, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    upstream[1::3] = 0.0  # masked tokens
    return x, weight, labels, upstream


def _with_gradients(loss_of, x, weight, upstream):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(x, weight)
    loss.backward(upstream.to(loss.dtype))
    return [value.detach().double() for value in (loss, x.grad, weight.grad)]


def _stock_loss(x, weight, labels, true):
    """bf16 logits of the whole micro-batch, fp32 loss: what megatron-core does on one rank."""
    return torch.nn.functional.cross_entropy(
        (x @ weight[:true].t()).float(), labels, reduction="none"
    )


def _exact(x, weight, labels, upstream, true):
    def loss_of(x, weight):
        return torch.nn.functional.cross_entropy(x @ weight[:true].t(), labels, reduction="none")

    return _with_gradients(loss_of, x.double(), weight.double(), upstream.double())


def _error(got, exact):
    return float((got - exact).norm() / exact.norm().clamp(min=1e-12))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("cpu_kernels")
def test_fp32_equals_the_reference(size, way):
    x, weight, labels, upstream = _inputs(*size)
    exact = _exact(x, weight, labels, upstream, size[3])
    x, weight = x.float(), weight.float()
    columns = Columns(0, size[3])
    found = _with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, columns, WAYS[way]), x, weight, upstream
    )
    naive = _with_gradients(lambda x, w: reference_loss(x, w, labels, size[3]), x, weight, upstream)
    for got, plain, wanted in zip(found, naive, exact):
        assert _error(got, wanted) < 1e-6
        assert _error(got, plain) < 1e-6
    assert found[2][size[3] :].abs().sum() == 0  # padding columns
    assert found[1][1::3].abs().sum() == 0  # masked tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("cpu_kernels")
def test_bf16_is_as_near_as_bf16_logits(size, way):
    """Errors against float64 are within 1.2 of those of the stock form, plus one rounding."""
    x, weight, labels, upstream = _inputs(*size, spread=0.2)
    exact = _exact(x, weight, labels, upstream, size[3])
    columns = Columns(0, size[3])
    found = _with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, columns, WAYS[way]), x, weight, upstream
    )
    stock = _with_gradients(lambda x, w: _stock_loss(x, w, labels, size[3]), x, weight, upstream)
    for got, plain, wanted in zip(found, stock, exact):
        assert _error(got, wanted) < 1.2 * _error(plain, wanted) + 2**-9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("cpu_kernels")
def test_sure_and_hopeless_tokens(way):
    """In fp32 a loss of 3e-6 is right to 2%, one of 400 is finite; so are the gradients."""
    x, weight = torch.eye(3), torch.zeros(5, 3)
    weight[0, 0], weight[1, 1], weight[2, 2] = 14.0, 400.0, -1e4
    labels = torch.tensor([0, 0, 1])
    upstream = torch.ones(3)
    exact = _exact(x, weight, labels, upstream, 5)
    found = _with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, Columns(0, 5), WAYS[way]),
        x,
        weight,
        upstream,
    )
    assert exact[0][0] < 1e-5 and exact[0][1] == pytest.approx(400.0)
    for got, wanted in zip(found, exact):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][0], exact[0][0], rtol=2e-2, atol=0)


def test_without_gradients_and_of_frozen_weights():
    x, weight, labels, upstream = _inputs(37, 64, 16, 60)
    with torch.no_grad():
        plain = linear_cross_entropy(x, weight, labels, Columns(0, 60))
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, Columns(0, 60))
    torch.testing.assert_close(loss.detach(), plain)
    loss.backward(upstream)
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("width", [1, 3, 16, 257, 5000])
def test_softmax_in_place(width):
    """The kernel may write where it reads; a NaN or an infinity stays visible."""
    rows = 20 * torch.randn(7, width)
    wanted, lse = torch.softmax(rows.double(), -1), rows.double().logsumexp(-1)
    peak, rest = softmax_(rows)
    torch.testing.assert_close(rows, wanted.float(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close((peak + rest), lse.float())
    rows = torch.randn(2, width)
    rows[0, 0], rows[1, -1] = torch.nan, torch.inf
    assert not torch.isfinite(torch.stack(softmax_(rows)).sum(0)).any()


def _on_rank(kept_bytes: int, true: int) -> list:
    """A quarter of the vocabulary: loss, this rank's part of dx, its rows of dW."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    x, weight, labels, upstream = _inputs(37, 128, 16, true, spread=2.0)
    width = 128 // group.size()
    first = group.rank() * width
    columns = Columns(first, min(max(true - first, 0), width), group)
    settings = Settings(kept_bytes, 4096, 2048)
    mine = weight.float()[first : first + width]
    found = _with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, columns, settings),
        x.float(),
        mine,
        upstream,
    )
    torch.distributed.destroy_process_group()
    return [value.numpy() for value in found]


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize("true", [128, 70, 60])
@pytest.mark.usefixtures("cpu_kernels")
def test_ranks_that_share_the_vocabulary(true, kept_bytes):
    """With 60 of 128 columns the ranks of the second half have none."""
    found = [
        [torch.from_numpy(v) for v in rank] for rank in run_ranks(_on_rank, 4, kept_bytes, true)
    ]
    x, weight, labels, upstream = _inputs(37, 128, 16, true, spread=2.0)
    loss, dx, dweight = _exact(x, weight, labels, upstream, true)
    for rank in found:
        assert _error(rank[0], loss) < 1e-6
    assert _error(sum(rank[1] for rank in found), dx) < 1e-6
    assert _error(torch.cat([rank[2] for rank in found]), dweight) < 1e-6


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
MODELS = {
    "one rank": (1, ""),
    "tied": (1, "--no-untie-embeddings-and-output-weights"),
    "tp2": (2, f"{TP2} --mtp-num-layers 1"),
    "tp2 pp2, tied": (
        4,
        f"{TP2} --pipeline-model-parallel-size 2 --no-untie-embeddings-and-output-weights",
    ),
    "cp2, two depths, per-token loss": (
        2,
        "--context-parallel-size 2 --mtp-num-layers 2 --calculate-per-token-loss",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_stock_loss(name, tmp_path, monkeypatch):
    """Same losses, gradient norms and evaluations as with logits and megatron-core's loss, which
    share torch's softmax: the compiled one differs in the last bit, and Adam makes more of it.
    """
    ranks, flags = MODELS[name]
    curves = []
    for fuses in (True, False):
        if not fuses:
            monkeypatch.setattr(gpt, "can_fuse", lambda config: False)
        where = tmp_path / str(fuses)
        short = "--train-iters 3 --global-batch-size 4 --eval-iters 1 --eval-interval 3".split()
        short += ["--cpu-kernels", "torch"]
        run_ranks(pretrain, ranks, [*TINY, *short, *flags.split(), "--run-dir", str(where)])
        keys = ("lm_loss", "mtp_loss", "grad_norm", "val_loss")
        curves.append([value for key in keys for value in read_metrics(where, key) if value])
    assert len(curves[0]) >= 7
    assert curves[0] == pytest.approx(curves[1], rel=2e-6)
