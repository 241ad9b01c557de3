"""mesh/gloo_collectives.py against gloo's own, on forked ranks."""

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.errors import LostPeer, as_fatal
from megatron_ext.mesh import gloo_collectives, host_collectives, same_host
from megatron_ext.mesh.calls import listening
from megatron_ext.mesh.gloo_collectives import faster
from tests.ranks.harness import RanksFailedError, next_port, run_ranks

SIZES = (1, 63, 4099, 300_001)
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def start() -> tuple[int, int]:
    """(rank, ranks) of a gloo group of all."""
    os.environ["MASTER_PORT"] = next_port()
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def values(numel: int, dtype: torch.dtype, rank: int) -> Tensor:
    made = torch.randn(numel, generator=torch.Generator().manual_seed(rank + numel))
    return made.mul(8).to(dtype)


def everything(rank: int, size: int) -> dict[str, Tensor]:
    """The result of each collective, of sizes and types that hurt."""
    found = {}
    for numel in SIZES:
        for dtype in DTYPES:
            mine, name = values(numel, dtype, rank), f"{numel} {dtype}"
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.AVG):
                if dtype.is_floating_point or op is not dist.ReduceOp.AVG:
                    dist.all_reduce(total := mine.clone(), op=op)
                    found[f"all_reduce {op} {name}"] = total
            whole = values(numel * size, dtype, rank)
            for is_async in (False, True):
                reduced, gathered = torch.empty_like(mine), torch.empty_like(whole)
                works = [dist.reduce_scatter_single(reduced, whole, async_op=is_async)]
                works.append(dist.all_gather_single(gathered, mine, async_op=is_async))
                for work in works if is_async else ():
                    work.wait()
                found[f"reduce_scatter {is_async} {name}"] = reduced
                found[f"all_gather {is_async} {name}"] = gathered
            dist.broadcast(mine, src=size - 1)
            found[f"broadcast {name}"] = mine
    return found | coalesced(rank, size) | uneven(rank, size)


def coalesced(rank: int, size: int) -> dict[str, Tensor]:
    """As megatron-core's DDP calls: several buffers, the result in its place of the buffer."""
    found = {}
    for is_async in (False, True):
        for name, call in (
            ("reduce_scatter", lambda p, b: dist.reduce_scatter_single(p, b)),
            ("all_gather", lambda p, b: dist.all_gather_single(b, p)),
            ("all_reduce", lambda p, b: dist.all_reduce(b)),
        ):
            buffers = [values(numel * size, torch.float32, rank) for numel in (70_001, 12)]
            pieces = [buffer.chunk(size)[rank] for buffer in buffers]
            with dist.distributed_c10d._coalescing_manager(None, async_ops=is_async) as handle:
                for piece, buffer in zip(pieces, buffers):
                    call(piece, buffer)
            if is_async:
                handle.wait()
            for place, (piece, buffer) in enumerate(zip(pieces, buffers)):
                kept = piece if name == "reduce_scatter" else buffer
                found[f"coalesced {name} {is_async} {place}"] = kept.clone()
    return found


def uneven(rank: int, size: int) -> dict[str, Tensor]:
    """All-to-all of rows where some pieces are empty and some larger than a slot."""
    rows = [[(r * 7 + c * 5) % 4 * (3 if r else 2000) for c in range(size)] for r in range(size)]
    sent = values(sum(rows[rank]) * 65, torch.bfloat16, rank).view(-1, 65)
    got = sent.new_empty(sum(row[rank] for row in rows), 65)
    dist.all_to_all_single(got, sent, [row[rank] for row in rows], rows[rank])
    even = values(size * 10, torch.float32, rank).view(size, 10)
    dist.all_to_all_single(back := torch.empty_like(even), even)
    return {"uneven": got, "even": back}


def compare() -> dict[str, float]:
    """The largest difference to gloo's own of each kind, relative to the size of a sum."""
    rank, size = start()
    plain, worst = everything(rank, size), {}
    for kind in ("shared", "messages"):
        with faster(kind, 60.0):
            gloo_collectives.LARGE_GATHER_BYTES = gloo_collectives.LARGE_BROADCAST_BYTES = 4096
            made = everything(rank, size)
            again = everything(rank, size)
        assert all(torch.equal(made[name], again[name]) for name in made)
        for name, reference in plain.items():
            moved = (made[name].double() - reference.double()).abs().max().item()
            is_half = reference.dtype == torch.bfloat16 and "reduce" in name
            worst[f"{kind} {name}"] = moved / (64 if is_half else 1)
    dist.destroy_process_group()
    return worst


def test_two_ranks_get_gloos_bits():
    for worst in run_ranks(compare, 2):
        assert {name for name, moved in worst.items() if moved} == set()


def test_four_ranks_differ_in_the_order_of_sums_only():
    for worst in run_ranks(compare, 4):
        assert {
            name: moved
            for name, moved in worst.items()
            if moved > (1e-2 if "bfloat16" in name else 1e-4)
        } == {}
        moves = {name for name, moved in worst.items() if moved and "reduce" not in name}
        assert moves == set()


def half_sums() -> list[tuple[float, float]]:
    """(error of ours, of gloo's) of a bf16 sum against fp64."""
    rank, size = start()
    terms = [values(4096 * size, torch.bfloat16, other) for other in range(size)]
    exact = sum(term.double() for term in terms)
    found = []
    for kind in ("shared", "messages", "plain"):
        with faster(kind, 60.0):
            piece = torch.empty(4096, dtype=torch.bfloat16)
            dist.reduce_scatter_single(piece, terms[rank].clone())
        found.append((piece.double() - exact.chunk(size)[rank]).abs().sum().item())
    dist.destroy_process_group()
    return found


def test_sixteen_bit_sums_are_rounded_once():
    for shared, messages, plain in run_ranks(half_sums, 4):
        assert shared == messages < 0.8 * plain


def test_sums_in_rank_order():
    terms = [values(100, torch.float32, rank) for rank in range(5)]
    expected = terms[0] + terms[1] + terms[2] + terms[3] + terms[4]
    for place in range(5):
        copies = [term.clone() for term in terms]
        host_collectives.sum_in_order(copies[place], copies)
        assert torch.equal(copies[place], expected)
    host_collectives.sum_in_order(copies[0], terms, divisor=5)
    assert torch.equal(copies[0], expected / 5)


def test_portions_cover_everything():
    for numel in (1, 63, 64, 65, 1000, 4096, 70_001):
        for size in (2, 3, 7, 16):
            pieces = host_collectives.portions(numel, size)
            assert len(pieces) == size and sum(pieces) == numel and min(pieces) >= 0


class Heard:
    """A listener that keeps the names."""

    def __init__(self) -> None:
        self.ops, self.waits = [], 0

    now = staticmethod(time.perf_counter)

    def called(self, op, group, args, work, start, end) -> None:
        self.ops.append(op)

    def waited(self, work, start, end) -> None:
        self.waits += 1


def listen(kind: str) -> tuple[list[str], int]:
    rank, size = start()
    heard, whole = Heard(), torch.ones(8)
    with faster(kind, 60.0):
        dist.all_reduce(whole)  # opens the channel
        with listening(heard):
            dist.all_reduce(whole)
            dist.reduce_scatter_single(piece := torch.empty(4), whole)
            dist.reduce_scatter_single(piece, whole, async_op=True).wait()
            dist.all_gather_single(whole, piece, async_op=True).wait()
            dist.all_to_all_single(torch.empty(8), whole)
    assert "faster" not in dist.ProcessGroup.allreduce.__qualname__
    dist.destroy_process_group()
    return heard.ops, heard.waits


@pytest.mark.parametrize("kind", ["shared", "messages", "plain"])
def test_listeners_hear_one_call_of_each(kind):
    names = ["all_reduce", "reduce_scatter", "reduce_scatter", "all_gather", "all_to_all"]
    for ops, waits in run_ranks(listen, 2, kind):
        assert ops == names
        assert waits == {"shared": 2, "messages": 4, "plain": 5}[kind]


def others_hosts() -> bool:
    """A rank that seems to be elsewhere: no channel, and the right sum."""
    rank, size = start()
    same_host._host = lambda: bytes([rank]) * 32
    with faster("shared", 60.0):
        dist.all_reduce(total := torch.full((100_000,), rank + 1.0))
    dist.destroy_process_group()
    return bool((total == 3).all())


def test_other_hosts_get_no_shared_memory():
    assert all(run_ranks(others_hosts, 2))


def full_memory() -> tuple[bool, list[str]]:
    """Rank 0 gets no memory: nobody uses it, and rank 0 says so."""
    rank, size = start()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(same_host.__name__).addHandler(handler)

    def fail(*_) -> None:
        raise OSError("no space")

    os.posix_fallocate = fail
    with faster("shared", 60.0):
        dist.all_reduce(total := torch.full((100_000,), rank + 1.0))
    dist.destroy_process_group()
    return bool((total == 6).all()), said


def test_no_memory_to_share_is_a_warning():
    (first, said), *others = run_ranks(full_memory, 3)
    assert first and all(other == (True, []) for other in others)
    assert said == [
        "3 ranks of this host share no memory (no space): their collectives go through sockets"
    ]


def lose(how: str, told: str = "") -> str:
    """What rank 0 is told (and writes to the file `told`) when rank 1 dies or sleeps."""
    rank, size = start()
    with faster("shared", 2.0):
        dist.all_reduce(torch.ones(10))
        if rank == 1:
            if how == "dies before":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "dies in the middle":
                host_collectives._read = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                dist.all_reduce(torch.ones(1_000_000))
            time.sleep(4)
            return ""
        try:
            dist.all_reduce(torch.ones(1_000_000))
        except RuntimeError as error:
            assert isinstance(as_fatal(error), LostPeer)
            if told:
                Path(told).write_text(str(error))
            return str(error)
    return "nothing"


@pytest.mark.parametrize("how", ["dies before", "dies in the middle"])
def test_a_rank_that_dies_ends_the_wait_and_leaves_nothing(how, tmp_path):
    began, told, before = time.monotonic(), tmp_path / "told", set(os.listdir("/dev/shm"))
    with pytest.raises(RanksFailedError):
        run_ranks(lose, 2, how, str(told))
    assert time.monotonic() - began < 20
    assert "Connection closed by peer, rank 1 of the group" in told.read_text()
    left = set(os.listdir("/dev/shm")) - before
    assert not [name for name in left if "pretrain" in name]


def test_a_rank_that_does_not_come_is_named():
    told = run_ranks(lose, 2, "sleeps")[0]
    assert "Timed out waiting 2 s for rank 1" in told


def skip_one() -> str:
    """Rank 1 leaves out a call of one group and goes on in another of the same ranks."""
    rank, _ = start()
    other = dist.new_group()
    with faster("shared", 2.0):
        dist.all_reduce(torch.ones(10))
        if rank == 0:
            dist.all_reduce(torch.ones(10))
        try:
            dist.all_reduce(torch.ones(10), group=other)
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_a_skipped_call_is_waited_for_and_no_other_is_taken_for_it():
    with pytest.raises(RanksFailedError, match="gloo through shared memory: .*rank 1 of the group"):
        run_ranks(skip_one, 2)


def from_a_thread() -> float:
    """Threads of ours use gloo's own while the main thread is in shared memory."""
    rank, size = start()
    aside = dist.new_group()
    with faster("shared", 60.0):
        theirs = torch.ones(50_000)
        thread = threading.Thread(target=lambda: dist.all_reduce(theirs, group=aside))
        thread.start()
        for _ in range(20):
            dist.all_reduce(mine := torch.ones(50_000))
        thread.join()
    dist.destroy_process_group()
    return (theirs + mine).sum().item()


def test_threads_do_not_meet_in_the_memory():
    assert run_ranks(from_a_thread, 2) == [200_000.0] * 2


def test_rows_of_nothing():
    pieces = gloo_collectives.rows(torch.empty(0, 7), [0, 0], 2)
    assert [piece.numel() for piece in pieces] == [0, 0]
