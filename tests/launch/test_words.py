"""The words after launch/run.sh, without a process."""

from __future__ import annotations

import itertools

import pytest

from launch.local import main
from launch.words import WordsError, read_words

FLAGS = ("--config", "a.yaml", "--train-iters", "5")


def test_options_may_stand_anywhere_in_any_order():
    options = [["--restarts", "3"], ["--cold"], ["--nnodes=2"], ["--node-rank", "1"]]
    endpoint = ["--rdzv-endpoint", "n1:29500"]
    expected = read_words(
        ["--restarts=3", "--cold", "--nnodes=2", "--node-rank=1", *endpoint, "4", *FLAGS], {}
    )
    assert (expected.num_ranks, expected.flags, expected.restarts) == (4, FLAGS, 3)
    for order in itertools.permutations([*options, endpoint]):
        words = list(itertools.chain.from_iterable(order))
        assert read_words([*words, "4", *FLAGS], {}) == expected
        assert read_words(["4", *words, *FLAGS], {}) == expected
        assert read_words(["4", *FLAGS, *words], {}) == expected
        first, others = order[0], itertools.chain.from_iterable(order[1:])
        assert read_words([*first, "4", *FLAGS, *others], {}) == expected


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--restarts", "2", "--help"]])
def test_help_before_the_number_is_the_launchers_own(words, capsys):
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: bash launch/run.sh RANKS") and shown.err == ""
    for option in ("--restarts", "--cold", "--nnodes", "--node-rank", "--rdzv-endpoint", "--srun"):
        assert option in shown.out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help-me"],
        ["0"],
        ["-1"],
        ["two"],
        ["\u00b2"],
        ["\u0664"],
        ["4", "--restarts"],
        ["4", "--restarts", "-1"],
        ["4", "--restarts", "\u00b2"],
        ["4", "--nnodes", "2"],
        ["4", "--nnodes", "2", "--rdzv-endpoint", "n1"],
        ["4", "--nnodes", "2", "--rdzv-endpoint", "n1:0"],
        ["4", "--nnodes", "2", "--rdzv-endpoint", "n1:99999"],
    ],
)
def test_wrong_words_are_named(words):
    with pytest.raises(WordsError):
        read_words(words, {})
