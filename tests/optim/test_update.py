"""A whole step with written gradients and the one-pass update against megatron-core's own DDP,
norm, clipping, AdamW and copies, in layouts with and without shards.
"""

from __future__ import annotations

from unittest import mock

import pytest

from tests.ranks.harness import run_ranks

DIST = "--use-distributed-optimizer"
EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
CASES = [
    (1, ""),
    (1, "--bf16"),
    (1, f"--bf16 {DIST}"),
    (1, "--optimizer sgd --sgd-momentum 0.9"),
    (1, "--bf16 --optimizer sgd"),
    (2, ""),
    (2, f"--bf16 {EP2}"),
    (2, f"--bf16 {EP2} {DIST}"),
    (2, f"{DIST} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000"),
    (2, f"--bf16 {TP2}"),
    (2, f"--bf16 --no-accumulate-allreduce-grads-in-fp32 {DIST}"),
    (2, "--pipeline-model-parallel-size 2 --calculate-per-token-loss"),
]


def stock_optimizer(cfg, chunks):
    """megatron-core's, with torch's AdamW in a loop."""
    from megatron.core.optimizer import get_megatron_optimizer

    from megatron_ext.model.run_config import optimizer_config

    return get_megatron_optimizer(optimizer_config(cfg), chunks)


def trained(cfg, is_stock: bool):
    """(losses, last gradient norm, name -> weights and states) of four steps with clipping."""
    import torch
    from megatron.core.distributed import DistributedDataParallel

    from megatron_ext.checkpoint import state as parts
    from megatron_ext.model import gpt
    from megatron_ext.model.gradients import WrittenGradients, averaged_loss
    from megatron_ext.optim import update
    from megatron_ext.optim.build import build_optimizer
    from tests.checkpoint import small_run

    torch.manual_seed(0)
    wrapper = DistributedDataParallel if is_stock else WrittenGradients
    builder = stock_optimizer if is_stock else build_optimizer
    with (
        mock.patch.object(gpt, "WrittenGradients", wrapper),
        mock.patch.object(small_run, "build_optimizer", builder),
    ):
        run = small_run.SmallRun(cfg)
    optimizer, norms = run.state.optimizer, []

    def fast() -> None:
        norms.append(update.prepare(optimizer))
        update.apply(optimizer, norms[-1])

    if not is_stock:
        chunks = run.state.chunks
        chunks[0].config.grad_scale_func = averaged_loss(chunks, optimizer.scale_loss, False)
    stock = optimizer.step
    optimizer.step = (lambda: norms.append(stock()[1])) if is_stock else fast
    losses = run.steps(4)
    parts.sync_weights(run.state.chunks)
    model = parts.sharded_model(run.state.chunks)
    states, _ = parts.sharded_optimizer(optimizer, model)
    pieces = parts.built([model, states])
    values = {(p.key, p.global_offset): p.data.detach().float().clone() for p in pieces}
    return losses, norms, values


def compare(case: str) -> None:
    import os

    import torch

    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from tests.checkpoint.small_run import FLAGS
    from tests.ranks.harness import next_port
    from tests.ranks.tiny import TINY

    plain = "--hidden-dropout 0 --clip-grad 0.1 --adam-eps 1e-4"
    cfg = parse([*TINY, *FLAGS, *plain.split(), *case.split()])
    os.environ["MASTER_PORT"] = next_port()
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        stock, fast = trained(cfg, True), trained(cfg, False)
    is_half = cfg.train.bf16
    torch.testing.assert_close(fast[0], stock[0], rtol=1e-3 if is_half else 1e-6, atol=0)
    torch.testing.assert_close(fast[1], stock[1], rtol=1e-2 if is_half else 1e-5, atol=0)
    assert stock[1][0] > 0.1, "nothing was clipped"
    assert fast[2].keys() == stock[2].keys()
    for name, wanted in stock[2].items():
        scale = float(wanted.abs().max()) or 1.0
        difference = float((fast[2][name] - wanted).abs().max()) / scale
        assert difference < (2e-2 if is_half else 1e-4), (name, difference)


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_steps_equal_megatron_cores(ranks, case):
    run_ranks(compare, ranks, case)


def no_gradient() -> None:
    import torch

    from tests.checkpoint.small_run import small_run

    with small_run("") as run:
        (chunk,) = run.state.chunks
        for param in chunk.params_with_grad:
            param.main_grad.fill_(7.0)
        chunk.zero_grad_buffer()
        first, second, *_ = chunk.params_with_grad
        (first.sum() * 2.0).backward()
        (first.sum() * 3.0).backward()
        chunk.finish_grad_sync()
        assert torch.all(first.main_grad == 5.0) and first.grad is None
        assert not second.main_grad.any()


def test_what_got_no_gradient_is_zero():
    run_ranks(no_gradient, 1)
