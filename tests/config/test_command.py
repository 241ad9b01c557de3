"""The command lines beside training: numbers in a range, no empty word, one FATAL line and 64."""

from __future__ import annotations

import argparse
import ast
import importlib
from pathlib import Path

import pytest

from megatron_ext.command import CommandLine
from megatron_ext.errors import ConfigError
from tests.config.test_ranges import HOSTILE

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("megatron_ext/**/*.py"), *ROOT.glob("data/**/*.py")]
PARSERS = {
    "megatron_ext.generate": "_flags",
    "megatron_ext.upcycle.__main__": "_flags",
    "megatron_ext.parity.__main__": "_flags",
    "megatron_ext.hf.__main__": "_flags",
    "megatron_ext.replay.__main__": "_parser",
    "megatron_ext.checkpoint.__main__": "_parser",
    "megatron_ext.planner.command": "parser",
    "data.tokenizer": "parser",
    "data.prepare": "parser",
    "data.corpus": "parser",
    "data.unigram": "parser",
}


def calls_of(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_every_program_uses_the_same_command_line():
    """No parser of argparse's own, no number without a range."""
    made, unbounded = [], []
    for path in SOURCES:
        for call in calls_of(path):
            if ast.unparse(call.func) == "argparse.ArgumentParser":
                made.append(path.name)
            types = [ast.unparse(k.value) for k in call.keywords if k.arg == "type"]
            if "add_argument" in ast.unparse(call.func) and {"int", "float"} & set(types):
                unbounded.append(f"{path}:{call.lineno}")
    assert made == [] and unbounded == []


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [one for made in action.choices.values() for one in actions_of(made)]
        else:
            found.append(action)
    return found


@pytest.mark.parametrize("module", PARSERS)
def test_hostile_words_are_read_or_refused(module):
    parser = getattr(importlib.import_module(module), PARSERS[module])()
    assert isinstance(parser, CommandLine)
    for action in actions_of(parser):
        read = parser._registry_get("type", action.type, action.type)
        if action.nargs == 0:
            continue
        for word in HOSTILE:
            try:
                value = read(word)
            except argparse.ArgumentTypeError as error:
                assert word.strip() or "is empty" in str(error)
                continue
            assert word.strip() or action.dest == "prompt", action.dest
            assert not isinstance(value, float) or abs(value) < 1e39


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("megatron_ext.generate", "--load a --temperature -1", "--temperature -1 must be"),
        ("megatron_ext.generate", "--load a --top-p 7", "--top-p 7 must be above 0 to 1"),
        ("megatron_ext.generate", "--load a --top-k -1", "--top-k -1 must be at least 0"),
        ("megatron_ext.generate", "--load a --max-new-tokens 0", "--max-new-tokens 0 must be at"),
        ("megatron_ext.generate", "--load a --seed nan", "--seed nan must be a whole number"),
        ("megatron_ext.generate", "--load=", "--load is empty"),
        ("megatron_ext.checkpoint.__main__", "prune a --keep-last 0", "--keep-last 0 must be at"),
        ("megatron_ext.planner.command", "memory --world-size 0", "--world-size 0 must be"),
        ("data.prepare", "--input= --output b", "--input is empty"),
        ("data.prepare", "--input a --output=", "--output/--output-prefix is empty"),
        ("data.corpus", "--out a --max-bytes -5", "--max-bytes -5 must be at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line(module, words, said):
    parser = getattr(importlib.import_module(module), PARSERS[module])()
    with pytest.raises(ConfigError) as caught:
        parser.parse_known_args(words.split())
    (line,) = caught.value.lines()
    assert line.startswith(f"what={said}") and " do=" in line


def test_a_program_ends_with_64_and_its_line(capsys):
    main = importlib.import_module("megatron_ext.generate").main
    with pytest.raises(SystemExit) as left:
        main(["--load", "a", "--temperature", "-1"])
    assert left.value.code == 64
    shown = capsys.readouterr().err
    assert shown == "FATAL 64 rank=0 what=--temperature -1 must be at least 0 do=use 0 or more\n"
