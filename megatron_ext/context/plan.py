"""From a program to what one rank does: the way back of results and gradients, and when to free.

A strategy writes how q and kv go out. The way back follows from it. A rank that owns a piece, or
got it by a move with `keep`, is a *base* of the piece; any other holder belongs to the base that
its copy came from.

forward   a holder of q that is no base sends ("partial": out, lse) to its base after its last
          block with it; the base merges, and a base that is not the owner sends ("final": out).
backward  the same moves and blocks again, without the kept pieces; the queries travel as ("query":
          q, dout, out, lse), a base that is not the owner gets ("dout"). Gradients ("dq", "dkv")
          start after the last block: to the next holder in a "chain", else to the base, else to the
          owner; every stop adds its own share first.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ext.context.program import Compute, Move, Piece, Program, Step

GRADIENT_OF = {"q": "dq", "kv": "dkv"}


class Routes:
    """Where the copies of the pieces of a program come from, go to and are used last."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.source: dict[tuple[Piece, int], Move] = {}
        self.next: dict[tuple[Piece, int], int] = {}
        self.last_use: dict[Piece, dict[int, int]] = defaultdict(dict)
        for index, step in enumerate(program.steps):
            for move in step.moves:
                self.source[move.piece, move.target] = move
                if not move.keep:
                    self.next[move.piece, move.source] = move.target
            for block in step.computes:
                for piece in block.pieces:
                    self.last_use[piece][block.rank] = index

    def owner(self, piece: Piece) -> int:
        """The rank that holds the piece's chunk."""
        return self.program.layout.owners[piece[1]]

    def base(self, piece: Piece, rank: int) -> int:
        """The owner, or the keeper, that the copy of `rank` came from."""
        while (piece, rank) in self.source and not self.source[piece, rank].keep:
            rank = self.source[piece, rank].source
        return rank

    def gradient_target(self, piece: Piece, rank: int) -> int | None:
        """Where `rank` sends its share of the gradient of `piece`; None: it is at home."""
        if rank == self.owner(piece):
            return None
        base = self.base(piece, rank)
        if base == rank:
            return self.owner(piece)
        if self.program.gradients == "chain":
            return self.next.get((piece, rank), base)
        return base


class _Timeline:
    """Steps that grow at the end."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.moves: list[list[Move]] = [list(step.moves) for step in steps]
        self.computes = [step.computes for step in steps]

    def add(self, index: int, move: Move) -> None:
        while len(self.moves) <= index:
            self.moves.append([])
            self.computes.append(())
        self.moves[index].append(move)

    def steps(self) -> tuple[Step, ...]:
        return tuple(Step(tuple(m), c) for m, c in zip(self.moves, self.computes))


def forward_steps(program: Program) -> tuple[Step, ...]:
    """The program with the moves that bring the results home."""
    routes, timeline = Routes(program), _Timeline(program.steps)
    for piece, uses in routes.last_use.items():
        what, chunk, part = piece
        if what != "q":
            continue
        finished: dict[int, int] = {}
        for rank, last in uses.items():
            base = routes.base(piece, rank)
            if rank != base:
                timeline.add(last + 1, Move("partial", chunk, part, rank, base, wide=True))
                last += 1
            finished[base] = max(finished.get(base, 0), last)
        assert len(finished) == 1, f"{program.name}: queries {chunk} are computed at two bases"
        [(base, last)] = finished.items()
        if base != routes.owner(piece):
            timeline.add(last + 1, Move("final", chunk, part, base, routes.owner(piece)))
    return timeline.steps()


def _again(move: Move) -> Move:
    """A move of the forward pass as the backward pass repeats it (a kept kv is not repeated)."""
    if move.what == "q":
        what = "dout" if move.keep else "query"
        return Move(what, move.chunk, move.part, move.source, move.target)
    return move


def backward_steps(program: Program) -> tuple[Step, ...]:
    """Blocks in the same order, with the moves that fetch their inputs and return gradients."""
    routes = Routes(program)
    repeated = [
        Step(tuple(_again(m) for m in step.moves if m.what == "q" or not m.keep), step.computes)
        for step in program.steps
    ]
    timeline = _Timeline(repeated)
    for piece, uses in routes.last_use.items():
        _return_gradient(routes, timeline, piece, uses)
    return timeline.steps()


def _return_gradient(
    routes: Routes, timeline: _Timeline, piece: Piece, uses: dict[int, int]
) -> None:
    """Add the moves of one piece's gradient: each rank sends once, after its last block with the
    piece and after the last share that it is to pass on has arrived."""
    name, chunk, part = GRADIENT_OF[piece[0]], piece[1], piece[2]
    senders: dict[int, list[int]] = defaultdict(list)
    pending = list(uses)
    reached = set(pending)
    while pending:
        rank = pending.pop()
        target = routes.gradient_target(piece, rank)
        if target is not None:
            senders[target].append(rank)
            if target not in reached:
                reached.add(target)
                pending.append(target)

    @functools.cache
    def sent_in(rank: int) -> int:
        return 1 + max([uses.get(rank, -1), *(sent_in(sender) for sender in senders[rank])])

    is_partial = len(uses) > 1
    for target, ranks in list(senders.items()):
        for rank in ranks:
            move = Move(name, chunk, part, rank, target, wide=is_partial)
            timeline.add(sent_in(rank), move)


@dataclass(frozen=True)
class RankStep:
    """One step of one rank; `release`: pieces that it holds and needs no more afterwards."""

    sends: tuple[Move, ...]
    receives: tuple[Move, ...]
    computes: tuple[Compute, ...]
    release: tuple[Piece, ...]


@dataclass(frozen=True)
class RankPlan:
    """All that one rank does. `saved`: q and kv pieces kept for the backward pass; `finals`: the
    (chunk, part) whose result is merged here; `own`: its chunks."""

    rank: int
    own: tuple[int, ...]
    forward: tuple[RankStep, ...]
    backward: tuple[RankStep, ...]
    saved: tuple[Piece, ...]
    finals: tuple[tuple[int, int], ...]


CARRIES = {"q": ("q",), "kv": ("kv",), "query": ("q", "g"), "dout": ("g",)}
"""Which pieces of a rank's table a move brings; "g" is (dout, out, lse) of a query piece."""


def _used(step_computes: Iterable[Compute], sends: Iterable[Move], backward: bool) -> set[Piece]:
    used: set[Piece] = set()
    for block in step_computes:
        used |= set(block.pieces)
        if backward:
            used |= {("g", chunk, block.part) for chunk in block.q}
    for move in sends:
        if move.what != "dout":
            used |= {(what, move.chunk, move.part) for what in CARRIES.get(move.what, ())}
    return used


def _rank_steps(steps: Iterable[Step], rank: int, backward: bool) -> tuple[RankStep, ...]:
    mine: list[RankStep] = []
    later: set[Piece] = set()
    for step in reversed(list(steps)):
        sends = tuple(move for move in step.moves if move.source == rank)
        receives = tuple(move for move in step.moves if move.target == rank)
        computes = tuple(block for block in step.computes if block.rank == rank)
        used = _used(computes, sends, backward)
        mine.append(RankStep(sends, receives, computes, tuple(sorted(used - later))))
        later |= used
    return tuple(reversed(mine))


@functools.cache
def _both_ways(program: Program) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    return forward_steps(program), backward_steps(program)


@functools.cache
def rank_plan(program: Program, rank: int) -> RankPlan:
    """What `rank` does in `program`."""
    forward, backward = (
        _rank_steps(steps, rank, is_backward)
        for steps, is_backward in zip(_both_ways(program), (False, True))
    )
    used: set[Piece] = set()
    fetched: set[Piece] = set()
    for step in backward:
        used |= _used(step.computes, step.sends, backward=True)
        for move in step.receives:
            carried = CARRIES.get(move.what, ())
            fetched |= {(what, move.chunk, move.part) for what in carried}
    saved = sorted(piece for piece in used - fetched if piece[0] != "g")
    routes = Routes(program)
    finals = sorted(
        (piece[1], piece[2])
        for piece, uses in routes.last_use.items()
        if piece[0] == "q" and {routes.base(piece, user) for user in uses} == {rank}
    )
    own = program.layout.chunks(rank)
    return RankPlan(rank, own, forward, backward, tuple(saved), tuple(finals))
