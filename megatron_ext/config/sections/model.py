"""What GPTModel takes besides megatron-core's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.ranges import Parts, Portion, Positive, Size


@dataclass(frozen=True)
class ModelSection:
    """Vocabulary, positions, activation and the layer implementation."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layer implementation. local: ours on plain PyTorch (the default here; Megatron-LM's default
    is transformer_engine); transformer_engine needs its package and CUDA."""

    spec: list[str] | None = None
    """Python path of a layer spec: module and function, or 'local' / 'default'."""

    seq_length: Size | None = None
    """Tokens of one training sequence."""

    max_position_embeddings: Size | None = None
    """Longest sequence that positions exist for, in tokens."""

    position_embedding_type: Literal[
        "learned_absolute", "rope", "yarn", "mrope", "relative", "none"
    ] = "learned_absolute"
    """How positions enter."""

    use_rotary_position_embeddings: bool = False
    """Old spelling of --position-embedding-type rope."""

    add_position_embedding: bool = field(
        default=True, metadata={"argparse_meta": {"arg_names": ["--no-position-embedding"]}}
    )
    """--no-position-embedding is kept for old scripts; only legal with rope."""

    rotary_base: Size = 10000
    """Base of the rotary frequencies."""

    rotary_percent: Portion = 1.0
    """Share of each head that is rotated, 0 to 1."""

    rotary_seq_len_interpolation_factor: Size | None = None
    """Divide positions by this factor (linear interpolation)."""

    use_rope_scaling: bool = False
    """Llama-3.1 scaling of the rotary frequencies."""

    rope_scaling_factor: Positive = 8.0
    """Factor of --use-rope-scaling."""

    yarn_original_max_position_embeddings: Size | None = None
    """Tokens of the context that YaRN stretches (without multi-latent attention)."""

    yarn_beta_fast: Positive | None = None
    """YaRN: rotations above which a frequency is kept."""

    yarn_beta_slow: Positive | None = None
    """YaRN: rotations below which a frequency is interpolated."""

    yarn_correction_range_round_to_int: bool | None = None
    """YaRN: round the range of corrected frequencies to whole dimensions."""

    vocab_size: Size | None = None
    """Tokens of the vocabulary before padding. Default: the tokenizer's."""

    padded_vocab_size: Size | None = None
    """Rows of the embedding table, exactly; overrides the padding rule."""

    make_vocab_size_divisible_by: Parts = 128
    """The table's rows are padded to a multiple of this times the tensor-model-parallel size."""

    untie_embeddings_and_output_weights: bool = False
    """Own weights for the output layer instead of the embedding's."""

    swiglu: bool = False
    """Gated SiLU units in the feed-forward layers."""

    squared_relu: bool = False
    """Squared ReLU in the feed-forward layers."""

    quick_geglu: bool = False
    """Gated quick GELU units (x * sigmoid(1.702 x)) in the feed-forward layers."""

    openai_gelu: bool = False
    """GELU by its tanh formula."""

    group_query_attention: bool = False
    """Share key and value heads in --num-query-groups groups; without it the number is unused."""

    bias_gelu_fusion: bool = True
    """Fuse bias and GELU."""

    bias_swiglu_fusion: bool = True
    """Fuse bias and SwiGLU."""

    qk_layernorm_over_heads: bool = False
    """With --qk-layernorm: one norm over all query heads of a token, one over all its key heads
    (OLMoE), instead of one for each head."""

    init_method_xavier_uniform: bool = False
    """Xavier-uniform weights instead of normal ones."""

    fp16_lm_cross_entropy: bool = False
    """Compute the loss in fp16 (with --fp16)."""

    recompute_activations: bool = False
    """Same as --recompute-granularity selective."""

    @property
    def activation(self) -> str:
        """gelu, silu, squared_relu or quick_gelu."""
        if self.swiglu:
            return "silu"
        if self.quick_geglu:
            return "quick_gelu"
        return "squared_relu" if self.squared_relu else "gelu"


@dataclass(frozen=True)
class MoeSection:
    """What our mixture-of-experts layers add to megatron-core's options."""

    moe_global_aux_scale: Literal["exact", "megatron"] = "exact"
    """Strength of the global-batch load-balancing gradient. exact: its coefficient at any number
    of ranks; megatron: coefficient / dp, as megatron-core 0.16.1 does, for recipes tuned there."""

    moe_global_aux_mode: Literal["running", "exact"] = "running"
    """Counts behind the global-batch loss. running: of the micro-batches so far (the paper's);
    exact: of the whole global batch, by one more forward pass without gradients where a step has
    several micro-batches."""

    moe_capacity_scope: Literal["micro-batch", "shard"] = "micro-batch"
    """Tokens that an expert's capacity counts. micro-batch: all of it, the same tokens are dropped
    at any tp and cp; shard: each rank's own part, as in Megatron-LM (always so with
    --moe-pad-expert-input-to-capacity)."""

    moe_router_group_score_experts: Parts | None = None
    """Experts whose scores sum to the score of their group (with --moe-router-group-topk).
    DeepSeek-V2: 1, DeepSeek-V3: 2. Default: megatron-core's topk / kept groups."""

    moe_kernels: Literal["torch", "triton"] = "torch"
    """What computes the experts. torch: its grouped_mm, gathers and sums; triton: our kernels, on
    CUDA, for SwiGLU experts without biases. Which is faster is not measured."""
