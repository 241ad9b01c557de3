"""The whole trainer on the kernels: the losses of two steps are those of torch's road.

On a GPU each road is a process of its own (the tests' process has megatron-core for the CPU).
"""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.kernels import cases  # first: it skips where Triton cannot run

from tests.ranks.harness import run_ranks  # isort: skip
from tests.ranks.tiny import TINY, pretrain, read_metrics  # isort: skip

ROOT = Path(__file__).parents[2]
SMALL = [
    *TINY,
    *"--num-layers 2 --hidden-size 32 --moe-ffn-hidden-size 24 --num-experts 4 --seq-length 16"
    " --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2 --train-iters 2"
    " --no-bf16".split(),
]
RUNS = {  # ranks, flags
    "one rank": (1, "--log-routing-interval 1"),
    "dropping, all recomputed": (
        1,
        "--moe-expert-capacity-factor 1.0 --recompute-granularity full --recompute-method uniform"
        " --recompute-num-layers 1",
    ),
    "ep2": (2, "--expert-model-parallel-size 2"),
}
KEYS = ("lm_loss", "load_balancing_loss", "grad_norm")


def _run(road: str, ranks: int, flags: list[str], run: Path) -> dict[str, list[float]]:
    argv = [*SMALL, *flags, "--moe-kernels", road, "--run-dir", str(run), "--device", cases.DEVICE]
    if cases.DEVICE == "cpu":
        run_ranks(pretrain, ranks, argv)
    else:
        subprocess.run([sys.executable, "pretrain_moe.py", *argv], cwd=ROOT, check=True)
    return {key: read_metrics(run, key) for key in KEYS}


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_have_the_losses_of_torchs_road(name, tmp_path):
    ranks, flags = RUNS[name]
    if cases.DEVICE == "cuda" and ranks > torch.cuda.device_count():
        pytest.skip(f"{ranks} GPUs are needed")
    found = {
        road: _run(road, ranks, flags.split(), tmp_path / road) for road in ("torch", "triton")
    }
    for key, expected in found["torch"].items():
        assert len(expected) == 2
        assert found["triton"][key] == pytest.approx(expected, rel=1e-5, abs=1e-5), key


def test_the_kernels_are_what_ran(tmp_path, monkeypatch):
    """The layers of a run have them, its routing is the same, and a bad expert is named."""
    if cases.DEVICE == "cuda":
        pytest.skip("looks into the process, which has megatron-core for the CPU")
    assert run_ranks(_layer_of_a_run, 1) == [[1]]


def _layer_of_a_run() -> list[int]:
    """Which local experts have an output that is not finite, by the hook of a close look."""
    warnings.simplefilter("ignore")  # the interpreter is numpy, which warns of inf - inf
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import Vocabulary, build_chunks
    from megatron_ext.moe.close_look import bad_blocks
    from megatron_ext.moe.device_dispatch import DeviceDispatcher
    from megatron_ext.moe.device_experts import DeviceExperts

    cfg = parse([*SMALL, "--moe-kernels", "triton"])
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        (chunk,) = build_chunks(cfg, Vocabulary(250, 256))
        layer = next(m for m in chunk.modules() if hasattr(m, "token_dispatcher"))
        assert isinstance(layer.experts, DeviceExperts)
        assert isinstance(layer.token_dispatcher, DeviceDispatcher)
        with torch.no_grad():
            layer.experts.fc2_weight[1].fill_(float("inf"))
        seen = []
        layer.experts.register_forward_hook(
            lambda one, given, out: seen.append(bad_blocks(*one.outputs_by_expert(given, out)))
        )
        layer(torch.randn(16, 1, 32))
        return seen[0].nonzero().flatten().tolist()
