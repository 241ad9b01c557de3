"""The same on real ranks: gloo processes, batched point-to-point, forward and backward."""

import pytest
import torch

from megatron_ext.context import Exchange, build, reach_of
from tests.context.cases import Case, joined
from tests.ranks.harness import run_ranks

CASES = [
    Case(seq=32),
    Case(seq=32, documents=True, sink=True, groups=1),
    Case(seq=32, window=5, width=12, value_width=8, groups=4),
    Case(seq=32, dtype=torch.bfloat16),
]
SIZES = {2: (2, 1), 4: (2, 2)}


def _on_rank(name: str) -> list[list]:
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    answers = []
    for case in CASES:
        reach = reach_of(case.window, case.seq // (2 * group.size()), 2 * group.size())
        program = build(name, group.size(), SIZES[group.size()], reach)
        mine = case.on_rank(program, Exchange(group))
        answers.append([x.float().numpy() for x in mine])
    torch.distributed.destroy_process_group()
    return answers


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("name", ["p2p", "all_gather", "a2a", "a2a+p2p"])
def test_processes_equal_the_reference(name, ranks):
    answers = run_ranks(_on_rank, ranks, name)
    layout = build(name, ranks, SIZES[ranks]).layout
    for index, case in enumerate(CASES):
        per_rank = [[torch.from_numpy(x) for x in answer[index]] for answer in answers]
        tolerance = 1e-5 if case.dtype == torch.float32 else 2**-5  # 4 roundings of numbers to 2
        for got, wanted in zip(joined(layout, per_rank), case.reference(), strict=True):
            torch.testing.assert_close(got, wanted.float(), rtol=tolerance, atol=tolerance)
