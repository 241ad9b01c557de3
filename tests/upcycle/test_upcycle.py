"""A mixture made from a dense checkpoint starts as the dense model, in every layout."""

import warnings

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint import Checkpointer, Progress, TrainState
from megatron_ext.checkpoint.stream import StoredTensors
from megatron_ext.config import parse
from megatron_ext.device import start
from megatron_ext.errors import ConfigError
from megatron_ext.hf.logits import logits_on_rank
from megatron_ext.mesh.forks import run_ranks
from megatron_ext.mesh.groups import process_groups
from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
from megatron_ext.optim.build import build_optimizer, build_scheduler
from megatron_ext.parity.names import parse_layout
from megatron_ext.upcycle.run import upcycle
from tests.ranks.tiny import pretrain, read_metrics

DENSE = """
--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --normalization RMSNorm
--position-embedding-type rope --untie-embeddings-and-output-weights --init-method-std 0.2
--hidden-dropout 0 --attention-dropout 0 --seq-length 16 --max-position-embeddings 16
--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --mock-data
--tokenizer-type NullTokenizer --vocab-size 99 --device cpu
""".split()
SWIGLU = ["--swiglu", "--disable-bias-linear"]
TOKENS = np.random.default_rng(0).integers(0, 99, (2, 16), dtype=np.int64)


def _save(flags: list[str], folder) -> None:
    """Initialise, make one random change to everything (biases too), save with the optimizer."""
    warnings.simplefilter("ignore")
    cfg = parse(flags)
    device = start("cpu")
    with process_groups(cfg.parallel, device, cfg.train.seed):
        chunks = build_chunks(cfg, vocabulary(cfg, None))
        with torch.no_grad():
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(std=0.2)
        chunks = wrap_for_training(cfg, chunks)
        optimizer = build_optimizer(cfg, chunks)
        state = TrainState(chunks, optimizer, build_scheduler(cfg, optimizer), Progress())
        info = {"config": cfg.to_yaml()}
        with Checkpointer(cfg.checkpoint, folder, None, run_info=info) as checkpointer:
            checkpointer.save(state)


def _dense(flags, folder, layout="single"):
    named = parse_layout(layout)
    words = [*DENSE, *flags, *named.flags]
    run_ranks(_save, named.world_size, words, folder)
    return _logits([*DENSE, *flags], folder, "single")


def _logits(flags, folder, layout):
    named = parse_layout(layout)
    flags = [*flags, "--global-batch-size", "4", *named.flags]
    found = run_ranks(logits_on_rank, named.world_size, flags, str(folder), TOKENS)
    return next(logits for logits in found if logits is not None)


EXACT = {
    "swiglu": (SWIGLU, "--num-experts 4 --moe-router-topk 2", None),
    "swiglu granular": (SWIGLU, "--num-experts 8 --moe-router-topk 4", 2),
    "swiglu one copy of three": (SWIGLU, "--num-experts 9 --moe-router-topk 3", 3),
    "gelu with biases granular": ([], "--num-experts 8 --moe-router-topk 4", 2),
    "squared relu granular": (
        ["--squared-relu", "--disable-bias-linear"],
        "--num-experts 4 --moe-router-topk 2",
        2,
    ),
    "sigmoid with expert bias": (
        SWIGLU,
        "--num-experts 4 --moe-router-topk 2 --moe-router-score-function sigmoid"
        " --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5",
        None,
    ),
    "some layers dense": (
        SWIGLU,
        "--num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1,0,1]",
        None,
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_first_logits_are_those_of_the_dense_model(case, tmp_path):
    flags, experts, granularity = EXACT[case]
    dense = _dense(flags, tmp_path / "dense")
    split = upcycle(tmp_path / "dense", tmp_path / "moe", experts.split(), granularity=granularity)
    width = ["--moe-ffn-hidden-size", str(split.width)]
    found = _logits([*DENSE, *flags, *experts.split(), *width], tmp_path / "moe", "single")
    assert np.abs(dense).max() > 1
    assert np.abs(found - dense).max() < 1e-6 * np.abs(dense).max()


def test_saved_in_any_layout_and_loaded_in_any_layout(tmp_path):
    """Also with virtual stages, where megatron-core's conversion calls itself wrongly (F8)."""
    dense = _dense(SWIGLU, tmp_path / "dense", "tp2-pp2-vpp2")
    experts = "--num-experts 8 --moe-router-topk 4".split()
    upcycle(tmp_path / "dense", tmp_path / "moe", experts, granularity=2)
    flags = [*DENSE, *SWIGLU, *experts, "--moe-ffn-hidden-size", "24"]
    for layout in ("pp2-vpp2", "tp2-sp-ep2-etp1", "dp2-ep2"):
        found = _logits(flags, tmp_path / "moe", layout)
        assert np.abs(found - dense).max() < 2e-6 * np.abs(dense).max()


def test_softmax_before_the_choice_is_near_and_unscaled_is_not(tmp_path):
    """Weights of a random router: near the dense model with the factor, far without it."""
    small = [*SWIGLU, "--init-method-std", "0.05"]
    dense = _dense(small, tmp_path / "dense")
    experts = "--num-experts 8 --moe-router-topk 2 --moe-router-pre-softmax".split()
    split = upcycle(tmp_path / "dense", tmp_path / "moe", experts)
    assert split.up_scale * split.down_scale == pytest.approx(8 / 2)
    found = _logits([*DENSE, *small, *experts], tmp_path / "moe", "single")
    error = np.linalg.norm(found - dense) / np.linalg.norm(dense)
    assert 1e-4 < error < 0.3


def test_routers_are_random_copies_share_rows_and_no_moments_are_kept(tmp_path):
    _dense(SWIGLU, tmp_path / "dense")
    experts = "--num-experts 8 --moe-router-topk 4".split()
    upcycle(tmp_path / "dense", tmp_path / "moe", experts, granularity=2)
    stored = StoredTensors(tmp_path / "moe" / "step_00000000")
    assert not [name for name in stored.names() if name.startswith("optimizer.")]
    routers = [stored.read(f"decoder.layers.{layer}.mlp.router.weight") for layer in range(4)]
    for router in routers:
        assert torch.equal(router[0::2], router[1::2])
        assert len(router.unique(dim=0)) == 4
        assert 0.15 < float(router.std()) < 0.25  # --init-method-std
    assert not torch.equal(routers[0], routers[1])
    fc1 = stored.read("decoder.layers.2.mlp.experts.fc1_weight")
    whole = StoredTensors(tmp_path / "dense" / "step_00000000")
    gate = whole.read("decoder.layers.2.mlp.linear_fc1.weight")[:48]
    assert torch.equal(torch.cat([fc1[6, 0], fc1[7, 0]]), gate)


WRONG = {
    "--num-experts 6 --moe-router-topk 3": (2, "--moe-router-topk 3 must be a multiple"),
    "--num-experts 5 --moe-router-topk 2": (2, "--num-experts 5 must be a multiple"),
    "--num-experts 4 --moe-router-topk 2": (5, "must divide the dense width 48"),
    "--moe-router-topk 2": (None, "--num-experts is required"),
    "--num-experts 4 --moe-router-topk 2 --qk-layernorm": (None, "different: qk_layernorm"),
    "--num-experts 4 --moe-router-topk 2 --moe-shared-expert-intermediate-size 8": (
        None,
        "no shared experts",
    ),
}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """A dense SwiGLU checkpoint."""
    folder = tmp_path_factory.mktemp("upcycle") / "dense"
    run_ranks(_save, 1, [*DENSE, *SWIGLU], folder)
    return folder


@pytest.mark.parametrize("flags", WRONG)
def test_what_cannot_be_upcycled_is_refused(flags, dense_folder, tmp_path):
    granularity, words = WRONG[flags]
    with pytest.raises(ConfigError) as error:
        upcycle(dense_folder, tmp_path / "moe", flags.split(), granularity=granularity)
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_training_upcycles_what_it_loads(tmp_path):
    """`--moe-use-upcycling`: the first loss of the mixture is the dense model's."""
    flags = [*DENSE, *SWIGLU, "--log-interval", "1", "--eval-iters", "0"]
    dense, moe = tmp_path / "dense_run", tmp_path / "moe_run"
    run_ranks(pretrain, 1, [*flags, "--run-dir", str(dense)])
    again = [*flags, "--load", str(dense / "checkpoints"), "--finetune"]
    run_ranks(pretrain, 1, [*again, "--run-dir", str(tmp_path / "again")])
    experts = "--num-experts 8 --moe-router-topk 4 --moe-upcycling-granularity 2".split()
    layout = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2".split()
    load = ["--load", str(dense / "checkpoints"), "--moe-use-upcycling"]
    run_ranks(pretrain, 2, [*flags, *experts, *load, *layout, "--run-dir", str(moe)])
    first, reference = read_metrics(moe)[0], read_metrics(tmp_path / "again")[0]
    assert first == pytest.approx(reference, rel=1e-6)
    record = StoredTensors(moe / "checkpoints" / "step_00000002").record
    assert record["progress"]["step"] == 2
