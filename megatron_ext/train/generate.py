"""Continue a prompt with a trained model: greedy or sampled, one token at a time, one rank.

Every token runs the whole context again (no key/value cache): right for looking at a checkpoint,
not for serving. The context is padded on the right to a multiple of 64 tokens, which causal
attention cannot see, so that matrix shapes repeat.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

PAD_MULTIPLE = 64
COLDEST = 1e-30
"""Least temperature that float32 divides by."""


def choose(
    logits_V: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """The next token from its logits [V]: the largest where temperature is 0, else a draw.

    top_k > 0 keeps the k largest; top_p < 1 keeps the smallest set that holds this probability
    (Holtzman et al. 2020).
    """
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.float()
    scores = (logits_V - logits_V.max()) / max(temperature, COLDEST)
    if top_k > 0:
        kth = torch.topk(scores, min(top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    probs, order = torch.sort(torch.softmax(scores, dim=-1), descending=True)
    before = probs.cumsum(0) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(probs, 1, generator=generator)])


@torch.no_grad()
def next_logits(model: nn.Module, tokens: list[int], vocab_size: int) -> Tensor:
    """Logits [V] of the token after `tokens`."""
    device = next(model.parameters()).device
    length = -(-len(tokens) // PAD_MULTIPLE) * PAD_MULTIPLE
    padded = tokens + [0] * (length - len(tokens))
    ids = torch.tensor([padded], dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device)[None]
    logits = model(input_ids=ids, position_ids=positions, attention_mask=None)
    return logits[0, len(tokens) - 1, :vocab_size].cpu()


def generate(
    model: nn.Module,
    prompt: list[int],
    *,
    max_new_tokens: int,
    max_context: int,
    vocab_size: int,
    eod: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
) -> Iterator[int]:
    """New tokens, one at a time, until `max_new_tokens` or the end-of-document token (not yielded).

    Contexts longer than `max_context` keep their last tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = max(PAD_MULTIPLE, max_context // PAD_MULTIPLE * PAD_MULTIPLE)
    tokens = list(prompt)
    model.eval()
    for _ in range(max_new_tokens):
        logits = next_logits(model, tokens[-limit:], vocab_size)
        token = choose(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        if token == eod:
            return
        tokens.append(token)
        yield token
