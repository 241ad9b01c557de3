"""RunConfig -> megatron-core's optimizer and its learning-rate and weight-decay scheduler."""
