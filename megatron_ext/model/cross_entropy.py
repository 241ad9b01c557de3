"""The output layer and its cross-entropy as one function, which never holds fp32 logits of a
micro-batch.

    x [T, H] -> bf16 logits of a few hundred rows -> fp32, a few rows at a time (they stay in the
    cache) -> softmax and logsumexp -> back over the logits, less one at the label: the gradient of
    the logits for an upstream gradient of one -> two matrix products in the backward pass.

The upstream gradient g [T] is known in the backward pass only. It scales rows, so it goes to the
[T, H] side of both products: dX = g * (Q W), dW = Q^T (g * X) with Q = softmax - onehot. Over
tp a rank's rows are softmax over its own columns, and the factor exp(lse of the rank - lse of all)
joins g: one all-gather of three numbers a token.

Two ways, by the size of Q (`Settings.kept_bytes`): it is kept in the place of the logits, in their
type; or nothing of that size exists: the forward pass keeps the logsumexp, and the backward pass
makes the logits again, a block of columns at a time (a third more work in the output layer), as in
Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009). `reference_loss` is the naive form.

Shapes: T tokens of a micro-batch, H hidden, V columns of this tp rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_ext.costs.cpu_blocks import KEPT_SOFTMAX, KEPT_SOFTMAX_CPU
from megatron_ext.native import loops

LEAST_SHARE = 1e-30
"""A tp rank's share of the probability is taken to be no less, so that 1 / share is finite."""


@dataclass(frozen=True)
class Columns:
    """The columns of one tp rank: number of the first, how many belong to the true vocabulary
    (the others get no probability), and the ranks that share the vocabulary (None: this one only).
    """

    first: int
    num_true: int
    group: torch.distributed.ProcessGroup | None = None


@dataclass(frozen=True)
class Settings:
    """Sizes that change time and memory, not the result."""

    kept_bytes: int
    """Q is kept for the backward pass up to this size, else made again."""
    product_bytes: int
    """Of the logits that one matrix product makes."""
    block_bytes: int
    """Of the fp32 rows that are worked on at a time: on a CPU a share of the cache."""

    @classmethod
    def of(cls, device: torch.device) -> Settings:
        """What is used on `device`."""
        if device.type == "cpu":
            return cls(kept_bytes=KEPT_SOFTMAX_CPU, product_bytes=8 << 20, block_bytes=4 << 20)
        return cls(kept_bytes=KEPT_SOFTMAX, product_bytes=256 << 20, block_bytes=256 << 20)


def reference_loss(x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, num_true: int) -> Tensor:
    """What `linear_cross_entropy` computes, on one rank: loss per token [T] in nats, fp32."""
    logits_TV = (x_TH @ weight_VH[:num_true].t()).float()
    return F.cross_entropy(logits_TV, labels_T, reduction="none")


def softmax_(rows: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits [r, n] become their softmax in place; -> (largest logit, logsumexp - largest).

    On a CPU the softmax kernel is 4.6 times as fast as exp_() alone; in place it is right because
    it reads a row whole before the row's last pass writes it.
    """
    peak = rows.amax(-1)
    if rows.device.type == "cpu":
        torch.softmax(rows, -1, out=rows)
        return peak, rows.amax(-1).log_().neg_()
    rows.sub_(peak[:, None]).exp_()
    total = rows.sum(-1)
    rows.div_(total[:, None])
    return peak, total.log_()


def blocks(num_rows: int, row_bytes: int, limit: int) -> list[slice]:
    """Slices of at most `limit` bytes that cover the rows, of at least one row each."""
    size = max(1, min(num_rows, limit // max(row_bytes, 1)))
    return [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]


class Statistics:
    """Of T rows over the columns of one rank, filled block by block: `peak` the largest logit,
    `rest` the logsumexp less that, `label` the label's logit where this rank has the label's column
    (`is_here`; `place` is that column, 0 elsewhere).
    """

    def __init__(self, labels_T: Tensor, columns: Columns) -> None:
        place = labels_T - columns.first
        self.is_here = (place >= 0) & (place < columns.num_true)
        self.place = place.masked_fill(~self.is_here, 0)
        self.peak, self.rest, self.label = torch.zeros(3, labels_T.numel(), device=labels_T.device)
        self.peak.fill_(torch.finfo(torch.float32).min)  # of a rank without true columns

    def look_at_all(self, rows: slice, logits: Tensor, num_true: int) -> None:
        """Note the logits [r, V] of `rows`, which become the softmax over `num_true` columns."""
        filled = (self.peak[rows], self.rest[rows], self.label[rows])
        loops.softmax_statistics(logits, self.place[rows], *filled, num_true)

    def look(self, rows: slice, work: Tensor) -> None:
        """Note the fp32 logits [r, n] of `rows`, which become their softmax."""
        torch.gather(work, 1, self.place[rows, None], out=self.label[rows, None])
        self.peak[rows], self.rest[rows] = softmax_(work)

    def join(self, group: torch.distributed.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, largest logit, logsumexp less that), each [T], over the columns of all ranks."""
        if group is None:
            loss = self.rest - torch.where(self.is_here, self.label - self.peak, 0.0)
            return loss, self.peak, self.rest
        absent = torch.full_like(self.label, torch.inf)
        mine = torch.cat((self.peak, self.rest, torch.where(self.is_here, self.label, absent)))
        ranks = mine.new_empty(group.size() * mine.numel())
        torch.distributed.all_gather_into_tensor(ranks, mine, group=group)
        peaks, rests, labels = ranks.view(group.size(), 3, -1).unbind(1)
        peak = peaks.amax(0)
        rest = (peaks - peak + rests).logsumexp(0)
        return rest - torch.where(labels.isinf(), 0.0, labels - peak).sum(0), peak, rest


def put(into: Tensor, place_T: Tensor, is_here_T: Tensor, value_T: Tensor) -> None:
    """into[t, place[t]] = value[t] where is_here[t]. Not by `scatter_`, which on a CPU makes a copy
    of all of a 16-bit tensor in fp32.
    """
    at = (torch.arange(len(place_T), device=into.device), place_T)
    into.index_put_(at, torch.where(is_here_T, value_T.to(into.dtype), into[at]))


def look_at_rows(
    x_TH: Tensor, weight_VH: Tensor, stats: Statistics, num_true: int, settings: Settings, q_TV=None
) -> None:
    """Fill `stats`; `q` [T, V], where given, becomes the softmax over this rank's columns."""
    width = weight_VH.shape[0]
    products = blocks(x_TH.shape[0], width * x_TH.element_size(), settings.product_bytes)
    longest = products[0].stop
    logits = x_TH.new_empty(longest, width) if q_TV is None else None
    parts = blocks(longest, 4 * width, settings.block_bytes)
    in_place = x_TH.dtype == torch.float32 and num_true == width
    is_one_pass = loops.serves(x_TH)
    scratch = (
        None
        if in_place or is_one_pass
        else x_TH.new_empty(parts[0].stop, num_true, dtype=torch.float32)
    )
    for rows in products:
        out = logits[: rows.stop - rows.start] if q_TV is None else q_TV[rows]
        torch.mm(x_TH[rows], weight_VH.t(), out=out)
        if num_true == 0:
            out.zero_()
            continue
        if is_one_pass:
            stats.look_at_all(rows, out, num_true)
            continue
        for part in blocks(out.shape[0], 4 * width, settings.block_bytes):
            block = out[part]
            work = block if in_place else scratch[: block.shape[0]].copy_(block[:, :num_true])
            stats.look(slice(rows.start + part.start, rows.start + part.stop), work)
            if q_TV is not None and not in_place:
                block[:, :num_true].copy_(work)
                block[:, num_true:].zero_()


class KeptLoss(torch.autograd.Function):
    """Loss per token; Q is kept in the place of the logits."""

    @staticmethod
    def forward(ctx, x_TH, weight_VH, labels_T, columns: Columns, settings: Settings):
        q_TV = x_TH.new_empty(x_TH.shape[0], weight_VH.shape[0])
        stats = Statistics(labels_T, columns)
        look_at_rows(x_TH, weight_VH, stats, columns.num_true, settings, q_TV)
        loss, peak, rest = stats.join(columns.group)
        share = None
        at_label = torch.expm1(-loss)
        if columns.group is not None:
            share = (stats.peak - peak + stats.rest - rest).exp_().clamp_(min=LEAST_SHARE)
            at_label /= share
        put(q_TV, stats.place, stats.is_here, at_label)
        ctx.save_for_backward(x_TH, weight_VH, q_TV, share)
        return loss

    @staticmethod
    def backward(ctx, grad_T):
        x_TH, weight_VH, q_TV, share = ctx.saved_tensors
        scale = (grad_T if share is None else grad_T * share)[:, None]
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = q_TV.t() @ (x_TH * scale).to(x_TH.dtype)
        if ctx.needs_input_grad[0]:
            dx = ((q_TV @ weight_VH) * scale).to(x_TH.dtype)
        return dx, dweight, None, None, None


class RemadeLoss(torch.autograd.Function):
    """Loss per token; the backward pass makes the logits again, a block of columns at a time, so
    that every row of dW is complete at once and only dX [T, H] is summed, in fp32.
    """

    @staticmethod
    def forward(ctx, x_TH, weight_VH, labels_T, columns: Columns, settings: Settings):
        stats = Statistics(labels_T, columns)
        look_at_rows(x_TH, weight_VH, stats, columns.num_true, settings)
        loss, peak, rest = stats.join(columns.group)
        ctx.columns, ctx.settings = columns, settings
        ctx.save_for_backward(x_TH, weight_VH, stats.place, stats.is_here, loss, peak, rest)
        return loss

    @staticmethod
    def backward(ctx, grad_T):
        x_TH, weight_VH, place, is_here, loss, peak, rest = ctx.saved_tensors
        at_label = torch.expm1(-loss) * grad_T
        dx = torch.zeros_like(x_TH, dtype=torch.float32)
        dweight = torch.empty_like(weight_VH)
        dweight[ctx.columns.num_true :].zero_()
        row_bytes = x_TH.shape[0] * x_TH.element_size()
        for columns in blocks(ctx.columns.num_true, row_bytes, ctx.settings.product_bytes):
            weight = weight_VH[columns]
            q = x_TH @ weight.t()
            for part in blocks(q.shape[0], 4 * q.shape[1], ctx.settings.block_bytes):
                work = q[part].float()
                own_peak, own_rest = softmax_(work)
                share = (own_peak - peak[part] + own_rest - rest[part]).exp_() * grad_T[part]
                q[part] = work.mul_(share[:, None])
            here = is_here & (place >= columns.start) & (place < columns.stop)
            put(q, (place - columns.start).masked_fill(~here, 0), here, at_label)
            torch.mm(q.t(), x_TH, out=dweight[columns])
            dx += q @ weight
        return dx.to(x_TH.dtype), dweight, None, None, None


def linear_cross_entropy(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    columns: Columns,
    settings: Settings | None = None,
) -> Tensor:
    """-log softmax(x W^T)[label] per token over the true vocabulary of all tp ranks -> [T] fp32.

    x and the result are the same on all ranks of `columns.group`; the gradient of x is this rank's
    columns' part of a sum over them. bf16 or fp32.
    """
    settings = settings or Settings.of(x_TH.device)
    q_bytes = x_TH.shape[0] * weight_VH.shape[0] * x_TH.element_size()
    needs_grad = torch.is_grad_enabled() and (x_TH.requires_grad or weight_VH.requires_grad)
    keeps = needs_grad and q_bytes <= settings.kept_bytes
    return (KeptLoss if keeps else RemadeLoss).apply(x_TH, weight_VH, labels_T, columns, settings)
