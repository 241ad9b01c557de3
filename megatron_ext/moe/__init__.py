"""Mixture of experts: `router` -> `stats` (what it did) -> mcore's dispatcher -> `experts`."""
