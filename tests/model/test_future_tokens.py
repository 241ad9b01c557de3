"""What looks ahead stays in its document: the targets and losses of multi-token prediction.

The stock mask of depth k (megatron-core 0.16.1) is the loss mask k places on: an eod token is then
trained on the tokens of the next document.
"""

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction

from data.loader import make_batch
from data.rules import Rules
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

EOD, LONG, DEPTHS = 0, 64, 2
RULES = {
    "eod mask": "--eod-mask-loss",
    "positions": "--reset-position-ids",
    "attention": "--reset-attention-mask",
    "all": "--eod-mask-loss --reset-position-ids --reset-attention-mask",
}


class _Rows:
    """Given samples [n, S + 1] as a dataset, their documents' starts with them."""

    domains = ("rows",)

    def __init__(self, rows, starts, rules: Rules):
        self.rows, self.starts, self.rules = rows, starts, rules

    def sample_with_starts(self, index: int):
        return self.rows[index], 0, self.starts[index]


def _rules(flags: str) -> Rules:
    names = [word[2:].replace("-", "_") for word in flags.split()]
    return Rules(EOD, **dict.fromkeys(names, True))


def _random_rows(count: int, dice: np.random.Generator):
    """Documents of 1 to 20 tokens, some without eod, cut into samples anywhere."""
    rows, starts, documents = [], [], []
    for _ in range(count):
        tokens, owner, begins = [], [], []
        while len(tokens) <= LONG:
            begins.append(len(tokens))
            body = list(dice.integers(1, 250, dice.integers(0, 20)))
            body += [EOD] if dice.random() < 0.7 or not body else []
            owner += [len(begins)] * len(body)
            tokens += body
        first = int(dice.integers(0, len(tokens) - LONG))
        rows.append(np.array(tokens[first:][: LONG + 1]))
        documents.append(owner[first:][: LONG + 1])
        starts.append(np.array([at - first for at in begins if first <= at <= first + LONG]))
    return rows, starts, documents


@pytest.mark.parametrize("name", RULES)
def test_a_target_counts_in_its_own_document_only(name):
    rows, starts, documents = _random_rows(40, np.random.default_rng(10))
    batch = make_batch(_Rows(rows, starts, _rules(RULES[name])), range(len(rows)))
    mask = batch.own_mask_BS
    for depth in range(1, 4):
        mask, total = gpt_model.roll_tensor(mask)
        wanted = [
            [t + depth + 1 <= LONG and owner[t] == owner[t + depth + 1] for t in range(LONG)]
            for owner in documents
        ]
        assert torch.equal(mask, torch.tensor(wanted, dtype=torch.float32)), depth
        assert total == mask.sum()
    stock = multi_token_prediction.roll_tensor(batch.loss_mask_BS)[0]
    assert stock.sum() > gpt_model.roll_tensor(batch.own_mask_BS)[0].sum()


def test_without_rules_only_the_end_of_the_sample_has_no_future():
    rows, starts, _ = _random_rows(3, np.random.default_rng(1))
    batch = make_batch(_Rows(rows, starts, Rules(EOD)), range(3))
    mask, total = gpt_model.roll_tensor(gpt_model.roll_tensor(batch.own_mask_BS)[0])
    assert total == 3 * (LONG - 2) and mask[:, : LONG - 2].all()


def test_nothing_to_count_is_no_division_by_zero():
    mask, total = gpt_model.roll_tensor(torch.zeros(2, 8))
    assert mask.sum() == 0 and total == 1


def _terms(flags: str, samples) -> list[list[list[float]]]:
    """Per sample the counted MTP losses [S] of each depth, in training."""
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import build_chunks, vocabulary
    from megatron_ext.train.step import forward_step

    cfg = parse([*TINY, "--mtp-num-layers", str(DEPTHS), "--num-layers", "2", *flags.split()])
    found: list[list[list[float]]] = []
    stock = gpt_model.MTPLossAutoScaler.apply
    with process_groups(cfg.parallel, start("cpu"), 1):
        [chunk] = build_chunks(cfg, vocabulary(cfg, None))
        gpt_model.MTPLossAutoScaler.apply = lambda hidden, loss: (
            found[-1].append(loss.detach()[0].tolist()),
            stock(hidden, loss),
        )[1]
        for sample in samples:
            found.append([])
            rows = _Rows([np.array(sample)], [np.array([0])], _rules(flags))
            forward_step(iter([make_batch(rows, [0])]), chunk)
        gpt_model.MTPLossAutoScaler.apply = stock
    return found


@pytest.mark.parametrize("name", ["eod mask", "attention", "all"])
def test_documents_do_not_meet_in_the_loss(name):
    """Other tokens in document 2 leave every loss of document 1 as it was; where attention is reset
    so do others in document 1 those of document 2. Seen before: 2.1e-3.
    """
    dice, border = np.random.default_rng(5), 30
    one, two = [[*dice.integers(1, 250, border - 1), EOD] for _ in range(2)]
    ends = [[*dice.integers(1, 250, LONG + 1 - border)] for _ in range(2)]
    samples = [one + ends[0], one + ends[1], two + ends[0]]
    base, second, first = torch.tensor(run_ranks(_terms, 1, RULES[name], samples)[0])
    for depth in range(DEPTHS):
        assert base[depth].count_nonzero() == LONG - (depth + 1) - (depth + 2)
        torch.testing.assert_close(second[depth][:border], base[depth][:border], atol=1e-7, rtol=0)
        assert (second[depth] - base[depth]).abs().max() > 1e-4
        if name != "eod mask":
            torch.testing.assert_close(
                first[depth][border:], base[depth][border:], atol=1e-7, rtol=0
            )
