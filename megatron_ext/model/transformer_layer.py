"""megatron-core's transformer layer; a mixture of experts in it gets the sorted dispatcher,
or the one of its kernels.
"""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer as StockLayer

from megatron_ext.moe.dispatch import use_sorted_dispatch


class TransformerLayer(StockLayer):
    """MoELayer builds its own dispatcher and the stock layer knows no MoELayer but megatron-core's,
    so the dispatcher is exchanged when both stand.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.mlp, MoELayer):
            use_sorted_dispatch(self.mlp)
            if getattr(self.mlp.experts, "on_device", False):
                from megatron_ext.moe.device_dispatch import use_device_dispatch  # imports Triton

                use_device_dispatch(self.mlp)
