"""A simulated step as a picture: one row a pipeline rank, time to the right."""

from __future__ import annotations

from megatron_ext.pipeline.simulate import Timeline

FILL = {"F": ("#4c78a8", "#9ecae9"), "B": ("#54a24b", "#a1d99b"), "other": ("#b279a2",)}
WIDTH, ROW = 1200, 22


def text(timeline: Timeline, columns: int = 96) -> str:
    """One line a rank: the micro-batch's last digit, forwards plain, backwards in letters, bubbles
    as dots."""
    ranks = len(timeline.busy)
    rows = [["."] * columns for _ in range(ranks)]
    scale = columns / timeline.makespan if timeline.makespan else 0
    for event in timeline.events:
        number = event.action.micro_batch
        mark = str(number % 10) if event.action.kind == "F" else chr(ord("a") + number % 26)
        for place in range(int(event.start * scale), max(int(event.end * scale), 1)):
            rows[event.rank][min(place, columns - 1)] = mark
    return "\n".join(f"pp {rank:2d} {''.join(row)}" for rank, row in enumerate(rows))


def svg(timeline: Timeline, title: str, tail: list[tuple[str, float]] | None = None) -> str:
    """The picture as an SVG document.

    Args:
        tail: (name, seconds) of what every rank does after the pipeline: gradients, optimizer.
    """
    tail = tail or []
    total = timeline.makespan + sum(seconds for _, seconds in tail)
    scale = (WIDTH - 60) / total if total else 0
    ranks = len(timeline.busy)
    height = ranks * ROW + 50
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="10">',
        f'<text x="4" y="14" font-size="12">{_escape(title)}</text>',
    ]
    for rank in range(ranks):
        out.append(f'<text x="4" y="{_top(rank) + 14}">pp {rank}</text>')
    for event in timeline.events:
        shades = FILL[event.action.kind]
        fill = shades[event.action.chunk % len(shades)]
        out.append(_box(event.rank, event.start, event.end, scale, fill, str(event.action)))
    begin = timeline.makespan
    for name, seconds in tail:
        out += [
            _box(rank, begin, begin + seconds, scale, FILL["other"][0], name)
            for rank in range(ranks)
        ]
        begin += seconds
    out.append(f'<text x="50" y="{height - 8}">0 s to {total:.4g} s</text></svg>')
    return "\n".join(out)


def _top(rank: int) -> int:
    return 22 + rank * ROW


def _box(rank: int, start: float, end: float, scale: float, fill: str, name: str) -> str:
    width = max((end - start) * scale, 0.3)
    x, y = 50 + start * scale, _top(rank)
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 4}" fill="{fill}"'
        f"><title>{_escape(name)} {start:.4g}-{end:.4g} s</title></rect>"
    )
    if width > 7 * len(name):
        box += f'<text x="{x + 2:.2f}" y="{y + 13}">{_escape(name)}</text>'
    return box


def _escape(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
