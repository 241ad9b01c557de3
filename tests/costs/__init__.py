"""Tests of megatron_ext/costs."""
