"""Candidates of the step bench train alike: the recipe is the run's, curves that part are named."""

import pytest
import torch

from megatron_ext.config import parse
from tests.bench.driver import Candidate, Result
from tests.bench.ours import ENDLESS
from tests.bench.peers.training import MasterAdamW, initialise
from tests.bench.recipe import TOLERANCE, disagreements, recipe_of
from tests.bench.shapes import flags_of


def _result(label: str, losses, **more) -> Result:
    return Result(Candidate(label, "module", **more), before=list(losses))


def test_the_recipe_is_that_of_ours():
    cfg = parse([*flags_of("bench-moe", "bf16", 4), *ENDLESS, "--run-dir", "x"])
    made = recipe_of(cfg)
    assert made == {
        "lr": cfg.optimizer.lr,
        "betas": [cfg.optimizer.adam_beta1, cfg.optimizer.adam_beta2],
        "eps": cfg.optimizer.adam_eps,
        "weight_decay": 0.1,
        "clip": 1.0,
    }
    schedule = cfg.schedule
    assert schedule.lr_decay_style == "constant" and not schedule.lr_warmup_iters
    assert not schedule.lr_warmup_fraction


def test_a_peer_clips_and_does_not_decay_norms():
    matrix, norm = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    recipe = {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.5, "clip": 1.0}
    optimizer = MasterAdamW([matrix, norm], recipe)
    matrix.grad, norm.grad = torch.full((2, 2), 3.0), torch.zeros(2)
    optimizer.step()
    assert torch.equal(norm, torch.ones(2))
    first = optimizer.adam.state[matrix]["exp_avg"]
    assert float(first.norm()) == pytest.approx(0.1, rel=1e-4)  # (1 - beta1) x norm 1
    assert matrix[0, 0].item() == pytest.approx(1 - 0.1 * 0.5 - 0.1, rel=1e-4)


def test_the_last_matrices_of_a_block_begin_smaller():
    block = torch.nn.ModuleDict({"attention": torch.nn.ModuleDict()})
    block["attention"]["qkv"] = torch.nn.Linear(64, 64, bias=False)
    block["attention"]["out"] = torch.nn.Linear(64, 64, bias=False)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block, torch.nn.Linear(1, 1)])
    initialise(model)
    attention = model.blocks[0]["attention"]
    assert attention["qkv"].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert attention["out"].weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_curves_that_part_are_named_or_explained():
    ours = _result("ours", [9, 8, 7.3, 7.2, 7.1, 7.12])
    near = _result("plain PyTorch, grouped_mm", [9, 8, 7.3, 7.2, 7.1, 7.12 + TOLERANCE])
    far = _result("HF Mixtral, eager", [9, 7, 6, 5.9, 5.9, 5.9])
    explained = _result("DeepSpeed MoE, capacity", [9, 7, 6, 5.9, 5.9, 5.9])
    ranks = _result("ours, dp2", [9, 7, 6, 5, 5, 5], ranks=2)
    broken = _result("HF Qwen3-MoE, eager", [])
    (line,) = disagreements(ours, [near, far, explained, ranks, broken])
    assert line.startswith("HF Mixtral, eager is at 5.93 after 6 steps, ours at 7.18")
    assert disagreements(ours, []) == []
