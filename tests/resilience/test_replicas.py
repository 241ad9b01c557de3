"""Row 14: any flipped bit of anything that has a replica is found and its rank named."""

import json

import pytest
import torch

from megatron_ext.resilience.replicas import differences, hash_of, odd_ones, weights_of
from tests.checkpoint.small_run import small_run
from tests.ranks.fingerprint import history
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain

BITS = {"sign": 31, "exponent": 25, "mantissa": 3}


def flip(tensor, element: int, bit: int) -> None:
    """Invert one bit of one fp32 element in place; twice is once not."""
    tensor.data.view(-1).view(torch.int32)[element] ^= torch.tensor(
        -(2**31) if bit == 31 else 2**bit, dtype=torch.int32
    )


@pytest.mark.parametrize("count", [1, 7, 512, 1000, 70_001])
def test_every_bit_counts(count):
    torch.manual_seed(count)
    tensor = torch.randn(count)
    weights = weights_of(4096)
    before = hash_of(tensor, weights)
    for element in {0, count // 2, count - 1}:
        for bit in range(32):
            flip(tensor, element, bit)
            assert hash_of(tensor, weights) != before
            flip(tensor, element, bit)
    assert hash_of(tensor, weights) == before
    if count > 1:
        assert hash_of(tensor.flip(0), weights) != before


def test_odd_lengths_of_16_bits():
    tensor = torch.randn(13, dtype=torch.bfloat16)
    before = hash_of(tensor, weights_of(4096))
    tensor.view(torch.int16)[12] ^= 1
    assert hash_of(tensor, weights_of(4096)) != before


def test_majority_names_the_rank_and_two_cannot():
    (odd,) = odd_ones(["a", "b"], torch.tensor([[1, 5], [1, 5], [2, 5], [1, 5]]), [4, 5, 6, 7])
    assert (odd.tensor, odd.ranks, odd.is_certain) == ("a", [6], True)
    (pair,) = odd_ones(["a"], torch.tensor([[1], [2]]), [0, 1])
    assert (pair.ranks, pair.is_certain) == ([0, 1], False)


def _flips(flags: str, seed: int):
    """[(site, bit class, injected tensor, found tensors, ranks)] for one flip at each site."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    with small_run(flags) as run:
        run.steps(2)
        clean = differences(run.state.chunks, run.state.optimizer)
        model = dict(run.state.chunks[0].module.named_parameters())
        leaf = run.state.optimizer.chained_optimizers[0].optimizer
        some = leaf.param_groups[0]["params"][0]
        sites = {
            "weight": next(p for name, p in model.items() if name.endswith("linear_qkv.weight")),
            "router": next(p for name, p in model.items() if name.endswith("router.weight")),
            "moment": leaf.state[some]["exp_avg"],
        }
        for site, tensor in sites.items():
            for name, bit in BITS.items():
                element = int(torch.randint(tensor.numel(), (1,), generator=generator))
                on_this_rank = torch.distributed.get_rank() == 1
                if on_this_rank:
                    flip(tensor, element, bit)
                found = differences(run.state.chunks, run.state.optimizer)
                results.append((site, name, [(odd.tensor, odd.ranks) for odd in found]))
                if on_this_rank:
                    flip(tensor, element, bit)
        after = differences(run.state.chunks, run.state.optimizer)
    return clean, results, after


@pytest.mark.parametrize(("world_size", "culprits"), [(2, [0, 1]), (4, [1])])
def test_flips_are_found_on_data_parallel_ranks(world_size, culprits):
    for clean, results, after in run_ranks(_flips, world_size, "", 7):
        assert clean == after == []
        assert len(results) == 9
        assert all(len(found) == 1 for _, _, found in results)
        assert all(found[0][1] == culprits for _, _, found in results)


def test_replicated_weights_of_tensor_parallel_ranks_are_compared():
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"
    for clean, results, after in run_ranks(_flips, 2, flags, 8):
        assert clean == after == []
        found = {site: bool(odd) for site, _, odd in results}
        assert found["router"], "tp ranks hold the same router"
        assert not found["weight"] and not found["moment"], "these have no replica here"


def _train_with_a_flip(argv: list[str], at_step: int | None) -> int:
    """pretrain_moe.py; after the update of `at_step` one bit of a weight of rank 1 flips."""
    from megatron_ext.train import loop

    stock = loop.train_step

    def train_step(state, *args, **kwargs):
        result = stock(state, *args, **kwargs)
        if state.progress.step + 1 == at_step and torch.distributed.get_rank() == 1:
            weights = dict(state.chunks[0].module.named_parameters())
            flip(
                next(w for name, w in weights.items() if "linear_fc" in name or "qkv" in name), 5, 2
            )
        return result

    loop.train_step = train_step
    try:
        pretrain([*TINY, *argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        loop.train_step = stock
    return 0


@pytest.mark.parametrize(("at_step", "code", "last"), [(None, 0, 4), (2, 77, 3)])
def test_a_run_stops_at_the_next_check(at_step, code, last, tmp_path):
    """The flip in step 2 is found by the check after step 4, whose state is not saved."""
    flags = "--train-iters 4 --save-interval 2 --check-weight-hash-across-dp-replicas-interval 4"
    argv = [*flags.split(), "--run-dir", str(tmp_path)]
    assert run_ranks(_train_with_a_flip, 4, argv, at_step) == [code] * 4
    assert max(history(tmp_path)) == last
    assert (tmp_path / "checkpoints" / "step_00000004").exists() == (code == 0)
    if code:
        reason = json.loads((tmp_path / "exit_reason.json").read_text())
        assert (reason["code"], reason["rank"]) == (77, 1)
        assert "differs on rank 1" in reason["what"]
