"""Rows 12 and 13: a transient NaN leaves no trace in the run, a reproducible one is named."""

import json

import pytest

from tests.ranks.fingerprint import history, recorded, state_digests
from tests.ranks.harness import run_ranks
from tests.resilience.numeric_faults import Fault, train

LAYOUT = (
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer"
    " --moe-router-score-function sigmoid --moe-router-enable-expert-bias --hidden-dropout 0.1"
    " --spike-threshold 0"
).split()
TRANSIENT = [
    Fault("loss", step=1, rank=3, micro_batch=1, times=1),
    Fault("expert", step=2, rank=1, layer=0, expert=5, times=1),
    Fault("expert gradient", step=3, rank=0, micro_batch=1, layer=1, expert=2, times=1),
    Fault("router", step=4, rank=2, layer=3, times=1),
    Fault("balance loss", step=4, rank=2, micro_batch=1, layer=2, times=1),
]
REPRODUCIBLE = {
    "loss": (Fault("loss", step=2, rank=3, micro_batch=1), "the loss function"),
    "expert": (
        Fault("expert", step=2, rank=1, micro_batch=1, layer=1, expert=5),
        "decoder.layers.1.mlp.experts expert 5 (global): output, forward",
    ),
    "last stage": (
        Fault("expert", step=1, rank=2, layer=3, expert=0),
        "decoder.layers.3.mlp.experts expert 0 (global): output, forward",
    ),
    "gradient": (
        Fault("expert gradient", step=2, rank=0, micro_batch=1, layer=1, expert=2),
        "decoder.layers.1.mlp.experts expert 2 (global): gradient of fc1_weight, backward",
    ),
    "router": (
        Fault("router", step=2, rank=2, layer=2),
        "decoder.layers.2.mlp.router: router logits, forward",
    ),
    "balance loss": (
        Fault("balance loss", step=2, rank=1, micro_batch=1, layer=0),
        "decoder.layers.0.mlp.router: load_balancing_loss, forward",
    ),
}


def _recorded(folder, argv: list[str], faults: list[Fault]) -> int:
    with recorded(folder):
        return train(argv, faults)


def _copies(faults) -> list[Fault]:
    """Faults count their strikes."""
    return [Fault(**vars(fault)) for fault in faults]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the runs, name -> exit code of each rank)."""
    root, codes = tmp_path_factory.mktemp("nonfinite"), {}
    for name, faults in {"whole": [], "transient": TRANSIENT}.items():
        argv = [*LAYOUT, "--train-iters", "5", "--run-dir", str(root / name)]
        codes[name] = run_ranks(_recorded, 4, root / name / "state", argv, _copies(faults))
    for name, (fault, _) in REPRODUCIBLE.items():
        argv = [*LAYOUT, "--train-iters", "3", "--save-interval", "1"]
        codes[name] = run_ranks(train, 4, [*argv, "--run-dir", str(root / name)], _copies([fault]))
    return root, codes


def test_transient_faults_leave_no_trace(runs):
    root, codes = runs
    assert codes["transient"] == [0] * 4
    assert history(root / "transient") == history(root / "whole")
    digests = state_digests(root / "whole" / "state")
    assert len(digests) == 4
    assert state_digests(root / "transient" / "state") == digests


@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_reproducible_faults_are_named(name, runs):
    """76 on every rank, rank, micro-batch, samples and module in the report, nothing bad saved."""
    root, codes = runs
    fault, module = REPRODUCIBLE[name]
    assert codes[name] == [76] * 4
    report = json.loads((root / name / f"nonfinite_step_{fault.step}.json").read_text())
    assert (report["rank"], report["micro_batch"]) == (fault.rank, fault.micro_batch)
    dp_rank = fault.rank % 2
    first = (fault.step - 1) * 8 + fault.micro_batch * 4 + dp_rank * 2
    assert report["sample_ids"] == [first, first + 1]
    assert report["first_bad"] == module
    assert len(history(root / name)) == fault.step - 1
    saved = sorted(path.name for path in (root / name / "checkpoints").glob("step_*"))
    assert saved == [f"step_{step:08d}" for step in range(1, fault.step)]
