"""Every number has a range, and whatever stands behind a flag ends in a config or in code 64."""

from __future__ import annotations

import math
import time

import pytest

from megatron_ext import ranges
from megatron_ext.config import parse
from megatron_ext.config.argv import Setting, build_parser, read_words
from megatron_ext.config.bounds import bounded
from megatron_ext.config.flags import all_flags, section_fields
from megatron_ext.config.mcore_ranges import RANGE_OF
from megatron_ext.errors import ConfigError
from megatron_ext.ranges import RANGES

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 1 --seq-length 64"
    " --max-position-embeddings 64 --train-iters 5 --lr 1e-3 --mock-data --vocab-size 100"
    " --num-experts 8 --position-embedding-type rope --disable-bias-linear --dry-run"
)
HOSTILE = (
    "-1", "0", str(2**31), str(2**63), "1e308", "-1e308", "inf", "-inf", "nan", "", " ", "1e999",
    "0x10", " 1", "1_000", "\u0663", "9" * 5000, "1" + "0" * 400, "[0]*9", "null",
)  # fmt: skip
NUMERIC = [f for f in all_flags().values() if f.kind.base in ("int", "float", "pattern", "pair")]


def numbers_in(value: object) -> list[float]:
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers_in(item)]
    return [] if value is None else [value]


def lines_of(words: list[str]) -> list[str]:
    try:
        parse(words, {})
    except ConfigError as error:
        return error.lines()
    return []


def test_every_number_has_a_range_that_holds_its_default():
    assert len(NUMERIC) > 230
    for flag in NUMERIC:
        limits = flag.kind.range
        has_range = (limits is None) == bool(flag.kind.choices)
        assert has_range, f"{flag.dest}: give it a type of megatron_ext/ranges.py"
        assert all(limits is None or limits.holds(n) for n in numbers_in(flag.default)), flag.dest


def test_every_number_of_megatron_core_has_its_line():
    ours = {name for name, f in section_fields()["transformer"].items() if f.owner}
    known = {name for fields in section_fields().values() for name in fields} | ours
    generated = ("transformer", "optimizer", "ddp")
    assert set(RANGE_OF) <= known
    assert not {f.dest for f in NUMERIC if f.section in generated} - set(RANGE_OF)


def test_every_range_has_a_type_of_its_name():
    for name, limits in RANGES.items():
        assert getattr(ranges, name).__name__ == limits.base
        assert limits.holds(limits.nearest(-math.inf)) and limits.holds(limits.nearest(math.inf))
        assert not any(limits.holds(n) for n in (math.nan, math.inf, -math.inf))


def test_every_number_with_every_hostile_word_is_inside_or_refused():
    parser, started = build_parser(), time.process_time()
    for flag in NUMERIC:
        for word in HOSTILE:
            settings, violations = read_words([f"{flag.names[0]}={word}"], "flag", parser)
            assert len(settings) + len(violations) == 1, (flag.dest, word)
            checked = bounded(settings)
            for setting in checked.settings:
                for number in numbers_in(setting.value):
                    assert flag.kind.choices or flag.kind.range.holds(number), (flag.dest, word)
            said = [*violations, *checked.violations]
            assert all(len(str(v)) < 400 + len(word) for v in said), said
    assert time.process_time() - started < 15


@pytest.mark.parametrize("word", ["-1", "0", str(2**63), "1e308", "inf", "", "1"])
def test_the_whole_way_ends_in_a_config_or_in_64(word):
    """A sample of the flags by the whole parse, other rules included; nothing else is raised."""
    for flag in NUMERIC[:: 1 if word == "0" else 3]:
        lines_of([*BASE.split(), f"{flag.names[0]}={word}"])


NAMED = {
    "--adam-beta1 1": "must be from 0 to below 1",
    "--adam-beta2 -0.1": "must be from 0 to below 1",
    "--adam-eps 0": "must be above 0",
    "--weight-decay -1": "must be at least 0",
    "--seed -1": "must be from 0 to 4294967295",
    "--seed 4294967296": "must be from 0 to 4294967295",
    "--train-iters 0": "must be at least 1",
    "--eval-iters -1": "must be at least 0",
    "--prometheus-port 99999": "must be from 0 to 65535",
    "--lr inf": "must be finite",
    "--lr 1e999": "must be finite",
    "--norm-epsilon -1": "must be above 0",
    "--rotary-base 0": "must be at least 1",
    "--kv-channels 0": "must be at least 1",
    "--kv-channels 15": "must be even",
    "--init-method-std -0.02": "must be above 0",
    "--lr-warmup-iters -3": "must be at least 0",
    "--keep-last -1": "must be at least 1",
    "--moe-expert-capacity-factor -2": "must be above 0, or -1",
    "--window-size (-2,0)": "must be at least -1",
    "--moe-layer-freq [0]*4+[1]*99999999999": "must be a whole number or a pattern",
}


@pytest.mark.parametrize(("words", "said"), NAMED.items())
def test_what_was_found_is_refused_once_with_its_flag_and_a_way_out(words, said):
    (line,) = lines_of([*BASE.split(), *words.split()])
    assert line.startswith(f"what={words.split()[0]} ") and said in line
    assert " do=" in line


@pytest.mark.parametrize("text", ["lr: 1e999", "lr: .inf", "train-iters: -5", "lr: .nan"])
def test_a_file_and_its_print_obey_the_same_ranges(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    words = ["--config", str(tmp_path / "run.yaml"), "--print-config", "yaml"]
    (line,) = lines_of(words)
    assert line.startswith(f"what=--{text.split(':')[0]} ")
    assert lines_of([*words, "--lr", "1e-3", "--train-iters", "5"]) == [] or "nan" in text


def test_ranges_and_rules_come_together_without_consequences():
    lines = lines_of([*BASE.split(), *"--seed -1 --min-lr 1 --clip-grad -1 --lr 0.1".split()])
    assert [line.split()[0] for line in lines] == [
        "what=--seed",
        "what=--clip-grad",
        "what=--min-lr",
    ]
    lines = lines_of([*BASE.split(), *"--num-layers 0 --seed -1 --num-experts 7".split()])
    assert [line.split()[0] for line in lines] == ["what=--num-layers", "what=--seed"]


def test_minus_one_means_off_where_megatron_lm_says_so():
    assert parse([*BASE.split(), *"--moe-expert-capacity-factor -1".split()], {}) is not None
    setting = Setting("window_size", "--window-size", (-1, -1), "flag")
    assert bounded([setting]).violations == ()
