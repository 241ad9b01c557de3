"""Key of a record -> TensorBoard tag: Megatron-LM's where Megatron-LM logs it. Pure functions.

Layers in tags count from 1, as everywhere here (Megatron-LM's `moe/z_loss_layer_0` is layer 1).
However large the model, there are at most `MOST_TAGS` scalar tags: with more layers or domains than
fit, evenly spread ones have curves; pictures and metrics.jsonl have all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_TAGS = 400
MOST_LAYERS, MOST_DOMAINS = 50, 12

STEP_TAGS = {
    "lm_loss": "lm loss",
    "load_balancing_loss": "load_balancing_loss",
    "seq_load_balancing_loss": "seq_load_balancing_loss",
    "global_load_balancing_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
    "mtp_loss": "mtp loss",
    "learning_rate": "learning-rate",
    "global_batch_size": "batch-size",
    "grad_norm": "grad-norm",
    "num_zeros": "num-zeros",
    "params_norm": "params-norm",
    "loss_scale": "loss-scale",
    "step_time_s": "iteration-time",
    "model_tflop_per_s_per_rank": "throughput",
    "mfu_share": "mfu",
    "tokens_per_s": "tokens-per-second",
    "max_violation": "moe/max violation",
    "num_dead_experts": "moe/dead experts",
    "num_dropped": "moe/dropped assignments",
    "dead_expert_share": "moe/dead expert share",
    "load_entropy_share": "moe/load entropy share",
    "router_entropy_share": "moe/router entropy share",
    "router_logit_norm": "moe/router logit norm",
    "router_logit_peak": "moe/router logit peak",
    "router_logit_max": "moe/router logit max",
    "domain_nmi": "moe/domain nmi",
    "busiest_ep_rank_tokens": "worst rank/tokens",
    "memory_peak_max_bytes": "worst rank/memory bytes",
    "time_data_s": "time/data",
    "time_forward_s": "time/forward",
    "time_backward_s": "time/backward",
    "time_all_to_all_s": "time/all-to-all",
    "time_pipeline_wait_s": "time/pipeline wait",
    "time_collectives_s": "time/other collectives",
    "time_optimizer_s": "time/optimizer",
    "time_save_s": "time/save",
}
ALSO_BY_SAMPLES = ("lm_loss", "learning_rate", "global_batch_size", "grad_norm", "num_zeros")
TIMER_TAGS = {
    "time_data_max_s": "batch-generator-time",
    "time_forward_max_s": "forward-compute-time",
    "time_backward_max_s": "backward-compute-time",
    "time_optimizer_max_s": "optimizer-time",
}
"""With --log-timers-to-tensorboard, Megatron-LM's names: seconds of the slowest rank."""
MEMORY_TAGS = {
    "reserved_bytes.all.current": "mem-reserved-bytes",
    "allocated_bytes.all.current": "mem-allocated-bytes",
    "allocated_bytes.all.peak": "mem-max-allocated-bytes",
    "allocation.all.current": "mem-allocated-count",
}
"""With --log-memory-to-tensorboard: torch.cuda.memory_stats() of rank 0."""
PER_LAYER = (
    "max_violation",
    "dead_expert_share",
    "router_entropy_share",
    "load_balancing_loss",
    "z_loss",
    "domain_nmi",
)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})


def step_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Tag -> value of a training step, by step."""
    found = {
        tag: float(record[key]) for key, tag in STEP_TAGS.items() if record.get(key) is not None
    }
    for name in PER_LAYER:
        found |= _layer_scalars(name, record)
    seen: Mapping[str, int] = record.get("tokens_seen_per_domain") or {}
    names = list(seen)
    for place in spread(len(names), MOST_DOMAINS):
        found[f"tokens seen/{names[place]}"] = float(seen[names[place]])
    return found


def _layer_scalars(name: str, record: Mapping[str, Any]) -> dict[str, float]:
    values: Sequence[float] = record.get(f"{name}_per_layer") or ()
    entropies = record.get("router_entropy_share_per_layer") or ()
    moe = [layer for layer, value in enumerate(entropies) if value]  # 0 in dense layers
    if not values:
        return {}
    return {
        f"moe/{name}_layer_{moe[place] + 1}": float(values[moe[place]])
        for place in spread(len(moe), MOST_LAYERS)
    }


def sample_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Tag -> value, by consumed samples."""
    return {
        f"{STEP_TAGS[key]} vs samples": float(record[key])
        for key in ALSO_BY_SAMPLES
        if record.get(key) is not None
    }


def layout(num_layers: int) -> dict[str, dict[str, list]]:
    """The Custom Scalars page: what to look at first, several curves in one picture."""
    shown = [f"_layer_{layer + 1}" for layer in spread(num_layers, 8)]
    lines: dict[str, dict[str, list[str]]] = {
        "training": {
            "loss": ["^lm loss$", "^lm loss validation$"],
            "gradient norm": ["^grad-norm$"],
            "learning rate": ["^learning-rate$"],
            "validation loss by domain": ["^lm loss validation/"],
        },
        "experts": {
            "MaxVio by layer": [f"^moe/max_violation{end}$" for end in shown],
            "share of dead experts by layer": [f"^moe/dead_expert_share{end}$" for end in shown],
            "router entropy by layer": [f"^moe/router_entropy_share{end}$" for end in shown],
            "balance loss by layer": [f"^moe/load_balancing_loss{end}$" for end in shown],
        },
        "speed": {
            "seconds a step": ["^iteration-time$", "^time/"],
            "TFLOP/s a rank": ["^throughput$"],
            "worst rank: tokens": ["^worst rank/tokens$"],
            "worst rank: memory": ["^worst rank/memory bytes$"],
        },
    }
    return {
        group: {title: ["Multiline", tags] for title, tags in charts.items()}
        for group, charts in lines.items()
    }
