"""The sorted dispatcher on Triton's kernels; no wait for a count where a rank has all experts.

    ep = etp = 1   x [T, H] ------------- experts (gather, fc1, SwiGLU, fc2, sum) ------> y [T, H]
    else           as `SortedDispatcher`; rows are summed by the kernel. One wait for the counts,
                   which the all-to-all needs on the host, is left.

Where a capacity dropped assignments, the map is read as K experts a token of which some are no
expert (`experts_of_map`): `nonzero` would ask the host.
"""

from __future__ import annotations

from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import rows as kernels
from megatron_ext.kernels.order import Order, experts_of_map, order_of
from megatron_ext.moe.choice import Choice
from megatron_ext.moe.dispatch import SortedDispatcher
from megatron_ext.moe.places import Places, without_blocks


class DeviceDispatcher(SortedDispatcher):
    """Takes and gives what `SortedDispatcher` does."""

    order: Order | None = None
    probs_TK: Tensor | None = None

    def _blocks(self, order: Tensor, counts: Tensor) -> Places:
        """Never padded, on a CPU (the interpreter's) neither."""
        return without_blocks(order, counts)

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Choice | Tensor, probs):
        """[.., H] -> ([T, H] as they are, None), or the rows to send."""
        self.probs_TK = None
        if not self.is_local:
            if isinstance(routing_map, Choice):
                self.probs_TK = probs
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        if isinstance(routing_map, Choice):
            experts_TK, counts_E, self.probs_TK = (
                routing_map.experts_TK,
                routing_map.counts_E,
                probs,
            )
        else:
            experts_TK, self.probs_TK, counts_E = experts_of_map(
                routing_map, probs, self.config.moe_router_topk
            )
        self.order = order_of(experts_TK, counts_E)
        return hidden_states.reshape(-1, self.hidden_shape[-1]), None

    def dispatch_postprocess(self, hidden_states: Tensor, probs: None):
        """-> ([T, H], the order, [T, K]), or as `SortedDispatcher`."""
        if self.is_local:
            return hidden_states, self.order, self.probs_TK
        return super().dispatch_postprocess(hidden_states, probs)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The sums in the shape that came."""
        if self.is_local:
            return hidden_states.view(self.hidden_shape)
        if self.probs_TK is None:
            return super().combine_postprocess(hidden_states)
        places, shape = self.rows.places, self.probs_TK.shape
        summed = kernels.unpermute(
            hidden_states, places.sources_P, places.places_A.view(shape), self.probs_TK
        )
        return summed.view(self.hidden_shape)


def use_device_dispatch(layer) -> None:
    """Exchange the sorted dispatcher of a built MoE layer whose experts have the kernels. Raises
    ConfigError where they would not be used; config/checks/kernels.py has refused that already.
    """
    stock, experts = layer.token_dispatcher, layer.experts
    if not isinstance(stock, SortedDispatcher) or not experts.is_plain_swiglu:
        raise ConfigError(
            "--moe-kernels triton serves SwiGLU experts without biases behind the alltoall"
            " dispatcher",
            do="use --moe-kernels torch",
        )
    stock.__class__ = DeviceDispatcher  # the same groups and sizes, another road
