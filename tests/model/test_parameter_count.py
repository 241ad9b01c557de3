"""The counted parameters are those of the built model, on every stage of several layouts."""

import pytest

from megatron_ext.config import parse
from megatron_ext.costs.parameters import count_parameters
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
CASES = {
    "one rank": (1, ""),
    "tp2 etp1": (2, TP2 + " --expert-tensor-parallel-size 1"),
    "tp2 pp2 ep2": (
        4,
        TP2 + " --pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
        " --expert-tensor-parallel-size 1",
    ),
    "pp2 vpp2, dense first layer, shared experts": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
        " --moe-layer-freq ([0]*1+[1]*3) --moe-shared-expert-intermediate-size 64",
    ),
    "tied, biases, qk norm, layer norm": (
        1,
        "--no-untie-embeddings-and-output-weights --add-bias-linear --qk-layernorm"
        " --normalization LayerNorm --position-embedding-type learned_absolute",
    ),
    "mtp": (2, "--pipeline-model-parallel-size 2 --mtp-num-layers 1"),
}


def _built(argv: list[str]) -> tuple[int, int]:
    """(pipeline rank, parameters of this rank's chunks)."""
    from megatron.core import parallel_state

    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import build_chunks, vocabulary

    cfg = parse(argv)
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        chunks = build_chunks(cfg, vocabulary(cfg, None))
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        return pp_rank, sum(p.numel() for chunk in chunks for p in chunk.parameters())


@pytest.mark.parametrize("name", CASES)
def test_counted_equals_built(name):
    world_size, flags = CASES[name]
    argv = [*TINY, *flags.split()]
    counted = count_parameters(parse([*argv, "--world-size", str(world_size), "--dry-run"]))
    for pp_rank, built in run_ranks(_built, world_size, argv):
        assert built == counted.per_stage[pp_rank]
    if world_size == 1:
        assert counted.total == counted.per_stage[0]
