"""The routing record of one step equals a recount from the routing maps and logits that all ranks
really used, in every layout, and is the same on all ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

NUM_DOMAINS, NUM_SAMPLES, SEQ = 3, 8, 64
LAYOUTS = {
    "one rank, moe_act recomputed": (
        1,
        "--micro-batch-size 2 --recompute-granularity selective --recompute-modules moe_act",
    ),
    "tp2 sp pp2 vpp2, all recomputed": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
        " --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 2"
        " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "cp2 ep2 dp2, sigmoid, global loss counted first": (
        4,
        "--context-parallel-size 2 --expert-model-parallel-size 2 --micro-batch-size 1"
        " --moe-router-score-function sigmoid --moe-router-load-balancing-type global_aux_loss"
        " --moe-global-aux-mode exact",
    ),
    "tp2 ep4, capacity, dense first layer, mtp": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4"
        " --expert-tensor-parallel-size 1 --micro-batch-size 2 --moe-layer-freq ([0]*1+[1]*3)"
        " --moe-expert-capacity-factor 1.0 --mtp-num-layers 1",
    ),
}


def _domain_of(sample: int) -> int:
    return (sample * sample + sample // 3) % NUM_DOMAINS


def _micro_batches(size: int):
    """This rank's micro-batches of 8 samples of random tokens, as the loader would order them."""
    from megatron.core import parallel_state

    from data.loader import TokenBatch
    from megatron_ext.device import current_device
    from megatron_ext.train.step import to_device

    tokens = torch.randint(
        0, 250, (NUM_SAMPLES, SEQ + 1), generator=torch.Generator().manual_seed(3)
    )
    dp, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    for first in range(rank * size, NUM_SAMPLES, size * dp):
        mine = slice(first, first + size)
        ids = torch.arange(first, first + size)
        yield to_device(
            TokenBatch(
                tokens_BS=tokens[mine, :-1].contiguous(),
                labels_BS=tokens[mine, 1:].contiguous(),
                loss_mask_BS=torch.ones(size, SEQ),
                own_mask_BS=torch.ones(size, SEQ),
                position_ids_BS=torch.arange(SEQ).expand(size, -1),
                document_ids_BS=None,
                sample_ids_B=ids,
                domain_ids_B=torch.tensor([_domain_of(int(one)) for one in ids]),
            ),
            current_device(),
        )


def _spy(chunks, num_layers: int) -> list:
    """Fills with (row, logits [T, E], map [T, E]) of every pass of a router that has gradients:
    each micro-batch once.
    """
    from megatron_ext.moe.stats import tallies

    rows = {id(tally): row for row, tally in tallies(chunks, num_layers)}
    seen: list = []
    for chunk in chunks:
        for module in chunk.modules():
            if id(getattr(module, "tally", None)) in rows:
                _record(module, rows[id(module.tally)], seen)
    return seen


def _record(router, row: int, seen: list) -> None:
    from megatron_ext.moe.choice import Choice, maps

    stock = router.routing

    def routing(logits, padding_mask=None):
        probs, chosen = stock(logits, padding_mask=padding_mask)
        if torch.is_grad_enabled():
            map_TE = maps(chosen)[1] if isinstance(chosen, Choice) else chosen
            seen.append((row, logits.detach().flatten(0, 1).double().numpy(), map_TE.numpy()))
        return probs, chosen

    router.routing = routing


def _one_step(flags: list[str]):
    """(record as numpy, what this rank's routers saw) after one step."""
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import Vocabulary, build_chunks, wrap_for_training
    from megatron_ext.moe.close_look import close_look
    from megatron_ext.moe.global_counts import counting, forget
    from megatron_ext.moe.stats import collect
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.train.step import prepare_config, run_schedule

    cfg = parse([*TINY, *flags])
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        chunks = wrap_for_training(cfg, build_chunks(cfg, Vocabulary(250, 256)))
        config = chunks[0].config
        prepare_config(config, build_optimizer(cfg, chunks), chunks, chunks[0].ddp_config)
        size = cfg.train.micro_batch_size
        batches = list(_micro_batches(size))
        seen = _spy(chunks, config.num_layers)
        shape = {"seq_length": SEQ, "micro_batch_size": size}
        if cfg.moe.moe_global_aux_mode == "exact":
            with counting(chunks, len(batches)):
                run_schedule(chunks, batches, **shape, forward_only=True)
        with close_look(chunks, batches, config.num_layers, NUM_DOMAINS) as look:
            run_schedule(chunks, batches, **shape, forward_only=False)
        forget(chunks)
        num_mtp = config.mtp_num_layers or 0
        record = collect(chunks, config.num_layers, num_mtp, config.num_moe_experts, "cpu")
        assert all(tally is None for *_, tally in _leftovers(chunks))
        return _as_numpy(look.collect(record)), seen


def _leftovers(chunks):
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "tally"):
                yield module.tally.num_micro_batches, module.tally.look


def _as_numpy(record) -> dict:
    look = record.look
    names = ("counts_LE", "tokens_L", "probs_LE", "entropy_L", "logit_norm_L", "logit_peak_L")
    found = {name: getattr(record, name).numpy() for name in (*names, "dropped_L")}
    found |= {name: value.numpy() for name, value in record.losses_L.items()}
    looked = {name: getattr(look, name).numpy() for name in vars(look)}
    return {**found, **looked, "num_ranks": record.num_ranks}


def _distribution(logits, is_sigmoid: bool):
    if is_sigmoid:
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module", params=LAYOUTS)
def step(request):
    """(records of all ranks, [(row, logits, map)] of one copy of every token, sigmoid?)."""
    world_size, words = LAYOUTS[request.param]
    ranks = run_ranks(_one_step, world_size, words.split())
    seen = [one for _, mine in ranks for one in mine]
    return [record for record, _ in ranks], seen, "sigmoid" in words


def test_all_ranks_have_the_same_record(step):
    records, _, _ = step
    for record in records:
        for name, value in record.items():
            np.testing.assert_array_equal(value, records[0][name], err_msg=name)
    assert records[0]["num_ranks"] == len(records)


def test_the_record_is_a_recount(step):
    (record, *_), seen, is_sigmoid = step
    for row in range(len(record["tokens_L"])):
        mine = [one for one in seen if one[0] == row]
        if not mine:
            assert not record["counts_LE"][row].any() and record["tokens_L"][row] == 0
            continue
        logits, chosen = (np.concatenate([one[i] for one in mine]) for i in (1, 2))
        assert record["tokens_L"][row] == len(logits) == NUM_SAMPLES * SEQ
        np.testing.assert_array_equal(record["counts_LE"][row], chosen.sum(axis=0))
        assert record["dropped_L"][row] == 2 * len(logits) - chosen.sum()
        probs = _distribution(logits, is_sigmoid)
        np.testing.assert_allclose(record["probs_LE"][row], probs.mean(axis=0), rtol=1e-5)
        entropy = -(probs * np.log(probs)).sum(axis=1).mean()
        np.testing.assert_allclose(record["entropy_L"][row], entropy, rtol=1e-5)
        norms = np.sqrt((logits**2).sum(axis=1)).mean()
        np.testing.assert_allclose(record["logit_norm_L"][row], norms, rtol=1e-5)
        peaks = np.abs(logits).max(axis=1)
        np.testing.assert_allclose(record["logit_peak_L"][row], peaks.mean(), rtol=1e-5)
        np.testing.assert_allclose(record["logit_max_L"][row], peaks.max(), rtol=1e-6)
        together = chosen.astype(float).T @ chosen
        np.testing.assert_array_equal(record["pairs_LEE"][row], together)


def test_domains_are_those_of_the_samples(step):
    (record, *_), _, _ = step
    np.testing.assert_array_equal(record["domains_LDE"].sum(axis=1), record["counts_LE"])
    assert not record["bad_LE"].any()
    samples = np.bincount([_domain_of(one) for one in range(NUM_SAMPLES)], minlength=NUM_DOMAINS)
    kept = record["domains_LDE"].sum(axis=2)
    for row, tokens in enumerate(record["tokens_L"]):
        if tokens and not record["dropped_L"].any():
            np.testing.assert_array_equal(kept[row], samples * SEQ * 2)


def test_domain_tables_do_not_depend_on_the_layout():
    """The same weights and tokens on one rank and on cp2 tp2: the same table, domain by domain."""
    flags = "--micro-batch-size 2"
    one, _ = run_ranks(_one_step, 1, flags.split())[0]
    many = "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"
    four, _ = run_ranks(_one_step, 4, [*flags.split(), *many.split()])[0]
    np.testing.assert_allclose(four["domains_LDE"], one["domains_LDE"], atol=2)
    assert one["domains_LDE"].min(axis=2).max() > 10
    np.testing.assert_allclose(four["probs_LE"], one["probs_LE"], rtol=1e-4)
