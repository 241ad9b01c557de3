"""Multi-latent attention whose shared rotary key gets its whole gradient under tensor parallelism.

The down projection gives every token a compressed key/value and one rotary key that all heads share
(DeepSeek-V2, arXiv:2405.04434, section 2.1). With local layers megatron-core 0.16.1 gathers both
over tp; the rotary key then goes straight to the heads of each rank, and the gather's backward pass
keeps only this rank's heads' share of its gradient (0.7% of the projection's gradient at tp 2,
invisible in the loss). `tests/parity` holds the layout `tp2-sp+mla` that finds it.
"""

from __future__ import annotations

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, cat, split


class LatentAttention(MLASelfAttention):
    """MLASelfAttention; its key/value down projection hands out whole rows in the form of a
    replicated linear layer, for which megatron-core sums the rotary key's gradient over tp.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        is_split = isinstance(self.linear_kv_down_proj, ColumnParallelLinear)
        if is_split and self.tp_group.size() > 1:
            self.linear_kv_down_proj.register_forward_hook(self._whole_rows)

    def _whole_rows(self, module, inputs, output: tuple[Tensor, Tensor | None]):
        """[S, B, (R + P) / tp] -> whole rows, [S / tp, B, R + P] with sequence parallelism."""
        rows = gather_from_tensor_model_parallel_region(output[0])
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(rows), output[1]
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        compressed, rotary = split(rows, widths, dim=-1)
        return cat((compressed, copy_to_tensor_model_parallel_region(rotary)), dim=-1), output[1]
