"""Every layout is the same training: 20 steps of the same tiny model, against one rank.

The weights start bit for bit equal (initialisation does not depend on the layout) and every run
reads the same samples, so the loss curves, the gradient norms and the routing agree to rounding:
1e-5 relative for losses.
"""

import pytest

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

STEPS = 20
LAYOUTS = {
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vpp2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "ep2-alltoall": (2, "--expert-model-parallel-size 2"),
    "ep2-allgather": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "dp2": (2, ""),
    "dp2-dopt": (2, "--use-distributed-optimizer"),
    "dp2-dopt-overlap": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "tp2-etp1": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
    ),
    "tp2-ep2-pp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
        " --expert-tensor-parallel-size 1 --pipeline-model-parallel-size 2",
    ),
    "tp2-ep4-etp1": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4"
        " --expert-tensor-parallel-size 1",
    ),
}


def _train(run_dir, world_size: int, flags: str) -> dict[str, list[float]]:
    argv = [*TINY, "--train-iters", str(STEPS), "--run-dir", str(run_dir), *flags.split()]
    run_ranks(pretrain, world_size, argv)
    keys = ("lm_loss", "grad_norm", "load_balancing_loss", "z_loss", "max_violation")
    return {key: read_metrics(run_dir, key) for key in keys}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("one"), 1, "")


def _largest_difference(got: list[float], wanted: list[float]) -> float:
    assert len(got) == len(wanted) == STEPS
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(got, wanted))


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_curve_as_one_rank(name, one_rank, tmp_path):
    got = _train(tmp_path, *LAYOUTS[name])
    assert _largest_difference(got["lm_loss"], one_rank["lm_loss"]) < 1e-5
    assert _largest_difference(got["grad_norm"], one_rank["grad_norm"]) < 1e-4
    assert _largest_difference(got["load_balancing_loss"], one_rank["load_balancing_loss"]) < 1e-4
    assert _largest_difference(got["z_loss"], one_rank["z_loss"]) < 1e-4
    assert got["max_violation"][0] == pytest.approx(one_rank["max_violation"][0], abs=1e-12)


def test_the_model_learns(one_rank):
    """The mock data has structure: the loss of step 20 is clearly under that of step 1."""
    assert one_rank["lm_loss"][-1] < one_rank["lm_loss"][0] - 0.1


def test_pipeline_layouts_are_exact(one_rank, tmp_path):
    """Moving layers to other ranks changes no arithmetic but the order of the norm's sum."""
    got = _train(tmp_path, *LAYOUTS["pp2-vpp2"])
    assert got["lm_loss"][0] == one_rank["lm_loss"][0]
    assert _largest_difference(got["lm_loss"], one_rank["lm_loss"]) < 1e-6
