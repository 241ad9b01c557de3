"""All flags, counted: the table of docs/flags.md.

python -m megatron_ext.config.catalogue          prints it
python -m megatron_ext.config.catalogue --write  puts it into the page
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from megatron_ext.config import ignored, refused, renamed
from megatron_ext.config.flags import Flag, all_flags

PAGE = Path(__file__).parents[2] / "docs/flags.md"
KINDS = ("read", "no kernel in `local`", "without effect", "other name", "refused")
SECTIONS = {
    "parallel": "ranks and groups",
    "model": "model",
    "moe": "router and experts, ours",
    "data": "data and tokenizer",
    "train": "training loop",
    "schedule": "learning rate",
    "checkpoint": "checkpoints",
    "observe": "logs and pictures",
    "resilience": "faults",
    "health": "health",
    "transformer": "megatron-core: model and parallelism",
    "optimizer": "megatron-core: optimizer",
    "ddp": "megatron-core: gradients",
    "megatron_only": "only in Megatron-LM",
}
"""Section -> its name in the table."""


def kind_of_flag(flag: Flag) -> str:
    """Which of `KINDS` a flag is with --transformer-impl local."""
    if flag.dest in refused.FIELDS or flag.dest in {i.dest for i in refused.flags()}:
        return "refused"
    if flag.dest in {i.dest for i in renamed.RENAMED}:
        return "other name"
    if flag.dest in ignored.reasons({}):
        return "without effect"
    return "no kernel in `local`" if flag.dest in ignored.NEEDS_TRANSFORMER_ENGINE else "read"


def table() -> str:
    """Markdown: a row for each section, a column for each kind, sums at the end."""
    counts = Counter((flag.section, kind_of_flag(flag)) for flag in all_flags().values())
    rows = [
        [name, *(counts[section, kind] for kind in KINDS)] for section, name in SECTIONS.items()
    ]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(KINDS) + 1))])
    head = ["flags of", *KINDS, "sum"]
    shown = [[str(row[0]), *(str(n or "") for n in row[1:]), str(sum(row[1:]))] for row in rows]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_with_table(text: str) -> str:
    """The page with the lines of its table replaced."""
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("| ")]
    first = next(i for i in places if lines[i].startswith("| flags of |"))
    last = first
    while last + 1 in places:
        last += 1
    return "\n".join([*lines[:first], *table().splitlines(), *lines[last + 1 :]]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
