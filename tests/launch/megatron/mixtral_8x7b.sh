#!/usr/bin/env bash
# Mixtral 8x7B on 8 nodes of 8, in the shape of a Megatron-LM example: lists of flags, one torchrun.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

LAUNCH=(--nproc_per_node 8 --nnodes 8 --node_rank 0 --master_addr localhost --master_port 6000)
MODEL=(
  --use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
  --group-query-attention --num-query-groups 8 --init-method-std 0.01
  --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm --swiglu
  --position-embedding-type rope --no-position-embedding --rotary-base 1000000
  --untie-embeddings-and-output-weights --no-masked-softmax-fusion
)
MOE=(
  --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss
  --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall
  --overlap-param-gather --overlap-grad-reduce
)
DATA=(--tokenizer-type Llama2Tokenizer --tokenizer-model /data/tokenizer.model
  --data-path /data/corpus_text_document --split "99990,8,2")
TRAINING=(
  --micro-batch-size 1 --global-batch-size 256 --lr 1e-4 --train-iters 500000
  --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1
  --lr-warmup-iters 500 --clip-grad 1.0 --bf16
)
PARALLEL=(--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4
  --expert-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel
  --num-layers-per-virtual-pipeline-stage 8)
LOGGING=(--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10
  --save /checkpoints --load /checkpoints --tensorboard-dir /checkpoints/tensorboard
  --ckpt-format torch_dist --auto-detect-ckpt-format)
if [ -n "${WANDB_API_KEY:-}" ]; then
  LOGGING+=(--wandb-project "${WANDB_PROJECT:-Mixtral}" --wandb-exp-name "${WANDB_NAME:-8x7B}")
fi

torchrun "${LAUNCH[@]}" pretrain_gpt.py "${MODEL[@]}" "${MOE[@]}" "${DATA[@]}" "${TRAINING[@]}" \
  "${PARALLEL[@]}" "${LOGGING[@]}"
