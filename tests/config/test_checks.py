"""Each broken rule is named with its numbers and values that work; all come together."""

from __future__ import annotations

import pytest

from megatron_ext.config import parse
from megatron_ext.errors import ConfigError

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 1 --seq-length 64"
    " --max-position-embeddings 64 --train-iters 5 --lr 1e-3 --mock-data --vocab-size 100"
    " --disable-bias-linear"
)
MOE = " --num-experts 8"
PP2 = " --world-size 2 --pipeline-model-parallel-size 2"


def broken(extra: str) -> list[str]:
    try:
        parse(f"{BASE} {extra}".split(), {})
    except ConfigError as error:
        return error.lines()
    return []


CASES = {
    # the length of the run
    "--train-iters null --train-samples 3 --global-batch-size 4": "--train-samples 3 must fill one"
    " batch of 4 do=use 4 or more",
    "--train-iters null --train-samples 9 --micro-batch-size 2 --global-batch-size 4"
    " --rampup-batch-size 1 1 4 --decrease-batch-size-if-needed": "--rampup-batch-size 1 1 4 must"
    " start with micro-batch-size*dp = 2 or more do=start at 2",
    # layout
    "--world-size 6 --tensor-model-parallel-size 4": "--world-size 6 must be a multiple of tp*pp*cp"
    " = 4*1*1 = 4 do=use 4 or 8 ranks",
    "--world-size 12 --num-experts 24 --expert-model-parallel-size 8": "--expert-model"
    "-parallel-size 8 must divide dp*cp*tp/etp = 12 do=use 1, 2, 3, 4, 6 or 12",
    "--world-size 4 --expert-tensor-parallel-size 3": "--expert-tensor-parallel-size 3 must divide"
    " dp*cp*tp = 4 do=use 1, 2 or 4",
    "--world-size 4 --expert-model-parallel-size 4 --num-experts 6": "--num-experts 6 must be a"
    " multiple of --expert-model-parallel-size = 4 do=use 4 or 8 experts, or ep 1, 2, 3 or 6",
    "--world-size 2 --expert-model-parallel-size 2": "needs --num-experts",
    "--tensor-model-parallel-size 0": "--tensor-model-parallel-size 0 must be at least 1",
    "--world-size 8 --tensor-model-parallel-size 8": "--tensor-model-parallel-size 8 must divide"
    " --num-attention-heads = 4 do=use 1, 2 or 4",
    "--world-size 2 --tensor-model-parallel-size 2" + MOE: "with --num-experts needs"
    " --sequence-parallel",
    "--world-size 4 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 62": "--seq"
    "-length 62 must be a multiple of cp*tp = 4",
    "--world-size 4 --context-parallel-size 4 --seq-length 60": "must be a multiple of"
    " 2*cp = 8 (cp 4, tp 1) do=use 56 or 64",
    "--world-size 2 --context-parallel-size 2": "--attention-dropout 0.1 must be 0",
    "--world-size 4 --num-distributed-optimizer-instances 3 --use-distributed-optimizer": "must"
    " divide dp*cp = 4 do=use 1, 2 or 4",
    "--world-size 8 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
    " --use-tp-pp-dp-mapping" + MOE: "needs world/(tp*cp*pp) = 4 equal to world/(etp*ep*pp) = 2",
    # pipeline
    "--num-layers 5" + PP2: "--num-layers 5 must be a multiple of pp = 2 do=use 4 or 6 layers,"
    " or pp 1 or 5",
    "--num-layers 6 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 2"
    + PP2: "--num-layers 6 must be a multiple of pp*vpp = 4 do=use 4 or 8 layers",
    "--num-layers-per-virtual-pipeline-stage 3"
    + PP2: "times pp = 2 must divide the 4 layers do=use 1 or 2",
    "--decoder-first-pipeline-num-layers 4" + PP2: "leaves a pipeline rank without a layer",
    "--pipeline-model-parallel-layout Et|tL" + PP2: "holds 2 layers, but --num-layers is 4",
    "--num-virtual-stages-per-pipeline-rank 2 --global-batch-size 3" + PP2: "gives 3 micro-batches;"
    " the interleaved schedule needs a multiple of pp = 2 do=use 2 or 4",
    "--num-virtual-stages-per-pipeline-rank 2 --global-batch-size 2 --no-overlap-p2p-communication"
    + PP2: "--no-overlap-p2p-communication is silently wrong with pp = 2",
    # experts
    "--moe-router-topk 9" + MOE: "--moe-router-topk 9 must be from 1 to --num-experts = 8",
    "--moe-router-topk 1" + MOE: "needs --moe-router-pre-softmax",
    "--moe-router-enable-expert-bias" + MOE: "needs --moe-router-score-function sigmoid",
    "--moe-router-num-groups 3 --moe-router-group-topk 1" + MOE: "--moe-router-num-groups 3 must"
    " divide --num-experts = 8 do=use 1, 2, 4 or 8",
    "--moe-router-num-groups 2 --moe-router-group-topk 4 --moe-router-topk 4" + MOE: "must not"
    " exceed --moe-router-num-groups = 2",
    "--moe-router-num-groups 8 --moe-router-group-topk 2 --moe-router-topk 4" + MOE: "exceeds the 2"
    " experts of the kept groups",
    "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.1"
    + MOE: "has 1 entries; --moe-router-load-balancing-type has 2",
    "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1" + MOE: "must be 0 with"
    " sinkhorn",
    "--moe-pad-expert-input-to-capacity" + MOE: "needs --moe-expert-capacity-factor",
    "--moe-layer-freq [1,0]" + MOE: "must have one entry for each of the 4 layers",
    "--moe-token-dispatcher-type flex" + MOE: "needs DeepEP (deepep), which is not installed",
    "--moe-shared-expert-overlap --moe-shared-expert-intermediate-size 8" + MOE: "needs"
    " --moe-token-dispatcher-type alltoall",
    "--moe-ffn-hidden-size 8": "--moe-ffn-hidden-size 8 needs --num-experts",
    # network
    "--transformer-impl transformer_engine": "pip install -r requirements-gpu.txt",
    "--hidden-size 66": "--hidden-size 66 must be a multiple of --num-attention-heads = 4",
    "--group-query-attention --num-query-groups 3": "--num-query-groups 3 must divide",
    "--max-position-embeddings 32": "must be at least --seq-length = 64",
    "--bf16 --fp16": "--fp16 excludes --bf16",
    "--swiglu --squared-relu": "--squared-relu excludes --swiglu",
    "--mtp-num-layers 1": "does not work with --position-embedding-type learned_absolute",
    "--recompute-granularity full": "needs --recompute-method",
    "--padded-vocab-size 64": "must be at least --vocab-size = 100",
    # megatron-core's own checks
    "--moe-router-topk 1": "--moe-router-topk 1 needs --num-experts",
    "--moe-router-group-topk 2 --moe-router-num-groups 2": "--moe-router-group-topk 2 needs",
    "--moe-router-topk-limited-devices 2": "needs --num-experts",
    "--moe-router-enable-expert-bias": "--moe-router-enable-expert-bias needs --num-experts",
    "--moe-pad-expert-input-to-capacity": "needs --num-experts",
    "--variable-seq-lengths": "needs --moe-token-dispatcher-type alltoall",
    "--defer-embedding-wgrad-compute": "needs the fused accumulation of gradients",
    "--overlap-p2p-communication-warmup-flush": "without --batch-p2p-comm",
    "--batch-invariant-mode": "is not built by --transformer-impl local",
    "--symmetric-ar-type two_shot": "is not built by --transformer-impl local",
    "--inference-fuse-tp-communication": "is not built by --transformer-impl local",
    "--window-size (4,0) --window-attn-skip-freq 0": "must be at least 1",
    "--no-rope-freq 3": "--no-rope-freq 3 must divide --num-layers = 4 do=use 1, 2 or 4",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3": "must"
    " divide the 4 layers of a model chunk",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 4"
    + PP2: "must divide the 2 layers of a model chunk",
    "--fp16 --min-loss-scale 3e38": "must not exceed --initial-loss-scale = 4.29497e+09",
    # training
    "--micro-batch-size 4 --global-batch-size 6": "--global-batch-size 6 must be a multiple of"
    " micro-batch-size*dp = 4*1 = 4 do=use 4 or 8",
    "--train-samples 10": "--train-samples 10 excludes --train-iters",
    "--lr-decay-samples 10": "--lr-decay-samples 10 does not fit --train-iters",
    "--lr-warmup-iters 5": "must be less than --lr-decay-iters = 5",
    "--lr-warmup-fraction 0.1 --lr-warmup-iters 1": "excludes --lr-warmup-iters",
    "--min-lr 1": "--min-lr 1.0 must not exceed --lr = 0.001",
    "--lr-decay-style WSD": "needs --lr-wsd-decay-iters",
    "--rampup-batch-size 1 1": "needs three numbers",
    "--rampup-batch-size 1 1 4 --global-batch-size 2": "needs --train-samples instead",
    "--overlap-param-gather --overlap-grad-reduce": "needs --use-distributed-optimizer",
    "--overlap-param-gather --use-distributed-optimizer": "needs --overlap-grad-reduce",
    "--weight-decay-incr-style linear": "needs --start-weight-decay and --end-weight-decay",
    "--exit-signal SIGNOPE": "--exit-signal SIGNOPE is not a signal",
    "--data-path a": "--mock-data excludes data paths",
    "--optimizer muon": "needs the package emerging_optimizers",
}


@pytest.mark.parametrize(("extra", "said"), CASES.items(), ids=lambda text: text[:40])
def test_a_broken_rule_names_its_numbers(extra, said):
    lines = broken(extra)
    assert any(said in line for line in lines), lines
    assert all("do=" in line for line in lines)


def test_all_broken_rules_come_together():
    lines = broken(
        "--world-size 3 --pipeline-model-parallel-size 2 --num-layers 5 --moe-router-topk 9"
        " --bf16 --fp16 --min-lr 1" + MOE
    )
    assert len(lines) == 5


def test_required_flags_are_named_together():
    with pytest.raises(ConfigError) as caught:
        parse(["--num-layers", "4"], {})
    named = " ".join(caught.value.lines())
    for flag in ("hidden-size", "num-attention-heads", "seq-length", "lr",
                 "max-position-embeddings", "micro-batch-size", "train-iters", "data-path",
                 "tokenizer-type"):  # fmt: skip
        assert f"--{flag} " in named, flag


@pytest.mark.parametrize("words", ["", "--dry-run", "--bf16 --lr 1e-3"])
def test_without_a_model_one_line_says_how_to_begin(words):
    with pytest.raises(ConfigError) as caught:
        parse(words.split(), {})
    (line,) = caught.value.lines()
    assert all(way in line for way in ("launch/quickstart.sh", "--config", "--help"))


@pytest.mark.parametrize(
    "extra",
    [
        "",
        MOE + " --world-size 8 --tensor-model-parallel-size 2 --sequence-parallel"
        " --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"
        " --pipeline-model-parallel-size 2",
        MOE + PP2 + " --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4 --bf16"
        " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        MOE + " --moe-router-load-balancing-type aux_loss global_aux_loss"
        " --moe-aux-loss-coeff 0.01 0.001",
        MOE + " --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk 4",
        PP2 + " --decoder-first-pipeline-num-layers 1",
        PP2 + " --pipeline-model-parallel-layout Ettt|tL",
        "--lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-warmup-fraction 0.1",
        "--eval-only",
        "--transformer-impl transformer_engine --dry-run",
    ],
)
def test_legal_configurations_pass(extra):
    assert broken(extra) == []


def test_a_dry_run_needs_no_data():
    argv = BASE.replace(" --mock-data", "").split()
    assert parse([*argv, "--dry-run"], {}).action == "dry-run"
    with pytest.raises(ConfigError, match="--data-path"):
        parse(argv, {})
