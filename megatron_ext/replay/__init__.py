"""A step of a run once more, from the checkpoint before it: is it the same, and what was in it.

python -m megatron_ext.replay --run RUN --step N

records   RUN/config.yaml, metrics.jsonl and the checkpoints before step N     (no torch)
program   the run's model and data on its ranks, loaded, trained to N; nothing is saved
compare   each replayed step against metrics.jsonl, bit for bit
batch     step N's losses, sample ids, documents and a piece of their text
"""
