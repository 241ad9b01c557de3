"""One pass over memory gives what torch's own AdamW, clipping and copies give."""

from __future__ import annotations

import copy

import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_ext.optim.adam import TiledAdam
from megatron_ext.optim.norm import ROW, runs, sum_of_squares
from megatron_ext.optim.tiles import TILE, cuts

SIZES = (TILE + 37, 5, 1, 3 * TILE, 63, TILE - 6)
KINDS = (torch.optim.AdamW, torch.optim.Adam)


def stock_of(kind: type) -> torch.optim.Adam:
    """Two groups, of which the second has its own rate and no weight decay."""
    made = torch.Generator().manual_seed(1)
    weights = [torch.randn(size, generator=made) for size in SIZES]
    groups = [{"params": weights[:4]}, {"params": weights[4:], "weight_decay": 0.0, "lr": 3e-3}]
    return kind(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))


def parameters(optimizer) -> list[torch.Tensor]:
    """Of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def one_step(stock, fast, step: int, norm: float) -> None:
    """The same gradients into both, clipped to 1."""
    made = torch.Generator().manual_seed(step)
    for one, other in zip(parameters(stock), parameters(fast)):
        one.grad = torch.randn(one.shape, generator=made)
        other.grad = one.grad.clone()
    clip_grad_by_total_norm_fp32(parameters(stock), 1.0, norm)
    fast.grad_scale = torch.tensor(norm + 1e-6) if norm > 1 else None
    stock.step()
    fast.step()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_torchs(kind):
    stock = stock_of(kind)
    source = copy.deepcopy(stock)
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in parameters(source)[1:]}
    fast = TiledAdam.instead_of(source, copies)
    for step, norm in enumerate((7.3, 0.5, 12.0, 1.7), 1):
        one_step(stock, fast, step, norm)
    for one, other in zip(parameters(stock), parameters(fast)):
        torch.testing.assert_close(other, one, rtol=2e-6, atol=2e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                fast.state[other][name], stock.state[one][name], rtol=2e-6, atol=1e-7
            )
        assert int(fast.state[other]["step"]) == 4
    for master, weight in copies.items():
        assert torch.equal(weight, master.bfloat16())


def test_a_loaded_state_is_found_again():
    stock = stock_of(torch.optim.AdamW)
    fast = TiledAdam.instead_of(copy.deepcopy(stock), {})
    one_step(stock, fast, 1, 1.5)
    fast.load_state_dict(copy.deepcopy(fast.state_dict()))
    one_step(stock, fast, 2, 1.5)
    for one, other in zip(parameters(stock), parameters(fast)):
        torch.testing.assert_close(other, one, rtol=2e-6, atol=2e-7)


def test_a_parameter_without_gradient_stays():
    fast = TiledAdam.instead_of(stock_of(torch.optim.AdamW), {})
    before = [p.clone() for p in parameters(fast)]
    parameters(fast)[2].grad = torch.ones(1)
    fast.step()
    moved = [not torch.equal(one, other) for one, other in zip(before, parameters(fast))]
    assert moved == [False, False, True, False, False, False]


@pytest.mark.parametrize("sizes", [(), (3,), (4,), (9,), (5, 3, 9), (1, 1, 1, 1, 1), (0, 4, 0)])
def test_tiles_cover_every_element_once(sizes):
    pieces = [piece for tile in cuts(sizes, 4) for piece in tile]
    seen = [(number, place) for number, low, high in pieces for place in range(low, high)]
    assert seen == [(number, place) for number, size in enumerate(sizes) for place in range(size)]
    full = [sum(high - low for _, low, high in tile) for tile in cuts(sizes, 4)]
    assert all(size == 4 for size in full[:-1])


def test_neighbours_in_memory_are_one_run():
    whole = torch.randn(100)
    parts = [whole[40:60].view(4, 5), whole[:40], whole[61:]]
    assert [run.numel() for run in runs(parts)] == [60, 39]
    assert torch.equal(next(runs(parts)), whole[:60])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_squares(dtype):
    whole = torch.randn(20 * ROW + 11).to(dtype)
    parts = [whole[: ROW + 1], whole[ROW + 1 : 2 * ROW], torch.randn(7).to(dtype), whole[3 * ROW :]]
    wanted = sum(part.double().square().sum() for part in parts)
    torch.testing.assert_close(sum_of_squares(parts), wanted, rtol=5e-6, atol=0)
    parts[0][3] = float("inf")
    assert sum_of_squares(parts).isinf()
    parts[0][3] = float("nan")
    assert sum_of_squares(parts).isnan()
    assert sum_of_squares([]) == 0
