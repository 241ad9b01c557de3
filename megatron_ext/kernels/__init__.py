"""Triton kernels of the mixture-of-experts layer on CUDA, without Transformer Engine.

    order.py         which sorted row holds which assignment, without a host synchronisation
    rows.py          permute with probabilities, unpermute as a weighted sum, both ways
    grouped_gemm.py  rows of expert e times weight e: forward, dX, dW; rows may be gathered
    swiglu.py        silu(gate) * up * probability, both ways
    routed.py        the three as one differentiable function of few saved tensors
    reference.py     each of them in plain torch, the naive way: what the kernels must equal
    choose.py        which of them a device and dtype get

`import megatron_ext.kernels` imports no Triton: the kernel modules do, and `choose` says whether
they can be imported. Tests run the kernels through Triton's interpreter where no GPU is found.

Shapes: T tokens of this rank, K experts of a token, R = T x K sorted rows, E experts of this rank,
H hidden, F expert hidden. A *slot* is the flat place t x K + k of an assignment in a [T, K] table.
"""
