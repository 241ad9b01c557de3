"""Where a faster road of ours takes the place of megatron-core's: asked by the model when it is
built and by the plan of its memory before.

`config` is megatron-core's TransformerConfig or the run's `transformer` section, which has the same
names.
"""

from __future__ import annotations

from typing import Any


def can_fuse(config: Any) -> bool:
    """Whether the loss may be computed from hidden states (model/output_layer.py). fp16 has no
    exponent for the gradient of unscaled losses; Transformer Engine's loss and deferred weight
    gradients want logits.
    """
    wants_te = config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "te"
    return not (config.fp16 or wants_te or config.defer_embedding_wgrad_compute)


def can_sort(config: Any) -> bool:
    """Whether the dispatcher of moe/dispatch.py does what megatron-core's all-to-all one would. It
    keeps the experts' results, from which the gradient of the routing weights comes.
    """
    return (
        config.moe_token_dispatcher_type == "alltoall"
        and not config.moe_pad_expert_input_to_capacity
        and not config.moe_router_padding_for_quantization
        and not config.moe_permute_fusion
        and not config.moe_apply_probs_on_input
        and not config.moe_shared_expert_overlap  # interleaved with the stages of the stock one
        and not config.overlap_moe_expert_parallel_comm
        and config.cuda_graph_impl == "none"
    )
