"""RMSNorm and LayerNorm that run without Transformer Engine or Apex and work with sequence
parallelism.

megatron-core's local norms refuse sequence parallelism, which a mixture of experts with tensor
parallelism needs. The weight is replicated over tp; with sequence parallelism each tp rank sees
S/tp of the tokens, so the weight carries `sequence_parallel=True` and megatron-core sums its
gradient over tp.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_ext.device import current_device
from megatron_ext.native import loops


class RowNorm(Function):
    """RMSNorm of x [..., H] with weight [H] of the same dtype, in few passes of a CPU.

    torch's `F.rms_norm` is made of element-wise steps there and keeps two fp32 tensors; this keeps
    x and 1/rms [T, 1]. Backward, with s = 1/rms and g = s dy:

        dx = g w - x s^2 mean(g w x),    dw = sum over rows of g x
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if loops.serves(x, weight):
            y, per_rms = loops.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, per_rms)
            return y
        rows = x.reshape(-1, x.shape[-1])
        squares = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        per_rms = squares.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, per_rms)
        normal = rows.float().mul_(per_rms) if rows.dtype != per_rms.dtype else rows * per_rms
        return normal.to(rows.dtype).mul_(weight).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, per_rms = ctx.saved_tensors
        if loops.serves(grad, x, weight):
            dx, dw = loops.rms_norm_backward(grad, x, weight, per_rms)
            return dx, dw.to(weight.dtype), None
        width = x.shape[-1]
        rows, wide_weight = x.reshape(-1, width).float(), weight.float()
        g = grad.reshape(-1, width).float() * per_rms
        products = g * rows
        dw = products.sum(dim=0)
        pull = torch.mv(products, wide_weight).unsqueeze(1).mul_(per_rms.square()).div_(-width)
        dx = g.mul_(wide_weight).addcmul_(rows, pull).to(x.dtype)
        return dx.view(x.shape), dw.to(weight.dtype), None


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, as `config.normalization` says.

    x [..., H] in any floating dtype -> the same shape and dtype; statistics are taken in fp32.
    RMSNorm: x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019, arXiv:1910.07467).
    With `--apply-layernorm-1p` the stored weight is w - 1, so that weight decay pulls towards the
    identity.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_ignored) -> None:
        super().__init__()
        self.eps = eps
        self.is_rms = config.normalization == "RMSNorm"
        self.centered_at_one = config.layernorm_zero_centered_gamma
        placed = {"dtype": config.params_dtype, "device": current_device()}
        fill = torch.zeros if self.centered_at_one else torch.ones
        self.weight = nn.Parameter(fill(hidden_size, **placed))
        self.weight.sequence_parallel = config.sequence_parallel
        if self.is_rms:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.zeros(hidden_size, **placed))
            self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.centered_at_one else self.weight
        weight = weight.to(x.dtype)
        if self.is_rms and x.device.type == "cpu":
            return RowNorm.apply(x, weight, self.eps)
        if self.is_rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), self.eps)
