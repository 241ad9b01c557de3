"""The fault matrix: what may happen to a run, done to it on purpose, with the figures of what came
of it.

    python -m tests.faults --rows all --kills 60 --seed 1

A *row* is a kind of fault, with the number it has in docs/reliability.md. Rows of files and folders
need one process and run by the hundred; rows of processes train a tiny model on forked ranks, break
it at a named point, start it again and compare every step and the final state with an uninterrupted
run, bit for bit. Faults are injected from here only: audit hooks, wrappers around functions by
dotted name, resource limits and signals; the program itself knows nothing of them.
"""
