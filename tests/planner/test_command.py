"""The planner's commands: what they say, and one line for every bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_ext.config import parse
from megatron_ext.costs.cluster import load
from megatron_ext.costs.parameters import count_parameters
from megatron_ext.errors import ConfigError
from megatron_ext.planner.command import config_path, main
from megatron_ext.planner.layouts import legal, verdicts
from megatron_ext.planner.search import flags_of, search
from tests.costs import models

QWEN = ["--config", "qwen3-30b-a3b"]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),
        ("qwen3-30b-a3b", 30.53, 3.35),
        ("qwen3-235b-a22b", 235.1, 22.2),
        ("deepseek-v3", 671.0, 37.55),
    ],
)
def test_models_have_their_published_sizes(name, total, active):
    cfg = parse(["--config", config_path(name), "--print-config", "yaml"], {})
    count = count_parameters(cfg)
    assert (count.total - count.mtp) / 1e9 == pytest.approx(total, rel=0.005)
    assert count.active / 1e9 == pytest.approx(active, rel=0.005)


def _answer(capsys, *words: str) -> str:
    main(words)
    return capsys.readouterr().out


def test_layouts_are_those_that_parse_accepts():
    words = (models.TINY + models.RUN + " --global-batch-size 16").split()
    cfg = parse([*words, "--world-size", "8"], {})
    found = list(verdicts(cfg, 8))
    assert len([v for v in found if v.rule is None]) == len(legal(cfg, 8)) > 20
    for one in found[:: max(1, len(found) // 60)]:
        flags = [w for line in flags_of(one.sizes) for w in line.split()]
        command = [*words, "--world-size", "8", *flags]
        if one.rule is None:
            parse(command, {})
        else:
            with pytest.raises(ConfigError):
                parse(command, {})


def test_memory_names_the_worst_rank_and_imbalance_costs(capsys):
    where = ("--cluster", "dgx-h100", "--world-size", "32")
    even = _answer(capsys, "memory", *QWEN, *where)
    full = _answer(capsys, "memory", *QWEN, *where, "--imbalance", "4")
    assert "worst: stage 0 with" in even
    assert float(full.split("worst: stage 0 with ")[1].split()[0]) > float(
        even.split("worst: stage 0 with ")[1].split()[0]
    )


def test_time_draws_and_explains(capsys, tmp_path):
    where = ("--config", "mixtral-8x7b", "--cluster", "dgx-h100", "--world-size", "128")
    text = _answer(capsys, "time", *where, "--svg", str(tmp_path / "a.svg"))
    assert "MFU" in text and "bubble" in text
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    assert "fullest" in _answer(capsys, "explain", *where)


def test_the_best_layout_is_legal_and_fits():
    base = (models.TINY + models.RUN + " --global-batch-size 64 --bf16").split()
    cfg = parse([*base, "--use-distributed-optimizer", "--world-size", "16"], {})
    cluster = load("dgx-h100")
    found, number = search(cfg, 16, cluster, 2e9)
    assert number > 20 and found
    assert [f.step.seconds for f in found] == sorted(f.step.seconds for f in found)
    for one in found:
        assert one.memory.total <= 2e9
        flags = [word for line in flags_of(one.sizes) for word in line.split()]
        parse([*base, "--use-distributed-optimizer", "--world-size", "16", *flags], {})
    assert search(cfg, 16, cluster, 1e6)[0] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["time", "--config", "qwen3-30", "--world-size", "8"], "qwen3-30b-a3b"),
        (["time", *QWEN, "--cluster", "dgxh100"], "dgx-h100"),
        (["layouts", *QWEN, "--world-size", "7"], "ranks"),
        (["layouts", *QWEN, "--world-size", "0"], "at least 1"),
        (["time", *QWEN, "--cluster", "two-sites", "--world-size", "128"], "at most 64"),
        (["memory", *QWEN, "--imbalance", "0.5"], "at least 1"),
        (["memory", *QWEN, "--world-size", "8", "--tensor-model-paralel-size", "2"], "tensor"),
        (["time", *QWEN, "--world-size", "8"], "--cluster is missing"),
        (["fly"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(words, said):
    with pytest.raises(ConfigError) as error:
        main(words)
    assert error.value.code == 64
    assert said in "\n".join(error.value.lines())


def test_no_torch_is_imported():
    code = (
        "import sys; from megatron_ext.planner.command import main;"
        "main(['time', '--config', 'qwen3-30b-a3b', '--cluster', 'h200', '--world-size', '16']);"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
