"""The strategies of --cp-comm-type as programs. Each is a pure function of the group's size.

| name         | moves                                                   | overlaps   | limit      |
|--------------|---------------------------------------------------------|------------|------------|
| `p2p`        | kv round the ring, one rank a step                      | each hop   | none       |
| `all_gather` | kv to every rank that looks at it, in one step          | own blocks | memory: kv |
| `a2a`        | q, kv of a chunk to the owners of the head parts        | nothing    | heads      |
| `a2a+p2p`    | a2a among `a2a` neighbours, then rings over the groups  | each hop   | heads      |

Ring: Liu et al. 2023, Ring Attention, arXiv:2310.01889, with the zig-zag balance of the causal
mask. a2a: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509. Both at once: Fang and Zhao
2024, USP, arXiv:2405.07719.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from megatron_ext.context.program import Move, Program, Step, blocks, check, prune
from megatron_ext.context.split import zigzag


def ring(cp: int, reach: int | None = None) -> Program:
    """Keys and values go from rank to rank + 1, cp - 1 times; queries stay. At hop h rank r
    computes with the keys of rank r - h."""
    return _rings(cp, 1, reach, "p2p", before=())


def all_gather(cp: int, reach: int | None = None) -> Program:
    """Every rank gets the keys that its queries see, while it computes on its own."""
    layout = zigzag(cp)
    own = [layout.chunks(rank) for rank in range(cp)]
    chunks = range(layout.num_chunks)
    moves = tuple(
        Move("kv", chunk, 0, layout.owners[chunk], rank)
        for chunk in chunks
        for rank in range(cp)
        if rank != layout.owners[chunk]
    )
    local = [b for rank in range(cp) for b in blocks(rank, own[rank], own[rank], reach=reach)]
    remote = [
        block
        for rank in range(cp)
        for query in own[rank]
        for block in blocks(rank, [query], [c for c in chunks if c not in own[rank]], reach=reach)
    ]
    steps = prune((Step(moves, tuple(local)), Step((), tuple(remote))))
    return Program("all_gather", layout, 1, steps, "home", reach)


def ulysses(cp: int, reach: int | None = None) -> Program:
    """Rank r gets part r of the heads for the whole sequence: one causal block, then back."""
    return _rings(1, cp, reach, "a2a", before=_exchange_heads(1, cp))


def hierarchical(a2a: int, p2p: int, reach: int | None = None) -> Program:
    """Groups of `a2a` neighbouring ranks exchange heads, then the ranks with the same part form a
    ring of `p2p` groups. hierarchical(cp, 1) is Ulysses, hierarchical(1, cp) the ring."""
    return _rings(p2p, a2a, reach, "a2a+p2p", before=_exchange_heads(p2p, a2a))


def _exchange_heads(p2p: int, a2a: int) -> tuple[Step, ...]:
    """Every chunk of a group, cut by heads, to the group's ranks, which keep it."""
    owners = zigzag(a2a * p2p).owners
    moves = [
        Move(what, chunk, part, owner, owner // a2a * a2a + part, keep=True)
        for what in ("q", "kv")
        for chunk, owner in enumerate(owners)
        for part in range(a2a)
        if owner % a2a != part
    ]
    return (Step(tuple(moves)),)


def _rings(p2p: int, a2a: int, reach: int | None, name: str, before: tuple[Step, ...]) -> Program:
    """`a2a` rings over `p2p` groups: rank g * a2a + i handles part i of the chunks of group g."""
    layout = zigzag(a2a * p2p)
    groups = [[c for c, owner in enumerate(layout.owners) if owner // a2a == g] for g in range(p2p)]
    steps = list(before)
    for hop in range(p2p):
        moves, computes = [], []
        for g in range(p2p):
            for part in range(a2a):
                rank, keys = g * a2a + part, groups[(g - hop) % p2p]
                computes += blocks(rank, groups[g], keys, part=part, reach=reach)
                if hop + 1 < p2p:
                    target = (g + 1) % p2p * a2a + part
                    moves += [Move("kv", chunk, part, rank, target) for chunk in keys]
        steps.append(Step(tuple(moves), tuple(computes)))
    return Program(name, layout, a2a, prune(steps), "chain", reach)


Builder = Callable[[int, Sequence[int], int | None], Program]

STRATEGIES: dict[str, Builder] = {
    "p2p": lambda cp, sizes, reach: ring(cp, reach),
    "all_gather": lambda cp, sizes, reach: all_gather(cp, reach),
    "a2a": lambda cp, sizes, reach: ulysses(cp, reach),
    "a2a+p2p": lambda cp, sizes, reach: hierarchical(sizes[0], sizes[1], reach),
}
"""--cp-comm-type -> program of (cp, --hierarchical-context-parallel-sizes, reach in chunks)."""


@functools.cache
def build(name: str, cp: int, sizes: tuple[int, ...] = (), reach: int | None = None) -> Program:
    """The checked program of a strategy for `cp` ranks; the same object for the same arguments."""
    program = STRATEGIES[name](cp, sizes, reach)
    check(program)
    return program


def reach_of(window: int | None, chunk_length: int, num_chunks: int) -> int | None:
    """How many chunks before its own a query can see through a window of `window` tokens back;
    None for all of them."""
    if window is None:
        return None
    reach = (window + chunk_length - 1) // chunk_length
    return reach if reach < num_chunks - 1 else None
