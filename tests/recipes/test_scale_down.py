"""--scale-down: every recipe trains three steps on gloo, its flags kept and its layout shrunk."""

from __future__ import annotations

import math

import pytest

from megatron_ext.config import parse
from megatron_ext.config.recipes import CONFIGS
from megatron_ext.costs.tensors import moe_pattern
from tests.policy.test_configs import ranks_of
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import pretrain, read_metrics
from tests.recipes.published import MODELS

TOLD = "{}.h100"


@pytest.mark.parametrize("model", ["quickstart", *(one.name for one in MODELS)])
def test_it_trains_three_steps(model, tmp_path):
    name = model if model == "quickstart" else TOLD.format(model)
    words = ["--config", name, "--scale-down", "--run-dir", str(tmp_path / "run")]
    run_ranks(pretrain, 4, words)
    losses = read_metrics(tmp_path / "run")
    assert len(losses) == 3 and all(abs(loss - math.log(250)) < 1.0 for loss in losses), losses


def pair(recipe: str, *flags: str):
    """The recipe as it is, and scaled down."""
    ranks = ranks_of(CONFIGS / "layouts" / f"{recipe}.yaml")
    words = ["--config", recipe, "--world-size", str(ranks), "--mock-data"]
    return parse([*words, "--dry-run"], {}), parse([*words, "--scale-down", *flags], {})


@pytest.mark.parametrize("path", sorted((CONFIGS / "layouts").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_kind_of_model_stays(path):
    big, small = pair(path.stem)
    a, b = big.transformer, small.transformer
    for name in (
        *("multi_latent_attention", "qk_layernorm", "add_bias_linear", "softmax_type"),
        *("moe_router_score_function", "moe_router_enable_expert_bias", "normalization"),
        *("moe_router_pre_softmax", "recompute_granularity", "recompute_modules"),
    ):
        assert getattr(a, name) == getattr(b, name), name
    for name in (
        *("moe_shared_expert_intermediate_size", "q_lora_rank", "mtp_num_layers", "window_size"),
        *("moe_router_num_groups", "moe_router_topk_scaling_factor"),
    ):
        assert bool(getattr(a, name)) == bool(getattr(b, name)), name
    if not a.multi_latent_attention:
        ratio = a.num_attention_heads // a.num_query_groups
        assert ratio == b.num_attention_heads // b.num_query_groups
    assert set(moe_pattern(big)) == set(moe_pattern(small))
    assert moe_pattern(big)[0] == moe_pattern(small)[0]
    assert big.train.bf16 == small.train.bf16
    untied = "untie_embeddings_and_output_weights"
    assert getattr(big.model, untied) == getattr(small.model, untied)


@pytest.mark.parametrize("path", sorted((CONFIGS / "layouts").glob("*.yaml")), ids=lambda p: p.stem)
def test_sizes_above_one_stay_at_two_while_four_ranks_allow_it(path):
    big, small = (cfg.parallel for cfg in pair(path.stem))
    assert small.world_size == 4
    left = 4
    for name in ("pipeline_model", "tensor_model", "context"):
        before, after = (getattr(p, f"{name}_parallel_size") for p in (big, small))
        assert after == (2 if before > 1 and left > 1 else 1)
        left //= after
    assert small.data_parallel_size == left
    assert small.expert_model_parallel_size == 2
    chunks = "virtual_pipeline_model_parallel_size"
    assert bool(getattr(big, chunks)) == bool(getattr(small, chunks))


def test_every_change_is_printed_and_has_its_origin():
    _, small = pair("deepseek-v3.h100")
    changed = {dest for dest, origin in small.origins.items() if origin == "scale-down"}
    assert len(small.scaled) >= len(changed) > 30
    assert "scale-down: --num-experts 256 -> 8" in small.scaled
    assert small.warnings == ()


def test_flags_after_it_win_and_flags_before_it_do_not():
    _, small = pair("qwen3-30b-a3b.h100", "--train-iters", "7")
    assert (small.train.train_iters, small.origins["train_iters"]) == (7, "flag")
    before = ["--config", "quickstart", "--train-iters", "7", "--scale-down"]
    assert parse(before, {}).train.train_iters == 3


@pytest.mark.parametrize(("ranks", "made"), [(1, 1), (2, 2), (3, 2), (4, 4), (1000, 4)])
def test_fewer_ranks_shrink_further(ranks, made):
    words = ["--config", "deepseek-v3.h100", "--scale-down", "--world-size", str(ranks)]
    assert parse(words, {}).parallel.world_size == made


@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 8])
def test_a_launch_of_any_size_is_used_whole(ranks):
    words = ["--config", "mixtral-8x22b.h100", "--scale-down"]
    assert parse(words, {"WORLD_SIZE": str(ranks)}).parallel.world_size == ranks
