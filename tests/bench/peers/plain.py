"""'150 lines of plain PyTorch': this file's layer in decoder.py's model, with
torch.nn.functional.grouped_mm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.gate import Gate
from tests.bench.peers.decoder import Decoder, grouped_product
from tests.bench.peers.training import initialise
from tests.bench.shapes import Shape

NOTE = "decoder.py + plain.py; aux loss 0.01"


class MoE(nn.Module):
    """Top-k of softmax, sorted by expert, three grouped products, summed per token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.topk, self.experts = shape.topk, shape.experts
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.up_EHF = nn.Parameter(torch.empty(shape.experts, shape.hidden, 2 * shape.width))
        self.down_EFH = nn.Parameter(torch.empty(shape.experts, shape.width, shape.hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, H] -> the same, Switch's balance loss."""
        x_TH = x.flatten(0, -2)
        probs_TE = self.router(x_TH).softmax(dim=-1, dtype=torch.float32)
        weights_TK, chosen_TK = probs_TE.topk(self.topk, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x.dtype)
        flat_N = chosen_TK.flatten()
        order_N = flat_N.argsort(stable=True)
        counts_E = torch.bincount(flat_N, minlength=self.experts)
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gathered_NH = x_TH[order_N // self.topk]
        gate, up = grouped_product(gathered_NH, self.up_EHF, ends_E).chunk(2, dim=-1)
        out_NH = grouped_product(F.silu(gate) * up, self.down_EFH, ends_E)
        back_N = torch.empty_like(order_N).scatter_(
            0, order_N, torch.arange(order_N.numel(), device=x.device)
        )
        y = (out_NH[back_N].view(-1, self.topk, x.shape[-1]) * weights_TK[..., None]).sum(1)
        balance = self.experts * (probs_TE.mean(0) * (counts_E / flat_N.numel())).sum()
        return y.view_as(x), balance


def layer(name: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    """One MoE layer."""
    return initialise(MoE(shape)).to(dtype)


def model(name: str, shape: Shape, gate: Gate, dtype: torch.dtype) -> nn.Module:
    """The whole model."""
    gate.imported()
    return initialise(Decoder(shape, MoE)).to(dtype)
