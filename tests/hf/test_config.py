"""config.json <-> flags: both spellings of transformers, both directions, and what is refused."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from megatron_ext.errors import DataError
from megatron_ext.hf.architectures import by_model_type
from megatron_ext.hf.configure import config_of, differences, run_config
from megatron_ext.hf.source import Source
from tests.hf.families import VARIANTS


def config_json(variant: str) -> dict:
    """config.json of a variant as transformers 5 writes it."""
    import transformers

    class_name, values = VARIANTS[variant]
    return getattr(transformers, class_name)(**values).to_dict()


def flags_of(values: dict) -> dict:
    """The flags that a config.json means."""
    source = Source(values, Path("config.json"))
    return by_model_type()[values["model_type"]].flags(source)


def old_spelling(values: dict) -> dict:
    """The same as transformers 4 wrote it."""
    old = dict(values)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = old.pop("dtype", None)
    return old


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_spellings_mean_the_same_flags(variant):
    values = config_json(variant)
    assert flags_of(old_spelling(values)) == flags_of(values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flags_find_their_family_and_say_the_same_again(variant):
    values = config_json(variant)
    cfg = run_config(flags_of(values))
    one, made = config_of(cfg)
    assert one.model_type == values["model_type"]
    assert not differences(cfg, run_config(flags_of(made)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_key_of_transformers_goes_unread(variant):
    values = {k: v for k, v in config_json(variant).items() if v not in (None, False, 0, "", {})}
    source = Source(values, Path("config.json"))
    by_model_type()[values["model_type"]].flags(source)
    harmless = {"chunk_size_feed_forward", "id2label", "label2id", "return_dict", "problem_type"}
    assert not set(source.unread()) - harmless


REFUSED = {
    "mixtral": [{"hidden_act": "gelu"}, {"router_jitter_noise": 0.1}, {"num_local_experts": None}],
    "qwen3_moe": [{"attention_bias": True}],
    "olmoe": [{"clip_qkv": 8.0}],
    "deepseek_v2-lite": [{"topk_method": "noaux_tc"}, {"norm_topk_prob": True}, {"mlp_bias": True}],
    "deepseek_v3": [
        {"norm_topk_prob": False},
        {"rms_norm_eps": 1e-5},
        {"quantization_config": {"quant_method": "fp8"}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ],
    "gpt_oss": [{"swiglu_alpha": 1.0}, {"quantization_config": {"quant_method": "mxfp4"}}],
}


@pytest.mark.parametrize(
    ("variant", "change"), [(v, change) for v, changes in REFUSED.items() for change in changes]
)
def test_what_the_model_cannot_express_is_refused_by_its_key(variant, change):
    with pytest.raises(DataError) as error:
        flags_of({**config_json(variant), **change})
    (key, value) = next(iter(change.items()))
    named = {"quantization_config": "quantised", "rope_parameters": "dynamic"}.get(key, key)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"mtp_num_layers": 1}, "mtp_num_layers"),
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"rotary_percent": 0.5, "moe_router_score_function": "sigmoid"}, "score_function"),
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
    ],
)
def test_a_run_that_no_family_expresses_is_refused(flags, named):
    base = flags_of(config_json("mixtral"))
    with pytest.raises(DataError) as error:
        config_of(run_config({**base, **flags}), "mixtral")
    assert named in str(error.value)
