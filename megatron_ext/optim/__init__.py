"""Optimizer and schedules: RunConfig -> megatron-core's optimizer and its learning-rate scheduler."""
