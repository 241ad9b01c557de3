"""The global-batch load-balancing loss has the strength of its coefficient at every dp (stock: 1/dp
of it).
"""

import pytest
import torch

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

GLOBAL = ["--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", "1.0"]


def _router_gradient(flags: list[str]):
    """The gradient of all routers after one micro-batch and its reduction over ranks, as numpy (a
    pipe carries it).
    """
    from megatron_ext.config import parse
    from megatron_ext.device import current_device, start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import Vocabulary, build_chunks, wrap_for_training
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.train.step import prepare_config, run_schedule, to_device

    cfg = parse([*TINY, *flags])
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        chunks = wrap_for_training(cfg, build_chunks(cfg, Vocabulary(250, 256)))
        optimizer = build_optimizer(cfg, chunks)
        prepare_config(chunks[0].config, optimizer, chunks, chunks[0].ddp_config)
        batch = [to_device(_batch(cfg), current_device())]
        size = cfg.train.micro_batch_size
        run_schedule(chunks, batch, seq_length=64, micro_batch_size=size, forward_only=False)
        named = chunks[0].named_parameters()
        return torch.cat([p.main_grad.flatten() for n, p in named if "router.weight" in n]).numpy()


def _batch(cfg):
    from megatron.core import parallel_state

    from data.loader import TokenBatch

    tokens = torch.randint(0, 250, (8, 65), generator=torch.Generator().manual_seed(3))
    size, rank = cfg.train.micro_batch_size, parallel_state.get_data_parallel_rank()
    mine = tokens[rank * size : (rank + 1) * size]
    return TokenBatch(
        tokens_BS=mine[:, :-1].contiguous(),
        labels_BS=mine[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(size, 64),
        own_mask_BS=torch.ones(size, 64),
        position_ids_BS=torch.arange(64).expand(size, -1),
        document_ids_BS=None,
        sample_ids_B=torch.arange(size),
        domain_ids_B=torch.zeros(size, dtype=torch.int64),
    )


def _balance_gradient(world_size: int, extra: list[str]) -> torch.Tensor:
    """Gradient with the loss minus gradient without it."""
    size = ["--micro-batch-size", str(8 // world_size)]
    none = ["--moe-router-load-balancing-type", "none"]
    with_loss = run_ranks(_router_gradient, world_size, [*size, *GLOBAL, *extra])[0]
    without = run_ranks(
        _router_gradient, world_size, [*size, *none, "--moe-aux-loss-coeff", "0", *extra]
    )[0]
    return torch.from_numpy(with_loss - without)


@pytest.mark.parametrize("scale", ["exact", "megatron"])
def test_strength_over_dp(scale):
    one = _balance_gradient(1, [])
    two = _balance_gradient(2, ["--moe-global-aux-scale", scale])
    ratio = (two.norm() / one.norm()).item()
    assert ratio == pytest.approx(1.0 if scale == "exact" else 0.5, abs=1e-3)


def test_per_token_loss_keeps_the_strength():
    """--calculate-per-token-loss with tp2 (stock: 1/tp of the strength)."""
    one = _balance_gradient(1, ["--calculate-per-token-loss"])
    tp = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--micro-batch-size", "8"]
    two = _balance_gradient(2, ["--calculate-per-token-loss", *tp])
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)
