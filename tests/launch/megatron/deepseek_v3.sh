#!/usr/bin/env bash
# DeepSeek-V3 on 128 nodes of 8, in the shape of a benchmark zoo: one string of flags from variables.
set -euo pipefail
TP=${TP:-1} PP=${PP:-16} EP=${EP:-64} MBS=${MBS:-1} GBS=${GBS:-8192} SEQ_LEN=${SEQ_LEN:-4096}

ARGS="--distributed-timeout-minutes 60 --tensor-model-parallel-size $TP
  --pipeline-model-parallel-size $PP --expert-model-parallel-size $EP
  --expert-tensor-parallel-size 1 --context-parallel-size 1
  --pipeline-model-parallel-layout Et*3|(tt|)*29m|L
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --use-mcore-models --sequence-parallel --use-flash-attn --disable-bias-linear
  --micro-batch-size $MBS --global-batch-size $GBS --train-samples 585937500
  --exit-duration-in-mins 220 --no-check-for-nan-in-loss-and-grad --manual-gc --manual-gc-interval 10
  --no-bias-swiglu-fusion --cross-entropy-loss-fusion --cross-entropy-fusion-impl te
  --transformer-impl transformer_engine --seq-length $SEQ_LEN --max-position-embeddings $SEQ_LEN
  --data-cache-path /workspace/cache --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model deepseek-ai/DeepSeek-V3 --data-path /data/corpus --split 99,1,0
  --no-mmap-bin-files --no-create-attention-mask-in-dataloader --num-workers 6
  --make-vocab-size-divisible-by 3232 --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432
  --num-attention-heads 128 --kv-channels 128 --position-embedding-type rope --rotary-base 10000
  --rotary-percent 1.0 --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0
  --swiglu --untie-embeddings-and-output-weights --normalization RMSNorm --norm-epsilon 1e-6
  --init-method-std 0.02 --attention-dropout 0.0 --hidden-dropout 0.0 --clip-grad 1.0
  --weight-decay 0.1 --qk-layernorm --multi-latent-attention --q-lora-rank 1536
  --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
  --lr-decay-samples 584765624 --lr-warmup-samples 1536000 --lr-warmup-init 3.9e-7 --lr 3.9e-6
  --min-lr 3.9e-7 --lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95
  --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1
  --num-experts 256 --moe-layer-freq ([0]*3+[1]*58) --moe-ffn-hidden-size 2048
  --moe-shared-expert-intermediate-size 2048 --moe-router-load-balancing-type seq_aux_loss
  --moe-router-topk 8 --moe-token-dispatcher-type flex --moe-enable-deepep
  --moe-router-pre-softmax --moe-grouped-gemm --moe-aux-loss-coeff 1e-4
  --moe-router-group-topk 4 --moe-router-num-groups 8 --moe-router-topk-scaling-factor 2.5
  --moe-router-score-function sigmoid --moe-router-enable-expert-bias
  --moe-router-bias-update-rate 1e-3 --moe-router-dtype fp32 --moe-permute-fusion
  --moe-router-fusion --eval-iters 32 --eval-interval 200 --auto-detect-ckpt-format
  --save /checkpoints --load /checkpoints --save-interval 500 --save-retain-interval 5000
  --dist-ckpt-strictness log_all --async-save --use-persistent-ckpt-worker
  --non-persistent-save-interval 50 --non-persistent-ckpt-type local
  --non-persistent-local-ckpt-dir /nvme/checkpoints
  --log-timers-to-tensorboard --log-memory-to-tensorboard --log-num-zeros-in-grad
  --log-params-norm --log-validation-ppl-to-tensorboard --log-throughput --log-interval 1
  --logging-level 40 --tensorboard-dir /checkpoints/tensorboard --wandb-project deepseek
  --wandb-exp-name v3 --bf16 --enable-experimental --recompute-granularity selective
  --recompute-modules mla_up_proj moe mlp layernorm --fp8-recipe blockwise --fp8-format e4m3
  --moe-router-padding-for-fp8 --use-precision-aware-optimizer --main-grads-dtype fp32
  --main-params-dtype fp32 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"

set -f # the pattern of --moe-layer-freq is no pattern of file names
# shellcheck disable=SC2086 # the string is a list of words
torchrun --nnodes=128 --nproc-per-node=8 --rdzv-backend c10d pretrain_gpt.py $ARGS
