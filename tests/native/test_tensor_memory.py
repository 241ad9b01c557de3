"""Tensors from malloc: aligned, given back, used again, and beside tensors that torch made.

The tests' own process uses malloc from tests/conftest.py on, and its children with it; what goes on
beside tensors of torch is looked at in a fresh one.
"""

import copy
import gc
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatron_ext.device.select import keep_large_blocks, start
from megatron_ext.native import loops, tensor_memory
from tests.ranks.harness import RanksFailedError, run_ranks

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _compiled():
    if why := tensor_memory.use():
        pytest.skip(f"the allocator cannot be compiled here: {why}")


def test_aligned_and_whole_for_every_size():
    def check():
        sizes = [0, 1, 15, 16, 63, 64, 65, 4095, MIB - 1, MIB, 40 * MIB]
        kept = [torch.full((size,), index, dtype=torch.uint8) for index, size in enumerate(sizes)]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in kept)
        assert all(bool((tensor == index).all()) for index, tensor in enumerate(kept))
        assert kept[0].data_ptr() == 0

    run_ranks(check, 1)


def test_a_freed_place_serves_the_next_of_its_size():
    """Where its neighbours stay: posix_memalign of glibc 2.36 uses one of these eight again."""

    def check():
        keep_large_blocks()
        kept, small = [], []
        for _ in range(16):
            kept.append(torch.empty(4 * MIB, dtype=torch.uint8))
            small += [bytearray(size) for size in (40, 100, 300, 900)]
        places = {tensor.data_ptr() for tensor in kept[1::2]}
        kept[1::2] = [None] * 8
        kept[1::2] = [torch.empty(4 * MIB, dtype=torch.uint8) for _ in range(8)]
        assert {tensor.data_ptr() for tensor in kept[1::2]} == places

    run_ranks(check, 1)


def beside_tensors_of_torch() -> None:
    """Made before and freed after; grown, copied, saved, shared and freed elsewhere."""
    before = [torch.arange(1000), torch.empty(MIB)]
    assert tensor_memory.use() == tensor_memory.use() == ""
    grown = before[0].resize_(300_000)
    assert grown[:1000].tolist() == list(range(1000))
    after = torch.arange(1000)
    after.resize_(300_000)
    assert after[:1000].tolist() == list(range(1000))
    del before
    assert torch.equal(copy.deepcopy(grown[:1000]), grown[:1000])
    lazy = torch._lazy_clone(after)
    lazy += 1
    assert after[1] == 1 and lazy[1] == 2
    file = io.BytesIO()
    torch.save(after, file)
    file.seek(0)
    assert torch.equal(torch.load(file), after)
    after.share_memory_()
    worker = threading.Thread(target=lambda: after.resize_(10))
    del grown, lazy
    worker.start()
    worker.join()
    gc.collect()


def test_beside_tensors_of_torch():
    code = "from tests.native import test_tensor_memory as t; t.beside_tensors_of_torch()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_child_frees_what_its_parent_made():
    def check():
        kept = [torch.ones(2 * MIB) for _ in range(4)]

        child = os.fork()
        if child == 0:
            kept.clear()
            os._exit(int(torch.ones(MIB).sum()) != MIB)
        assert os.waitpid(child, 0)[1] == 0
        assert float(kept[0].sum()) == 2 * MIB

    run_ranks(check, 1)


@pytest.mark.parametrize("size", [1 << 50, (1 << 63) - 8])
def test_more_than_there_is(size):
    """The words by which a run that is out of memory is known (observe/memory.py)."""
    with pytest.raises(RanksFailedError, match=f"can't allocate memory.* {size} bytes"):
        run_ranks(lambda: torch.empty(size, dtype=torch.uint8), 1)


def test_the_profiler_counts_it():
    def check():
        with torch.profiler.profile(profile_memory=True, acc_events=True) as seen:
            torch.empty(3 * MIB, dtype=torch.uint8)
        assert max(event.self_cpu_memory_usage for event in seen.key_averages()) >= 0
        made = [event.cpu_memory_usage for event in seen.events() if event.name == "aten::empty"]
        assert made == [3 * MIB]

    run_ranks(check, 1)


def test_where_it_cannot_be_compiled(tmp_path, monkeypatch):
    """The loops are used all the same, and the first lines of a run say it."""
    if loops.use("auto"):
        pytest.skip("no compiled loops here")
    broken = tmp_path / "tensor_memory.cpp"
    broken.write_text('#include "no_such_header.h"\n')
    monkeypatch.setattr(tensor_memory, "_SOURCE", Path(broken))
    said = run_ranks(lambda: start("cpu").kernels, 1)[0]
    assert said.startswith("native, tensors in torch's memory (") and "ended with 1" in said


def test_torch_is_asked_for(monkeypatch):
    used = []
    monkeypatch.setattr(tensor_memory, "use", lambda: used.append("malloc") or "")

    def started(asked):
        return start("cpu", cpu_kernels=asked).kernels, len(used)

    said = [run_ranks(started, 1, asked)[0] for asked in ("torch", "auto")]
    assert said == [("torch (--cpu-kernels torch)", 0), ("native", 1)]
