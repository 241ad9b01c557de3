"""Derived values: Megatron-LM's rules."""

from __future__ import annotations

import pytest

from megatron_ext.config import parse


def read(words: str):
    return parse(f"{words} --print-config json".split(), {})


def test_feed_forward_width():
    assert read("--hidden-size 1024").transformer.ffn_hidden_size == 4096
    assert read("--hidden-size 1024 --swiglu").transformer.ffn_hidden_size == 2688
    cfg = read("--hidden-size 1024 --num-experts 4 --ffn-hidden-size 512")
    assert cfg.transformer.moe_ffn_hidden_size == 512
    assert read("--hidden-size 1024").transformer.moe_ffn_hidden_size is None


def test_query_groups_have_a_gate():
    heads = "--hidden-size 64 --num-attention-heads 4 --num-query-groups 2"
    gated = read(heads + " --group-query-attention")
    plain = read(heads)
    assert gated.transformer.num_query_groups == 2
    assert plain.transformer.num_query_groups == 4
    assert "--num-query-groups 2 has no effect" in plain.warnings[0]


@pytest.mark.parametrize(
    ("words", "chunks"),
    [
        ("--num-virtual-stages-per-pipeline-rank 4", 4),
        ("--num-layers-per-virtual-pipeline-stage 2", 4),
        ("--num-layers-per-virtual-pipeline-stage 3", None),
        ("--virtual-pipeline-model-parallel-size 2", 2),
        ("--num-virtual-stages-per-pipeline-rank 1", None),
        ("--pipeline-model-parallel-layout Et*4|t*4|t*4|t*4L", 2),
        ("--pipeline-model-parallel-layout Et*8|t*8L", None),
    ],
)
def test_model_chunks(words, chunks):
    cfg = read(f"--num-layers 16 --pipeline-model-parallel-size 2 {words}")
    assert cfg.parallel.virtual_pipeline_model_parallel_size == chunks
    assert cfg.transformer.overlap_p2p_comm is (chunks is not None)
    assert cfg.transformer.batch_p2p_comm is (chunks is None)


def test_chunks_without_a_pipeline_are_dropped_with_a_note():
    cfg = read("--num-layers 16 --num-virtual-stages-per-pipeline-rank 4")
    assert cfg.parallel.virtual_pipeline_model_parallel_size is None
    assert "have no effect" in cfg.warnings[0]


def test_fusions_are_on_with_transformer_engine_and_off_without():
    local, te = read(""), read("--transformer-impl transformer_engine")
    for name in ("apply_rope_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion"):
        assert getattr(local.transformer, name) is False
        assert getattr(te.transformer, name) is True
    assert local.warnings == te.warnings == ()
    assert te.mcore_values()["bias_activation_fusion"] is True


def test_precision_and_aliases():
    cfg = read("--bf16 --use-rotary-position-embeddings --recompute-activations --skip-train")
    assert cfg.train.params_dtype == "bf16" and cfg.ddp.grad_reduce_in_fp32
    assert cfg.model.position_embedding_type == "rope"
    assert cfg.transformer.recompute_granularity == "selective"
    assert cfg.train.eval_only
    assert read("").train.params_dtype == "fp32" and not read("").ddp.grad_reduce_in_fp32


def test_one_flag_reaches_every_class_that_has_it():
    cfg = read("--use-distributed-optimizer --overlap-param-gather --fp8-param-gather")
    assert cfg.optimizer.use_distributed_optimizer and cfg.ddp.use_distributed_optimizer
    assert cfg.optimizer.overlap_param_gather and cfg.ddp.overlap_param_gather
    assert cfg.transformer.fp8_param and cfg.ddp.fp8_param_gather
    assert "fp8_param" not in cfg.mcore_values()
    assert "fp8_param_gather" not in cfg.ddp_values()


def test_values_without_effect_never_reach_megatron_core():
    cfg = read("--fp8-format hybrid --cuda-graph-impl local --moe-permute-fusion --tp-comm-overlap")
    assert not {"fp8", "cuda_graph_impl", "moe_permute_fusion", "tp_comm_overlap"} & set(
        cfg.mcore_values()
    )
    assert set(cfg.ignored) == {
        "--fp8-format",
        "--cuda-graph-impl",
        "--moe-permute-fusion",
        "--tp-comm-overlap",
    }


def test_latent_attention_fields_only_with_latent_attention():
    assert "kv_lora_rank" not in read("").mcore_values()
    values = read("--multi-latent-attention --kv-lora-rank 16").mcore_values()
    assert values["kv_lora_rank"] == 16 and values["q_lora_rank"] is None
    assert values["rope_type"] == "yarn"


def test_old_scripts_say_removed_flags():
    cfg = read("--batch-size 4 --warmup 0.3 --local-rank 2")
    assert len(cfg.warnings) == 1
    assert "use --micro-batch-size" in cfg.warnings[0]
