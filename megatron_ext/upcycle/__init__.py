"""A dense checkpoint -> one of a mixture of experts that starts as the same function.

    python -m megatron_ext.upcycle --load DENSE --save DIR --num-experts 8 --moe-router-topk 2
    pretrain_moe.py --config DIR/config.yaml --load DIR --finetune --data-path ...

Or in one go: `pretrain_moe.py ... --load DENSE --moe-use-upcycling`. Sparse upcycling (Komatsuzaki
et al. 2022, arXiv:2212.05055); granular upcycling with virtual groups (He et al. 2024,
arXiv:2410.07524). Works on the files of a checkpoint, tensor by tensor, so layouts (and virtual
stages, where megatron-core 0.16.1 fails) do not come into it: any layout saved it, any layout loads
it. Optimizer states are not carried over.

E experts, granularity G: expert e is the slice e mod G of the dense layer's width, and the router's
rows of experts g*G ... g*G + G - 1 are equal, so that a token takes whole copies of the dense layer
(top-k is a multiple of G). With weights that sum to one (softmax after the choice, or sigmoid) a
copy's slices count 1/G each; the factor G goes into the linear part: its square root into each of
up and down projection where the unit is gated, all of it into the down projection elsewhere. So the
first logits are the dense model's, but for rounding. (Megatron-LM spreads it over gate, up and
down, which is exact for squared ReLU only.) With softmax before the choice the weights are those of
a random router, near 1/E: the factor is E*G/topk, the logits are near the dense ones, not equal.
"""
