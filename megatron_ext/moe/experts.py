"""The experts of one rank as two grouped matrix products, `torch.nn.functional.grouped_mm`.

Shapes: T tokens routed to this rank (sorted by expert), e experts of this rank, H hidden, F expert
hidden of this etp rank, g = 2 for gated units (gate and up) and 1 otherwise. Weights are stored as
fc1 [e, g, F, H] and fc2 [e, H, F]: the two leading axes are the global expert axis and the gate/up
axis, so one checkpoint entry covers all experts whatever ep and etp are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_ext.costs.cpu_blocks import block_rows, row_multiple
from megatron_ext.device import current_device
from megatron_ext.moe.feed_forward import swiglu_experts


def grouped_linear(x_TK: Tensor, weight_eNK: Tensor, offsets_e: Tensor) -> Tensor:
    """y[t] = weight[expert of t] @ x[t] for tokens sorted by expert; offsets are the cumulated
    counts (int32).

    x [T, K], weight [e, N, K] -> [T, N]. Experts without tokens are allowed and get a zero
    gradient.
    """
    return F.grouped_mm(x_TK, weight_eNK.transpose(1, 2), offs=offsets_e)


def reference_grouped_linear(x_TK: Tensor, weight_eNK: Tensor, counts_e: Tensor) -> Tensor:
    """The naive loop that `grouped_linear` must equal, gradients included."""
    pieces = torch.split(x_TK, [int(count) for count in counts_e])
    return torch.cat([x @ weight.t() for x, weight in zip(pieces, weight_eNK)])


def padded_places(counts_e: Tensor, multiple: int | Tensor) -> tuple[Tensor, Tensor]:
    """Where T sorted rows go when every expert's block has a multiple of `multiple` rows ([e]: of
    its own).

    counts [e] -> (places [T] int64, end of each block [e] int32). The rows between are padding.
    On a CPU oneDNN compiles a kernel for every new row count (0.9-3 ms against 0.06-0.12 ms for a
    known one, bf16, 256 rows); with rounded counts the shapes repeat.
    """
    padded = (counts_e + multiple - 1) // multiple * multiple
    ends = torch.cumsum(padded, 0)
    shift = (ends - padded) - (torch.cumsum(counts_e, 0) - counts_e)
    rows = torch.arange(int(counts_e.sum()), device=counts_e.device)
    return rows + shift.repeat_interleave(counts_e), ends.to(torch.int32)


class GroupedExperts(MegatronModule):
    """SwiGLU (or other) feed-forward experts; the routing weight is applied before fc2, as
    megatron-core does.

    Every parameter carries `allreduce = False`: it is reduced over the expert data-parallel group
    whatever ep is. Stock megatron-core does so only when ep > 1, which with etp < tp and ep = 1
    leaves expert gradients about 100% wrong while the first loss moves by 1e-5 (see
    `tests/moe/test_experts.py`).
    """

    def __init__(self, num_local_experts: int, config, pg_collection=None) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.groups = pg_collection
        self.ep_group, self.etp_group = pg_collection.ep, pg_collection.expt_tp
        self.edp_group = pg_collection.expt_dp
        self.num_gates = 2 if config.gated_linear_unit else 1
        width = config.moe_ffn_hidden_size // self.etp_group.size()
        fc1_shape = (num_local_experts, self.num_gates, width, config.hidden_size)
        self.fc1_weight = self._parameter(fc1_shape, split_dim=2)
        fc2_shape = (num_local_experts, config.hidden_size, width)
        self.fc2_weight = self._parameter(fc2_shape, split_dim=2)
        config.init_method(self.fc1_weight)
        config.output_layer_init_method(self.fc2_weight)
        self.fc1_bias = self.fc2_bias = None
        if config.add_bias_linear:  # megatron-core allows biases with etp 1 only
            self.fc1_bias = self._parameter(fc1_shape[:3], split_dim=2)
            self.fc2_bias = self._parameter(fc2_shape[:2], split_dim=2)
            nn.init.zeros_(self.fc1_bias)
            nn.init.zeros_(self.fc2_bias)
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        self.is_plain_swiglu = (
            config.gated_linear_unit
            and config.activation_func is F.silu
            and config.activation_func_clamp_value is None
            and config.glu_linear_offset == 0
            and not config.add_bias_linear
        )

    def _parameter(self, shape: tuple[int, ...], split_dim: int) -> nn.Parameter:
        """An uninitialised expert parameter, split over etp along `split_dim`."""
        parameter = nn.Parameter(
            torch.empty(shape, dtype=self.config.params_dtype, device=current_device())
        )
        parameter.allreduce = False
        parameter.tensor_model_parallel = (
            True  # else the gradient norm counts one etp rank's shard only
        )
        parameter.partition_dim, parameter.partition_stride = split_dim, 1
        return parameter

    def block_rows(self, counts: Sequence[int]) -> list[int]:
        """Rows of each local expert's block on a CPU, for `counts` tokens of each."""
        matrices = self.num_gates + 1
        width, hidden = self.fc2_weight.shape[2], self.fc2_weight.shape[1]
        return block_rows(counts, 2.0 * matrices * width * hidden)

    def _activate(self, hidden_TgF: Tensor, probs_T: Tensor | None) -> Tensor:
        """[T, g, F] and the routing weights [T] (None: not weighted) -> [T, F] in the dtype of the
        hidden state.
        """
        config = self.config
        if config.gated_linear_unit:
            gate, up = hidden_TgF.unbind(1)
            if config.activation_func_clamp_value is not None:
                limit = config.activation_func_clamp_value
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            out = config.activation_func(gate) * (up + config.glu_linear_offset)
        else:
            out = config.activation_func(hidden_TgF.squeeze(1))
        return out if probs_T is None else (out * probs_T.unsqueeze(-1)).to(hidden_TgF.dtype)

    def forward(self, x_TH: Tensor, tokens_per_expert: Tensor, probs_T: Tensor | None):
        """Tokens sorted by local expert [T, H] -> ([T, H], None); partial sums over etp.

        With probs None rows lie in blocks already (`block_rows`, of which `tokens_per_expert` are
        the sizes) and the result is not weighted: `SortedDispatcher` does both.
        """
        if probs_T is None:
            return self._of_blocks(x_TH, tokens_per_expert), None
        if self.config.moe_apply_probs_on_input:
            x_TH = (x_TH * probs_T.unsqueeze(-1)).to(x_TH.dtype)
            probs_T = torch.ones_like(probs_T)
        counts = tokens_per_expert.to(x_TH.device)
        if x_TH.device.type != "cpu":
            return self._compute(
                x_TH, counts, torch.cumsum(counts, 0, dtype=torch.int32), probs_T
            ), None
        multiples = counts.new_tensor([row_multiple(count) for count in counts.tolist()])
        places, ends = padded_places(counts, multiples)
        x_PH = x_TH.new_zeros(int(ends[-1]), x_TH.shape[1]).index_copy(0, places, x_TH)
        probs_P = probs_T.new_zeros(int(ends[-1])).index_copy(0, places, probs_T)
        blocks = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
        return self._compute(x_PH, blocks, ends, probs_P).index_select(0, places), None

    def _of_blocks(self, x_PH: Tensor, rows_e: Tensor) -> Tensor:
        """[P, H] -> [P, H]; rows [e]."""
        if self.is_plain_swiglu and x_PH.device.type == "cpu":
            return swiglu_experts(x_PH, self.fc1_weight, self.fc2_weight, rows_e.tolist())
        return self._compute(x_PH, rows_e, torch.cumsum(rows_e, 0, dtype=torch.int32), None)

    def _compute(
        self, x_TH: Tensor, counts: Tensor, offsets: Tensor, probs_T: Tensor | None
    ) -> Tensor:
        """fc1, activation times routing weight, fc2 for blocks of `counts` rows that end at
        `offsets`.
        """
        fc1, fc2 = self.fc1_weight, self.fc2_weight
        hidden = grouped_linear(x_TH, fc1.flatten(1, 2), offsets).unflatten(1, fc1.shape[1:3])
        if self.fc1_bias is not None:
            hidden = hidden + self.fc1_bias.repeat_interleave(counts, dim=0)
        if self.recompute_activation:
            activation = tensor_parallel.CheckpointWithoutOutput()
            hidden = activation.checkpoint(self._activate, hidden, probs_T)
            out = grouped_linear(hidden, fc2, offsets)
            activation.discard_output_and_register_recompute(out)
        else:
            out = grouped_linear(self._activate(hidden, probs_T), fc2, offsets)
        if self.fc2_bias is not None:
            bias_TH = self.fc2_bias.repeat_interleave(counts, dim=0)
            weighted = bias_TH if probs_T is None else (bias_TH * probs_T.unsqueeze(-1))
            out = out + weighted.to(out.dtype)
        return out

    def outputs_by_expert(self, inputs: tuple, output: tuple) -> tuple[Tensor, Tensor]:
        """(rows by local expert, rows of each [e]) of what `forward` took and gave: for hooks."""
        return output[0], inputs[1]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Global tensors fc1 [.., E, g, F, H] and fc2 [.., E, H, F]; replicas are the expert
        data-parallel ranks.
        """
        axis = len(sharded_offsets)
        ep = (axis, self.ep_group.rank(), self.ep_group.size())
        etp = (axis + 2, self.etp_group.rank(), self.etp_group.size())
        state = {}
        for name, parameter in self.named_parameters():
            split = [] if name == "fc2_bias" else [etp]
            state[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                ep,
                *split,
                replica_id=(0, 0, self.edp_group.rank()),
                prepend_axis_num=len(sharded_offsets),
            )
        return state
