"""Old and other names are read as meant; what would change the training is refused."""

from __future__ import annotations

import pytest

from megatron_ext.config import parse
from megatron_ext.config.refused import FIELDS, UNKNOWN
from megatron_ext.errors import ConfigError

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64"
    " --max-position-embeddings 64 --train-iters 5 --lr 1e-3 --mock-data --vocab-size 100"
)
MICRO = "--micro-batch-size 2"


def read(extra: str):
    return parse(f"{BASE} {extra}".split(), {})


def refusal(extra: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(extra)
    assert caught.value.code == 64
    return "\n".join(caught.value.lines())


def test_old_names_set_the_modern_value_with_one_warning():
    cfg = read(
        "--batch-size 4 --warmup 0.1 --checkpoint-activations --exit-signal-handler-for-training"
    )
    assert cfg.train.micro_batch_size == cfg.train.global_batch_size == 4
    assert cfg.schedule.lr_warmup_fraction == 0.1
    assert cfg.transformer.recompute_granularity == "selective"
    assert cfg.train.exit_signal_handler
    (warning,) = cfg.warnings
    for old in ("--batch-size (use --micro-batch-size)", "--warmup", "--checkpoint-activations"):
        assert old in warning


def test_an_old_name_that_contradicts_the_modern_one_is_refused():
    assert read(f"{MICRO} --batch-size 2").train.micro_batch_size == 2
    said = refusal(f"{MICRO} --batch-size 4")
    assert "--batch-size 4 contradicts --micro-batch-size 2 do=keep only" in said


def test_checkpoint_flags_become_tiers_and_retention():
    cfg = read(
        f"{MICRO} --save-retain-interval 100 --non-persistent-ckpt-type local"
        " --non-persistent-local-ckpt-dir /nvme --non-persistent-save-interval 5"
    ).checkpoint
    assert (cfg.keep_last, cfg.keep_every) == (1, 100)
    assert (cfg.ckpt_tiers, cfg.ckpt_local_dir, cfg.ckpt_local_interval) == (
        "local,store",
        "/nvme",
        5,
    )
    memory = read(f"{MICRO} --non-persistent-ckpt-type in_memory --non-persistent-save-interval 3")
    assert memory.checkpoint.ckpt_tiers == "memory,store"
    assert memory.checkpoint.ckpt_memory_interval == 3
    shared = read(f"{MICRO} --non-persistent-ckpt-type global --save /shared").checkpoint
    assert shared.ckpt_local_dir == "/shared/non_persistent"


def test_gradients_and_weight_decay():
    assert read(f"{MICRO} --bf16").ddp.grad_reduce_in_fp32
    cfg = read(
        f"{MICRO} --bf16 --grad-reduce-in-bf16 --no-weight-decay-cond-type apply_wd_to_qk_layernorm"
    )
    assert not cfg.ddp.grad_reduce_in_fp32
    assert cfg.optimizer.apply_wd_to_qk_layernorm
    said = refusal(f"{MICRO} --bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32")
    assert "--grad-reduce-in-bf16" in said


def test_a_file_of_data_arguments_and_a_pretrained_checkpoint(tmp_path):
    path = tmp_path / "blend.txt"
    path.write_text("0.7 code\n0.3 text\n")
    extra = f"{MICRO} --data-args-path {path} --no-mock-data --pretrained-checkpoint /old"
    cfg = read(extra)
    assert cfg.data.data_path == ["0.7", "code", "0.3", "text"]
    assert (cfg.checkpoint.load, cfg.checkpoint.finetune) == ("/old", True)
    assert "contradicts --load /new" in refusal(f"{extra} --load /new")
    assert "No such file" in refusal(f"{MICRO} --data-args-path {tmp_path / 'absent'}")


CHANGES = [(inert.dest, inert.annotation) for inert, _ in UNKNOWN] + [(d, "bool") for d in FIELDS]
VALUES = {"output_logit_dtype": "fp32", "muon_scalar_optimizer": "lion"}


@pytest.mark.parametrize(("dest", "kind"), CHANGES, ids=[d for d, _ in CHANGES])
def test_a_flag_that_would_change_the_training_is_refused_with_a_way_out(dest, kind):
    flag = "--" + dest.replace("_", "-")
    value = "" if kind == "bool" else VALUES.get(dest, "7")
    said = refusal(f"{MICRO} {flag} {value}")
    assert f"what={flag}" in said and " do=" in said


def test_their_defaults_ask_for_nothing():
    words = "--muon-coefficient-type quintic --muon-scalar-optimizer adam --no-qk-clip"
    assert read(f"{MICRO} {words}").warnings == ()


def test_a_switch_whose_off_side_has_no_effect_is_named():
    cfg = read(f"{MICRO} --no-pin-cpu-grads --no-save-tokenizer-assets --no-initialization")
    (warning,) = cfg.warnings
    for flag in ("--no-pin-cpu-grads", "--no-save-tokenizer-assets", "--no-initialization"):
        assert flag in warning
    quiet = "--pin-cpu-grads --save-tokenizer-assets --verify-integrity --async-strategy nvrx"
    assert read(f"{MICRO} {quiet}").warnings == ()


def test_old_names_are_scaled_down_like_the_modern_ones():
    old = "--batch-size 8 --pretrained-checkpoint /old --data-args-path /absent --scale-down"
    cfg = read(f"{old} --world-size 1")
    assert (cfg.train.micro_batch_size, cfg.checkpoint.load) == (1, None)
    assert not cfg.checkpoint.finetune and cfg.data.mock_data
    assert any("--batch-size (use --micro-batch-size)" in w for w in cfg.warnings)
