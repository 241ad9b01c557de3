"""Logits of a checkpoint in any layout, whole, on every rank's request; used by `check`.

Runs on each rank of a launch (`megatron_ext.mesh.forks.run_ranks`): load, one forward pass through
megatron-core's schedule, gather the vocabulary over tp and the sequence over cp.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.checkpoint import Checkpointer, Progress, TrainState
from megatron_ext.config import RunConfig, parse
from megatron_ext.device import start
from megatron_ext.mesh.groups import process_groups
from megatron_ext.model.gpt import build_chunks, vocabulary


def loaded_chunks(cfg: RunConfig, load: Path) -> list[torch.nn.Module]:
    """The model chunks of this rank with a checkpoint's weights, not wrapped for training."""
    chunks = build_chunks(cfg, vocabulary(cfg, None))
    with Checkpointer(cfg.checkpoint, None, load, run_info={}) as checkpointer:
        checkpointer.load(TrainState(chunks, None, None, Progress()))
    return chunks


def whole_logits(logits_BSV: Tensor, vocab_size: int) -> Tensor:
    """The true vocabulary's logits from the column blocks of all tp ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    blocks = [torch.empty_like(logits_BSV) for _ in range(group.size())]
    torch.distributed.all_gather(blocks, logits_BSV.contiguous(), group=group)
    return torch.cat(blocks, dim=-1)[..., :vocab_size]


@torch.no_grad()
def forward(chunks: list[torch.nn.Module], tokens_BS: Tensor) -> Tensor | None:
    """Logits [B, S, V/tp] of one batch on the last pipeline stage, None elsewhere."""
    positions = torch.arange(tokens_BS.shape[1])[None].expand_as(tokens_BS)
    for chunk in chunks:
        chunk.eval()

    def step(batches, model, *_):
        return model(next(batches), positions, None), lambda output, **_: output.clone()

    many = len(chunks) > 1
    # the interleaved schedule takes a multiple of pp: the same batch again
    copies = [tokens_BS] * (parallel_state.get_pipeline_model_parallel_world_size() if many else 1)
    out = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(copies) for _ in chunks] if many else iter(copies),
        model=chunks if many else chunks[0],
        num_microbatches=len(copies),
        seq_length=tokens_BS.shape[1],
        micro_batch_size=tokens_BS.shape[0],
        decoder_seq_length=tokens_BS.shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return out[-1] if out else None


def logits_on_rank(words: list[str], load: str, tokens: np.ndarray) -> np.ndarray | None:
    """Logits [B, S, V] in fp32 of `tokens` [B, S] on ranks of the last stage; None elsewhere."""
    cfg = parse(words)
    device = start("cpu")
    with process_groups(cfg.parallel, device, cfg.train.seed):
        out = forward(loaded_chunks(cfg, Path(load)), torch.from_numpy(tokens))
        if out is None:
            return None
        return whole_logits(out.float(), cfg.model.vocab_size).numpy()
