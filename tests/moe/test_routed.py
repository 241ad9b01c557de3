"""The fast router against megatron-core's road: outputs, choice, losses, tally and gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_ext.moe.balance import counted_by_sample
from megatron_ext.moe.choice import Choice, counted, maps
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

SIGMOID = {"moe_router_score_function": "sigmoid"}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4}
NONE = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
THREE = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.5, 0.25, 0.125],
}
SETTINGS = {
    "softmax of the chosen": {},
    "softmax first, scaled": {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "no losses": {**NONE, "moe_z_loss_coeff": None},
    "no losses, softmax first": {**NONE, "moe_z_loss_coeff": None, "moe_router_pre_softmax": True},
    "z loss alone": {**NONE, "moe_z_loss_coeff": 0.5},
    "three losses": {**THREE, "moe_z_loss_coeff": 0.25},
    "three losses, softmax first": {**THREE, "moe_router_pre_softmax": True},
    "samples": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5},
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.5},
    "sigmoid": SIGMOID,
    "sigmoid, no losses": {**SIGMOID, **NONE, "moe_z_loss_coeff": None},
    "sigmoid, three losses, z loss": {**SIGMOID, **THREE, "moe_z_loss_coeff": 0.25},
    "sigmoid, z loss alone": {**SIGMOID, **NONE, "moe_z_loss_coeff": 0.5},
    "sigmoid, top-1": {**SIGMOID, "moe_router_topk": 1},
    "sigmoid with bias, scaled": {
        **SIGMOID,
        **THREE,
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "sigmoid with bias and groups": {**SIGMOID, **GROUPS, "moe_router_enable_expert_bias": True},
    "groups": {**GROUPS, **THREE},
    "groups, softmax first": {**GROUPS, "moe_router_pre_softmax": True},
    "groups by their best": {**GROUPS, "group_score_experts": 1},
    "top-1, softmax first": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "all experts": {"moe_router_topk": 8},
    "odd number of experts": {"num_moe_experts": 7, "moe_router_topk": 3},
    "per-token loss": {**THREE, "calculate_per_token_loss": True, "moe_z_loss_coeff": 0.25},
    "fp32 router": {"moe_router_dtype": "fp32", "moe_z_loss_coeff": 0.25},
    "biased gate": {"add_bias_linear": True},
    "capacity": {"moe_expert_capacity_factor": 1.0},
}
LAYOUTS = {
    "one rank": (1, ""),
    "tp2 sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "dp2": (2, ""),
}


def _router(kind, config, groups, group_score_experts):
    """One of both routers, its random state that of the other one."""
    from megatron_ext.moe.stock_router import RouterOptions

    torch.manual_seed(5)
    options = RouterOptions(moe_router_group_score_experts=group_score_experts)
    router = kind(config, groups, options=options)
    router.weight.data = torch.randn(router.weight.shape).to(config.params_dtype) / 4
    if router.bias is not None:
        router.bias.data = torch.randn(router.bias.shape).to(config.params_dtype)
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.randn(router.expert_bias.shape) / 4)
    router.set_layer_number(1)
    return router


def _seen(kind, config, groups, dtype, group_score_experts, is_wide: bool = False) -> dict:
    """Everything that two micro-batches [S=13, B=3] through a router leave behind. `is_wide`: the
    same numbers, computed in fp32.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_ext.moe.stats import summed_rows

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(3.0)
    router = _router(kind, config, groups, group_score_experts)
    if is_wide:
        router = router.float()
    made = torch.Generator().manual_seed(torch.distributed.get_rank())
    out: dict = {"probs": [], "map": [], "to input": []}
    for _ in range(2):
        x = torch.randn(13, 3, config.hidden_size, generator=made).to(dtype)
        x = (x.float() if is_wide else x).requires_grad_()
        probs, routing_map = router(x)
        weight = torch.randn(probs.shape, generator=made)
        (probs.float() * weight).sum().backward()
        out["probs"].append(probs.detach().float())
        out["map"].append(routing_map.float())
        out["to input"].append(x.grad.float())
    out = {name: torch.stack(values) for name, values in out.items()}
    out["to weight"] = router.weight.grad.float()
    if router.bias is not None:
        out["to bias"] = router.bias.grad.float()
    if router.expert_bias is not None:
        out["counts for bias"] = router.local_tokens_per_expert
    out["tally"] = summed_rows([router.tally])
    return {name: value.numpy() for name, value in out.items()}


def _both_roads(flags: list[str]) -> dict:
    """setting -> (fast, megatron-core's, is the fast one taken), for fp32; and for bf16."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.initialise import Recorder
    from megatron_ext.model.run_config import transformer_config
    from megatron_ext.moe.router import Router
    from megatron_ext.moe.stock_router import StockRouter

    cfg, found = parse([*TINY, *flags]), {}
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        groups = get_default_pg_collection()
        stock = transformer_config(cfg, Recorder())
        for name, setting in SETTINGS.items():
            config = copy.copy(stock)
            setting = dict(setting)
            of_groups = setting.pop("group_score_experts", None)
            for key, value in setting.items():
                setattr(config, key, value)
            config.params_dtype = torch.float32
            args = (config, groups, torch.float32, of_groups)
            taken = _router(Router, config, groups, of_groups).rule is not None
            found[name] = (_seen(Router, *args), _seen(StockRouter, *args), taken)
            config.params_dtype = torch.bfloat16
            args = (config, groups, torch.bfloat16, of_groups)
            wide = _seen(StockRouter, *args, is_wide=True)
            found[f"{name}, bf16"] = (_seen(Router, *args), wide, _seen(StockRouter, *args))
    return found


@pytest.fixture(scope="module", params=LAYOUTS)
def roads(request):
    """What both roads gave on each rank of a layout."""
    world_size, flags = LAYOUTS[request.param]
    return run_ranks(_both_roads, world_size, flags.split())


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_megatron_core(roads, name):
    for rank in roads:
        fast, stock, taken = rank[name]
        assert taken
        for what, value in stock.items():
            close = {"rtol": 1e-5, "atol": 1e-5} if "to " in what else {"rtol": 2e-6, "atol": 1e-6}
            given = torch.from_numpy(fast[what])
            torch.testing.assert_close(given, torch.from_numpy(value), **close, msg=f"{what}")


@pytest.mark.parametrize("name", SETTINGS)
def test_bf16_is_as_near_to_fp32_as_megatron_core(roads, name):
    """Where the rounding of the logits leaves the choice as it is."""
    for rank in roads:
        fast, wide, stock = (
            {what: torch.from_numpy(value) for what, value in one.items()}
            for one in rank[f"{name}, bf16"]
        )
        same = ((fast["map"] == wide["map"]) & (stock["map"] == wide["map"])).all(dim=-1)
        assert same.float().mean() > 0.8
        for what in ("probs", "to input"):
            rows = same if what == "probs" else same.view(fast[what].shape[:-1])
            ours, theirs = ((one[what] - wide[what])[rows].norm() for one in (fast, stock))
            assert ours <= 1.3 * theirs + 0.01 * wide[what][rows].norm(), what


def test_maps_of_a_choice():
    experts = torch.tensor([[2, 0], [1, 2], [0, 2]])
    probs = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]], requires_grad=True)
    choice = Choice(experts, probs, counted(experts, 4))
    probs_TE, map_TE = maps(choice)
    assert choice.counts_E.tolist() == [2, 1, 3, 0] and (choice.num_experts, choice.topk) == (4, 2)
    assert map_TE.sum(dim=0).tolist() == [2, 1, 3, 0]
    assert probs_TE.tolist()[0] == [0.25, 0, 0.75, 0]
    probs_TE.backward(torch.arange(12.0).view(3, 4))
    assert probs.grad.tolist() == [[2, 0], [5, 6], [8, 10]]


def test_assignments_of_each_sample():
    experts = torch.tensor([[0, 1], [2, 1], [0, 2], [1, 2]])  # samples 0 1 0 1
    assert counted_by_sample(experts, 2, 3).tolist() == [[2, 1, 1], [0, 2, 2]]
