"""Every flag has a help text, also those that are generated from megatron-core's dataclasses."""

from __future__ import annotations

from megatron_ext.config.flags import all_flags


def test_every_flag_that_is_acted_on_has_a_help_text():
    flags = [flag for flag in all_flags().values() if flag.section != "megatron_only"]
    assert len(flags) > 300
    assert not [flag.dest for flag in flags if not (flag.help or "").strip()]
