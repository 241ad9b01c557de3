"""The page's text: template, style, scripts and data in one file that needs no network."""

from __future__ import annotations

import html
import json
import time
from pathlib import Path
from typing import Any

from megatron_ext.observe.report.flags import differing

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("draw.js", "lines.js", "heat.js", "bars.js", "timeline.js", "tables.js", "page.js")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The browser itself refuses any load from elsewhere."""


def _inlined(data: Any) -> str:
    """JSON that no text of a run can end early: `</script>` and comments lose their bracket."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def compose(runs: list[dict[str, Any]]) -> str:
    """The page of one run, or of two side by side."""
    data = {"runs": runs, "made": time.strftime("%Y-%m-%d %H:%M")}
    data["differing"] = differing(runs[0]["flags"], runs[1]["flags"]) if len(runs) > 1 else []
    title = " and ".join(run["name"] for run in runs)
    parts = {
        "POLICY": POLICY,
        "TITLE": html.escape(title),
        "STYLE": (PAGE / "page.css").read_text(encoding="utf-8"),
        "DATA": _inlined(data),
        "SCRIPT": "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (PAGE / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        before, _, after = text.partition(f"@{name}@")
        text = before + part + after
    return text
