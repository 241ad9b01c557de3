"""A planted spike leaves RUN/spike_step_N.json with its samples; healthy runs leave none."""

import json

import numpy as np
import torch

from data.indexed import write_pair
from data.origin import pieces
from megatron_ext.config import parse
from megatron_ext.device import start
from megatron_ext.mesh.groups import process_groups
from tests.ranks.fingerprint import history
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain
from tests.resilience.curves import alarms, missed

STEPS = 42
FLAGS = (
    f"--num-layers 2 --train-iters {STEPS} --no-mock-data --split 100,0,0 --lr 5e-3"
    " --lr-decay-style constant --spike-window 16"
).split()
STRANGE_STEP = 39


def test_healthy_curves_raise_few_alarms():
    """At most 5 in 15,000 steps of seeds that nobody chose; what no noise makes is found."""
    seeds = np.random.SeedSequence(20240601).generate_state(15)
    assert sum(len(alarms(int(seed), 1000, 10.0)) for seed in seeds) <= 5
    assert not any(missed(int(seed), 10.0, 3.0, of_norm=False) for seed in seeds)
    assert not any(missed(int(seed), 10.0, 20.0, of_norm=True) for seed in seeds)


def _corpus(folder, strange: int | None) -> list[str]:
    """420 documents of one phrase; document `strange` is noise."""
    documents = [np.arange(10, 74)] * 420
    if strange is not None:
        documents[strange] = np.random.default_rng(1).integers(100, 250, size=64)
    write_pair(folder / "corpus", documents, np.uint16)
    return ["--data-path", str(folder / "corpus")]


def _whereabouts(argv: list[str], sample: int) -> tuple[int, int, int]:
    """(longest document of a sample, first, last sample with tokens of it); one rank."""
    from megatron_ext.train import setup

    cfg = parse([*TINY, *argv])
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        train = setup.datasets(cfg, setup.tokenizer(cfg)).train
    document = max(pieces(train, sample), key=lambda piece: piece.count).document
    with_it = [
        number
        for number in range(len(train))
        if any(piece.document == document for piece in pieces(train, number))
    ]
    return document, with_it[0], with_it[-1]


def _weights_jump(argv: list[str], at_step: int) -> None:
    """pretrain_moe.py; the output layer of all ranks is 30 times too large after `at_step`."""
    from megatron_ext.train import loop

    stock = loop.train_step

    def train_step(state, *args, **kwargs):
        result = stock(state, *args, **kwargs)
        if state.progress.step + 1 == at_step:
            with torch.no_grad():
                for name, weight in state.chunks[0].module.named_parameters():
                    weight.mul_(30.0 if "output_layer" in name else 1.0)
        return result

    loop.train_step = train_step
    try:
        pretrain([*TINY, *argv])
    finally:
        loop.train_step = stock


def _spikes(run) -> dict[int, dict]:
    found = (json.loads(path.read_text()) for path in run.glob("spike_step_*.json"))
    return {one["step"]: one for one in found}


def test_strange_data_are_named_and_skipped(tmp_path):
    """A phrase is learnt, then a document of noise comes; without its samples there is no alarm."""
    argv = [*FLAGS, *_corpus(tmp_path, None)]
    ((document, first, last),) = run_ranks(_whereabouts, 1, argv, 8 * STRANGE_STEP - 5)
    _corpus(tmp_path, document)
    step = first // 8 + 1
    run_ranks(pretrain, 2, [*TINY, *argv, "--run-dir", str(tmp_path / "spike")])
    spikes = _spikes(tmp_path / "spike")
    assert min(spikes) == step
    of_step = [
        ids
        for rank in spikes[step]["ranks"]
        for note in rank["steps"]
        if note["step"] == step
        for micro_batch in note["sample_ids"]
        for ids in micro_batch
    ]
    assert sorted(of_step) == list(range(8 * step - 8, 8 * step))
    assert first in of_step
    owner = first % 4 // 2
    mine = next(r for r in spikes[step]["ranks"] if r["dp"] == owner)["steps"][-1]
    assert any(first in micro_batch for micro_batch in mine["sample_ids"])

    skip = ["--skip-samples", f"{first}-{last}", "--run-dir", str(tmp_path / "healthy")]
    run_ranks(pretrain, 2, [*TINY, *argv, *skip])
    assert _spikes(tmp_path / "healthy") == {}
    assert len(history(tmp_path / "healthy")) == STEPS


def test_a_jump_of_the_weights_is_a_spike(tmp_path):
    argv = [*FLAGS, "--train-iters", "18", "--mock-data", "--run-dir", str(tmp_path)]
    run_ranks(_weights_jump, 2, argv, 17)
    assert min(_spikes(tmp_path)) == 18
    assert "lm_loss" in _spikes(tmp_path)[18]["what"]
