#!/usr/bin/env bash
# Qwen3-30B-A3B on 4 nodes of 8, in the shape of the scripts of model-conversion kits.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1 NVTE_FLASH_ATTN=1
NNODES=${NNODES:-4}

model=(
  --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --moe-ffn-hidden-size 768
  --num-attention-heads 32 --kv-channels 128 --group-query-attention --num-query-groups 4
  --qk-layernorm --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --swiglu
  --use-rotary-position-embeddings --position-embedding-type rope --rotary-percent 1.0
  --rotary-base 1000000 --rotary-seq-len-interpolation-factor 1
  --untie-embeddings-and-output-weights --vocab-size 151936 --attention-dropout 0 --hidden-dropout 0
)
moe=(
  --num-experts 128 --moe-router-topk 8 --moe-router-score-function softmax
  --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3
  --moe-layer-freq '([1]*48)' --moe-token-dispatcher-type alltoall --moe-grouped-gemm
  --moe-permute-fusion --moe-router-dtype fp32 --moe-shared-expert-overlap
)
train=(
  --seq-length 4096 --max-position-embeddings 40960 --micro-batch-size 1 --global-batch-size 256
  --train-iters 25000 --lr 3e-4 --min-lr 3e-5 --lr-decay-style WSD --lr-wsd-decay-style minus_sqrt
  --lr-wsd-decay-iters 2500 --lr-warmup-iters 500 --weight-decay 0.1 --adam-beta1 0.9
  --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.008 --bf16 --grad-reduce-in-bf16
  --no-weight-decay-cond-type apply_wd_to_qk_layernorm --seed 42
  --pretrained-checkpoint /models/qwen3-mcore --no-load-optim --no-load-rng
)
system=(
  --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --expert-model-parallel-size 8
  --expert-tensor-parallel-size 1 --sequence-parallel --use-distributed-optimizer
  --overlap-grad-reduce --overlap-param-gather --recompute-granularity full
  --recompute-method uniform --recompute-num-layers 1 --attention-backend flash
  --transformer-impl transformer_engine --distributed-timeout-minutes 60
  --tp-comm-bootstrap-backend nccl --empty-unused-memory-level 1 --no-gradient-accumulation-fusion
  --exit-signal-handler --exit-signal-handler-for-training --flight-recorder-dump-path /tmp/flight
)
data=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen/Qwen3-30B-A3B --trust-remote-code
  --train-data-path 0.7 /data/web 0.3 /data/code --valid-data-path /data/valid --num-workers 4
  --eod-mask-loss --reset-position-ids --reset-attention-mask)
logs=(--save /checkpoints --save-interval 1000 --eval-interval 500 --eval-iters 20 --log-interval 10
  --tensorboard-dir /logs --log-throughput --timing-log-level 1 --timing-log-option minmax
  --profile --profile-step-start 10 --profile-step-end 12 --profile-ranks 0 8
  --use-pytorch-profiler --async-save --async-strategy nvrx --ckpt-fully-parallel-load)

torchrun --nnodes "$NNODES" --nproc-per-node 8 --master-addr localhost --master-port 29500 \
  pretrain_gpt.py "${model[@]}" "${moe[@]}" "${train[@]}" "${system[@]}" "${data[@]}" "${logs[@]}"
