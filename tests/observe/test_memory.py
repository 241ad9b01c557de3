"""Memory that does not suffice: one FATAL line, and a page that says what is large and where."""

from __future__ import annotations

import contextlib
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ext.errors import ResourceError
from megatron_ext.mesh.forks import exit_codes, run_ranks
from megatron_ext.observe import memory
from tests.ranks.tiny import TINY, pretrain

CPU = torch.device("cpu")
IMPOSSIBLE = 2**46


def small_state() -> SimpleNamespace:
    """A chunk of 1024 x 256 and 256 weights with Adam's states."""
    chunk = nn.Sequential(nn.Linear(256, 1024))
    adam = torch.optim.Adam(chunk.parameters())
    chunk(torch.ones(1, 256)).sum().backward()
    adam.step()
    return SimpleNamespace(chunks=[chunk], optimizer=SimpleNamespace(optimizer=adam))


def test_storages_count_once():
    state = small_state()
    held = memory.split(state)
    weights = 4 * (1024 * 256 + 1024)
    assert held["weights"] == weights
    assert held["optimizer"] == pytest.approx(2 * weights, abs=16)  # and its step counters


def too_much() -> None:
    kept = torch.ones(3, 2**20)
    kept.add_(torch.empty(IMPOSSIBLE))


def test_the_page_names_the_largest_tensors_and_their_places(tmp_path):
    state = small_state()
    with pytest.raises(ResourceError) as caught, memory.on_out_of_memory(state, tmp_path, 3, CPU):
        too_much()
    page = (tmp_path / "oom_rank_3.txt").read_text()
    assert caught.value.code == 69 and caught.value.path == str(tmp_path / "oom_rank_3.txt")
    assert "\n" not in str(caught.value) and "--micro-batch-size" in caught.value.do
    rows = [line.split(maxsplit=1) for line in page.splitlines() if " on cpu, " in line]
    sizes = [float(size) for size, _ in rows]
    assert sizes == sorted(sizes, reverse=True)
    variable = next(what for size, what in rows if float(size) == 12.0)
    assert "float32 [3, 1048576] on cpu, variable kept in test_memory.py:" in variable
    assert "too_much()" in variable
    assert any("weight 0.weight of chunk 0" in what for _, what in rows)
    everything = memory.largest(state, MemoryError())  # the page ends before the smallest
    assert sum("optimizer: exp_avg" in place for _, _, place in everything) == 4
    assert sum("optimizer: exp_avg" in what for _, what in rows) >= 2  # the large weight's
    assert "where it happened" in page and "kept.add_" in page


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_python_and_cuda_say_it_in_other_words(error, tmp_path):
    with pytest.raises(ResourceError), memory.on_out_of_memory(small_state(), tmp_path, 0, CPU):
        raise error


def test_other_errors_pass(tmp_path):
    with (
        pytest.raises(RuntimeError, match="shapes"),
        memory.on_out_of_memory(small_state(), tmp_path, 0, CPU),
    ):
        raise RuntimeError("shapes differ")
    assert not list(tmp_path.iterdir())


def limit_addresses(room: int) -> None:
    """This process may take `room` bytes of addresses more."""
    words = Path("/proc/self/statm").read_text().split()
    limit = int(words[0]) * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fill_up() -> None:
    """Until no object of 512 bytes has a place."""
    kept = []
    for size in (2**24, 2**20, 2**16, 2**12, 2**9):
        with contextlib.suppress(MemoryError):
            while True:
                kept.append(bytearray(size))
    kept.append(bytearray(2**24))


def explain_without_room(logs: Path) -> int:
    state = small_state()
    limit_addresses(100 * 2**20)
    try:
        with memory.on_out_of_memory(state, logs, 0, CPU):
            fill_up()
    except ResourceError as error:
        return error.code
    return 0


def test_the_page_is_written_where_nothing_else_has_a_place(tmp_path):
    assert run_ranks(explain_without_room, 1, tmp_path) == [69]
    assert "fill_up" in (tmp_path / "oom_rank_0.txt").read_text()


def train_in_a_small_room(run: Path) -> None:
    """A batch that needs gigabytes, where the process may take 3 GB of addresses more (threads of
    gloo reserve some before they use them).
    """
    limit_addresses(3000 * 2**20)
    large = ["--micro-batch-size", "1024", "--global-batch-size", "1024", "--seq-length", "256"]
    more = ["--max-position-embeddings", "256", "--run-dir", str(run)]
    pretrain([*TINY, *large, *more])


def test_a_training_without_memory_ends_with_69_and_the_page(tmp_path, capfd):
    assert exit_codes(train_in_a_small_room, 1, tmp_path) == [69]
    fatal = [line for line in capfd.readouterr().err.splitlines() if line.startswith("FATAL")]
    assert len(fatal) == 1 and fatal[0].startswith("FATAL 69 rank=0 step=1 what=out of memory")
    assert f"path={tmp_path}/logs/oom_rank_0.txt" in fatal[0]
    assert json.loads((tmp_path / "exit_reason.json").read_text())["code"] == 69
    page = (tmp_path / "logs/oom_rank_0.txt").read_text()
    assert "weights" in page and " on cpu, variable " in page
