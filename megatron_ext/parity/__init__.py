"""Is every layout the same training? `python -m megatron_ext.parity` runs a model in many layouts
and compares each with one rank.

    names (layout <-> flags) -> cases (which to run) -> measure (on forked ranks: loss, every
    gradient, routing, curve) -> compare (pure) -> report (table or JSON, exit code)
"""
