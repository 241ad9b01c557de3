"""No flag of ours is forgotten: each is read, resolved, or listed as without effect."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_ext.config import ignored, refused, renamed
from megatron_ext.config.conditions import NEEDS
from megatron_ext.config.flags import OURS, all_flags, members

ROOT = Path(__file__).parents[2]
RESOLVED = {
    # config itself turns these into other values
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "use_rotary_position_embeddings",
    "group_query_attention",
    "recompute_activations",
    "skip_train",
    # both values mean what happens anyway; their help says so
    "add_position_embedding",
    "create_attention_mask_in_dataloader",
    "exit_on_missing_checkpoint",
    "auto_detect_ckpt_format",
    "use_pytorch_profiler",
}


def sources() -> str:
    files = [*(ROOT / "megatron_ext").rglob("*.py"), *(ROOT / "data").rglob("*.py")]
    files = [f for f in files if (ROOT / "megatron_ext" / "config") not in f.parents]
    files.append(ROOT / "pretrain_moe.py")
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def test_every_field_of_ours_is_read_or_listed():
    text = sources()
    listed = RESOLVED | set(ignored.UNHONOURED) | set(ignored.NEEDS_TRANSFORMER_ENGINE)
    listed |= set(refused.FIELDS)
    unread = [
        member.dest
        for section in OURS
        for member in members()[section]
        if member.dest not in listed and not re.search(rf"\b{member.name}\b", text)
    ]
    assert unread == []


def test_the_table_names_flags_that_exist():
    flags = all_flags()
    tables = (ignored.UNHONOURED, ignored.NEEDS_TRANSFORMER_ENGINE, ignored.HARMLESS)
    tables += (ignored.ON_BY_DEFAULT, refused.FIELDS, renamed.DEPRECATED, renamed.SAME_VALUE)
    tables += (renamed.SAME_VALUE.values(), *(need.dests for need in NEEDS))
    for table in tables:
        assert not set(table) - set(flags)
