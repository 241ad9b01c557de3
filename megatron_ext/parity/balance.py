"""How far the running estimate of the global-batch balance is from the exact one:

python -m megatron_ext.parity.balance --config configs/quickstart.yaml --train-iters 60

Trains the model once with each `--moe-global-aux-mode` on one rank, a sample a micro-batch (so that
the running estimate has the most to estimate), and reports: the cosine between the router gradients
that the two modes give the balance loss on the same weights and batch; the load spread (max / mean)
over the last steps; and the normalised mutual information of domain and expert, 2 I(D;E) / (H(D) +
H(E)) per layer on held-out samples (spec: arXiv:2501.11873, which found domains to specialise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import RunConfig, parse
from megatron_ext.errors import exit_on_fatal

ONE_RANK = (
    "--pipeline-model-parallel-size 1 --num-virtual-stages-per-pipeline-rank 1"
    " --expert-model-parallel-size 1 --micro-batch-size 1 --eval-iters 4 --device cpu"
).split()


@dataclass(frozen=True)
class Outcome:
    """One mode's run."""

    cosines: list[float]
    load_spread: float
    information_L: list[float]
    lm_loss: float


def normalised_information(counts_DE: Tensor) -> float:
    """2 I(D;E) / (H(D) + H(E)) of counts [domains, experts]; 0 independent, 1 one to one."""
    joint = counts_DE.double() / counts_DE.sum()
    domain, expert = joint.sum(dim=1), joint.sum(dim=0)

    def entropy(p: Tensor) -> float:
        return float(-(p * p.clamp(min=1e-300).log()).sum())

    mutual = entropy(domain) + entropy(expert) - entropy(joint.flatten())
    total = entropy(domain) + entropy(expert)
    return 2 * mutual / total if total else 0.0


def _balance_gradient(state: Any, batches: Sequence, settings: Any, exact: bool) -> Tensor:
    """Router gradients of one global batch with the balance loss minus those without it."""
    from megatron_ext.moe.global_counts import counting, forget
    from megatron_ext.train.step import run_schedule

    shape = {"seq_length": settings.seq_length, "micro_batch_size": settings.micro_batch_size}
    gradients, routers = [], _routers(state.chunks)
    asked = [router.wants_exact_counts for router in routers]
    for coefficient_scale in (1.0, 0.0):
        for router in routers:
            router.balance_scale, router.wants_exact_counts = coefficient_scale, exact
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        if exact:
            with counting(state.chunks, len(batches)):
                run_schedule(state.chunks, batches, **shape, forward_only=True)
        run_schedule(state.chunks, batches, **shape, forward_only=False)
        if exact:
            forget(state.chunks)
        gradients.append(torch.cat([r.weight.main_grad.flatten().clone() for r in routers]))
    for router, wants in zip(routers, asked):
        router.balance_scale, router.wants_exact_counts = 1.0, wants
        router.tally.clear()
    return gradients[0] - gradients[1]


def _routers(chunks: Sequence) -> list:
    from megatron_ext.moe.router import Router

    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, Router)]


def _information(state: Any, dataset: Any, cfg: RunConfig, num_samples: int) -> list[float]:
    """Per-layer information between the domain of a sample and the experts of its tokens."""
    from data.loader import MicroBatches
    from megatron_ext.train.step import run_schedule

    routers = _routers(state.chunks)
    tables = [torch.zeros(len(dataset.domains), router.num_experts) for router in routers]
    with MicroBatches(dataset, 1, 0, 1) as batches, torch.no_grad():
        for _ in range(num_samples):
            batch = next(batches)
            for router in routers:
                router.begin_counting()
            run_schedule(
                state.chunks,
                [batch],
                seq_length=cfg.model.seq_length,
                micro_batch_size=1,
                forward_only=True,
            )
            for table, router in zip(tables, routers):
                table[int(batch.domain_ids_B[0])] += router.counted_E
                router.end_counting(None)
    return [normalised_information(table) for table in tables]


def run_mode(argv: list[str], mode: str, every: int = 10) -> Outcome:
    """Train with `--moe-global-aux-mode mode`; measure the cosine every `every` steps."""
    from data.loader import MicroBatches
    from megatron_ext.device import current_device, start

    device = start("cpu")

    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
    from megatron_ext.optim.build import build_optimizer, build_scheduler
    from megatron_ext.train import setup
    from megatron_ext.train.step import StepSettings, prepare_config, to_device, train_step

    cfg = parse([*argv, *ONE_RANK, "--moe-global-aux-mode", mode])
    with process_groups(cfg.parallel, device, cfg.train.seed):
        tokenizer = setup.tokenizer(cfg)
        splits = setup.datasets(cfg, tokenizer)
        chunks = wrap_for_training(cfg, build_chunks(cfg, vocabulary(cfg, tokenizer.vocab_size)))
        optimizer = build_optimizer(cfg, chunks)
        state = setup.train_state(chunks, optimizer, build_scheduler(cfg, optimizer))
        prepare_config(chunks[0].config, optimizer, chunks, chunks[0].ddp_config)
        settings, cosines, spreads, losses = StepSettings.of(cfg), [], [], []
        with MicroBatches(splits.train, 1, 0, 1) as batches:
            for step in range(cfg.train.train_iters):
                batch = [
                    to_device(next(batches), current_device())
                    for _ in range(cfg.train.global_batch_size)
                ]
                if step % every == 0:
                    pair = [_balance_gradient(state, batch, settings, e) for e in (False, True)]
                    cosines.append(float(torch.cosine_similarity(*pair, dim=0)))
                result = train_step(state, batch, settings, lambda: (False, False))
                state.scheduler.step(increment=len(batch))
                state.progress.step += 1
                violation = result.routing.max_violation_L()[result.routing.is_moe_L]
                spreads.append(1 + float(violation.mean()))
                losses.append(result.lm_loss)
        information = _information(state, splits.valid, cfg, num_samples=64)
    last = max(1, len(losses) // 6)
    return Outcome(cosines, sum(spreads[-last:]) / last, information, sum(losses[-last:]) / last)


def main(argv: list[str] | None = None) -> None:
    """Both modes, four lines."""
    import sys

    argv = sys.argv[1:] if argv is None else argv
    with exit_on_fatal():
        outcomes = {mode: run_mode(argv, mode) for mode in ("running", "exact")}
    for mode, outcome in outcomes.items():
        mean = sum(outcome.cosines) / len(outcome.cosines)
        layers = " ".join(f"{value:.3f}" for value in outcome.information_L)
        print(
            f"{mode:8s} cosine(running, exact) mean {mean:.4f} min {min(outcome.cosines):.4f}"
            f"  load spread {outcome.load_spread:.3f}  information per layer {layers}"
            f"  lm loss {outcome.lm_loss:.4f}"
        )
    assert math.isfinite(outcomes["exact"].lm_loss), "training diverged"


if __name__ == "__main__":
    main()
