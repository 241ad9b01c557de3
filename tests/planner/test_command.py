"""The planner's commands: what they say, and one line for every bad input."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from megatron_ext.config import parse
from megatron_ext.costs.cluster import load
from megatron_ext.costs.parameters import count_parameters
from megatron_ext.errors import ConfigError
from megatron_ext.planner.command import CONFIGS, config_path, main
from megatron_ext.planner.layouts import legal, sizes_of, verdicts
from megatron_ext.planner.memory import all_stages, worst
from megatron_ext.planner.search import flags_of, search, sharded
from megatron_ext.planner.step_time import step
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
    ("name", "world", "cluster"),
    [("qwen3-30b-a3b.h100", 32, "dgx-h100"), ("mixtral-8x7b.h100", 64, "dgx-h100")],
)
def test_the_flags_of_a_search_are_the_layout_that_was_priced(name, world, cluster):
    """Also where the file has a layout of its own: stages, chunks, recomputation."""
    base = ["--config", config_path(name), "--world-size", str(world)]
    cfg, sharding = sharded(parse([*base, "--print-config", "yaml"], {}))
    where = load(cluster)
    found, _ = search(cfg, world, where, where.memory_bytes, keep=8)
    assert len(found) == 8
    for one in found:
        words = " ".join([*sharding, *flags_of(one.sizes, cfg)]).split()
        read = parse([*base, *words, "--dry-run"], {})
        assert read.ddp.use_distributed_optimizer
        assert step(read, where).seconds == one.step.seconds
        assert worst(all_stages(read, 1.0, where)) == one.memory


def test_a_search_shards_the_optimizer_unless_told_otherwise():
    base = [
        "--config",
        config_path("deepseek-v3"),
        "--world-size",
        "2048",
        "--print-config",
        "yaml",
    ]
    every = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    for own, flags in (
        ([], every),
        (["--no-overlap-param-gather"], every[:2]),
        (["--no-overlap-grad-reduce"], every[:1]),
        (["--no-use-distributed-optimizer"], []),
    ):
        cfg, words = sharded(parse([*base, *own], {}))
        assert words == flags
        assert cfg.ddp.use_distributed_optimizer == bool(flags)


def test_the_job_of_a_search_takes_flags_and_runs_train_sbatch(tmp_path, capsys):
    where = ["--cluster", "dgx-h100", "--world-size", "64", "--sbatch", str(tmp_path / "job")]
    said = _answer(capsys, "search", "--config", "mixtral-8x7b", *where)
    text = (tmp_path / "job").read_text()
    train = (CONFIGS.parent / "launch/slurm/train.sbatch").read_text()
    for line in re.findall(r"^#SBATCH --(?:signal|requeue|exclusive|open-mode).*$", train, re.M):
        assert line in text
    assert "#SBATCH --nodes=8\n" in text and "#SBATCH --gpus-per-node=8\n" in text
    last = text.splitlines()[-1]
    start, rest = "exec bash launch/slurm/train.sbatch ", ' "$@"'
    assert last.startswith(start) and last.endswith(rest)
    words = shlex.split(last[len(start) : -len(rest)])
    cfg = parse([*words, "--mock-data", "--world-size", "64", "--dry-run"], {})
    assert str(sizes_of(cfg)) in said and cfg.ddp.use_distributed_optimizer
    subprocess.run(["bash", "-n", tmp_path / "job"], check=True)


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
