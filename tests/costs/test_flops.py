"""Model FLOPs by hand and by the 6-N rule."""

from __future__ import annotations

import pytest

from megatron_ext.costs.flops import model_flops_per_token, visible_keys
from megatron_ext.costs.parameters import count_parameters
from tests.costs import models
from tests.costs.models import config


@pytest.mark.parametrize(
    ("length", "window"), [(1, None), (7, None), (7, 0), (7, 3), (7, 6), (7, 99)]
)
def test_visible_keys_are_those_of_the_mask(length, window):
    seen = sum(min(t, length if window is None else window + 1) for t in range(1, length + 1))
    assert visible_keys(length, window) == pytest.approx(seen / length)


def test_a_layer_by_hand():
    hidden, width, seq, rows = 64, 128, 4096, 1024
    linear = 4 * hidden * hidden + 8 * hidden + 2 * 3 * hidden * width
    scores = 2 * (2 * hidden) * (seq + 1) / 2
    forward = 4 * (2 * linear + scores) + 2 * hidden * rows
    assert model_flops_per_token(config(models.TINY)) == pytest.approx(3 * forward)


@pytest.mark.parametrize("model", [models.MIXTRAL_8X7B, models.DEEPSEEK_V3, models.QWEN3_30B_A3B])
def test_without_attention_it_is_six_times_the_active_matrices(model):
    cfg = config(model, "--seq-length 1")
    count = count_parameters(cfg)
    matrices = count.active - count.embedding / 2
    assert model_flops_per_token(cfg) == pytest.approx(6 * matrices, rel=2e-3)


def test_a_window_costs_less_and_mtp_costs_a_layer_and_a_loss():
    plain = model_flops_per_token(config(models.TINY))
    window = model_flops_per_token(config(models.TINY, "--window-size (127,0)"))
    fewer = (4096 + 1) / 2 - visible_keys(4096, 127)
    assert plain - window == pytest.approx(3 * 4 * 2 * 2 * 64 * fewer)
    mixed = "--window-size (127,0) --window-attn-skip-freq 2"
    assert plain - model_flops_per_token(config(models.TINY, mixed)) == pytest.approx(
        3 * 2 * 2 * 2 * 64 * fewer
    )
    mtp = model_flops_per_token(config(models.TINY, "--mtp-num-layers 1"))
    table = 3 * 2 * 64 * 1024
    assert mtp - plain == pytest.approx((plain - table) / 4 + table + 6 * 2 * 64 * 64)
