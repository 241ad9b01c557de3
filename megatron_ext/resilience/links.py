"""Which ranks no longer hear each other: what the kernel knows of each rank's TCP connections.

A link that is cut shows on the side that sent last: bytes that nobody acknowledges, sent again and
again. (A peer that is stopped still acknowledges: its kernel does.) When a hang is noticed, each
rank writes its connections into RUN/logs/rank_R.links; the leader joins both ends of each:

    rank 1  10.0.0.1:40001 -> 10.0.0.2:39017   4,096 bytes unacknowledged, 5 retransmissions
    rank 3  10.0.0.2:39017 -> 10.0.0.1:40001                              => ranks 1 and 3

Where a proxy acknowledges what it does not deliver, the calls of the ranks say it (`unheard`): both
sides of a send, or both of a group of two, are in the same call and it does not end.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ext.resilience.diagnose import Verdict, name_ranks
from megatron_ext.resilience.heartbeat import POINT_TO_POINT, Heartbeat

WAIT_S = 2.0
"""How long the leader waits for the others' connections."""
MOST_PAIRS = 6
"""More pairs of ranks than this are shown as a number."""
Pair = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """One connection of a rank; addresses as the kernel writes them."""

    local: str
    remote: str
    unacked: int  # bytes
    retransmits: int

    @property
    def is_cut(self) -> bool:
        return self.unacked > 0 and self.retransmits > 0


def parse(text: str, inodes: Collection[int]) -> list[Link]:
    """The connections of /proc/net/tcp or tcp6 whose socket is one of `inodes`."""
    found = []
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) > 9 and int(words[9]) in inodes:
            local, remote = (_address(word) for word in words[1:3])
            found.append(Link(local, remote, int(words[4].split(":")[0], 16), int(words[6], 16)))
    return found


def _address(word: str) -> str:
    """IPv4 inside IPv6 is IPv4."""
    return re.sub("^0{16}FFFF0000(?=.{8}:)", "", word)


def own_links() -> list[Link]:
    """The TCP connections of this process."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if socket := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{name}")):
                inodes.add(int(socket[1]))
    found = []
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            found += parse(Path("/proc/self/net", name).read_text(), inodes)
    return found


def links_path(logs: Path, rank: int) -> Path:
    """Where the connections of a rank are, after a hang."""
    return logs / f"rank_{rank}.links"


def write_own(logs: Path, rank: int, token: int) -> None:
    """Write this rank's connections, so that they are seen whole or not at all."""
    path = links_path(logs, rank)
    content = {"token": token, "links": [asdict(link) for link in own_links()]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def read_all(logs: Path, ranks: Collection[int], token: int) -> dict[int, list[Link]]:
    """The connections of those of `ranks` that write them in time."""
    found: dict[int, list[Link]] = {}
    deadline = time.monotonic() + WAIT_S
    while True:
        for rank in set(ranks) - set(found):
            with suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(links_path(logs, rank).read_text())
                if content["token"] == token:
                    found[rank] = [Link(**link) for link in content["links"]]
        if len(found) == len(set(ranks)) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def cut(links: Mapping[int, list[Link]]) -> dict[Pair, str]:
    """The pairs of ranks between which a connection is cut -> what the kernel says."""
    owner = {(link.local, link.remote): rank for rank, of_rank in links.items() for link in of_rank}
    found = {}
    for rank, of_rank in sorted(links.items()):
        for link in of_rank:
            other = owner.get((link.remote, link.local))
            if link.is_cut and other not in (None, rank):
                words = f"{link.unacked} bytes of rank {rank} unacknowledged after"
                pair = (min(rank, other), max(rank, other))
                found.setdefault(pair, f"{words} {link.retransmits} retransmissions")
    return found


def unheard(beats: Mapping[int, Heartbeat]) -> dict[Pair, str]:
    """The pairs of ranks that are in the same call, which does not end."""
    found = {}
    for rank, beat in sorted(beats.items()):
        call = beat.waiting
        others = set(call.members) - {rank} if call and call.op not in POINT_TO_POINT else set()
        other = call.peer if call and call.op in POINT_TO_POINT else min(others, default=-1)
        if call is None or other not in beats or len(others) > 1:
            continue
        is_there = any(
            theirs.group_id == call.group_id
            and theirs.seq == call.seq
            and theirs.peer in (-1, rank)
            and (call.op not in POINT_TO_POINT or theirs.op in set(POINT_TO_POINT) - {call.op})
            for theirs in beats[other].ring
        )
        if is_there:
            found.setdefault((min(rank, other), max(rank, other)), f"both are in {call}")
    return found


def name_cut(
    verdict: Verdict, links: Mapping[int, list[Link]], beats: Mapping[int, Heartbeat]
) -> Verdict:
    """The verdict about the pairs of ranks that no longer hear each other; as it was where a rank
    does not beat or runs, or where no pair is known.
    """
    if verdict.kind == "silent":
        return verdict
    pairs = cut(links) or ({} if verdict.kind in ("busy", "different") else unheard(beats))
    if not pairs:
        return verdict
    ranks = sorted({rank for pair in pairs for rank in pair})
    listed = ", ".join(f"{a} and {b}" for a, b in sorted(pairs)[:MOST_PAIRS])
    if len(pairs) > MOST_PAIRS:
        listed += f" and {len(pairs) - MOST_PAIRS} more pairs"
    hosts = sorted({tuple(sorted({beats[a].host, beats[b].host})) for a, b in pairs})
    between = "; ".join(" and ".join(pair) for pair in hosts)
    first = min(pairs)
    beat = beats[first[0]]
    text = (
        f"ranks {listed} no longer hear each other ({pairs[first]}): the link between hosts"
        f" {between} is cut; {name_ranks([first[0]])} is in {beat.phase} of step {beat.step}"
    )
    if beat.waiting:
        text += f", in {beat.waiting}"
    return replace(verdict, ranks=tuple(ranks), kind="link", text=text)
