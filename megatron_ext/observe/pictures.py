"""Pictures of the routing as PNG: matrices of colours with axes, units and a colour bar.

    load          layers x experts: an expert's load, 1 = even
    coselection   experts x experts of a few layers: how often two are chosen together, 1 = chance
    domains       domains x experts of a few layers: where a domain's tokens go, 1 = as all tokens

Colours run from dark blue over green to yellow: they grow evenly in lightness, so that they can be
told apart by the colour-blind and in print. White means: nothing to show (no token, a dense layer).
An image has 256 colours and no smoothing: 64 x 256 cells are drawn in about 10 ms.

Suffixes: L layers, D domains, E experts.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ANCHORS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
"""Colours at even steps of the scale, between which is interpolated."""
LEVELS, WHITE, BLACK, GREY = 250, 250, 251, 252
MOST_PANELS = 6
LONGEST_SIDE = 1024
MARGIN, LINE, GAP = 64, 16, 24


@dataclass(frozen=True)
class Panel:
    """One matrix: values [rows, columns], NaN where there is nothing to show."""

    title: str
    values: np.ndarray
    rows: Sequence[str]


@functools.lru_cache(maxsize=1)
def palette() -> bytes:
    """RGB of the 256 colours: the scale, white, black, grey."""
    places = np.linspace(0, len(ANCHORS) - 1, LEVELS)
    channels = np.array(ANCHORS, dtype=float).T
    scale = [np.interp(places, np.arange(len(ANCHORS)), channel) for channel in channels]
    colours = np.stack(scale, axis=1).round().astype(np.uint8)
    rest = np.array([(255, 255, 255), (0, 0, 0), (150, 150, 150)] + [(0, 0, 0)] * 3, np.uint8)
    return np.concatenate((colours, rest)).tobytes()


@functools.lru_cache(maxsize=1)
def _font():
    return ImageFont.load_default(size=12)


def levels(values: np.ndarray, high: float) -> np.ndarray:
    """uint8 indices of colours of values 0..high; above is the last colour, NaN is white."""
    scaled = np.clip(np.nan_to_num(values) / high, 0, 1) * (LEVELS - 1)
    return np.where(np.isnan(values), WHITE, scaled.round()).astype(np.uint8)


def ticks(count: int, most: int) -> list[int]:
    """At most `most` places 0 .. count - 1, evenly, the first among them: every 1, 2, 5, 10 ..."""
    step = next(
        base * 10**power
        for power in range(9)
        for base in (1, 2, 5)
        if count <= most * base * 10**power
    )
    return list(range(0, count, step))


def cell_size(rows: int, columns: int, panels: int) -> tuple[int, int]:
    """(height, width) in pixels of a cell, so that a panel fits its part of the page."""
    side = LONGEST_SIDE if panels == 1 else LONGEST_SIDE // min(3, panels)
    width = max(1, min(32, side // columns))
    height = max(1, min(24, (side if panels > 1 else LONGEST_SIDE // 2 + 128) // rows))
    return height, width


def draw(
    panels: Sequence[Panel], *, title: str, x_label: str, y_label: str, unit: str, high: float
) -> bytes:
    """The panels in rows of two, or three if many, one colour bar for all, as PNG."""
    rows, columns = panels[0].values.shape
    height, width = cell_size(rows, columns, len(panels))
    across = min(len(panels), 2 if len(panels) <= 4 else 3)
    down = -(-len(panels) // across)
    left = MARGIN + 7 * max(len(name) for name in panels[0].rows)
    outer_w, outer_h = left + width * columns + GAP, height * rows + 4 * LINE
    size = (max(across * outer_w + 130, 7 * len(title) + 20), LINE * 2 + down * outer_h + LINE)
    image = Image.new("P", (size[0], max(size[1], 220)), WHITE)
    image.putpalette(palette())
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"
    pen.text((10, 6), title, fill=BLACK, font=_font())
    for number, panel in enumerate(panels):
        corner = (number % across * outer_w + left, LINE * 3 + number // across * outer_h)
        cells = levels(panel.values, high).repeat(height, axis=0).repeat(width, axis=1)
        image.paste(Image.fromarray(cells, "L"), corner)
        _axes(pen, panel, corner, (height, width), (x_label, y_label))
    _bar(image, pen, (across * outer_w + 10, LINE * 3), unit, high)
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _axes(pen, panel: Panel, corner: tuple[int, int], cell: tuple[int, int], labels) -> None:
    """Frame, title, numbers of the columns below and names of the rows on the left."""
    (x, y), (height, width) = corner, cell
    rows, columns = panel.values.shape
    right, bottom = x + width * columns, y + height * rows
    pen.rectangle((x - 1, y - 1, right, bottom), outline=GREY)
    pen.text((x, y - LINE - 2), panel.title, fill=BLACK, font=_font())
    for column in ticks(columns, max(1, width * columns // 30)):
        middle = x + column * width + width // 2
        pen.line((middle, bottom, middle, bottom + 3), fill=BLACK)
        pen.text((middle, bottom + 3), str(column), fill=BLACK, font=_font(), anchor="ma")
    pen.text(((x + right) // 2, bottom + LINE), labels[0], fill=BLACK, font=_font(), anchor="ma")
    for row in ticks(rows, max(1, height * rows // 14)):
        middle = y + row * height + height // 2
        pen.text((x - 5, middle), panel.rows[row], fill=BLACK, font=_font(), anchor="rm")
    pen.text((x - 5, y - LINE - 2), labels[1], fill=BLACK, font=_font(), anchor="ra")


def _bar(image: Image.Image, pen, corner: tuple[int, int], unit: str, high: float) -> None:
    """The colour bar: 0 below, `high` and more above."""
    x, y = corner
    length = 120
    column = np.linspace(LEVELS - 1, 0, length).round().astype(np.uint8)
    image.paste(Image.fromarray(column[:, None].repeat(14, axis=1), "L"), (x, y))
    pen.rectangle((x - 1, y - 1, x + 14, y + length), outline=GREY)
    for share, name in ((0, "0"), (1 / high, "1"), (1, f">= {high:g}")):
        level = y + round((1 - share) * (length - 1))
        pen.text((x + 20, level), name, fill=BLACK, font=_font(), anchor="lm")
    for number, line in enumerate((*unit.split("\n"), "white: none")):
        pen.text((x, y + length + 8 + number * 14), line, fill=BLACK, font=_font())


def _layers(count: int) -> list[str]:
    return [str(layer + 1) for layer in range(count)]


def load(counts_LE: np.ndarray, is_moe_L: np.ndarray, step: int) -> bytes:
    """Load of every expert of every layer relative to the mean of its layer."""
    mean_L1 = np.maximum(counts_LE.mean(axis=1, keepdims=True), 1e-9)
    values = np.where(is_moe_L[:, None] & (counts_LE > 0), counts_LE / mean_L1, np.nan)
    panel = Panel("", values, _layers(len(values)))
    title = f"step {step}: load of each expert (white: no token in this step)"
    unit = "load /\nmean load"
    return draw([panel], title=title, x_label="expert", y_label="layer", unit=unit, high=3.0)


def _spread(places: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the places, evenly, the first and the last among them."""
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).round().astype(int)]


def coselection(pairs_LEE: np.ndarray, is_moe_L: np.ndarray, step: int) -> bytes:
    """How often two experts work on the same token, relative to a choice by chance with the same
    loads: n_ij x sum of all pairs / (n_i x n_j); the diagonal is left out.
    """
    panels = []
    for layer in _spread(np.flatnonzero(is_moe_L), MOST_PANELS):
        pairs = pairs_LEE[layer].astype(float)
        np.fill_diagonal(pairs, 0.0)
        ends = pairs.sum(axis=1)
        expected = np.outer(ends, ends) / max(pairs.sum(), 1e-9)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.where(expected > 0, pairs / expected, np.nan)
        np.fill_diagonal(values, np.nan)
        panels.append(Panel(f"layer {layer + 1}", values, list(map(str, range(len(values))))))
    title = f"step {step}: experts chosen together"
    labels = {"x_label": "expert", "y_label": "expert", "unit": "pairs /\nby chance"}
    return draw(panels, title=title, **labels, high=3.0)


def domains(
    domains_LDE: np.ndarray,
    is_moe_L: np.ndarray,
    nmi_L: np.ndarray,
    names: Sequence[str],
    step: int,
) -> bytes:
    """Share of a domain's assignments that an expert gets / share of all assignments; the layers in
    which domain and expert have most to do with each other.
    """
    moe = np.flatnonzero(is_moe_L)
    best = np.sort(moe[np.argsort(-nmi_L[moe], kind="stable")][:MOST_PANELS])
    panels = []
    for layer in best:
        table = domains_LDE[layer].astype(float)
        of_domain = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-9)
        of_all = table.sum(axis=0) / max(table.sum(), 1e-9)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.where(
                (of_all > 0) & (table.sum(axis=1) > 0)[:, None], of_domain / of_all, np.nan
            )
        short = [name[-24:] for name in names]
        panels.append(Panel(f"layer {layer + 1}, NMI {nmi_L[layer]:.3f}", values, short))
    title = f"step {step}: where each domain's tokens go"
    labels = {"x_label": "expert", "y_label": "domain", "unit": "domain's share /\nall tokens'"}
    return draw(panels, title=title, **labels, high=2.0)
