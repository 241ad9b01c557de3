#!/usr/bin/env bash
# A Mixtral 8x7B launch script as users of Megatron-LM have it, scaled down: 2 layers, hidden size 64, 2 ranks.
# Only sizes, paths and the number of steps differ from a real one; tests/launch/test_torchrun.py runs it.
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS=1

CHECKPOINT_PATH=$1
TOKENIZER_MODEL=$2
DATA_PATH=$3
PRETRAIN=$4

DISTRIBUTED_ARGS=(--nproc-per-node 2 --nnodes 1 --node-rank 0 --master-addr localhost --master-port "$5")

GPT_MODEL_ARGS=(
  --use-mcore-models
  --disable-bias-linear
  --seq-length 64
  --max-position-embeddings 256
  --num-layers 2
  --hidden-size 64
  --ffn-hidden-size 224
  --num-attention-heads 4
  --init-method-std 0.01
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --normalization RMSNorm
  --position-embedding-type rope
  --swiglu
  --untie-embeddings-and-output-weights
  --group-query-attention
  --num-query-groups 2
  --no-masked-softmax-fusion
  --no-position-embedding
  --rotary-base 1000000
)

MOE_ARGS=(
  --num-experts 8
  --moe-router-topk 2
  --moe-router-load-balancing-type aux_loss
  --moe-aux-loss-coeff 1e-2
  --moe-grouped-gemm
  --moe-token-dispatcher-type alltoall
  --overlap-param-gather
  --overlap-grad-reduce
)

DATA_ARGS=(
  --tokenizer-type Llama2Tokenizer
  --tokenizer-model "$TOKENIZER_MODEL"
  --data-path "$DATA_PATH"
  --split "90,8,2"
)

TRAINING_ARGS=(
  --micro-batch-size 1
  --global-batch-size 8
  --lr 1e-3
  --train-iters 4
  --lr-decay-iters 4
  --lr-decay-style cosine
  --min-lr 1.0e-5
  --weight-decay 0.1
  --lr-warmup-iters 1
  --clip-grad 1.0
  --bf16
  --no-gradient-accumulation-fusion
  --distributed-backend nccl
)

MODEL_PARALLEL_ARGS=(
  --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 1
  --expert-model-parallel-size 2
  --use-distributed-optimizer
  --sequence-parallel
)

LOGGING_ARGS=(
  --log-interval 1
  --save-interval 10000
  --eval-interval 1000
  --eval-iters 2
  --save "$CHECKPOINT_PATH"
  --load "$CHECKPOINT_PATH"
  --tensorboard-dir "$CHECKPOINT_PATH/tensorboard"
  --no-load-optim
  --no-load-rng
)

torchrun "${DISTRIBUTED_ARGS[@]}" "$PRETRAIN" \
  "${GPT_MODEL_ARGS[@]}" \
  "${MOE_ARGS[@]}" \
  "${DATA_ARGS[@]}" \
  "${TRAINING_ARGS[@]}" \
  "${MODEL_PARALLEL_ARGS[@]}" \
  "${LOGGING_ARGS[@]}" \
  "${@:6}" # --run-dir, which Megatron-LM does not have
