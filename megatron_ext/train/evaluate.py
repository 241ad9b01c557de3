"""Validation: the loss over a fixed set of samples, in nats per token and in bits per byte of text.

Every evaluation reads the same first `eval_iters` global batches of its split, so that the points
of a curve compare. bits per byte = nats / ln 2 / bytes, which does not depend on the tokenizer;
bytes are those of the text that the label tokens stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from data.loader import MicroBatches
from data.text_bytes import TextBytes
from megatron_ext.device import current_device
from megatron_ext.train.step import run_schedule, sum_over_ranks, to_device


def count_bytes(batch, text_bytes: TextBytes, scales_D: np.ndarray) -> float:
    """Bytes of text of the unmasked labels of one micro-batch; `scales_D` of the domains' files."""
    sizes_BS = text_bytes.count(batch.tokens_BS.cpu().numpy(), batch.labels_BS.cpu().numpy())
    sizes_B = (sizes_BS * (batch.loss_mask_BS.cpu().numpy() > 0)).sum(axis=1)
    return float(sizes_B @ scales_D[batch.domain_ids_B.cpu().numpy()])


def _of_domains(reports: Sequence[Tensor], num_domains: int) -> list[float]:
    """Loss sums and tokens of each domain on this rank; zeros before the last pipeline stage."""
    if not reports:
        return [0.0] * (2 * num_domains)
    return torch.stack(list(reports)).sum(dim=0)[2:].tolist()


def _record(
    sums: Sequence[float], domains: Sequence[str], step: int, split: str, dp: int
) -> dict[str, Any]:
    """The record of an evaluation from [loss, tokens, bytes, losses and tokens of the domains],
    summed over all ranks.
    """
    cp = parallel_state.get_context_parallel_world_size()
    copies = torch.distributed.get_world_size() / (dp * cp)
    loss = sums[0] / max(sums[1], 1.0)
    tokens = sums[1] / parallel_state.get_tensor_model_parallel_world_size()
    losses, counts = sums[3 : 3 + len(domains)], sums[3 + len(domains) :]
    record = {
        "step": step,
        "split": split,
        "val_loss": loss,
        "perplexity": math.exp(min(20.0, loss)),
        "num_tokens": round(tokens),
        "val_loss_per_domain": {
            name: one / count for name, one, count in zip(domains, losses, counts) if count
        },
    }
    if sums[2]:
        record["num_bytes"] = round(sums[2] / copies)
        record["bits_per_byte"] = loss * tokens / math.log(2) / record["num_bytes"]
    return record


@torch.no_grad()
def evaluate(
    chunks: Sequence[nn.Module],
    dataset,
    *,
    split: str,
    num_batches: int,
    global_batch_size: int,
    micro_batch_size: int,
    seq_length: int,
    step: int,
    text_bytes: TextBytes | None,
    stop: Callable[[], tuple[bool, bool]],
) -> dict[str, Any] | None:
    """The validation record of `split`, the same on all ranks; the chunks end in training mode.

    None where a rank was asked to `stop` by a signal: the sums of a batch carry it to all.
    """
    dp_rank = parallel_state.get_data_parallel_rank()
    dp = parallel_state.get_data_parallel_world_size()
    batches = MicroBatches(dataset, micro_batch_size, dp_rank, dp, consumed_samples=0)
    per_step = global_batch_size // (micro_batch_size * dp)
    for chunk in chunks:
        chunk.eval()
    num_domains = len(dataset.domains)
    scales_D = None if text_bytes is None else text_bytes.scales(dataset)
    sums = [0.0] * (3 + 2 * num_domains)
    try:
        for _ in range(num_batches):
            micro_batches = [to_device(next(batches), current_device()) for _ in range(per_step)]
            num_bytes = 0.0
            if text_bytes is not None and scales_D is not None:
                num_bytes = sum(count_bytes(x, text_bytes, scales_D) for x in micro_batches)
            reports = run_schedule(
                chunks,
                micro_batches,
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                forward_only=True,
                num_domains=num_domains,
            )
            more = (num_bytes, *_of_domains(reports, num_domains), float(stop()[0]))
            *step_sums, asked = sum_over_ranks(reports, *more)
            if asked:
                return None
            sums = [a + b for a, b in zip(sums, step_sums)]
    finally:
        batches.close()
        for chunk in chunks:
            chunk.train()
    return _record(sums, dataset.domains, step, split, dp)
