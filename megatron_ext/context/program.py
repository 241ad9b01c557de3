"""A context-parallel strategy as data: which rank computes which block, and which pieces move.

The sequence is cut into chunks and the heads into parts (1 part: heads stay together). The piece
("q", chunk, part) is the queries of that chunk and those heads, ("kv", chunk, part) its keys and
values. A `Program` is a list of steps; in a step every rank

    1. starts the step's moves from what it holds (sends) and for what it will hold (receives),
    2. computes the step's blocks with what it held before: computation and transfer overlap,
    3. waits for the moves.

What follows from these lists is derived, not written: how partial results and gradients travel
back (`plan.py`), what is saved, what can be freed. `check` proves without ranks that every query
chunk meets every key chunk that it can see exactly once and that nobody uses what it does not hold.

Worked example, ring(2): chunks 0 and 3 on rank 0, chunks 1 and 2 on rank 1.
    step 0   moves kv0 0->1, kv1 1->0, kv2 1->0;   blocks (0,3 | 0,3) on rank 0, (1,2 | 1,2) on 1
    step 1   blocks (3 | 1,2) on rank 0, (1,2 | 0) on rank 1
kv3 stays where it is: nobody else may look at the last chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from megatron_ext.context.split import Layout

Piece = tuple[str, int, int]
"""(what, chunk, part of the heads)."""


@dataclass(frozen=True)
class Move:
    """A copy of one piece from one rank to another.

    `keep`: the target saves the piece for the backward pass; without it the piece is fetched again
    then. `wide`: what travels is a partial sum, in fp32.
    """

    what: str
    chunk: int
    part: int
    source: int
    target: int
    keep: bool = False
    wide: bool = False

    @property
    def piece(self) -> Piece:
        """What is moved."""
        return self.what, self.chunk, self.part


@dataclass(frozen=True)
class Compute:
    """One call of block attention on `rank`: query chunks against key chunks, both ascending.

    `causal`: both are the same chunks and each query sees the keys up to itself; otherwise every
    key chunk lies before every query chunk and is seen whole.
    """

    rank: int
    q: tuple[int, ...]
    kv: tuple[int, ...]
    part: int
    causal: bool

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (query chunk, key chunk) pairs of the block."""
        return [(q, kv) for q in self.q for kv in self.kv if not self.causal or kv <= q]

    @property
    def pieces(self) -> list[Piece]:
        """What the rank must hold."""
        queries: list[Piece] = [("q", chunk, self.part) for chunk in self.q]
        return queries + [("kv", chunk, self.part) for chunk in self.kv]


@dataclass(frozen=True)
class Step:
    """Moves and blocks that happen at the same time."""

    moves: tuple[Move, ...] = ()
    computes: tuple[Compute, ...] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """A strategy for one size of the group; compared by identity (`strategies.build` keeps one).

    `gradients`: "chain" lets the gradient of a passed-on piece follow it from rank to rank,
    growing, and go home from the last (neighbours only); "home" sends every rank's share straight
    back. `reach`: a query chunk sees at most this many chunks before its own (sliding window);
    None is all.
    """

    name: str
    layout: Layout
    num_parts: int
    steps: tuple[Step, ...]
    gradients: str = "home"
    reach: int | None = None

    def is_visible(self, q: int, kv: int) -> bool:
        """May a token of chunk q look at one of chunk kv?"""
        return kv <= q and (self.reach is None or q - kv <= self.reach)


def blocks(
    rank: int,
    q: Iterable[int],
    kv: Iterable[int],
    *,
    part: int = 0,
    reach: int | None = None,
) -> Iterator[Compute]:
    """The fewest calls for all visible pairs of these chunks: one causal block where both are the
    same, else one block per group of query chunks that see the same keys."""
    queries, keys = tuple(sorted(q)), tuple(sorted(kv))
    if queries and queries == keys and (reach is None or queries[-1] - queries[0] <= reach):
        yield Compute(rank, queries, keys, part, causal=True)
        return
    seen: dict[tuple[int, ...], list[int]] = {}
    for chunk in queries:
        before = tuple(k for k in keys if k < chunk and (reach is None or chunk - k <= reach))
        if chunk in keys:
            yield Compute(rank, (chunk,), (chunk,), part, causal=True)
        if before:
            seen.setdefault(before, []).append(chunk)
    for before, chunks in seen.items():
        yield Compute(rank, tuple(chunks), before, part, causal=False)


def prune(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Without the moves whose piece the target neither computes with nor passes on later."""
    wanted: set[tuple[int, Piece]] = set()
    kept: list[Step] = []
    for step in reversed(list(steps)):
        moves = tuple(move for move in step.moves if (move.target, move.piece) in wanted)
        wanted |= {(move.source, move.piece) for move in moves}
        wanted |= {(block.rank, piece) for block in step.computes for piece in block.pieces}
        kept.append(replace(step, moves=moves))
    return tuple(reversed(kept))


def check(program: Program) -> None:
    """Raise AssertionError, with the step and the piece, where the program is not causal attention
    computed exactly once from pieces that are where they are used."""
    owners, parts = program.layout.owners, range(program.num_parts)
    held = {
        (owner, (what, chunk, part))
        for chunk, owner in enumerate(owners)
        for part in parts
        for what in ("q", "kv")
    }
    done: Counter = Counter()
    for index, step in enumerate(program.steps):
        where = f"{program.name} on {program.layout.num_ranks} ranks, step {index}"
        for move in step.moves:
            assert (move.source, move.piece) in held, f"{where}: {move} sends what it has not"
            assert (move.target, move.piece) not in held, f"{where}: {move} arrives twice"
        for block in step.computes:
            for piece in block.pieces:
                assert (block.rank, piece) in held, f"{where}: {block} lacks {piece}"
            order = block.q == block.kv if block.causal else max(block.kv) < min(block.q)
            assert order and list(block.q) == sorted(block.q), f"{where}: {block} is not causal"
            done.update((q, kv, block.part) for q, kv in block.pairs)
        arrived = [(move.target, move.piece) for move in step.moves]
        assert len(arrived) == len(set(arrived)), f"{where}: a piece arrives twice"
        held |= set(arrived)
    chunks = range(len(owners))
    due = {(q, kv, p) for q in chunks for kv in chunks for p in parts if program.is_visible(q, kv)}
    wrong = {key: count for key, count in done.items() if count != 1 or key not in due}
    assert not wrong and set(done) == due, (
        f"{program.name}: computed more or less than once: {wrong or due - set(done)}"
    )


def work(program: Program) -> list[list[float]]:
    """[step][rank]: block area in chunk pairs, a causal diagonal counted half, a part of the heads
    as its share. The time of a step is its largest entry."""
    table = []
    for step in program.steps:
        row = [0.0] * program.layout.num_ranks
        for block in step.computes:
            area = sum(0.5 if q == kv else 1.0 for q, kv in block.pairs)
            row[block.rank] += area / program.num_parts
        table.append(row)
    return table


def traffic(steps: Iterable[Step]) -> Counter:
    """Counter of (what, source rank) -> pieces sent in the whole program."""
    return Counter((move.what, move.source) for step in steps for move in step.moves)
