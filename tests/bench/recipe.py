"""What every candidate of step.py trains with, and whether the curves agree.

The same samples, model and recipe leave two differences: the draw of the initial weights and
rounding. The bound is chosen, not derived: how far seeds move a curve was not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tests.bench.driver import Result
from tests.bench.peers.catalogue import PEERS

LAST, TOLERANCE = 4, 0.5
"""Steps whose mean is compared; nats a token."""


def recipe_of(cfg: Any) -> dict[str, Any]:
    """The optimizer's numbers of a configuration: constant learning rate, from the first step."""
    one = cfg.optimizer
    return {
        "lr": one.lr,
        "betas": [one.adam_beta1, one.adam_beta2],
        "eps": one.adam_eps,
        "weight_decay": one.weight_decay,
        "clip": one.clip_grad,
    }


def disagreements(ours: Result, others: Sequence[Result]) -> list[str]:
    """Peers whose last losses are not ours' at the same steps, without a reason in the catalogue.
    Several ranks see other batches and are left out.
    """
    reasons = {peer.label: peer.differs for peer in PEERS}
    found = []
    for other in others:
        label, both = other.candidate.label, min(len(ours.losses()), len(other.losses()))
        if other.error or not both or other.candidate.ranks != ours.candidate.ranks:
            continue
        mine, theirs = (statistics.fmean(r.losses()[:both][-LAST:]) for r in (ours, other))
        if abs(mine - theirs) > TOLERANCE and not reasons.get(label):
            found.append(
                f"{label} is at {theirs:.2f} after {both} steps, ours at {mine:.2f}: more than"
                f" {TOLERANCE} apart"
            )
    return found
