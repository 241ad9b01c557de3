"""Every strategy equals attention on the whole sequence: outputs and all gradients."""

import pytest
import torch

from megatron_ext.context import Attention, build, reach_of
from megatron_ext.context.forward import Forward
from tests.context.cases import Case, joined
from tests.context.threads import on_threads

STRATEGIES = {
    "p2p": (),
    "all_gather": (),
    "a2a": (),
    "a2a+p2p": (2, 2),
}
CASES = {
    "plain": Case(),
    "one token a chunk": Case(seq=8, batch=1),
    "no groups": Case(groups=4),
    "one group": Case(groups=1),
    "wide values": Case(width=6, value_width=10),
    "narrow values": Case(width=12, value_width=8, groups=4),
    "documents": Case(seq=24, documents=True),
    "window": Case(seq=24, window=3),
    "window of one chunk": Case(seq=24, window=6),
    "window wider than all": Case(window=100),
    "sees itself only": Case(window=0),
    "documents and window": Case(seq=24, window=5, documents=True, groups=1),
    "sink": Case(sink=True),
    "sink, documents, window": Case(seq=24, sink=True, documents=True, window=7),
    "odd chunks": Case(seq=56, batch=3, heads=8, width=5),
}


def run(case: Case, name: str, cp: int, sizes=()) -> list[torch.Tensor]:
    reach = reach_of(case.window, case.seq // (2 * cp if cp > 1 else 1), 2 * cp)
    program = build(name, cp, sizes, reach)
    return joined(program.layout, on_threads(lambda e: case.on_rank(program, e), cp))


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case, name, cp):
    if cp == 1 and name == "a2a+p2p":
        pytest.skip("two levels need ranks")
    sizes = (2, cp // 2) if name == "a2a+p2p" else ()
    for got, wanted in zip(run(case, name, cp, sizes), case.reference(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cp", "sizes"),
    [("p2p", 3, ()), ("all_gather", 3, ()), ("p2p", 8, ()), ("a2a", 8, ()), ("a2a+p2p", 8, (2, 4))],
)
def test_other_sizes_of_the_group(name, cp, sizes):
    case = Case(seq=48, heads=8, documents=True, sink=True)
    for got, wanted in zip(run(case, name, cp, sizes), case.reference(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_bf16_loses_a_few_roundings_only(name, documents):
    """bf16 keeps 8 bits: one rounding is 2^-9 of a number at most. The reference computes in fp32;
    a block's kernel rounds P (or dS) and its result, then the sum is rounded once: within 4
    roundings, 2^-7, of the norm. The sums over blocks and ranks are fp32 and add nothing.
    """
    case = Case(seq=256, heads=4, width=32, documents=documents, dtype=torch.bfloat16)
    wanted = case.reference()
    got = run(case, name, 4, (2, 2))
    alone = run(case, "p2p", 1)
    for mine, one_rank, truth in zip(got, alone, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        assert _relative(mine, truth) < 2**-7
        assert _relative(mine, truth) < 1.5 * _relative(one_rank, truth) + 2**-9


def test_pieces_are_freed():
    """After a pass a rank holds nothing but what it started with or keeps for the backward pass."""
    program = build("p2p", 4)
    qkv, *_ = Case(seq=32).tensors()

    def left_over(exchange) -> set:
        local = [program.layout.split(x, exchange.rank, dim=0) for x in qkv]
        work = Forward(Attention(program, exchange, 1.0), *local, None)
        work.run(work.plan.forward)
        return {chunk for _, chunk, _ in work.table} - set(work.plan.own)

    assert on_threads(left_over, 4) == [set()] * 4
