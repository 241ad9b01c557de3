"""The parts of a step's time, for those who measure (spans.py) and those who draw; no torch."""

from __future__ import annotations

KINDS = (
    "data",
    "forward",
    "backward",
    "all_to_all",
    "pipeline_wait",
    "collectives",
    "optimizer",
    "save",
)
"""Parts of the time split, in the order in which pictures stack them."""

KIND_OF_OP = {"all_to_all": "all_to_all", "send": "pipeline_wait", "recv": "pipeline_wait"}
"""Operation of a process group -> kind; all others are "collectives"."""
