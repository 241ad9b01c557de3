"""Every strategy equals attention on the whole sequence: outputs and all gradients."""

import pytest
import torch

from megatron_ext.context import build, reach_of
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
