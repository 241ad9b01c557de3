"""An imported checkpoint in other layouts, and planted errors that the comparison must see."""

from argparse import Namespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from megatron_ext.hf.check import largest_difference, reference_logits
from megatron_ext.hf.exporter import export_folder
from megatron_ext.hf.importer import import_folder, plan_import
from tests.hf.families import random_model, save


def _difference(folder, layout="single", **changed_flags):
    plan = plan_import(folder)
    plan.flags.update(changed_flags)
    args = Namespace(layout=layout, tokens=24, batch=2, seed=3)
    return largest_difference(plan, folder, args)[0]


LAYOUTS = {
    "olmoe": "tp2-sp",  # the norm over heads sums over tp
    "qwen2_moe": "tp2-sp-ep2-etp1",  # biases and a shared expert
    "deepseek_v3": "pp3-ep1",  # a dense stage, expert bias
    "gpt_oss": "pp2-vpp2",
    "mixtral-window-tied": "tp2-pp2-ep2",  # tied tables on two stages, padded vocabulary
}


@pytest.mark.parametrize("variant", LAYOUTS)
def test_every_layout_has_the_logits_of_transformers(variant, tmp_path):
    folder = save(random_model(variant), tmp_path / "model")
    assert _difference(folder, LAYOUTS[variant]) < 1e-4


PLANTED = {
    "mixtral-window-tied": {"window_size": [7, 0]},
    "qwen2_moe": {"moe_router_pre_softmax": False},
    "qwen3_moe-raw-yarn": {"yarn_beta_fast": 4.0},
    "olmoe": {"layernorm_epsilon": 1e-2},
    "deepseek_v2-lite": {"moe_router_pre_softmax": False},
    "deepseek_v2-groups-yarn": {"moe_router_group_score_experts": 2},
    "deepseek_v3": {"mscale_all_dim": 1.0},
    "gpt_oss": {"activation_func_clamp_value": 7.0},
}


@pytest.mark.parametrize("variant", PLANTED)
def test_one_wrong_flag_is_seen(variant, tmp_path):
    folder = save(random_model(variant), tmp_path / "model")
    assert _difference(folder, **PLANTED[variant]) > 1e-3


@pytest.mark.parametrize("variant", ["qwen2_moe", "deepseek_v2-groups-yarn", "gpt_oss"])
def test_a_config_json_made_from_flags_is_read_by_transformers(variant, tmp_path):
    """As after training: the checkpoint knows its flags, not the folder that it came from."""
    model = random_model(variant)
    folder = save(model, tmp_path / "model")
    import_folder(plan_import(folder), tmp_path / "ours")
    family = export_folder(tmp_path / "ours", tmp_path / "back", wanted=variant.partition("-")[0])
    assert family.class_name == type(model).__name__
    tokens = torch.arange(48).view(2, 24).numpy()
    assert (reference_logits(tmp_path / "back", tokens) == reference_logits(folder, tokens)).all()
