"""What a run says: `run_dir` (where), `metrics` (one record a step), `console`, `tensorboard` (how
it is shown).

Observers only read. All of them get the same `dict` record; rank 0 writes.
"""
