"""What a checkpoint belongs to besides flags: what is in the data and tokenizer files behind them
(data/inputs.py makes the hashes). Files may move; a file of the same name with another content is
another run, unless --accept-change names data_content or tokenizer_content.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

DATA, TOKENIZER = "data_content", "tokenizer_content"
MOST_SHOWN = 4


def content_differences(
    saved: Mapping[str, Any], mine: Mapping[str, Any], accepted: Collection[str]
) -> dict[str, str]:
    """Name -> which files differ, with both hashes; without the accepted names. A pair or a hash
    that one of the two does not know is no difference: a checkpoint of before has none, and another
    --data-path is the flag's.
    """
    found = {}
    for name in (DATA, TOKENIZER):
        changed = list(_changes(saved.get(name), mine.get(name))) if name not in accepted else []
        if changed:
            more = f" and {len(changed) - MOST_SHOWN} more" if len(changed) > MOST_SHOWN else ""
            found[name] = "; ".join(changed[:MOST_SHOWN]) + more
    return found


def _changes(saved: Any, mine: Any) -> Iterator[str]:
    for name, now in mine.items() if isinstance(saved, dict) and isinstance(mine, dict) else ():
        before = saved.get(name)
        if not isinstance(before, dict):
            continue
        for kind in (kind for kind in now if kind != "path" and kind in before):
            if now[kind] != before[kind]:
                yield f"{now.get('path', name)} ({kind}) {before[kind]} -> {now[kind]}"
