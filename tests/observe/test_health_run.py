"""One run of two ranks in which one fault after the other is planted: each is named within the
stated number of steps, does what its flag says, and nothing else is reported.

| planted                                        | at      | reported               | does |
|------------------------------------------------|---------|------------------------|------|
| sigmoid router of layer 2 cheats its loss      | 5 to 10 | within the window      | warn |
| loss x 3                                       | 20      | in that step           | save |
| gradient norm x 50                             | 23      | in that step           | warn |
| rank 1 sleeps ten times the slowest of 5 steps | 26 on   | half a window + 1 step | save |
| expert 5 of layer 3, on rank 1, gives NaN      | 32      | before the update      | stop |
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

WINDOW = 4
CHEAT, LOSS, NORM, SLEEP, NAN = 5, 20, 23, 26, 32
FLAGS = (
    f"--health-window {WINDOW} --train-iters 40 --log-routing-interval 4 --log-interval 8"
    " --moe-router-score-function sigmoid --expert-model-parallel-size 2"
    " --no-check-for-nan-in-loss-and-grad --health-min-throughput-share 0.2"
    " --health-throughput-seconds 0 --health-loss-spike save --health-throughput save"
    " --health-nan save --health-expert-nan stop"
)


def _cheating(logits: torch.Tensor) -> torch.Tensor:
    """Three of four tokens like experts 0 and 1 a little more than the others and choose them, the
    fourth gives them nothing: most of the load with little of the probability.
    """
    made = torch.zeros_like(logits).view(-1, logits.shape[-1])
    made[:, :2] = 0.01
    made[::4, :2] = -10.0
    made[::4, 2:] = torch.rand(made[::4, 2:].shape, generator=torch.Generator().manual_seed(0))
    return made.view_as(logits) + 0 * logits


def _plant(argv: list[str]) -> None:
    """Train with the faults of the module's table."""
    import time

    from megatron_ext.moe.experts import GroupedExperts
    from megatron_ext.moe.router import Router
    from megatron_ext.optim import update
    from megatron_ext.train import loop, step

    stock = loop.train_step, Router.routing, step.language_model_loss, update.prepare
    stock_forward = GroupedExperts.forward
    now = {"step": 0, "seconds": 0.1, "experts": []}

    def train_step(state, micro_batches, *rest):
        now["step"] = number = state.progress.step + 1
        modules = [one for chunk in state.chunks for one in chunk.modules()]
        now["experts"] = [one for one in modules if isinstance(one, GroupedExperts)]
        if number >= SLEEP and torch.distributed.get_rank() == 1:
            time.sleep(10 * now["seconds"])
        start = time.perf_counter()
        result = stock[0](state, micro_batches, *rest)
        if LOSS < number < SLEEP:
            now["seconds"] = max(now["seconds"], time.perf_counter() - start)
        return result

    def routing(self, logits, padding_mask=None):
        if self.layer_number == 2 and CHEAT <= now["step"] <= 2 * CHEAT:
            logits = _cheating(logits)
        return stock[1](self, logits, padding_mask=padding_mask)

    def loss(mask, is_per_token, loss_BS):
        return stock[2](mask, is_per_token, loss_BS * (3 if now["step"] == LOSS else 1))

    def prepare(optimizer):
        norm = stock[3](optimizer)
        return norm * 50 if now["step"] == NORM else norm

    def forward(self, *given):
        rows, bias = stock_forward(self, *given)
        is_here = torch.distributed.get_rank() == 1 and self is now["experts"][2]
        if now["step"] == NAN and is_here:
            counts = given[1].tolist()
            rows = rows.clone()
            rows[counts[0] : counts[0] + counts[1]] = torch.nan  # its second expert of four
        return rows, bias

    loop.train_step, Router.routing, step.language_model_loss = train_step, routing, loss
    update.prepare, GroupedExperts.forward = prepare, forward
    pretrain(argv)


@pytest.fixture(scope="module")
def unwell(tmp_path_factory):
    """(run folder, its verdicts) of the run of the table, which ends with code 76."""
    folder = tmp_path_factory.mktemp("unwell")
    argv = [*TINY, *FLAGS.split(), "--run-dir", str(folder)]
    with pytest.raises(AssertionError, match="exit code 76"):
        run_ranks(_plant, 2, argv, timeout_s=300)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return folder, [one for one in map(json.loads, lines) if "health" in one]


def test_each_fault_is_found_in_time_and_nothing_else(unwell):
    found = {one["health"]: one for one in unwell[1]}
    steps = {kind: one["step"] for kind, one in found.items()}
    slow, cheat = steps.pop("throughput"), steps.pop("balance_cheat")
    assert steps == {
        "loss_spike": LOSS,
        "grad_spike": steps["grad_spike"],
        "nan": NAN,
        "expert_nan": NAN,
    }
    assert CHEAT < cheat <= CHEAT + WINDOW - 1
    assert SLEEP + 1 <= slow <= SLEEP + WINDOW // 2
    spikes = [one["step"] for one in unwell[1] if one["health"] == "grad_spike"]
    assert NORM in spikes and set(spikes) <= {LOSS, NORM}
    assert len(unwell[1]) == 5 + len(spikes)
    assert all(one["do"] for one in found.values())


def test_the_layer_and_the_expert_are_named(unwell):
    found = {one["health"]: one for one in unwell[1]}
    assert found["balance_cheat"]["layer"] == 2
    assert (found["expert_nan"]["layer"], found["expert_nan"]["expert"]) == (3, 5)
    reason = json.loads((unwell[0] / "exit_reason.json").read_text())
    assert reason["code"] == 76 and "layer 3 expert 5" in reason["what"]


def test_what_is_saved_is_the_last_good_state(unwell):
    folder, verdicts = unwell
    slow = next(one["step"] for one in verdicts if one["health"] == "throughput")
    saved = sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*"))
    assert saved == [LOSS, slow, NAN - 1]
    assert len(read_metrics(folder)) == NAN - 1
    for path in folder.glob(f"checkpoints/step_{NAN - 1:08d}/*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        assert all(torch.isfinite(one.float()).all() for one in tensors)
