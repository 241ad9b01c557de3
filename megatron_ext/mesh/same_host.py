"""Memory that the ranks of one host share, and a wire between each two of them.

A `Channel` is what `mesh/host_collectives.py` moves tensors through. It leaves no file behind,
whatever kills a rank: the memory is an anonymous one (memfd) that rank 0 of the group hands to the
others through the wires, which are abstract unix sockets; the kernel frees both with the last rank.

    meet     every rank listens, and all learn each other's host and address through the process
             group; other hosts (or network namespaces): no channel, on any rank
    wires    rank i connects to every rank below it and proves who it is
    memory   [source, destination, SLOTS, chunk] bytes. Source r writes its pieces for d to (r, d),
             and what is for everybody to (r, r)
    tokens   "the next slot is filled" is four bytes on the wire that stand for the collective; a
             wait for it ends with an error when the peer dies or the time of collectives is over

A rank writes slot k + 1 before it waits for the peers' slot k, so that it seldom sleeps. That needs
four slots: having heard of a peer's k, it knows that the peer has read k - 2.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import select
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

SLOTS = 4
SLOT_BYTES = 1 << 20
"""Bytes of a slot times the ranks of the channel: what is staged stays in the processor's cache."""
MAX_RANKS = 16
"""Of a channel: its memory is SLOTS * size MiB, 8 MiB for two ranks, 64 for 16."""
SPIN_S = 50e-6
"""How long a rank looks for a token before it sleeps; waking up takes about as long."""
_CALLER = struct.Struct("<i16s")  # rank and its secret
_MARK_BYTES = 4  # of a token
_MEETING_S = 30.0


class Channel:
    """The memory and the wires of some ranks, seen from `rank` of them.

    `group` is the name of the process group that a collective is of: those with the same ranks
    share a channel.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        memory: mmap.mmap,
        wires: dict[int, socket.socket],
        wait_s: float,
    ) -> None:
        self.rank, self.size, self.group = rank, size, ""
        self.peers = [(rank + step) % size for step in range(1, size)]
        self.chunk_bytes = chunk_bytes(size)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._slots = whole.view(size, size, SLOTS, self.chunk_bytes)
        self._wires, self._wait_s = wires, wait_s
        self._heard = {peer: bytearray() for peer in wires}
        self._next: dict[tuple[int, int], int] = {}

    def slot(self, source: int, destination: int) -> Tensor:
        """The next slot of that pair, [chunk] bytes; `source` twice: the one for everybody."""
        step = self._next[source, destination] = self._next.get((source, destination), -1) + 1
        return self._slots[source, destination, step % SLOTS]

    def token(self, op: str, num_bytes: int) -> bytes:
        """What says on the wire that a slot of this collective of `self.group` is filled."""
        return zlib.crc32(f"{self.group} {op} {num_bytes}".encode()).to_bytes(_MARK_BYTES, "little")

    def tell(self, peer: int, token: bytes) -> None:
        """This rank has filled its next slot for `peer`."""
        try:
            self._wires[peer].send(token)
        except (BrokenPipeError, ConnectionResetError):
            raise self._closed(peer) from None

    def hear(self, peer: int, token: bytes) -> None:
        """Wait until `peer` has told its next slot of the same collective.

        If it is in another one (a rank skipped a call) this waits as two groups of gloo would, so
        that whoever watches over hangs can name it.
        """
        heard, start = self._heard[peer], time.perf_counter()
        while len(heard) < _MARK_BYTES:
            self._listen(peer, heard, start)
        if heard[:_MARK_BYTES] != token:
            self._sleep(peer, start + self._wait_s, select.POLLRDHUP)
            raise self._closed(peer)
        del heard[:_MARK_BYTES]

    def _listen(self, peer: int, heard: bytearray, start: float) -> None:
        try:
            got = self._wires[peer].recv(64)
        except BlockingIOError:
            if time.perf_counter() - start < SPIN_S:
                os.sched_yield()
            else:
                self._sleep(peer, start + self._wait_s, select.POLLIN)
            return
        except ConnectionResetError:
            got = b""
        if not got:
            raise self._closed(peer)
        heard += got

    def _sleep(self, peer: int, until: float, event: int) -> None:
        left = until - time.perf_counter()
        poll = select.poll()
        poll.register(self._wires[peer], event)
        if left <= 0 or not poll.poll(1000 * left):
            raise RuntimeError(
                f"gloo through shared memory: Timed out waiting {self._wait_s:.0f} s for rank"
                f" {peer} of the group"
            )

    def _closed(self, peer: int) -> RuntimeError:
        return RuntimeError(
            f"gloo through shared memory: Connection closed by peer, rank {peer} of the group"
        )

    def close(self) -> None:
        """Hang up; the memory goes with the last rank's view of it."""
        _hang_up(self._wires)


def _hang_up(wires: dict[int, socket.socket]) -> None:
    for wire in wires.values():
        wire.close()


def chunk_bytes(size: int) -> int:
    """Bytes of one slot among `size` ranks, a multiple of 4096."""
    return max(4096, SLOT_BYTES // size // 4096 * 4096)


def _host() -> bytes:
    """What tells this host, and this network namespace of it, from all others; 32 bytes."""
    if not (sys.platform == "linux" and hasattr(os, "memfd_create")):
        return os.urandom(32)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    network = os.stat("/proc/self/ns/net")
    return hashlib.sha256(boot + f"{network.st_dev}:{network.st_ino}".encode()).digest()


def _address(secret: bytes) -> str:
    return f"\0pretrain-moe-{secret.hex()}"


def _meet(rank: int, secrets: Sequence[bytes], listener: socket.socket) -> dict[int, socket.socket]:
    """A wire to every other rank: those below are called, those above call."""
    wires = {}
    for peer in range(rank):
        wires[peer] = wire = socket.socket(socket.AF_UNIX)
        wire.settimeout(_MEETING_S)
        wire.connect(_address(secrets[peer]))
        wire.sendall(_CALLER.pack(rank, secrets[rank]))
    while len(wires) < len(secrets) - 1:
        wire, _ = listener.accept()
        wire.settimeout(_MEETING_S)
        peer, secret = _CALLER.unpack(wire.recv(_CALLER.size, socket.MSG_WAITALL))
        if rank < peer < len(secrets) and secret == secrets[peer]:
            wires[peer] = wire
        else:
            wire.close()
    return wires


def _shared_memory(rank: int, size: int, wires: dict[int, socket.socket]) -> mmap.mmap:
    """The same pages on all ranks; rank 0 makes them, and OSError is raised where it cannot."""
    num_bytes = size * size * SLOTS * chunk_bytes(size)
    if rank == 0:
        file = os.memfd_create("pretrain-moe-collectives")
        os.posix_fallocate(file, 0, num_bytes)  # else a full memory is a SIGBUS later
        for wire in wires.values():
            socket.send_fds(wire, [b"m"], [file])
    else:
        _, files, _, _ = socket.recv_fds(wires[0], 1, 1)
        if not files:
            raise OSError("rank 0 of the group has no memory to share")
        file = files[0]
    try:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # no page faults in the first collectives
        return mmap.mmap(file, num_bytes, flags=flags)
    finally:
        os.close(file)


def open_channel(
    rank: int, size: int, gather: Callable[[bytes], list[bytes]], wait_s: float
) -> Channel | None:
    """The channel of a group, or None on all of its ranks where they share no host. Collective.

    gather  48 bytes of this rank -> those of all ranks, through the process group
    wait_s  how long a collective may wait for a peer
    """
    listener = socket.socket(socket.AF_UNIX)
    secret, wires, memory = os.urandom(16), {}, None
    error: OSError | None = None
    with listener:
        if sys.platform == "linux":
            listener.bind(_address(secret))
            listener.listen(size)
        listener.settimeout(_MEETING_S)
        everyone = gather(_host() + secret)
        if len({one[:32] for one in everyone}) > 1:
            return None
        try:
            wires = _meet(rank, [one[32:] for one in everyone], listener)
            memory = _shared_memory(rank, size, wires)
        except OSError as met:
            error = met
            _hang_up(wires)  # the others wait for it
    if not all(one[0] for one in gather(bytes([memory is not None]) * 48)):
        _hang_up(wires)
        if rank == 0:
            logging.getLogger(__name__).warning(
                "%d ranks of this host share no memory (%s): their collectives go through sockets",
                size,
                error or "another rank could not",
            )
        return None
    for wire in wires.values():
        wire.setblocking(False)
    return Channel(rank, size, memory, wires, wait_s)
