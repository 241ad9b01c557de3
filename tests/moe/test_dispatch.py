"""Sorted dispatch against megatron-core's all-to-all dispatcher; its pieces against naive ones."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.costs.cpu_blocks import block_rows, rounded
from megatron_ext.moe.choice import Choice, counted, maps
from megatron_ext.moe.feed_forward import reference_swiglu_experts, swiglu_experts
from megatron_ext.moe.places import chunk_order, expert_order, in_blocks, without_blocks
from megatron_ext.moe.rows import (
    collect,
    reference_collect,
    reference_spread,
    sort_rows,
    spread,
    token_rows,
    unsort_rows,
)
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

COUNTS = [[5, 0, 7, 1], [0, 0, 63, 0], [32, 32, 32, 32], [0, 0, 0, 0], [1, 33, 0, 64]]


@pytest.mark.parametrize("experts", [3, 300])
def test_expert_order_is_stable(experts):
    torch.manual_seed(0)
    chosen = torch.randint(experts, (997,))
    assert torch.equal(expert_order(chosen, experts), torch.argsort(chosen, stable=True))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("rows", ["padded", "equal", "bare"])
def test_blocks_hold_every_row_once(counts, rows):
    torch.manual_seed(0)
    experts = torch.arange(4).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    order = expert_order(experts, 4)
    if rows == "bare":
        sizes, places = counts, without_blocks(order, torch.tensor(counts))
    else:
        sizes = [-(-n // 32) * 32 for n in counts] if rows == "padded" else [64] * 4
        places = in_blocks(order, counts, sizes)
    assert places.rows_E.tolist() == list(sizes) and len(places.sources_P) == sum(sizes)
    owner_P = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    assert torch.equal(owner_P[places.places_A], experts)
    assert torch.equal(places.sources_P[places.places_A], torch.arange(len(experts)))
    used = torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, places.places_A, True)
    assert torch.equal((~used).nonzero().flatten(), places.padding)
    full = torch.tensor(counts)[owner_P[places.padding]] > 0  # padding shows its own expert
    shown = experts[places.sources_P[places.padding]] if len(experts) else places.padding
    assert torch.equal(shown[full], owner_P[places.padding][full])


def test_chunks_are_sorted_by_expert():
    rows_Se = torch.tensor([[2, 0, 1], [1, 3, 0]])
    experts = torch.arange(3).repeat(2).repeat_interleave(rows_Se.flatten())
    assert torch.equal(chunk_order(rows_Se), torch.argsort(experts, stable=True))


def _token_rows(kept_TE):
    tokens, experts = kept_TE.nonzero(as_tuple=True)
    counts = kept_TE.sum(0).tolist()
    places = in_blocks(expert_order(experts, len(counts)), counts, block_rows(counts, 1e9))
    per_token = kept_TE.sum(1)
    return token_rows(places, tokens, per_token.cumsum(0) - per_token)


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("cpu_kernels")
def test_spread_and_collect_equal_the_naive_ones(kept, dtype):
    """Tokens with no expert, with some and with all; weights of float32 beside bfloat16 rows."""
    torch.manual_seed(0)
    rows = _token_rows(torch.rand(37, 4) < kept)
    places, num_places = rows.places, len(rows.tokens_P)
    used = torch.ones(num_places, 1).index_fill(0, places.padding, 0)
    x = torch.randn(37, 16, dtype=dtype, requires_grad=True)
    up = torch.randn(num_places, 16, dtype=dtype) * used.to(dtype)
    got, expected = spread(x, rows), reference_spread(x.float(), rows)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2}
    close = {"atol": 1e-2, **tolerance}
    a, b = (torch.autograd.grad(y, x, up.to(y.dtype))[0] for y in (got, expected))
    torch.testing.assert_close(a.float(), b.float(), **close)

    y = torch.randn(num_places, 16, dtype=dtype, requires_grad=True)
    weights = torch.rand(len(places.places_A), requires_grad=True)
    got, expected = collect(y, weights, rows), reference_collect(y.float(), weights, rows)
    torch.testing.assert_close(got.float(), expected, **{**close, "atol": 2e-2})
    up = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, [y, weights], up),
        torch.autograd.grad(expected, [y, weights], up.float()),
    ):
        torch.testing.assert_close(a.float(), b.float(), **{**close, "atol": 5e-2})


def test_rows_return_to_their_order():
    torch.manual_seed(0)
    counts = [5, 0, 40]
    places = in_blocks(torch.randperm(45), counts, [32, 32, 64])
    x = torch.randn(45, 8, requires_grad=True)
    back = unsort_rows(sort_rows(x, places), places)
    assert torch.equal(back, x)
    up = torch.randn(45, 8)
    assert torch.equal(torch.autograd.grad(back, x, up)[0], up)


@pytest.mark.parametrize("rows", [[32, 0, 64, 32], [0, 0, 64, 0], [32] * 4, [0] * 4, [7, 1, 0, 9]])
@pytest.mark.usefixtures("cpu_kernels")
def test_swiglu_experts_equal_the_loop(rows):
    torch.manual_seed(0)
    inputs = [torch.randn(sum(rows), 16), torch.randn(4, 2, 24, 16), torch.randn(4, 16, 24)]
    inputs = [one.requires_grad_() for one in inputs]
    got, expected = (f(*inputs, rows) for f in (swiglu_experts, reference_swiglu_experts))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    up = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, inputs, up) for y in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [[64, 0, 96, 32], [32] * 4])
@pytest.mark.usefixtures("cpu_kernels")
def test_bfloat16_experts_are_as_exact_as_autograd(rows):
    """Against float32: no worse than the same products in bfloat16 through autograd."""
    torch.manual_seed(0)
    exact = [torch.randn(sum(rows), 64), torch.randn(4, 2, 96, 64) / 8, torch.randn(4, 64, 96) / 8]
    exact = [one.bfloat16().float().requires_grad_() for one in exact]
    inputs = [one.detach().bfloat16().requires_grad_() for one in exact]
    up = torch.randn(sum(rows), 64).bfloat16()

    def all_of(function, given):
        out = function(*given, rows)
        return out, *torch.autograd.grad(out, given, up.to(out.dtype))

    truth = all_of(reference_swiglu_experts, exact)
    ours = all_of(swiglu_experts, inputs)
    naive = all_of(reference_swiglu_experts, inputs)
    for t, a, b in zip(truth, ours, naive):
        assert (a - t).norm() <= 1.1 * (b - t).norm() + 1e-6 * t.norm()


def test_few_rows_get_equal_blocks():
    flops = 2.0 * 3 * 256 * 256
    assert block_rows([8, 3, 12, 0], flops) == [32] * 4
    assert block_rows([256, 1000, 31, 0], flops) == [256, 1024, 32, 0]
    assert block_rows([0, 0, 0], flops) == [0, 0, 0]


def test_long_blocks_have_few_lengths():
    lengths = {rounded(count): count for count in range(1, 4097)}
    assert len(lengths) < 50 and rounded(0) == 0
    assert all(count <= rounded(count) < count * 9 / 8 + 32 for count in range(1, 4097))


def test_maps_and_choice_give_the_same_rows():
    from megatron_ext.moe.dispatch import of_choice, of_map

    torch.manual_seed(0)
    experts = torch.rand(19, 6).topk(3).indices.sort(dim=1).values
    choice = Choice(experts, torch.rand(19, 3), counted(experts, 6))
    probs, kept = maps(choice)
    for a, b in zip(of_choice(choice, choice.probs_TK), of_map(kept, probs)):
        assert torch.equal(a, b)


LAYOUTS = {
    "one rank": (1, ""),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "etp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2 tp2": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1",
    ),
    "ep2 etp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
    ),
}
CHANGES = {
    "swiglu": "",
    "gelu": "--no-swiglu",
    "clamped": "--activation-func-clamp-value 0.5 --glu-linear-offset 1.0",
    "capacity": "--moe-expert-capacity-factor 1.0",
    "shared expert": "--moe-shared-expert-intermediate-size 96",
    "recomputed": "--recompute-granularity selective --recompute-modules moe",
    "activation recomputed": "--recompute-granularity selective --recompute-modules moe_act",
    "fp32 router": "--moe-router-dtype fp32",
}


def _layer(cfg, dtype):
    """(MoE layer, stock dispatcher, sorted dispatcher)."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_ext.model.initialise import Recorder
    from megatron_ext.model.layers import layer_spec
    from megatron_ext.model.run_config import transformer_config
    from megatron_ext.moe.dispatch import use_sorted_dispatch
    from megatron_ext.moe.router import RouterOptions

    config = transformer_config(cfg, Recorder())
    config.params_dtype, config.bf16 = dtype, dtype == torch.bfloat16
    spec = layer_spec(config, is_moe=True, router=RouterOptions()).submodules.mlp
    layer = MoELayer(config, spec.submodules, 1, get_default_pg_collection())
    torch.manual_seed(11 + torch.distributed.get_rank())
    for name, weight in layer.named_parameters():
        torch.nn.init.normal_(weight, std=0.2)
        if "router" in name or "shared" in name:
            torch.distributed.broadcast(weight.data, 0)
    layer.set_layer_number(1)
    stock = layer.token_dispatcher
    use_sorted_dispatch(layer)
    return layer, stock, layer.token_dispatcher


def _seen(layer, x, up) -> dict:
    """The output and every gradient."""
    given = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(given)[0]
    out.backward(up.to(out.dtype))
    grads = {name: one.grad.float() for name, one in layer.named_parameters()}
    return {"out": out.detach().float(), "x": given.grad.float(), **grads}


def _differences(flags: list[str]) -> dict:
    """change -> {tensor: (difference between both dispatchers, its norm)}, fp32; and for bf16
    {tensor: (error of the sorted, error of the stock one)} against fp32 experts.
    """
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups

    found, first = {}, parse([*TINY, *flags])
    with process_groups(first.parallel, start("cpu"), first.train.seed):
        for name, change in CHANGES.items():
            cfg = parse([*TINY, *flags, *change.split()])
            layer, stock, ours = _layer(cfg, torch.float32)
            x, up = torch.randn(2, 21, 2, 64)
            layer.token_dispatcher, layer.router._hands_on = stock, False
            expected = _seen(layer, x, up)
            layer.token_dispatcher = ours
            layer.router.hand_on_choice()
            got = _seen(layer, x, up)
            found[name] = {
                key: ((got[key] - value).norm().item(), value.norm().item())
                for key, value in expected.items()
            }
            assert type(ours).__name__ == "SortedDispatcher"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_megatron_core(layout):
    """Outputs and gradients of a layer on every rank, with 42 tokens of 8 experts."""
    world_size, flags = LAYOUTS[layout]
    for rank in run_ranks(_differences, world_size, flags.split()):
        assert set(rank) == set(CHANGES)
        for change, tensors in rank.items():
            for name, (difference, size) in tensors.items():
                assert difference <= 2e-6 * size + 1e-7, (change, name, difference, size)
