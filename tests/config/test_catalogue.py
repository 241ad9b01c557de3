"""The table of docs/flags.md is the program's."""

from __future__ import annotations

from megatron_ext.config.catalogue import (
    KINDS,
    PAGE,
    SECTIONS,
    kind_of_flag,
    page_with_table,
    table,
)
from megatron_ext.config.flags import all_flags


def test_the_page_has_the_table_of_today():
    text = PAGE.read_text(encoding="utf-8")
    assert table() in text, "run: python -m megatron_ext.config.catalogue --write"
    assert page_with_table(text) == text


def test_every_flag_is_counted_once():
    assert {flag.section for flag in all_flags().values()} <= set(SECTIONS)
    assert table().splitlines()[-1].split(" | ")[-1].strip(" |") == str(len(all_flags()))
    kinds = {name: kind_of_flag(all_flags()[name]) for name in ("lr", "fp8", "qk_clip", "warmup")}
    assert kinds == {
        "lr": "read",
        "fp8": "without effect",
        "qk_clip": "refused",
        "warmup": "other name",
    }
    assert {kind_of_flag(flag) for flag in all_flags().values()} == set(KINDS)
