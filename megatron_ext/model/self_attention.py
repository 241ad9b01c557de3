"""Self-attention whose rotary embedding and core attention are one step on the qkv projection.

megatron-core's SelfAttention splits the projection into q, k and v, rotates q and k in five passes
each and hands them to the core attention, which wants another layout. On a CPU, for causal
attention over one rank's whole sequence, `ProjectedAttention` reads the projection once and writes
its gradient once. Everything else (cached generation, packed documents, windows, dropout, context
parallelism, CUDA) takes megatron-core's road and `CoreAttention`.
"""

from __future__ import annotations

from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer import attention
from torch import Tensor

from megatron_ext.model.blockwise import (
    BlockwiseAttention,
    Form,
    ProjectedAttention,
    keeps_probabilities,
)
from megatron_ext.model.rotary import Rotation, rotation


class SelfAttention(attention.SelfAttention):
    """megatron-core's, with the short road of this module where it applies."""

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        whole_heads = config.num_query_groups >= self.world_size
        # over tp groups of fewer key heads than ranks the projection is gathered and cut first
        self.is_short = (
            self.core_attention.is_blockwise
            and whole_heads
            and not config.attention_output_gate
            and not config.fine_grained_activation_offloading
            and not config.flash_decode
            and not config.test_mode
            and config.mrope_section is None
        )
        self.has_rope = not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1])
        self.concentration = _yarn_get_concentration_factor_from_config(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context=None,
        rotary_pos_emb: Tensor | tuple | None = None,
        *args,
        packed_seq_params=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] -> output [S, B, H] and the bias of the last projection."""
        is_plain = (
            self.is_short
            and attention_mask is None
            and inference_context is None
            and kwargs.get("inference_params") is None
            and packed_seq_params is None
            and not (self.training and self.core_attention.dropout)
            and (rotary_pos_emb is None or _is_one_table(rotary_pos_emb))
        )
        if not is_plain:
            return super().forward(
                hidden_states,
                attention_mask,
                key_value_states,
                inference_context,
                rotary_pos_emb,
                *args,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        angles = rotary_pos_emb if self.has_rope else None
        if self.q_layernorm is None and self.k_layernorm is None:
            mixed, _ = self.linear_qkv(hidden_states)
            form = self._form(angles, mixed)
            width = self.hidden_size_per_attention_head
            return self.linear_proj(ProjectedAttention.apply(mixed, width, form))
        q, k, v = self.get_query_key_value_tensors(hidden_states)
        return self.linear_proj(BlockwiseAttention.apply(q, k, v, self._form(angles, q)))

    def _form(self, angles: Tensor | None, like: Tensor) -> Form:
        keep = keeps_probabilities(like.shape[0]) and not self.checkpoint_core_attention
        scale = self.core_attention.scale
        turns = None if angles is None else self._turns(angles, like, scale)
        return Form(self.num_query_groups_per_partition, scale, turns, keep)

    def _turns(self, angles: Tensor, like: Tensor, scale: float) -> tuple[Rotation, Rotation]:
        given = {
            "interleaved": self.config.rotary_interleaved,
            "concentration": self.concentration,
        }
        return (
            rotation(angles, like.dtype, scale=scale, **given),
            rotation(angles, like.dtype, **given),
        )


def _is_one_table(angles: Tensor | tuple) -> bool:
    """Angles [S, 1, 1, R]: the same for queries and keys and for every sample."""
    return isinstance(angles, Tensor) and angles.shape[1] == 1
