"""One sequence over many ranks: context parallelism without Transformer Engine.

    split.py       which rank holds which tokens (zig-zag), used by the batch, RoPE and attention
    program.py     a strategy as data: steps of (moves, blocks); `check` proves it without ranks
    strategies.py  p2p (ring), all_gather, a2a (Ulysses), a2a+p2p: programs of the group's size
    plan.py        what follows from a program: the way back, what is saved, what one rank does
    execute.py     one autograd function that runs a plan (worker, forward, backward, exchange)
    block.py       attention of a block of queries on a block of keys, and the exact merge
    reference.py   attention on the whole sequence, which every strategy must equal

        rank 0 holds chunks 0 7      ring(4), hop 1:  kv of rank 0 -> 1 -> 2 -> 3 -> 0
        rank 1              1 6      while it travels, each rank computes with what hop 0 brought;
        rank 2              2 5      the blocks of a hop are equally many on all ranks, because
        rank 3              3 4      each holds an early and a late chunk

A later strategy is one function in `strategies.py` that returns a `Program`:

    TokenRing   Move("q", chunk, 0, rank, rank + 1) instead of "kv": partial results go home and
                gradients come back by themselves (tests/context/test_later.py runs it).
    LightSeq    `contiguous(cp)`, and for idle ranks Move("q", ...) to the helper plus its blocks.
    Other kernels (LASP-2's linear attention) keep the program of all_gather and need another
    `block`: forward, backward and merge of a state instead of scores.

A new layout needs the same layout in the batch and in RoPE: `split.py` is the only place that
knows it.
"""

from megatron_ext.context.exchange import Exchange
from megatron_ext.context.execute import context_attention
from megatron_ext.context.split import Layout, contiguous, zigzag
from megatron_ext.context.strategies import STRATEGIES, build, reach_of
from megatron_ext.context.worker import Attention

__all__ = [
    "STRATEGIES",
    "Attention",
    "Exchange",
    "Layout",
    "build",
    "contiguous",
    "context_attention",
    "reach_of",
    "zigzag",
]
