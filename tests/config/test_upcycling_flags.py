"""Flags of upcycling, of the norm over heads and of the group score: derived values and rules."""

import pytest

from megatron_ext.config import parse
from megatron_ext.errors import ConfigError
from tests.ranks.tiny import TINY


def _parse(words: str):
    return parse([*TINY, *words.split()], environ={})


def _refused(words: str) -> str:
    with pytest.raises(ConfigError) as error:
        _parse(words)
    return "; ".join(error.value.lines())


def test_granularity_gives_the_experts_width():
    tiny = [w for w in TINY if w not in ("--moe-ffn-hidden-size", "96")]
    cfg = parse([*tiny, "--moe-upcycling-granularity", "2"], environ={})
    assert cfg.transformer.moe_ffn_hidden_size == 64
    assert cfg.origins["moe_ffn_hidden_size"] == "derived"


def test_granularity_and_width_must_agree():
    text = _refused("--moe-upcycling-granularity 2")
    assert "times --moe-ffn-hidden-size = 96 must be --ffn-hidden-size = 128" in text
    assert "must be at least 1" in _refused("--moe-upcycling-granularity 0")


def test_upcycling_needs_a_checkpoint():
    assert "needs --num-experts and --load" in _refused("--moe-use-upcycling")
    assert _parse("--moe-use-upcycling --load x").checkpoint.moe_use_upcycling


def test_a_norm_over_heads_needs_whole_groups_on_each_rank():
    assert "needs --qk-layernorm" in _refused("--qk-layernorm-over-heads")
    words = "--qk-layernorm --qk-layernorm-over-heads"
    assert _parse(words).model.qk_layernorm_over_heads
    text = _refused(f"{words} --tensor-model-parallel-size 4 --sequence-parallel --world-size 4")
    assert "--num-query-groups = 2 to be a multiple of --tensor-model-parallel-size = 4" in text
    assert "is an RMSNorm" in _refused(f"{words} --normalization LayerNorm")


def test_a_group_score_counts_experts_of_a_group():
    words = "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-group-score-experts"
    assert _parse(f"{words} 2").moe.moe_router_group_score_experts == 2
    assert "must be from 1 to the 2 experts of a group" in _refused(f"{words} 3")
    assert "needs --moe-router-group-topk" in _refused("--moe-router-group-score-experts 1")
