"""Numbers that break during training, planted from outside: functions of the program are wrapped by
name in the test's own process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tests.ranks.tiny import TINY, pretrain


@dataclass
class Fault:
    """`where`: loss, expert, expert gradient, router, balance loss. `layer` and `expert` are global
    numbers from 0. `times`: how often it strikes (1: transient).
    """

    where: str
    step: int
    rank: int
    micro_batch: int = 0
    layer: int = 0
    expert: int = 0
    times: int = 10**9


class _Planted:
    """Where the run is, and which faults strike there."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults, self.step, self.num_micro_batches = faults, 0, 1
        self.calls: dict[object, int] = {}

    def begins(self, step: int, num_micro_batches: int) -> None:
        self.step, self.num_micro_batches = step, num_micro_batches

    def strikes(self, where: str, key: object, layer: int | None = None) -> Fault | None:
        """Counts a call of `where`; the fault that hits it, if one does."""
        call = self.calls.get((where, key), -1) + 1
        self.calls[where, key] = call
        for fault in self.faults:
            if (
                (fault.where, fault.step) == (where, self.step)
                and fault.rank == torch.distributed.get_rank()
                and fault.micro_batch == call % self.num_micro_batches
                and (layer is None or fault.layer == layer)
                and fault.times
            ):
                fault.times -= 1
                return fault
        return None


def _train_step(plan: _Planted, stock: Callable) -> Callable:
    def run(state, micro_batches, *args, **kwargs):
        if not plan.step:
            _plant_in_gradients(plan, state.chunks)
        plan.begins(state.progress.step + 1, len(micro_batches))
        return stock(state, micro_batches, *args, **kwargs)

    return run


def _loss(plan: _Planted, stock: Callable) -> Callable:
    def run(*args):
        total, count, report = stock(*args)
        factor = float("nan") if plan.strikes("loss", None) else 1.0
        return total * factor, count, report * torch.tensor([factor, 1.0])

    return run


def _experts(plan: _Planted, stock: Callable) -> Callable:
    def run(self, x_TH, tokens_per_expert, probs_T):
        out, bias = stock(self, x_TH, tokens_per_expert, probs_T)
        hit = plan.strikes("expert", id(self), self.layer_of_test)
        if hit:
            starts = (torch.cumsum(tokens_per_expert, 0) - tokens_per_expert).tolist()
            out = out.clone()  # the first row of a block is a token's, the last may be padding
            out[starts[hit.expert % self.num_local_experts]] = float("inf")
        return out, bias

    return run


def _gating(plan: _Planted, stock: Callable) -> Callable:
    def run(self, hidden):
        logits = stock(self, hidden)
        hit = plan.strikes("router", id(self), self.layer_number - 1)
        return logits * float("nan") if hit else logits

    return run


def _balance(plan: _Planted, stock: Callable) -> Callable:
    def run(self, name, share):
        is_balance = name.endswith("balancing_loss")
        hit = is_balance and plan.strikes("balance loss", id(self), self.layer_number - 1)
        return stock(self, name, share * float("inf") if hit else share)

    return run


@contextlib.contextmanager
def planted(faults: list[Fault]) -> Iterator[None]:
    """Training inside meets these faults."""
    from megatron_ext.moe.experts import GroupedExperts
    from megatron_ext.moe.router import Router
    from megatron_ext.train import loop, step

    plan = _Planted(faults)
    wrappers = (
        (loop, "train_step", _train_step),
        (step, "language_model_loss", _loss),
        (GroupedExperts, "forward", _experts),
        (Router, "gating", _gating),
        (Router, "log_loss", _balance),
    )
    with contextlib.ExitStack() as undo:
        for owner, name, make in wrappers:
            stock = getattr(owner, name)
            undo.callback(setattr, owner, name, stock)
            setattr(owner, name, make(plan, stock))
        yield


def _plant_in_gradients(plan: _Planted, chunks) -> None:
    """Marks experts with their layer, and puts hooks on their gradients."""
    for layer in (m for chunk in chunks for m in chunk.modules() if hasattr(m, "layer_number")):
        experts = getattr(getattr(layer, "mlp", None), "experts", None)
        if experts is None:
            continue
        experts.layer_of_test = layer.layer_number - 1

        def spoil(gradient, experts=experts):
            hit = plan.strikes("expert gradient", id(experts), experts.layer_of_test)
            if not hit:
                return None
            gradient = gradient.clone()
            gradient[hit.expert % experts.num_local_experts].flatten()[3] = float("nan")
            return gradient

        experts.fc1_weight.register_hook(spoil)


def train(argv: list[str], faults: list[Fault]) -> int:
    """pretrain_moe.py with these flags after TINY's -> its exit code."""
    with planted(faults):
        try:
            pretrain([*TINY, *argv])
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0
