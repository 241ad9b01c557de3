"""The table of starts and growth on a model that is nearly nothing."""

import json

import pytest

from tests.bench import growth, log_volume, start, start_rank
from tests.bench.test_front_door import TINY_MODEL

FAST = "--dtype fp32 --rounds 1 --steps 1 --warm 1 --threads 1 --sequences 2"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_MODEL)
    return str(path)


def test_the_volume_of_logs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log_volume, "LONG", 12)
    written = tmp_path / "start.json"
    assert start.main(["--parts", "logs", "--sizes", "1x4", "--json", str(written)]) == 0
    assert "metrics.jsonl a step" in capsys.readouterr().out
    (logs,) = json.loads(written.read_text())["parts"]["logs"]["lines"]
    assert 100 < logs["metrics"] < 10_000 and 100 < logs["console"] < 2_000
    assert logs["record"] > 0 and logs["tensorboard"] > 100


def test_the_moments_of_a_start(model, monkeypatch):
    short = [start_rank.Case("program", ("--config", model, "--dry-run"), ("--dry-run",))]
    monkeypatch.setattr(start_rank, "cases", lambda model: short)
    (line,) = start_rank.measure(model, 1)
    assert 0 < line["cpu"] < 10 and 0 < line["wall"] < 60 and 5 < line["rss"] <= line["peak"]
    ((what, wall, *_),) = start_rank.rows([line])
    assert what == "--dry-run" and float(wall) > 0
    broken = start_rank.Case("program", ("--config", "none.yaml"), ("never",))
    with pytest.raises(RuntimeError, match="none.yaml"):
        start_rank.once(broken)


def test_what_grows_is_held_against_the_first_of_its_round(model, monkeypatch):
    def run(candidates, args):
        limits = {"bf16 GFLOP/s": 2.0, "fp32 GFLOP/s": 1.0, "fp32 oneDNN GFLOP/s": 1.0}
        results = [growth.Result(one, facts={"parameters": 10**6}) for one in candidates]
        for number, result in enumerate(results, 1):
            one = {"seconds": [0.1 * number], "cpu_s": 0.2, "peak_mib": 5.0}
            result.rounds = [one]
        return results, limits | {"copy GB/s": 10.0}

    monkeypatch.setattr(growth, "run", run)
    args = f"{FAST} --model {model} --experts 4 8 --lengths 16 32 --tokens 64".split()
    table = growth.experts(start.options().parse_args(args))
    assert [row[0] for row in table.rows] == [4, 8]
    assert table.lines[1]["by_first"] == pytest.approx(2.0)
    assert table.lines[0]["update_floor_ms"] == pytest.approx(3.0)  # 30 MB at 10 GB/s
    more = growth.ranks(start.options().parse_args([*args, "--ranks", "1", "2"]))
    assert [row[:2] for row in more.rows] == [["dp", 1], ["dp", 2], ["ep", 1], ["ep", 2]]
    halved = [line["cpu_us_per_token"] for line in more.lines]
    assert halved[0] == pytest.approx(2 * halved[1])  # 0.2 s for twice the tokens
    longer = growth.sequence(start.options().parse_args(args))
    assert [row[0] for row in longer.rows] == ["4 x 16", "2 x 32"]
    assert longer.lines[1]["flops_per_token"] > longer.lines[0]["flops_per_token"]
