"""--scale-down: the same kind of model, layout and schedule, small enough for a few CPU ranks.

A pure function over the given values, before they are resolved: flags after --scale-down win.

    layout    4 ranks, or fewer where fewer are there. In the order pp, tp, cp every size above 1
              becomes 2 while 4 ranks allow it; dp takes what is left; then ep and etp become 2
              where the ranks of a stage allow it. Two model chunks a stage where there were more.
    model     the same kinds of layers: one dense first layer where there were some, latent
              attention, the ratio of query to key heads, shared and grouped experts, windows, MTP,
              biases, tied or own tables; but width 64, 4 to 6 layers, 8 experts, 250 tokens.
    training  3 steps of a few sequences of 64 mock tokens, no evaluation, save at the end.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_ext.config.flags import all_flags
from megatron_ext.config.resolve import Values
from megatron_ext.config.stages import parse_layout

ORIGIN = "scale-down"
RANKS = 4
HALVED = 2
"""What every size above 1 becomes."""
LAYERS, WIDTH, FEED_FORWARD, EXPERT_WIDTH = 4, 64, 128, 64
EXPERTS, HEADS, HEAD_WIDTH, WIDEST = 8, 4, 8, 8
LOW_RANK, NOPE, ROPE = 32, 16, 8
TOKENS, SEQUENCE, WINDOW, STEPS = 250, 64, 15, 3

Change = Callable[[str, object], None]


def scale_down(values: Values, world_size: int | None = None) -> tuple[str, ...]:
    """Shrinks the values in place.

    Args:
        world_size: ranks of this launch where it has begun; None: as many as the rule says.

    Returns:
        One line for each changed value.
    """
    lines: list[str] = []

    def change(dest: str, value: object) -> None:
        old = values[dest]
        if old == value:
            return
        values.value[dest], values.origin[dest] = value, ORIGIN
        lines.append(f"scale-down: {all_flags()[dest].names[0]} {old} -> {value}")

    _parallel(values, change, world_size)
    for rule in (_pipeline, _layers, _attention, _experts, _sizes, _training, _data):
        rule(values, change)
    return tuple(lines)


def _parallel(v: Values, change: Change, world_size: int | None) -> None:
    asked = world_size or min(RANKS, v["world_size"] or RANKS)
    world = world_size or 2 ** (asked.bit_length() - 1)
    etp = v["expert_tensor_parallel_size"] or v["tensor_model_parallel_size"]
    used = 1
    for name in ("pipeline_model", "tensor_model", "context"):
        dest = f"{name}_parallel_size"
        size = HALVED if v[dest] > 1 and world % (used * HALVED) == 0 and used < RANKS else 1
        used *= size
        change(dest, size)
    fold = world // v["pipeline_model_parallel_size"]
    ep = HALVED if v["expert_model_parallel_size"] > 1 and fold % HALVED == 0 else 1
    change("expert_model_parallel_size", ep)
    change("expert_tensor_parallel_size", HALVED if etp > 1 and fold % (ep * HALVED) == 0 else 1)
    change("world_size", world)
    change("num_distributed_optimizer_instances", 1)
    if v["cp_comm_type"] is not None and v["hierarchical_context_parallel_sizes"]:
        change("hierarchical_context_parallel_sizes", None)
        change("cp_comm_type", "p2p")
    change("device", "cpu")
    change("transformer_impl", "local")
    change("distributed_backend", None)


def _pipeline(v: Values, change: Change) -> None:
    """Two chunks a stage where there were more than one; a layout keeps its ends."""
    pp, layout = v["pipeline_model_parallel_size"], v["pipeline_model_parallel_layout"]
    chunks = v["num_virtual_stages_per_pipeline_rank"] or v["virtual_pipeline_model_parallel_size"]
    several = bool(v["num_layers_per_virtual_pipeline_stage"]) or (chunks or 1) > 1
    change("num_layers_per_virtual_pipeline_stage", None)
    change("virtual_pipeline_model_parallel_size", None)
    change("microbatch_group_size_per_vp_stage", None)
    if pp == 1:
        for dest in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            change(dest, None)
        change("account_for_embedding_in_pipeline_split", False)
        change("account_for_loss_in_pipeline_split", False)
        change("pipeline_model_parallel_layout", None)
        change("num_virtual_stages_per_pipeline_rank", None)
        return
    change("num_virtual_stages_per_pipeline_rank", HALVED if several else None)
    if layout is not None:
        text, layers = _layout(layout, pp * (HALVED if several else 1), v["mtp_num_layers"])
        change("pipeline_model_parallel_layout", text)
        change("num_layers", layers)


def _layout(layout: str, stages: int, mtp: int | None) -> tuple[str, int]:
    """(layout of `stages` words that begins and ends as the given one, its layers)."""
    last = parse_layout(layout)[-1]
    end = ("t" if "t" in last else "") + "m" * min(1, mtp or 0) + "L"
    words = ["E" + "t", *["t"] * (stages - 2), end]
    missing = LAYERS - sum(word.count("t") for word in words)
    words[0] += "t" * max(0, missing)
    return "|".join(words), sum(word.count("t") for word in words)


def _layers(v: Values, change: Change) -> None:
    """As many layers as the stages need; patterns are cut, with one dense layer in front."""
    stages = v["pipeline_model_parallel_size"] * (v["num_virtual_stages_per_pipeline_rank"] or 1)
    extra = v["account_for_embedding_in_pipeline_split"] + v["account_for_loss_in_pipeline_split"]
    first, last = v["num_layers_in_first_pipeline_stage"], v["num_layers_in_last_pipeline_stage"]
    chunks = v["num_virtual_stages_per_pipeline_rank"] or 1
    if v["pipeline_model_parallel_layout"] is None:
        layers = next(n for n in range(LAYERS, 8 * LAYERS) if (n + extra) % stages == 0)
        if first is not None:
            change("num_layers_in_first_pipeline_stage", chunks)
        if last is not None:
            change(
                "num_layers_in_last_pipeline_stage", chunks if first is None else layers - chunks
            )
        change("num_layers", layers)
    layers, experts = v["num_layers"], v["moe_layer_freq"]
    if isinstance(experts, list):
        front = experts[: experts.index(1)] if 1 in experts else []
        rest = experts[len(front) :] + experts[-1:] * layers
        change("moe_layer_freq", (front[:1] + rest)[:layers])
    elif experts > HALVED:
        change("moe_layer_freq", HALVED)
    for dest in ("window_attn_skip_freq", "no_rope_freq"):
        if isinstance(v[dest], list):
            change(dest, v[dest][:layers])
    if v["mtp_num_layers"]:
        change("mtp_num_layers", 1)
    if v["recompute_num_layers"]:
        change("recompute_num_layers", 1)


def _attention(v: Values, change: Change) -> None:
    """The ratio of query to key heads stays; latent attention keeps its two paths."""
    heads, groups = v["num_attention_heads"] or HEADS, v["num_query_groups"]
    kept = HEADS
    if v["group_query_attention"] and groups:
        ratio = max(1, heads // groups)
        change("num_query_groups", min(groups, HALVED))
        kept = ratio * v["num_query_groups"]
    change("num_attention_heads", kept)
    if v["multi_latent_attention"]:
        if v["q_lora_rank"]:
            change("q_lora_rank", LOW_RANK)
        change("kv_lora_rank", LOW_RANK)
        change("qk_head_dim", NOPE)
        change("qk_pos_emb_head_dim", ROPE)
        change("v_head_dim", NOPE)
        if v["kv_channels"]:
            change("kv_channels", NOPE + ROPE)
    elif v["kv_channels"] or kept > WIDEST:
        change("kv_channels", HEAD_WIDTH)
    if v["window_size"]:
        change("window_size", [WINDOW, *v["window_size"][1:]])


def _experts(v: Values, change: Change) -> None:
    """Eight experts, at most two for a token; four groups where groups are chosen."""
    if v["num_moe_experts"] is None:
        return
    shared, width = v["moe_shared_expert_intermediate_size"], v["moe_ffn_hidden_size"]
    change("num_moe_experts", min(EXPERTS, v["num_moe_experts"]))
    change("moe_router_topk", min(HALVED, v["moe_router_topk"]))
    if shared:
        change(
            "moe_shared_expert_intermediate_size",
            EXPERT_WIDTH * max(1, shared // (width or shared)),
        )
    if width:
        change("moe_ffn_hidden_size", EXPERT_WIDTH)
    if v["moe_latent_size"]:
        change("moe_latent_size", EXPERT_WIDTH // HALVED)
    if v["moe_router_group_topk"]:
        change("moe_router_num_groups", min(HALVED * HALVED, v["moe_router_num_groups"] or HALVED))
        change("moe_router_group_topk", min(HALVED, v["moe_router_group_topk"]))
        best = v["moe_router_group_score_experts"]
        change("moe_router_group_score_experts", best and min(HALVED, best))
    if v["moe_token_dispatcher_type"] == "flex":
        change("moe_token_dispatcher_type", "alltoall")
    change("moe_enable_deepep", False)


def _sizes(v: Values, change: Change) -> None:
    change("hidden_size", WIDTH)
    if v["ffn_hidden_size"]:
        change("ffn_hidden_size", FEED_FORWARD)
    change("seq_length", SEQUENCE)
    change("max_position_embeddings", SEQUENCE)
    change("vocab_size", TOKENS)
    change("padded_vocab_size", None)


def _training(v: Values, change: Change) -> None:
    """Three steps, of two micro-batches where there were more."""
    ranks = v["pipeline_model_parallel_size"] * v["tensor_model_parallel_size"]
    dp = v["world_size"] // (ranks * v["context_parallel_size"])
    change("micro_batch_size", 1)
    change("global_batch_size", HALVED * dp)
    change("rampup_batch_size", None)
    change("train_samples", None)
    change("train_iters", STEPS)
    for dest in ("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_samples"):
        change(dest, None)
    warm = v["lr_warmup_iters"] or v["lr_warmup_samples"]
    change("lr_warmup_samples", 0)
    change("lr_warmup_iters", 1 if warm else 0)
    if v["lr_decay_style"] == "WSD":
        change("lr_wsd_decay_iters", 1)
    for dest in ("eval_interval", "save_interval", "exit_interval", "exit_duration_in_mins"):
        change(dest, None)
    change("eval_iters", 0)
    change("log_interval", 1)
    change("use_precision_aware_optimizer", False)


def _data(v: Values, change: Change) -> None:
    """Mock tokens, and nothing of the real run is read or written."""
    change("mock_data", True)
    paths = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    for dest in (*paths, "per_split_data_args_path", "data_cache_path", "tokenizer_model"):
        change(dest, None)
    change("tokenizer_type", "NullTokenizer")
    for dest in ("load", "save", "tensorboard_dir"):
        change(dest, None)
    change("moe_use_upcycling", False)
    change("finetune", False)
