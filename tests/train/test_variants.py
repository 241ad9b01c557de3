"""Every model and router switch trains, and is the same training on two ranks as on one."""

import math

import pytest

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

STEPS = 3
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = PP2 + " --num-virtual-stages-per-pipeline-rank 2"
EP2 = "--expert-model-parallel-size 2"
MLA = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8"
    " --v-head-dim 16 --no-group-query-attention"
)
SIGMOID = "--moe-router-score-function sigmoid"

VARIANTS = {
    "mla": (MLA, TP2),
    "mla with query compression": (MLA + " --q-lora-rank 32 --qk-layernorm", TP2),
    "multi-token prediction": ("--mtp-num-layers 1", PP2),
    "tied embeddings": ("--no-untie-embeddings-and-output-weights", PP2),
    "shared experts": ("--moe-shared-expert-intermediate-size 64", TP2),
    "gated shared experts": (
        "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-gate",
        EP2,
    ),
    "overlapped shared experts": (
        "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-overlap",
        EP2,
    ),
    "dense first layer": ("--moe-layer-freq ([0]*1+[1]*3)", VPP2),
    "a pipeline stage without experts": ("--moe-layer-freq ([0]*2+[1]*2)", PP2),
    "every second layer": ("--moe-layer-freq 2", PP2),
    "sigmoid, expert bias, groups": (
        SIGMOID + " --moe-router-enable-expert-bias --moe-router-num-groups 4"
        " --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5"
        " --moe-router-load-balancing-type seq_aux_loss",
        EP2,
    ),
    "sigmoid": (SIGMOID, TP2),
    "pre-softmax": ("--moe-router-pre-softmax", TP2),
    "top-1": ("--moe-router-topk 1 --moe-router-pre-softmax", EP2),
    "sinkhorn": ("--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0", PP2),
    "two balance losses": (
        "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.01 0.001",
        TP2,
    ),
    "no balance loss": ("--moe-router-load-balancing-type none --moe-aux-loss-coeff 0", PP2),
    "capacity": ("--moe-expert-capacity-factor 1.0", PP2),
    "padded capacity": (
        "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
        EP2,
    ),
    "layernorm, gelu, biases, learned positions": (
        "--normalization LayerNorm --no-swiglu --add-bias-linear"
        " --position-embedding-type learned_absolute",
        TP2 + " --expert-tensor-parallel-size 1",
    ),
    "expert biases": ("--add-bias-linear", EP2),
    "qk norm": ("--qk-layernorm", TP2),
    "qkv bias": ("--add-qkv-bias", TP2),
    "yarn": (
        "--position-embedding-type yarn --rotary-scaling-factor 4"
        " --yarn-original-max-position-embeddings 16",
        PP2,
    ),
    "rope scaling": ("--use-rope-scaling --rotary-percent 0.5 --rotary-base 500000", PP2),
    "sliding window": ("--window-size 16,0 --window-attn-skip-freq 2", TP2),
    "attention sinks": ("--softmax-type learnable", TP2),
    "document mask": ("--reset-attention-mask --reset-position-ids --eod-mask-loss", PP2),
    "full recompute": (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        PP2,
    ),
    "selective recompute": (
        "--recompute-granularity selective --recompute-modules core_attn moe_act layernorm",
        TP2,
    ),
    "moe recompute": ("--recompute-granularity selective --recompute-modules moe", EP2),
    "dense": (
        "--no-num-experts",
        TP2,
    ),
    "uneven pipeline": ("", PP2 + " --decoder-first-pipeline-num-layers 1"),
    "pipeline layout": ("", PP2 + " --pipeline-model-parallel-layout Et|tttL"),
    "embedding and loss count as layers": (
        "",
        PP2 + " --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    "tp order before dp": ("", PP2 + " --use-tp-pp-dp-mapping"),
    "per-token loss": ("--calculate-per-token-loss --eod-mask-loss", TP2),
    "batch ramp": ("--rampup-batch-size 4 4 8 --train-samples 24", ""),
    "wsd by samples": (
        "--lr-decay-style WSD --lr-wsd-decay-samples 8 --train-samples 24 --lr-warmup-samples 4",
        "",
    ),
}


def _flags(text: str, samples: bool) -> list[str]:
    base = [flag for flag in TINY]
    if samples:
        at = base.index("--train-iters")
        del base[at : at + 2]
    else:
        base += ["--train-iters", str(STEPS)]
    extra = text.split()
    for drop, count in (("--no-num-experts", 2), ("--no-group-query-attention", 0)):
        if drop in extra:
            extra.remove(drop)
            names = (
                [flag for flag in base if flag.startswith("--moe") or flag == "--num-experts"]
                if count
                else ["--group-query-attention", "--num-query-groups"]
            )
            for name in names:
                at = base.index(name)
                end = at + 1
                while end < len(base) and not base[end].startswith("--"):
                    end += 1
                del base[at:end]
    return base + extra


def _curve(run_dir, world_size: int, flags: list[str]) -> dict[str, list[float]]:
    run_ranks(pretrain, world_size, [*flags, "--run-dir", str(run_dir)])
    return {key: read_metrics(run_dir, key) for key in ("lm_loss", "grad_norm", "mtp_loss")}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    flags, layout = VARIANTS[name]
    base = _flags(flags, samples="--train-samples" in flags)
    one = _curve(tmp_path / "one", 1, base)
    two = _curve(tmp_path / "two", 2, [*base, *layout.split()])
    assert len(one["lm_loss"]) >= STEPS and all(map(math.isfinite, one["lm_loss"]))
    assert two["mtp_loss"] == pytest.approx(one["mtp_loss"], rel=1e-5)
    assert bool(one["mtp_loss"]) == ("--mtp-num-layers" in flags)
    for key, tolerance in (("lm_loss", 1e-5), ("grad_norm", 1e-4)):
        assert two[key] == pytest.approx(one[key], rel=tolerance), key
