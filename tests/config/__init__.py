"""Tests of megatron_ext/config."""
