"""Layer specifications: which module stands where in a transformer layer, with or without
Transformer Engine.

`--transformer-impl local` builds every layer from megatron-core's parallel linear layers and our
norm, core attention, router and grouped experts; it needs no compiled extension and runs on CPU and
CUDA. `--transformer-impl transformer_engine` takes megatron-core's own Transformer Engine spec and
puts our router into it.
"""

from __future__ import annotations

import functools

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_ext.device import current_device
from megatron_ext.kernels.choose import uses_triton
from megatron_ext.model.attention import CoreAttention
from megatron_ext.model.head_norm import HeadsNorm
from megatron_ext.model.latent_attention import LatentAttention
from megatron_ext.model.norm import Norm
from megatron_ext.model.self_attention import SelfAttention
from megatron_ext.model.transformer_layer import TransformerLayer
from megatron_ext.moe.experts import GroupedExperts
from megatron_ext.moe.router import Router, RouterOptions


class LocalBackend(LocalSpecProvider):
    """megatron-core's provider of local modules with ours where its own cannot do the work."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        return GroupedExperts, None


def _attention_spec(config, backend: LocalBackend) -> ModuleSpec:
    linear, row_linear = backend.column_parallel_linear(), backend.row_parallel_linear()
    norm = backend.layer_norm() if config.qk_layernorm else IdentityOp
    if config.multi_latent_attention:
        return ModuleSpec(
            module=LatentAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=linear,
                linear_q_down_proj=linear,
                linear_q_up_proj=linear,
                linear_kv_down_proj=linear,
                linear_kv_up_proj=linear,
                core_attention=backend.core_attention(),
                linear_proj=row_linear,
                q_layernorm=norm,
                kv_layernorm=norm,
            ),
        )
    q_norm = k_norm = L2Norm if config.qk_l2_norm else norm
    if config.qk_layernorm_over_heads:
        heads = config.num_attention_heads, config.num_query_groups
        q_norm, k_norm = (ModuleSpec(HeadsNorm, params={"num_heads": n}) for n in heads)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear,
            core_attention=backend.core_attention(),
            linear_proj=row_linear,
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def _local_layer(config, num_experts: int | None) -> ModuleSpec:
    backend = LocalBackend()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=_attention_spec(config, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(),
            mlp=get_mlp_module_spec_for_backend(
                backend=backend, num_experts=num_experts, moe_grouped_gemm=True
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _transformer_engine_layer(config, num_experts: int | None) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts,
        moe_grouped_gemm=num_experts is not None and config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        qk_l2_norm=config.qk_l2_norm,
        use_te_activation_func=config.use_te_activation_func,
    )


def layer_spec(config, *, is_moe: bool, router: RouterOptions) -> ModuleSpec:
    """The spec of one decoder layer, dense or mixture of experts."""
    use_te = config.transformer_impl == "transformer_engine"
    build = _transformer_engine_layer if use_te else _local_layer
    spec = build(config, config.num_moe_experts if is_moe else None)
    if is_moe:
        parts = spec.submodules.mlp.submodules
        parts.router = functools.partial(Router, options=router)
        if uses_triton(router.moe_kernels, current_device().type):
            from megatron_ext.moe.device_experts import DeviceExperts  # it imports Triton

            parts.experts.module = DeviceExperts
    return spec


def moe_layer_pattern(config) -> list[bool]:
    """Which of the num_layers layers are mixtures of experts (--moe-layer-freq: every N-th, or a
    list of 0 and 1).
    """
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [layer % config.moe_layer_freq == 0 for layer in range(config.num_layers)]
    return [bool(flag) for flag in config.moe_layer_freq]


def decoder_spec(
    config, *, router: RouterOptions, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The specs of the layers that this pipeline rank builds for virtual stage `vp_stage`."""
    specs = {
        is_moe: layer_spec(config, is_moe=is_moe, router=router)
        for is_moe in set(moe_layer_pattern(config))
    }
    layers = [specs[is_moe] for is_moe in moe_layer_pattern(config)]
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        mine = layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
        mine = range(offset, offset + count)
    use_te = config.transformer_impl == "transformer_engine"
    backend = TESpecProvider() if use_te else LocalBackend()
    return TransformerBlockSubmodules(
        layer_specs=[layers[index] for index in mine], layer_norm=backend.layer_norm()
    )


def mtp_spec(config, *, router: RouterOptions, pp_rank: int, vp_stage: int | None):
    """The spec of the multi-token-prediction block of this stage, or None (it repeats the last
    decoder layer's kind).
    """
    if not config.mtp_num_layers:
        return None
    use_te = config.transformer_impl == "transformer_engine"
    backend = TESpecProvider() if use_te else LocalBackend()
    layer = layer_spec(config, is_moe=moe_layer_pattern(config)[-1], router=router)
    return get_gpt_mtp_block_spec_for_backend(
        config=config,
        # a block, since 0.16.1 takes a lone layer only of its own class
        spec=TransformerBlockSubmodules(layer_specs=[layer], layer_norm=backend.layer_norm()),
        backend=backend,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
