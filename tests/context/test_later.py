"""A strategy of tomorrow is a few lines: two published ones, written here as programs only."""

import pytest
import torch

from megatron_ext.context import contiguous, zigzag
from megatron_ext.context.program import Move, Program, Step, blocks, check, prune, work
from tests.context.cases import Case, joined
from tests.context.threads import on_threads


def token_ring(cp: int, gradients: str = "home") -> Program:
    """Queries travel, keys and values stay: results go home (TokenRing, arXiv:2412.20501)."""
    layout, ranks = zigzag(cp), range(cp)
    steps = []
    for hop in ranks:
        queries = {rank: layout.chunks((rank - hop) % cp) for rank in ranks}
        moves = [Move("q", c, 0, r, (r + 1) % cp) for r in ranks for c in queries[r]]
        computes = [b for r in ranks for b in blocks(r, queries[r], layout.chunks(r))]
        steps.append(Step(tuple(moves) if hop + 1 < cp else (), tuple(computes)))
    return Program("token ring", layout, 1, prune(steps), gradients)


def light_seq(cp: int) -> Program:
    """Contiguous chunks; a rank without work of its own helps a later one with that one's query
    (LightSeq, arXiv:2310.03294)."""
    ranks = range(cp)
    moves: list[list[Move]] = [[] for _ in range(cp // 2 + 1)]
    computes = [[b for r in ranks for b in blocks(r, [r], [r])], *([] for _ in range(cp // 2))]
    for t in range(1, cp // 2 + 1):
        for r in ranks:
            if r >= t:
                moves[t - 1].append(Move("kv", r - t, 0, r - t, r))
                computes[t] += blocks(r, [r], [r - t])
            elif t < cp - t:
                moves[t - 1].append(Move("q", r - t + cp, 0, r - t + cp, r))
                computes[t] += blocks(r, [r - t + cp], [r])
    steps = [Step(tuple(m), tuple(c)) for m, c in zip(moves, computes)]
    return Program("lightseq", contiguous(cp), 1, tuple(steps))


CASES = [Case(seq=40), Case(seq=40, sink=True, documents=True, groups=1), Case(seq=40, window=9)]
PROGRAMS = [token_ring(2), token_ring(4), token_ring(4, "chain"), light_seq(4), light_seq(5)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p.name} {p.layout.num_ranks}")
def test_it_runs_as_it_is(program, case):
    check(program)
    per_rank = on_threads(lambda e: case.on_rank(program, e), program.layout.num_ranks)
    for got, wanted in zip(joined(program.layout, per_rank), case.reference(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_light_seq_leaves_half_a_step_idle_on_even_groups_only():
    assert all(len(set(row)) == 1 for row in work(light_seq(5)))
    assert sum(row.count(0.0) for row in work(light_seq(4))) == 2
