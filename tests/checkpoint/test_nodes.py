"""Memory of a neighbour: four ranks as two nodes, each with a folder of its own for its memory.

LOCAL_WORLD_SIZE says which ranks share a node; what the kernel would give each node, its own
/dev/shm, is a folder here.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import folder, neighbour, tiers
from megatron_ext.checkpoint.nodes import Nodes, ranks_per_node
from megatron_ext.errors import Fatal
from tests.checkpoint.small_run import DIST, EP2, PP2, TP2, checkpointer, small_run
from tests.ranks.harness import exit_codes, run_ranks

LAYOUT = f"{PP2} {EP2} {DIST} --bf16"
OPTIONS = dict(ckpt_tiers="memory,store", save_interval=4, async_save=True)


def _on_a_node(per_node: int, root: Path) -> Path:
    """This rank's node gets a memory of its own; its folder."""
    node = int(os.environ["RANK"]) // per_node
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    tiers._SHM = root / f"node{node}"
    tiers._SHM.mkdir(exist_ok=True)
    return tiers._SHM


def _save(flags, per_node, root, steps=3):
    """Each step in memory, none in the store; then the ranks die. (marks, files of my node)."""
    _on_a_node(per_node, root)
    store = root / "ckpt"
    with small_run(flags) as run:
        saver = checkpointer(store, store, **OPTIONS)
        assert not saver.load(run.state)
        for _ in range(steps):
            run.step()
            saver.save(run.state, saver.due(run.state.progress.step))
        saver._wait_for(2)
        if saver._leases is not None:
            saver._leases.release()
        here = tiers.memory_folder(store)
        files = {p.parent.name: 0 for p in here.glob("step_*/*")}
        for path in here.glob("step_*/rank_*"):
            files[path.parent.name] += path.stat().st_size
        names = sorted(path.name for path in here.glob("step_*/rank_*"))
        return run.fingerprint(), run.gathered(), names, files


def _resume(flags, per_node, root):
    """(step or None, marks, gathered, text of the error)."""
    _on_a_node(per_node, root)
    store = root / "ckpt"
    with small_run(flags) as run:
        try:
            with checkpointer(store, store, **OPTIONS) as loader:
                found = loader.load(run.state)
                step = run.state.progress.step if found else None
                return step, run.fingerprint(), run.gathered(), ""
        except Fatal as error:
            return None, None, None, "".join(error.lines())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 4 ranks on 2 nodes that died after step 3; copy `root` before changing it."""
    root = tmp_path_factory.mktemp("nodes")
    return root, run_ranks(_save, 4, LAYOUT, 2, root)


@pytest.fixture
def dead_run(saved, tmp_path):
    """A copy of it, with the name of the memory folder that belongs to the copy."""
    root = tmp_path / "copy"
    shutil.copytree(saved[0], root)
    for node in root.glob("node*"):
        (held,) = node.iterdir()
        held.rename(node / tiers.memory_folder(root / "ckpt").name)
    return root, saved[1]


def test_a_node_holds_its_files_and_those_of_the_node_before(saved):
    _, found = saved
    for _, _, names, sizes in found:
        assert names == [f"rank_{rank:05d}.safetensors" for rank in range(4)]
        assert list(sizes) == ["step_00000003"], "one step is kept"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_costs_no_step(dead_run, lost):
    root, before = dead_run
    shutil.rmtree(root / f"node{lost}")
    after = run_ranks(_resume, 4, LAYOUT, 2, root)
    for (marks, _, _, _), (step, again, _, text) in zip(before, after):
        assert (step, text) == (3, "")
        assert again == marks


def test_one_node_that_is_left_goes_on_in_another_layout(dead_run):
    root, before = dead_run
    shutil.rmtree(root / "node0")
    (root / "node1").rename(root / "node0")
    after = run_ranks(_resume, 2, f"{TP2} {DIST} --bf16", 2, root)
    assert [(step, text) for step, _, _, text in after] == [(3, ""), (3, "")]
    assert after[0][2] == before[0][1]


def test_a_damaged_copy_is_passed_over_and_two_are_too_many(dead_run):
    root, before = dead_run
    (held,) = root.glob("node0/*/step_00000003/rank_00002.safetensors")
    other = next(root.glob("node1/*/step_00000003/rank_00002.safetensors"))
    for number, path in enumerate((held, other)):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        after = run_ranks(_resume, 4, LAYOUT, 2, root)
        if number == 0:
            assert [step for step, _, _, _ in after] == [3] * 4
            assert [a[1] for a in after] == [b[0] for b in before]
    assert [step for step, _, _, _ in after] == [None] * 4
    (text,) = [text for _, _, _, text in after if text]
    assert "rank_00002.safetensors offset=0" in text and "expected=" in text


def test_a_step_whose_files_are_gone_is_no_candidate(dead_run):
    root, _ = dead_run
    for path in root.glob("node*/*/step_00000003/rank_00001.safetensors"):
        path.unlink()
    after = run_ranks(_resume, 4, LAYOUT, 2, root)
    (text,) = [text for _, _, _, text in after if text]
    assert "rank_00001.safetensors on no node" in text


def _ring(root):
    """Four nodes of one rank; node 2 is lost: what a rank needs and its node lacks is sent."""
    marks = _save(LAYOUT, 1, root)
    return marks[0], marks[2]


def test_pieces_of_other_nodes_are_sent(tmp_path):
    before = run_ranks(_ring, 4, tmp_path)
    assert [names for _, names in before] == [
        sorted(f"rank_{r:05d}.safetensors" for r in (rank, (rank - 1) % 4)) for rank in range(4)
    ]
    shutil.rmtree(tmp_path / "node2")
    (tmp_path / "node1").rename(tmp_path / "away")  # the nodes come back in another order
    (tmp_path / "node0").rename(tmp_path / "node1")
    (tmp_path / "away").rename(tmp_path / "node0")
    after = run_ranks(_resume, 4, LAYOUT, 1, tmp_path)
    assert [(step, text) for step, _, _, text in after] == [(3, "")] * 4
    assert [again for _, again, _, _ in after] == [marks for marks, _ in before]


def _disk_full_once(root):
    """The copy of rank 1's file cannot be written at step 2: steps 1 and 3 are whole."""
    _on_a_node(2, root)
    store, stock = root / "ckpt", neighbour.swap

    def swap(mine, num_bytes, copy, *more):
        if "step_00000002" in str(copy) and copy.name == "rank_00001.safetensors":
            copy = copy.parent / "missing" / copy.name
        return stock(mine, num_bytes, copy, *more)

    neighbour.swap = swap
    found = []
    with small_run("") as run, checkpointer(store, store, **OPTIONS) as saver:
        for _ in range(3):
            run.step()
            saver.save(run.state, "memory")
            saver._wait_for(2)
            found.append(folder.steps(tiers.memory_folder(store)))
        torch.distributed.barrier()  # the first rank to finish empties the folder of its node
        saver.finish()
    return found


def test_a_failed_copy_is_a_failed_save_and_the_next_one_works(tmp_path):
    outcome = run_ranks(_disk_full_once, 4, tmp_path)
    assert outcome == [[[1], [1], [3]]] * 4
    assert not list(tmp_path.glob("node*/*")), "the memory is given back at the end"


def _one_dies(root):
    """Rank 3 dies while its file is on the way; the others must not wait for it."""
    _on_a_node(2, root)
    store, stock = root / "ckpt", neighbour.swap

    def swap(*args):
        if os.environ["RANK"] == "3":
            os._exit(9)
        return stock(*args)

    neighbour.swap = swap
    with small_run("") as run, checkpointer(store, store, **OPTIONS) as saver:
        run.step()
        saver.save(run.state, "memory")
        saver._wait_for(2)


def test_a_rank_that_dies_in_the_middle_ends_the_others(tmp_path):
    begin = time.monotonic()
    codes = exit_codes(_one_dies, 4, tmp_path, timeout_s=60)
    assert codes[3] == 9 and all(code == 1 for code in codes[:3]), codes
    assert time.monotonic() - begin < 45


def test_who_shares_a_node():
    assert ranks_per_node(8, {"LOCAL_WORLD_SIZE": "4"}) == 4
    assert ranks_per_node(8, {"SLURM_TASKS_PER_NODE": "2(x4)"}) == 2
    assert ranks_per_node(8, {}) == 8
    nodes = Nodes(rank=5, world=6, per_node=2, lane=None)
    assert (nodes.neighbour, nodes.source, nodes.is_leader, nodes.place) == (1, 3, False, 1)
