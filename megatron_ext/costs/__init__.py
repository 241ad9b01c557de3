"""WHAT it weighs, as pure functions of the configuration (no torch).

parameters.py  parameters: total, active for a token, on each rank
flops.py       model FLOPs of a token
dryrun.py      what --dry-run prints
"""
