"""Norm of the weights and losses by domain do not depend on the layout."""

from __future__ import annotations

import pytest

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

LAYOUTS = {
    "tp2 pp2": "--tensor-model-parallel-size 2 --sequence-parallel"
    " --pipeline-model-parallel-size 2",
    "ep2 cp2": "--expert-model-parallel-size 2 --context-parallel-size 2",
}


class Domains:
    """Mock samples of three domains."""

    domains = ("a", "b", "c")

    def __init__(self, dataset) -> None:
        self._dataset, self.rules = dataset, dataset.rules

    def __len__(self) -> int:
        return len(self._dataset)

    def sample_with_starts(self, index: int):
        """The mock sample, of domain 0 or 2."""
        tokens, _, starts = self._dataset.sample_with_starts(index)
        return tokens, 2 if index % 3 == 0 else 0, starts


def _measure(flags: list[str]) -> dict:
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import Vocabulary, build_chunks, wrap_for_training
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.optim.params_norm import params_norm
    from megatron_ext.train import setup
    from megatron_ext.train.evaluate import evaluate
    from megatron_ext.train.step import prepare_config

    cfg = parse([*TINY, "--eval-iters", "2", *flags])
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        chunks = wrap_for_training(cfg, build_chunks(cfg, Vocabulary(251, 256)))
        prepare_config(chunks[0].config, build_optimizer(cfg, chunks), chunks, chunks[0].ddp_config)
        valid = Domains(setup.datasets(cfg, setup.tokenizer(cfg)).valid)
        record = evaluate(
            chunks,
            valid,
            split="validation",
            num_batches=2,
            global_batch_size=8,
            micro_batch_size=2,
            seq_length=64,
            step=0,
            text_bytes=None,
            stop=lambda: (False, False),
        )
        return {"norm": params_norm(chunks), **record}


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(_measure, 1, [])[0]


def test_domains_make_up_the_whole(one_rank):
    losses = one_rank["val_loss_per_domain"]
    assert list(losses) == ["a", "c"]
    mean = (10 * losses["a"] + 6 * losses["c"]) / 16  # samples 0, 3, .. 15 are of c
    assert mean == pytest.approx(one_rank["val_loss"], rel=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_the_same(one_rank, name):
    for got in run_ranks(_measure, 4, LAYOUTS[name].split()):
        assert got["norm"] == pytest.approx(one_rank["norm"], rel=1e-6)
        assert got["val_loss_per_domain"] == pytest.approx(
            one_rank["val_loss_per_domain"], rel=1e-5
        )


class Alternating:
    """Six samples of domain a, then six of b, again and again."""

    domains = ("a", "b")

    def __len__(self) -> int:
        return 24


def test_left_out_samples_are_counted_where_they_are_read(monkeypatch):
    from megatron_ext.train import observed

    def given(dataset, first: int, stop: int) -> list[int]:
        of_b = sum(sample // 6 % 2 for sample in range(first, stop))
        return [stop - first - of_b, of_b]

    monkeypatch.setattr(observed, "given", given)
    count = lambda *where: observed.read_of_domains(Alternating(), *where)  # noqa: E731
    assert count(0, 12, []) == [6, 6]
    assert count(0, 12, [(4, 5)]) == [4, 8]  # 6, of b, is read in their place
    assert count(4, 6, [(4, 5)]) == [0, 2] and count(6, 12, [(4, 5)]) == [0, 6]
    assert count(18, 24, [(20, 23)]) == [0, 6]  # the end of the data: the sample before
