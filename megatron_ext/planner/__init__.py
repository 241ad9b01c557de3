"""BEFORE the run: which layouts are legal, what they weigh, how long a step takes, which is best.

layouts.py    every legal layout, and the rule that rejects each other
memory.py     bytes of every pipeline stage
step_time.py  a simulated step on a cluster
choose.py     stages of equal time; dynamic programming over layers for recomputation
search.py     the best layouts under a memory limit
placement.py  which rank stands where in a cluster of several parts (Holmes)
command.py    python -m megatron_ext.planner

No torch, no process group.
"""
