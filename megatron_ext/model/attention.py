"""Core attention on `F.scaled_dot_product_attention`: causal, grouped-query, sliding window,
document mask; plain causal attention on a CPU by `blockwise.py`; over several ranks of one sequence
by a strategy of `megatron_ext/context/`.

Stands where megatron-core puts its own DotProductAttention or Transformer Engine's
(`core_attention` of the layer spec). Shapes: S sequence, B micro-batch, N query heads of this tp
rank, G key/value heads of this tp rank, D head.
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_ext import context
from megatron_ext.device import current_device
from megatron_ext.model.blockwise import BlockwiseAttention, Form, keeps_probabilities


def attention_mask(
    num_queries: int,
    num_keys: int,
    window: tuple[int, int] | None = None,
    document_ids_BS: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """True where query i may look at key j: causal, within `window` = (left, right), inside one
    document.

    The last query stands at the last key (cached generation). -> bool [1 or B, 1, num_queries,
    num_keys].
    """
    row = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    col = torch.arange(num_keys, device=device)[None, :]
    allowed = col <= row
    if window is not None and window[0] >= 0:
        allowed = allowed & (col >= row - window[0])
    allowed = allowed[None, None]
    if document_ids_BS is not None:
        same = document_ids_BS[:, -num_queries:, None] == document_ids_BS[:, None, :]
        allowed = allowed & same[:, None]
    return allowed


class CoreAttention(MegatronModule):
    """softmax(q k^T * scale + mask) v for the heads of this tp rank.

    `attention_mask` (third tensor of forward) carries the document ids [B, S] of packed samples, or
    None for plain causal attention; the mask itself is built here, so that no [S, S] tensor crosses
    the pipeline. `softmax_type`: vanilla; off-by-one and learnable add one extra logit per head to
    the denominator (GPT-OSS).

    With context parallelism (--context-parallel-size) query, key and value are the zig-zag chunks
    of this cp rank, the document ids still those of the whole sequence, and `cp_comm_type`
    (--cp-comm-type, this layer's) names the strategy.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **_ignored,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        if config.apply_query_key_layer_scaling:
            self.scale /= max(1, layer_number)
        in_window = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size if in_window else None
        self.softmax_offset = self._build_offset()
        self.strategy = cp_comm_type or "p2p"
        self.exchange = None
        if config.context_parallel_size > 1:
            self.exchange = context.Exchange(pg_collection.cp)
        self.is_blockwise = (
            current_device().type == "cpu"
            and self.exchange is None
            and self.window is None
            and self.softmax_offset is None
        )

    def _build_offset(self) -> Tensor | None:
        """The extra logit per head of this rank [N]: none, zeros, or learned."""
        if self.config.softmax_type == "vanilla":
            return None
        num_heads = self.config.num_attention_heads // self.tp_group.size()
        if self.config.softmax_type == "off-by-one":
            return torch.zeros(num_heads, device=current_device())
        zeros = torch.zeros(num_heads, dtype=self.config.params_dtype, device=current_device())
        offset = nn.Parameter(zeros)
        offset.tensor_model_parallel, offset.partition_dim, offset.partition_stride = True, 0, 1
        self.config.init_method(offset)
        return offset

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask_arg: Tensor | None = None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """query [S, B, N, D], key [S', B, G, D], value [S', B, G, Dv] -> [S, B, N * Dv]."""
        if self.exchange is not None:
            return self._over_ranks(query, key, value, attention_mask_arg)
        has_dropout = self.training and self.dropout > 0
        if self.is_blockwise and self._is_plain(query, key, attention_mask_arg) and not has_dropout:
            form = Form(key.shape[2], self.scale, keep=keeps_probabilities(key.shape[0]))
            return BlockwiseAttention.apply(query, key, value, form)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if k.shape[1] != q.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        num_queries, num_keys = q.shape[2], k.shape[2]
        mask = None
        is_plain = self._is_plain(query, key, attention_mask_arg)
        if not is_plain or self.window is not None or self.softmax_offset is not None:
            mask = attention_mask(num_queries, num_keys, self.window, attention_mask_arg, q.device)
        if self.softmax_offset is not None:
            k, v, mask = self._with_offset_key(q, k, v, mask)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.scale,
        )
        return out.permute(2, 0, 1, 3).reshape(num_queries, q.shape[0], -1)

    @staticmethod
    def _is_plain(query: Tensor, key: Tensor, document_ids_BS: Tensor | None) -> bool:
        """Whether every query sees all keys up to its own place."""
        return query.shape[0] == key.shape[0] and document_ids_BS is None

    def _over_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, document_ids_BS: Tensor | None
    ) -> Tensor:
        """The same for the chunks of this cp rank; [S/cp, B, N * Dv]."""
        assert query.shape[0] == key.shape[0], "no cached generation over context-parallel ranks"
        cp = self.exchange.size
        window = None if self.window is None or self.window[0] < 0 else self.window[0]
        reach = context.reach_of(window, query.shape[0] // 2, 2 * cp)
        sizes = tuple(self.config.hierarchical_context_parallel_sizes or ())
        program = context.build(self.strategy, cp, sizes, reach)
        job = context.Attention(program, self.exchange, self.scale, window, document_ids_BS)
        return context.context_attention(query, key, value, job, self.softmax_offset)

    def _with_offset_key(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor):
        """Append a key whose logit is the offset and whose value is zero: softmax then sums to less
        than one.
        """
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~mask, float("-inf"))
        bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
        column = self.softmax_offset.to(q.dtype).view(1, -1, 1, 1)
        column = column.expand(q.shape[0], -1, q.shape[2], 1)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v, torch.cat((bias, column), dim=-1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The learned offset is split over tp along its heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
