"""The samples of a global batch as 64 bits that no order and no layout changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron.core import parallel_state

_MASK = 2**64 - 1


def mix(number: int) -> int:
    """64 well mixed bits of a number (the finaliser of splitmix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def halves(ids: Iterable[int]) -> tuple[float, float]:
    """Sums of the high and of the low 32 bits of each id's mix: exact in float64 up to 2 million
    ids, so that ranks can add theirs up.
    """
    mixes = [mix(one) for one in ids]
    return float(sum(m >> 32 for m in mixes)), float(sum(m & 0xFFFFFFFF for m in mixes))


def mixed(micro_batches: Sequence) -> tuple[float, float]:
    """`halves` of this rank's samples; 0 on ranks that only share the samples of another."""
    if (
        parallel_state.get_tensor_model_parallel_rank()
        or parallel_state.get_pipeline_model_parallel_rank()
        or parallel_state.get_context_parallel_rank()
    ):
        return 0.0, 0.0
    return halves(one for batch in micro_batches for one in batch.sample_ids_B.tolist())
