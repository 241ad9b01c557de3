"""Row 20: an id outside the vocabulary is one error with file, document and position, before any
forward pass of it, whatever tensor parallelism is; also where the file changes while the run reads.
"""

import json
import re

import numpy as np
import pytest

from data.indexed import write_pair
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain

BAD = 999
FLAGS = (
    "--num-layers 2 --num-query-groups 4 --no-mock-data --split 100,0,0 --train-iters 6"
    " --global-batch-size 4 --micro-batch-size 4"
).split()


def _train(argv: list[str], corpus, change_at: int | None) -> tuple[int, list[int], int]:
    """pretrain_moe.py -> (exit code, steps begun, the largest id that a step was given)."""
    import torch

    from megatron_ext.train import loop

    stock, steps, largest = loop.train_step, [], [0]

    def train_step(state, micro_batches, *rest):
        steps.append(state.progress.step + 1)
        largest.append(max(int(one.tokens_BS.max()) for one in micro_batches))
        if steps[-1] == change_at:
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                ids = np.memmap(f"{corpus}.bin", dtype=np.uint16, mode="r+")
                ids[:] = BAD
                ids.flush()
            torch.distributed.barrier()
        return stock(state, micro_batches, *rest)

    loop.train_step = train_step
    try:
        pretrain([*TINY, *FLAGS, *argv])
    except SystemExit as ended:
        return int(ended.code or 0), steps, max(largest)
    finally:
        loop.train_step = stock
    return 0, steps, max(largest)


def _documents():
    generator = np.random.default_rng(5)
    return [generator.integers(0, 250, size=70) for _ in range(40)]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_same_line_at_every_tp(tp, tmp_path):
    layout = ["--tensor-model-parallel-size", str(tp)]
    layout += ["--sequence-parallel"] if tp > 1 else []

    documents = _documents()
    documents[7][11] = BAD
    write_pair(tmp_path / "bad", documents, np.uint16)
    argv = [*layout, "--data-path", str(tmp_path / "bad"), "--run-dir", str(tmp_path / "start")]
    assert run_ranks(_train, tp, argv, tmp_path / "bad", None) == [(65, [], 0)] * tp
    reason = json.loads((tmp_path / "start" / "exit_reason.json").read_text())
    assert reason["what"] == (
        f"token id {BAD} in document 7 at position 11: the vocabulary is 0 to 250"
    )
    assert reason["path"] == str(tmp_path / "bad.bin")

    write_pair(tmp_path / "good", _documents(), np.uint16)
    argv = [*layout, "--data-path", str(tmp_path / "good"), "--run-dir", str(tmp_path / "late")]
    results = run_ranks(_train, tp, argv, tmp_path / "good", 2)
    assert {code for code, _, _ in results} == {65}
    assert all(2 <= steps[-1] < 6 for _, steps, _ in results)
    assert max(largest for _, _, largest in results) <= 250
    reason = json.loads((tmp_path / "late" / "exit_reason.json").read_text())
    place = rf"token id {BAD} in document \d+ at position \d+: the vocabulary is 0 to 250"
    assert re.fullmatch(place, reason["what"])
    assert reason["path"] == str(tmp_path / "good.bin")
