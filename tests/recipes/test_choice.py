"""Names of recipes, several files, numbers of ranks that a layout cannot hold."""

from __future__ import annotations

import pytest

from megatron_ext.config import parse
from megatron_ext.config.checks.world import legal_worlds
from megatron_ext.config.recipes import CONFIGS, files_of
from megatron_ext.errors import ConfigError


def refusal(*words: str) -> str:
    """The one line with which the words are refused."""
    with pytest.raises(ConfigError) as caught:
        parse([*words, "--dry-run"], {})
    (line,) = caught.value.lines()
    return line


def test_a_name_with_a_machine_is_two_files():
    layouts = CONFIGS / "layouts"
    assert files_of(["Qwen3-30B-A3B.H100"]) == [
        str(CONFIGS / "qwen3-30b-a3b.yaml"),
        str(layouts / "qwen3-30b-a3b.h100.yaml"),
    ]
    assert files_of(["olmoe-1b-7b.h200"])[1] == str(layouts / "olmoe-1b-7b.h100.yaml")
    assert files_of(["some/where.yaml", "quickstart"])[0] == "some/where.yaml"


@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("qwen3-30b", "qwen3-30b-a3b"),
        ("deepseekv3", "deepseek-v3"),
        ("Mixtral8x7B", "mixtral-8x7b"),
        ("zzz", "olmoe-1b-7b"),
        ("qwen3-30b-a3b.h300", "qwen3-30b-a3b.gb200, qwen3-30b-a3b.h100"),
        ("qwen3-30b-a3b.", "qwen3-30b-a3b.gb200"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(word, offered):
    line = refusal("--config", word)
    assert word in line and offered in line


def test_a_later_file_wins_and_a_flag_over_both(tmp_path):
    (tmp_path / "mine.yaml").write_text("num-layers: 8\nlr: 1.0e-3\n")
    words = ["--config", "quickstart", str(tmp_path / "mine.yaml"), "--world-size", "4"]
    assert parse([*words, "--dry-run"], {}).transformer.num_layers == 8
    assert parse(["--lr", "2e-3", *words, "--dry-run"], {}).schedule.lr == 2e-3
    twice = ["--config", "quickstart", "--config", str(tmp_path / "mine.yaml")]
    cfg = parse([*twice, "--world-size", "4", "--dry-run"], {})
    assert cfg.transformer.num_layers == 8
    assert cfg.origins["num_layers"] == f"file:{tmp_path / 'mine.yaml'}"
    assert "quickstart" in cfg.origins["num_moe_experts"]


@pytest.mark.parametrize(
    ("recipe", "ranks", "offered"),
    [
        ("qwen3-30b-a3b.h100", 24, "use 16, 32, 64 or 128 ranks"),
        ("deepseek-v3.h100", 1500, "use 1024, 2048, 3072 or 6144 ranks"),
        ("kimi-k2.gb200", 1, "use 256"),
        ("gpt-oss-20b.h100", 3, "use 8"),
    ],
)
def test_a_wrong_number_of_ranks_gets_those_that_fit(recipe, ranks, offered):
    line = refusal("--config", recipe, "--world-size", str(ranks))
    assert line.startswith(f"what=--world-size {ranks} does not fit the layout of ")
    assert offered in line


def test_the_offered_numbers_of_ranks_are_accepted():
    words = ["--config", "deepseek-v3.h100", "--dry-run", "--world-size"]
    legal = legal_worlds(parse([*words, "1024"], {}))
    assert 1024 in legal and all(n % 1024 == 0 for n in legal)
    for ranks in legal[:5]:
        parse([*words, str(ranks)], {})


def test_sizes_from_flags_are_named_themselves():
    flags = ["--expert-model-parallel-size", "8", "--global-batch-size", "12"]
    line = refusal("--config", "qwen3-30b-a3b", *flags, "--world-size", "12")
    assert line.startswith("what=--expert-model-parallel-size 8 must divide")
