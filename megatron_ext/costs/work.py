"""What one rank computes and sends for one micro-batch of a layer, as operations with seconds.

    layer_work(cfg, moe=True) -> [Op("gemm", "moe", ...), ...], [Send("ep", "exchange", ...), ...]

A matrix product of r rows and a narrow side c runs at peak * efficiency * r/(r+half_rows) *
c/(c+half_width): the curve of its GPU (cluster.py).  Everything else moves bytes.  A backward pass
costs twice the products, 2.5 times the attention (FlashAttention-2) and twice the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.costs.activations import routed_rows
from megatron_ext.costs.cluster import Gpu
from megatron_ext.costs.flops import attention_flops
from megatron_ext.costs.micro_batch import shape_of
from megatron_ext.costs.tensors import num_gates, padded_vocab_size

BACKWARD = {"gemm": 2.0, "attention": 2.5, "memory": 2.0}
SCORE_PASSES = 5
"""Reads and writes of the scores without a fused attention: product, causal softmax (half of a read
and of a write), dropout (read, write), product."""

OPTIMIZER_TRAFFIC = 34
"""Bytes that Adam reads and writes for a parameter: three fp32 states twice, gradient, weight."""


@dataclass(frozen=True)
class Op:
    """One computation of the forward pass.

    Attributes:
        part: attention, experts, mlp, ...: what selective recomputation names.
        kernels: launches.
    """

    kind: str
    part: str
    flops: float = 0.0
    size: float = 0.0
    rows: float = 0.0
    narrow: float = 0.0
    kernels: int = 1

    def seconds(self, gpu: Gpu) -> float:
        """Forward time."""
        launch = self.kernels * gpu.kernel_us * 1e-6
        if self.kind == "memory":
            return self.size / (gpu.memory_gb_per_s * 1e9) + launch
        rate = gpu.peak_tflops * 1e12
        if self.kind == "attention":
            return self.flops / (rate * gpu.attention_efficiency) + launch
        share = self.rows / (self.rows + gpu.half_rows or 1)
        share *= self.narrow / (self.narrow + gpu.half_width or 1)
        return self.flops / (rate * gpu.gemm_efficiency * max(share, 1e-6)) + launch

    def backward(self, gpu: Gpu) -> float:
        """Backward time."""
        return self.seconds(gpu) * BACKWARD[self.kind]


@dataclass(frozen=True)
class Send:
    """One collective of the forward pass, repeated in the backward pass.

    Attributes:
        axis: tp, ep, etp or cp.
        kind: gather (or reduce-scatter) of `size` bytes in all, or exchange of `size` bytes a rank.
        times: how often in the forward pass.
    """

    axis: str
    kind: str
    size: float
    times: int
    part: str


def _gemm(part: str, rows: float, k: float, n: float, kernels: int = 1) -> Op:
    """rows x k times k x n."""
    return Op("gemm", part, 2 * rows * k * n, 0, rows, min(k, n), kernels)


def layer_work(
    cfg: RunConfig, moe: bool, index: int = 0, imbalance: float = 1.0
) -> tuple[list[Op], list[Send]]:
    """Computations and collectives of one layer."""
    t, s = cfg.transformer, shape_of(cfg)
    ops = _mla(cfg) if t.multi_latent_attention else _attention(cfg)
    flops = attention_flops(cfg, index) * s.T / s.tp
    if str(t.attention_backend).rpartition(".")[2] == "unfused":
        # products over all keys, and the scores of every head through memory
        scores = s.T * cfg.model.seq_length * t.num_attention_heads / s.tp
        ops.append(Op("attention", "core_attn", 2 * flops))
        ops.append(Op("memory", "core_attn", size=SCORE_PASSES * scores * s.w, kernels=3))
    else:
        ops.append(Op("attention", "core_attn", flops))
    row = s.t * s.H * s.w
    ops.append(Op("memory", "layernorm", size=4 * row, kernels=2))
    ops.append(Op("memory", "residual", size=6 * row, kernels=2))
    sends = []
    cp = cfg.parallel.context_parallel_size
    if cp > 1:
        keys = t.num_query_groups * t.kv_channels * 2 * s.T * cp * s.w / s.tp
        sends.append(Send("cp", "gather", keys, 1, "core_attn"))
    if s.tp > 1:
        sends.append(Send("tp", "gather", s.T * s.H * s.w, 2, "attention"))
    if not moe:
        ops += _mlp(cfg, "mlp", t.ffn_hidden_size)
        sends += [Send("tp", "gather", s.T * s.H * s.w, 2, "mlp")] if s.tp > 1 else []
        return ops, sends
    more, moved = _experts(cfg, imbalance)
    return ops + more, sends + moved


def _attention(cfg: RunConfig) -> list[Op]:
    t, s = cfg.transformer, shape_of(cfg)
    queries, keys = t.num_attention_heads * t.kv_channels, t.num_query_groups * t.kv_channels
    out = (queries + 2 * keys) // s.tp
    turned = 4 * s.T * out * s.w
    return [
        _gemm("attention", s.T, s.H, out),
        _gemm("attention", s.T, queries // s.tp, s.H),
        Op("memory", "attention", size=turned, kernels=4),
    ]


def _mla(cfg: RunConfig) -> list[Op]:
    t, s = cfg.transformer, shape_of(cfg)
    heads = t.num_attention_heads // s.tp
    query = heads * (t.qk_head_dim + t.qk_pos_emb_head_dim)
    up = heads * (t.qk_head_dim + t.v_head_dim)
    te = 1 if s.te else s.tp
    ops = []
    if t.q_lora_rank:
        ops.append(_gemm("attention", s.t if s.te else s.T, s.H, t.q_lora_rank // te))
        ops.append(_gemm("mla_up_proj", s.T, t.q_lora_rank, query))
    else:
        ops.append(_gemm("attention", s.T, s.H, query))
    narrow = (t.kv_lora_rank + t.qk_pos_emb_head_dim) // te
    ops.append(_gemm("attention", s.t if s.te else s.T, s.H, narrow))
    ops.append(_gemm("mla_up_proj", s.T, t.kv_lora_rank, up))
    ops.append(_gemm("attention", s.T, heads * t.v_head_dim, s.H))
    ops.append(Op("memory", "mla_up_proj", size=4 * s.T * (query + up) * s.w, kernels=8))
    return ops


def _mlp(cfg: RunConfig, part: str, width: int) -> list[Op]:
    s, gates = shape_of(cfg), num_gates(cfg)
    width = width // s.tp
    return [
        _gemm(part, s.T, s.H, gates * width),
        _gemm(part, s.T, width, s.H),
        Op("memory", part, size=s.T * width * s.w * (gates + 1)),
    ]


def _experts(cfg: RunConfig, imbalance: float) -> tuple[list[Op], list[Send]]:
    t, p, s = cfg.transformer, cfg.parallel, shape_of(cfg)
    etp, ep = p.expert_tensor_parallel_size or 1, p.expert_model_parallel_size
    rows = routed_rows(cfg, imbalance)
    local = t.num_moe_experts // ep
    width, gates = t.moe_ffn_hidden_size // etp, num_gates(cfg)
    each = rows / local
    grouped = 2 * rows * s.H * width
    kernels = 1 if s.te or not s.cpu else 2
    ops = [
        _gemm("moe", s.t, s.H, t.num_moe_experts),
        Op("memory", "moe", size=s.t * t.num_moe_experts * 16, kernels=12),
        Op("gemm", "moe", grouped * gates, 0, each, min(s.H, gates * width), kernels),
        Op("gemm", "moe", grouped, 0, each, min(s.H, width), kernels),
        Op("memory", "moe_act", size=rows * width * s.w * (gates + 1)),
        Op("memory", "moe", size=8 * rows * s.H * s.w / etp, kernels=8),
    ]
    sent = s.t * t.moe_router_topk * s.H * s.w
    sends = [Send("ep", "exchange", sent * imbalance, 2, "moe")] if ep > 1 else []
    if etp > 1:
        sends.append(Send("etp", "gather", rows * s.H * s.w, 2, "moe"))
    if t.moe_shared_expert_intermediate_size:
        ops += _mlp(cfg, "shared_experts", t.moe_shared_expert_intermediate_size)
        if s.tp > 1:
            sends.append(Send("tp", "gather", s.T * s.H * s.w, 2, "shared_experts"))
    return ops, sends


def head_work(cfg: RunConfig, vocab_size: int | None = None) -> list[Op]:
    """The output layer and the loss."""
    s = shape_of(cfg)
    columns = padded_vocab_size(cfg, vocab_size) // s.tp
    return [
        _gemm("loss", s.T, s.H, columns),
        Op("memory", "loss", size=s.T * columns * 4 * 4, kernels=6),
    ]


def embedding_work(cfg: RunConfig) -> list[Op]:
    """The look-up."""
    s = shape_of(cfg)
    return [Op("memory", "embedding", size=2 * s.t * s.H * s.w, kernels=2)]
