"""Mixture of experts: `router` -> `stats` (what it did) -> megatron-core's dispatcher -> `experts`."""
