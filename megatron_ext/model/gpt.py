"""The model chunks of one rank: megatron-core's GPTModel, filled the same way in every layout,
wrapped in DDP.

    transformer_config -> decoder_spec per virtual stage -> GPT -> initialise -> Float16Module ->
    DDP

Worked example, 8 layers on pp2 with two virtual stages: pipeline rank 0 builds chunks [layers 1-2
with the embedding] and [layers 5-6], rank 1 builds [3-4] and [7-8 with norm, output layer and
loss].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ext.config import RunConfig
from megatron_ext.costs.roads import can_fuse
from megatron_ext.device import current_device
from megatron_ext.errors import ConfigError
from megatron_ext.model import layers, run_config, vocab
from megatron_ext.model.gradients import WrittenGradients
from megatron_ext.model.initialise import Recorder, initialise
from megatron_ext.model.output_layer import Deferred, OutputLayer
from megatron_ext.moe.router import RouterOptions


@dataclass(frozen=True)
class Vocabulary:
    """`size` true tokens, `padded` rows of the embedding table of all tp ranks."""

    size: int
    padded: int


class GPT(GPTModel):
    """GPTModel whose loss is over the true vocabulary (padding columns get no probability), and
    computed without its logits where `has_fused_loss`.
    """

    def __init__(self, *args, true_vocab_size: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        tp = self.pg_collection.tp
        self.num_true_columns = vocab.num_true_columns(
            true_vocab_size, self.vocab_size, tp.rank(), tp.size()
        )
        self.true_vocab_size = true_vocab_size
        if self.mtp_process and self.share_embeddings_and_output_weights and not self.pre_process:
            # the stage has its own copy of the embedding for MTP and uses that: 0.16.1 allocates
            # an output table as well, trains without it and then cannot save it
            self.output_layer.register_parameter("weight", None)
        self.has_fused_loss = self.post_process and can_fuse(self.config)
        if self.has_fused_loss:
            # GPTModel names the class of its output layer; ours has the same parameters
            self.output_layer.__class__ = OutputLayer

    def _postprocess(self, *args, labels: Tensor | None, **kwargs) -> Tensor:
        """Loss per token [B, S] where there are labels, else logits [B, S, padded/tp]."""
        if self.has_fused_loss:
            self.output_layer.defers = labels is not None
        return super()._postprocess(*args, labels=labels, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor | Deferred) -> Tensor:
        """labels [B, S], logits [S, B, padded/tp] -> loss per token [B, S] in nats."""
        if isinstance(logits, Deferred):
            return self.output_layer.loss(labels, logits, self.num_true_columns)
        return super().compute_language_model_loss(
            labels, vocab.hide_padding(logits, self.num_true_columns)
        )


def vocabulary(cfg: RunConfig, tokenizer_size: int | None) -> Vocabulary:
    """The true and the padded size: the larger of --vocab-size and the tokenizer's (which may add
    an end-of-document).

    Raises ConfigError where neither is known, or --padded-vocab-size cannot hold it.
    """
    size = max(cfg.model.vocab_size or 0, tokenizer_size or 0)
    if size == 0:
        raise ConfigError("--vocab-size is needed where no tokenizer gives it", do="add it")
    padded = cfg.model.padded_vocab_size or vocab.padded_vocab_size(
        size, cfg.model.make_vocab_size_divisible_by, cfg.parallel.tensor_model_parallel_size
    )
    if padded < size or padded % cfg.parallel.tensor_model_parallel_size:
        raise ConfigError(
            f"--padded-vocab-size {padded} must hold {size} tokens and be a multiple of tp"
            f" {cfg.parallel.tensor_model_parallel_size}",
            do="leave it out: it is derived",
        )
    return Vocabulary(size, padded)


def _chunk(cfg: RunConfig, config: TransformerConfig, words: Vocabulary, stage: int | None) -> GPT:
    """One GPT chunk: virtual stage `stage`, or the whole pipeline stage where it is None."""
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    place = {"ignore_virtual": False, "vp_stage": stage}
    options = RouterOptions(**asdict(cfg.moe))
    spec = {"router": options, "pp_rank": pp_rank, "vp_stage": stage}
    has_mtp = bool(config.mtp_num_layers) and mtp_on_this_rank(
        config, ignore_virtual=False, vp_stage=stage
    )
    model = cfg.model
    return GPT(
        config=config,
        transformer_layer_spec=layers.decoder_spec(config, **spec),
        vocab_size=words.padded,
        true_vocab_size=words.size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        fp16_lm_cross_entropy=model.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        seq_len_interpolation_factor=model.rotary_seq_len_interpolation_factor,
        mtp_block_spec=layers.mtp_spec(config, **spec) if has_mtp else None,
        vp_stage=stage,
    )


def _check_layers(chunks: Sequence[nn.Module], num_layers: int) -> None:
    """The layers that all pipeline ranks built sum to --num-layers (a split may drop some
    silently).
    """
    built = torch.tensor(
        [sum(len(chunk.decoder.layers) for chunk in chunks)], device=current_device()
    )
    torch.distributed.all_reduce(built, group=parallel_state.get_pipeline_model_parallel_group())
    if int(built) != num_layers:
        raise ConfigError(
            f"--num-layers {num_layers}, but the pipeline split builds {int(built)} layers",
            do="check --pipeline-model-parallel-layout and --decoder-*-pipeline-num-layers",
        )


def build_chunks(cfg: RunConfig, words: Vocabulary) -> list[nn.Module]:
    """The initialised model chunks of this rank (in 16 bits where asked), not yet wrapped for
    training.
    """
    recorder = Recorder()
    config = run_config.transformer_config(cfg, recorder)
    virtual = config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    chunks: list[nn.Module] = [_chunk(cfg, config, words, stage) for stage in stages]
    _check_layers(chunks, config.num_layers)
    for chunk in chunks:
        initialise(
            chunk, recorder, embedding_std=run_config.embedding_std(cfg), seed=cfg.train.seed
        )
        chunk.to(current_device())
    if config.bf16 or config.fp16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    return chunks


def wrap_for_training(cfg: RunConfig, chunks: Sequence[nn.Module]) -> list[WrittenGradients]:
    """Each chunk in megatron-core's DDP, which owns its gradient buffers and their reduction over
    dp (and edp).
    """
    overlap_step = cfg.optimizer.overlap_param_gather_with_optimizer_step
    return [
        WrittenGradients(
            config=chunk.config,
            ddp_config=run_config.ddp_config(cfg),
            module=chunk,
            disable_bucketing=index > 0 or overlap_step,
        )
        for index, chunk in enumerate(chunks)
    ]
