"""A plain decoder around somebody's MoE layer: embedding, RMSNorm, causal attention with RoPE
through torch's scaled_dot_product_attention, untied output, cross-entropy in fp32.

For peers of which only the layer is compared, and for 'plain PyTorch'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.shapes import Shape


def rope_tables(sequence: int, head: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos, sin [S, head] of Llama's halves."""
    frequencies = base ** -(torch.arange(0, head, 2).float() / head)
    angles = torch.outer(torch.arange(sequence).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, A, S, head]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """grouped_mm of rows [N, in] sorted by group, weights [E, in, out], ends [E] int32.

    torch.compile takes it in bf16 only; in other precisions the compiled graph breaks around it.
    """
    call = F.grouped_mm if rows.dtype == torch.bfloat16 else _grouped_mm_in_eager
    return call(rows, weights, offs=ends)


@torch.compiler.disable
def _grouped_mm_in_eager(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights, offs=offs)


class Attention(nn.Module):
    """Causal attention of `heads` heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, H] -> the same."""
        b, s, h = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, h))


class Block(nn.Module):
    """x + attention, x + experts; `moe` returns (output, auxiliary loss or None)."""

    def __init__(self, shape: Shape, moe: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.norm2 = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.attention, self.moe = Attention(shape), moe

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, S, H] -> the same, auxiliary loss."""
        x = x + self.attention(self.norm1(x), cos, sin)
        y, aux = self.moe(self.norm2(x))
        return x + y, aux


class Decoder(nn.Module):
    """The whole model; its call gives (loss with auxiliary losses, language model loss)."""

    def __init__(self, shape: Shape, make_moe: Callable[[Shape], nn.Module]) -> None:
        super().__init__()
        self.aux = shape.aux
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, make_moe(shape)) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.output = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        cos, sin = rope_tables(shape.sequence, shape.head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, labels [B, S]."""
        x, losses = self.embedding(tokens), []
        for block in self.blocks:
            x, aux = block(x, self.cos, self.sin)
            losses += [] if aux is None else [aux]
        logits = self.output(self.norm(x)).flatten(0, 1).float()
        language = F.cross_entropy(logits, labels.flatten())
        loss = language + self.aux * torch.stack(losses).sum() if losses else language
        return loss, language.detach()
