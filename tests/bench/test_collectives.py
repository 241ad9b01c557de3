"""The table of collectives, on two ranks and small tensors."""

import json

import pytest

from tests.bench import collectives


def test_every_collective_has_a_line_of_each_kind(tmp_path, capsys):
    written = tmp_path / "found.json"
    argv = ["--ranks", "2", "--rounds", "1", "--kib", "4", "64", "--dtypes", "bfloat16"]
    assert collectives.main([*argv, "--json", str(written)]) == 0
    text = capsys.readouterr().out
    assert all(text.count(f"| {op} ") == 2 for op in collectives.OPS)
    assert "ceilings measured in this run: copy" in text
    lines = json.loads(written.read_text())["lines"]
    kinds = {
        op: {line["kind"] for line in lines if line["collective"] == op} for op in collectives.OPS
    }
    assert kinds["reduce_scatter"] == {"plain", "messages", "shared"}
    assert kinds["all_reduce"] == {"plain", "shared"}
    assert all(seconds > 0 for line in lines for seconds in line["seconds"])


def test_a_line_is_held_against_the_bytes_it_must_touch():
    line = {"collective": "all_reduce", "dtype": "float32", "bytes": 1 << 20}
    lines = [
        {**line, "kind": kind, "seconds": [0.001 * n]} for n, kind in ((4, "plain"), (2, "shared"))
    ]
    cells = collectives.row(2, "all_reduce", "float32", 1 << 20, lines, copy_gb_s=4.0)
    named = dict(zip(collectives.HEAD, cells))
    assert named["shared by plain"] == "2.00x" and named["messages ms"] is None
    assert float(named["floor ms"]) == pytest.approx(2 * 2 * (1 << 20) / 4e6, abs=0.01)


def test_the_slowest_rank_of_a_round_counts():
    ranks = [[{"kind": "plain", "seconds": [1.0, 4.0]}], [{"kind": "plain", "seconds": [3.0, 2.0]}]]
    assert collectives.slowest(ranks) == [{"kind": "plain", "seconds": [3.0, 4.0]}]
