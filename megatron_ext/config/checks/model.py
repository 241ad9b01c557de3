"""Sizes, positions, activation, recomputation and precision of the network."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.checks.numbers import divisors, multiples_near, one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation

PAIR = 2


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """All rules of the network's shape."""
    yield from _shape(cfg)
    yield from _norm_over_heads(cfg)
    yield from _positions(cfg)
    yield from _latent(cfg)
    yield from _recompute(cfg)
    yield from _precision(cfg)
    yield from _vocabulary(cfg)


def _shape(cfg: RunConfig) -> Iterator[Violation]:
    t, m = cfg.transformer, cfg.model
    heads, groups, hidden = t.num_attention_heads, t.num_query_groups, t.hidden_size
    if heads and hidden and cfg.origins["kv_channels"] == "derived" and hidden % heads:
        yield Violation(
            "--hidden-size",
            hidden,
            f"must be a multiple of --num-attention-heads = {heads}",
            f"use {one_of(multiples_near(hidden, heads))}, or give --kv-channels",
        )
    if heads and groups and heads % groups:
        yield Violation(
            "--num-query-groups",
            groups,
            f"must divide --num-attention-heads = {heads}",
            f"use {one_of([d for d in range(1, heads + 1) if heads % d == 0], groups)}",
        )
    units = {"--swiglu": m.swiglu, "--squared-relu": m.squared_relu, "--quick-geglu": m.quick_geglu}
    given = [name for name, on in units.items() if on]
    if len(given) > 1:
        yield Violation(given[1], None, f"excludes {given[0]}", f"use only {given[0]}")


def _norm_over_heads(cfg: RunConfig) -> Iterator[Violation]:
    t, flag = cfg.transformer, "--qk-layernorm-over-heads"
    if not cfg.model.qk_layernorm_over_heads:
        return
    if not t.qk_layernorm:
        yield Violation(flag, None, "needs --qk-layernorm", "add it")
    if t.normalization != "RMSNorm":
        yield Violation(flag, None, "is an RMSNorm", "add --normalization RMSNorm")
    if t.multi_latent_attention or t.qk_l2_norm:
        yield Violation(
            flag, None, "excludes --multi-latent-attention and --qk-l2-norm", "remove it"
        )
    if cfg.model.transformer_impl != "local":
        yield Violation(flag, None, "needs --transformer-impl local", "add it")
    tp, groups = cfg.parallel.tensor_model_parallel_size, t.num_query_groups
    if groups and groups % tp:
        yield Violation(
            flag,
            None,
            f"needs --num-query-groups = {groups} to be a multiple of"
            f" --tensor-model-parallel-size = {tp}",
            f"use --tensor-model-parallel-size {one_of(divisors(groups), tp)}",
        )


def _positions(cfg: RunConfig) -> Iterator[Violation]:
    m = cfg.model
    kind, longest = m.position_embedding_type, m.max_position_embeddings
    if m.seq_length and longest and longest < m.seq_length:
        yield Violation(
            "--max-position-embeddings",
            longest,
            f"must be at least --seq-length = {m.seq_length}",
            f"use {m.seq_length}",
        )
    if kind in ("mrope", "relative"):
        yield Violation(
            "--position-embedding-type",
            kind,
            "is not built for this model",
            "use rope, yarn, learned_absolute or none",
        )
    if not m.add_position_embedding and kind == "learned_absolute":
        yield Violation(
            "--no-position-embedding",
            None,
            "is only legal with rotary positions",
            "add --position-embedding-type rope",
        )
    yield from _rotated(cfg)
    if cfg.transformer.mtp_num_layers and kind not in ("rope", "none", "yarn"):
        yield Violation(
            "--mtp-num-layers",
            cfg.transformer.mtp_num_layers,
            f"does not work with --position-embedding-type {kind}",
            "use --position-embedding-type rope",
        )


def _rotated(cfg: RunConfig) -> Iterator[Violation]:
    """Rotary positions turn pairs of a head's channels."""
    t, m = cfg.transformer, cfg.model
    if m.position_embedding_type not in ("rope", "yarn") or not t.kv_channels:
        return
    flag, width = "--kv-channels", t.kv_channels
    if t.multi_latent_attention:
        flag, width = "--qk-pos-emb-head-dim", t.qk_pos_emb_head_dim
    turned = width if m.rotary_percent == 1 else int(width * m.rotary_percent)
    if turned < PAIR or turned % PAIR:
        share = "" if turned == width else f" times --rotary-percent = {m.rotary_percent}"
        rule = f"{share} must be even and not 0: rotary positions turn pairs, not {turned} channels"
        near = one_of(multiples_near(width, PAIR))
        yield Violation(flag, width, rule.strip(), f"use {near}, or --rotary-percent 1")


def _latent(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    if not t.multi_latent_attention:
        return
    if cfg.model.group_query_attention:
        yield Violation(
            "--group-query-attention",
            None,
            "excludes --multi-latent-attention",
            "remove one of them",
        )
    if t.rotary_interleaved:
        yield Violation(
            "--rotary-interleaved", None, "excludes --multi-latent-attention", "remove it"
        )
    if t.attention_output_gate:
        yield Violation(
            "--attention-output-gate", None, "excludes --multi-latent-attention", "remove it"
        )


def _recompute(cfg: RunConfig) -> Iterator[Violation]:
    t = cfg.transformer
    kind, modules = t.recompute_granularity, set(t.recompute_modules or ())
    if kind == "full" and t.recompute_method is None:
        yield Violation(
            "--recompute-granularity",
            "full",
            "needs --recompute-method",
            "add --recompute-method uniform --recompute-num-layers 1",
        )
    elif kind == "full" and not t.recompute_num_layers:
        yield Violation(
            "--recompute-granularity",
            "full",
            "needs --recompute-num-layers",
            "add --recompute-num-layers 1",
        )
    if kind == "selective" and t.recompute_num_layers is not None:
        yield Violation(
            "--recompute-num-layers",
            t.recompute_num_layers,
            "is for --recompute-granularity full",
            "remove it",
        )
    if t.moe_layer_recompute:
        yield Violation(
            "--moe-layer-recompute",
            None,
            "excludes --recompute-granularity full",
            "remove one of them",
        )
    if t.distribute_saved_activations and cfg.parallel.sequence_parallel:
        yield Violation(
            "--distribute-saved-activations", None, "excludes --sequence-parallel", "remove it"
        )
    if kind == "selective" and "moe_act" in modules and not t.moe_grouped_gemm:
        yield Violation("--recompute-modules", "moe_act", "needs --moe-grouped-gemm", "add it")
    if kind == "selective" and "mla_up_proj" in modules and not t.multi_latent_attention:
        yield Violation(
            "--recompute-modules",
            "mla_up_proj",
            "needs --multi-latent-attention",
            "remove mla_up_proj",
        )
    if "shared_experts" in modules and t.moe_shared_expert_overlap:
        yield Violation(
            "--recompute-modules",
            "shared_experts",
            "excludes --moe-shared-expert-overlap",
            "remove one of them",
        )


def _precision(cfg: RunConfig) -> Iterator[Violation]:
    if cfg.train.bf16 and cfg.train.fp16:
        yield Violation("--fp16", None, "excludes --bf16", "use one of them")
    if cfg.model.fp16_lm_cross_entropy and not cfg.train.fp16:
        yield Violation("--fp16-lm-cross-entropy", None, "needs --fp16", "remove it")
    if cfg.transformer.apply_query_key_layer_scaling and not cfg.train.fp16:
        yield Violation("--apply-query-key-layer-scaling", None, "is only for --fp16", "remove it")


def _vocabulary(cfg: RunConfig) -> Iterator[Violation]:
    m, tp = cfg.model, cfg.parallel.tensor_model_parallel_size
    rows = m.padded_vocab_size
    if rows is None:
        return
    if rows % tp:
        yield Violation(
            "--padded-vocab-size",
            rows,
            f"must be a multiple of --tensor-model-parallel-size = {tp}",
            f"use {one_of(multiples_near(rows, tp)[-1:])}",
        )
    if m.vocab_size and rows < m.vocab_size:
        yield Violation(
            "--padded-vocab-size",
            rows,
            f"must be at least --vocab-size = {m.vocab_size}",
            f"use {multiples_near(m.vocab_size, tp)[-1]}",
        )
