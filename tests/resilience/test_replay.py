"""python -m megatron_ext.replay: the run is only read, its steps come out bit for bit, a batch is
shown with its documents.
"""

import hashlib
import json
import re

import numpy as np
import pytest

from data.indexed import write_pair
from megatron_ext.errors import DataError
from megatron_ext.replay.__main__ import run
from megatron_ext.replay.records import differences, require_step
from tests.ranks.harness import run_ranks
from tests.resilience.numeric_faults import Fault, train

FLAGS = (
    "--num-layers 2 --train-iters 5 --save-interval 1 --expert-model-parallel-size 2"
    " --use-distributed-optimizer --hidden-dropout 0.1 --split 100,0,0 --no-mock-data"
).split()


def _marks(folder) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a run of 2 ranks that a NaN ended in step 5, its documents)."""
    folder = tmp_path_factory.mktemp("replay")
    generator = np.random.default_rng(3)
    documents = [generator.integers(0, 250, size=90) for _ in range(40)]
    write_pair(folder / "corpus", documents, np.uint16)
    argv = [*FLAGS, "--data-path", str(folder / "corpus"), "--run-dir", str(folder / "run")]
    faults = [Fault("loss", step=5, rank=1, micro_batch=1)]
    assert run_ranks(train, 2, argv, faults) == [76, 76]
    return folder / "run", documents


def test_a_step_again(trained, capsys):
    folder, documents = trained
    before = _marks(folder)
    assert run(["--run", str(folder), "--step", "4"]) == 0
    out = capsys.readouterr().out
    assert "step_00000003: 1 of 1 recorded steps are equal bit for bit" in out
    for dp in (0, 1):
        for number in (0, 1):
            first = 24 + 4 * number + 2 * dp
            assert f"dp {dp} micro-batch {number}: lm_loss " in out
            assert f"samples [{first}, {first + 1}]" in out
    shown = re.findall(r"corpus document (\d+) tokens (\d+) to \d+: '([^'.]*)", out)
    assert len(shown) >= 8
    for document, at, text in shown:
        ids = [int(word) for word in text.split()[:10]]
        assert documents[int(document)][int(at) : int(at) + len(ids)].tolist() == ids
    assert _marks(folder) == before


def test_the_step_that_ended_the_run(trained, capsys):
    """It is not in metrics.jsonl. Its fault was the machine's: it is finite now."""
    assert run(["--run", str(trained[0]), "--step", "5"]) == 0
    out = capsys.readouterr().out
    assert "0 of 0 recorded steps" in out
    assert "step 5: lm_loss " in out


def test_an_older_checkpoint_where_the_newest_is_damaged(trained, capsys):
    folder, _ = trained
    damaged = folder / "checkpoints" / "step_00000003" / "rank_00001.safetensors"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-5] + bytes([good[-5] ^ 4]) + good[-4:])
    assert run(["--run", str(folder), "--step", "4"]) == 0
    assert "step_00000002: 2 of 2 recorded steps are equal" in capsys.readouterr().out
    assert damaged.exists(), "a replay moves nothing aside"
    damaged.write_bytes(good)


def test_what_is_not_there_is_one_line(trained, capfd, tmp_path):
    folder, _ = trained
    with pytest.raises(DataError, match="--step 9: metrics.jsonl holds steps 1 to 4"):
        run(["--run", str(folder), "--step", "9"])
    with pytest.raises(DataError, match="no record of this run"):
        run(["--run", str(tmp_path), "--step", "1"])
    assert run(["--run", str(folder), "--step", "1"]) == 65
    lines = [line for line in capfd.readouterr().err.splitlines() if "FATAL" in line]
    assert len(lines) == 1
    assert "no whole checkpoint before step 1" in lines[0]


def test_from_the_initial_weights(trained, capsys):
    assert run(["--run", str(trained[0]), "--step", "2", "--from-start"]) == 0
    assert "from the initial weights: 2 of 2 recorded steps are equal" in capsys.readouterr().out


def test_one_bit_of_a_record_counts(tmp_path):
    values = {"lm_loss": 2.5, "grad_norm": 1.0, "samples_sha": "ab"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **values}) + "\n{torn")
    record = require_step(tmp_path, 1)[1]
    assert differences(values, record) == []
    assert differences(values, None) == []
    (found,) = differences({**values, "lm_loss": float(np.nextafter(2.5, 3))}, record)
    assert found.startswith("lm_loss is 2.5000000000000004 now, 2.5 then")
