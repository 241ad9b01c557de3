#!/usr/bin/env bash
# Mixtral 8x22B on 32 nodes of 8, in the shape of flags that a configuration framework writes out:
# one option a line, defaults included, switches that turn defaults off.
set -euo pipefail
set -- --num-layers 56 --hidden-size 6144 --ffn-hidden-size 16384 --num-attention-heads 48 \
  --num-query-groups 8 --group-query-attention --kv-channels 128 --seq-length 8192 \
  --max-position-embeddings 65536 --normalization RMSNorm --swiglu --disable-bias-linear \
  --untie-embeddings-and-output-weights --position-embedding-type rope --rotary-base 1000000 \
  --num-experts 8 --moe-router-topk 2 --moe-router-pre-softmax --moe-aux-loss-coeff 0.001 \
  --moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall \
  --moe-grouped-gemm --moe-permute-fusion --moe-pad-expert-input-to-capacity \
  --moe-expert-capacity-factor 1.25 --moe-token-drop-policy probs \
  --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.02 \
  --tensor-model-parallel-size 2 --pipeline-model-parallel-size 8 --context-parallel-size 2 \
  --cp-comm-type p2p --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 \
  --num-virtual-stages-per-pipeline-rank 7 --sequence-parallel --use-distributed-optimizer \
  --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 40000000 \
  --ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw --no-align-grad-reduce \
  --tp-comm-overlap --tp-comm-bootstrap-backend nccl --no-tp-comm-split-ag \
  --cuda-graph-modules attn moe_router --bf16 --accumulate-allreduce-grads-in-fp32 \
  --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-margin 0 \
  --recompute-activations --no-persist-layer-norm --no-rope-fusion \
  --micro-batch-size 1 --global-batch-size 256 --train-samples 12207031 \
  --rampup-batch-size 64 64 1000000 --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine \
  --lr-warmup-samples 200000 --weight-decay 0.1 --start-weight-decay 0.1 --end-weight-decay 0.1 \
  --weight-decay-incr-style constant --clip-grad 1.0 --optimizer adam --adam-beta1 0.9 \
  --adam-beta2 0.95 --adam-eps 1e-8 --loss-scale-window 1000 --hysteresis 2 \
  --tokenizer-type SentencePieceTokenizer --tokenizer-model /data/tokenizer.model \
  --per-split-data-args-path /data/splits.json --mid-level-dataset-surplus 0.005 \
  --dataloader-type single --num-dataset-builder-threads 8 --no-save-tokenizer-assets \
  --save /checkpoints --load /checkpoints --save-interval 500 --eval-interval 500 --eval-iters 8 \
  --log-interval 10 --tensorboard-dir /logs --no-log-loss-scale-to-tensorboard \
  --log-world-size-to-tensorboard --log-energy --check-weight-hash-across-dp-replicas-interval 500 \
  --rerun-mode validate_results --result-rejected-tracker-filename /logs/rejected \
  --high-priority-stream-groups ep --nccl-communicator-config-path /etc/nccl.yaml \
  --distributed-timeout-seconds-after-init 600 --no-one-logger --inprocess-restart

torchrun --nnodes 32 --nproc-per-node 8 --rdzv-id job --rdzv-endpoint localhost:29500 pretrain_gpt.py "$@"
