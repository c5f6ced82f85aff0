"""The drawings of the report: SVG that takes its colours from the page, so that one file suits light, dark and paper.

Built as an element tree, so that names out of a checkpoint are escaped wherever they end up.
"""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

FULL, HALF = 1000, 486  # widths in the units of the page's column, whose font sizes then hold in drawings too
_MINUS = "\N{MINUS SIGN}"
_CHAR = 6.6  # width of a character of a label, about


class Drawing:
    """An SVG under construction; ``css`` names the classes that give it colour (report.html.jinja)."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height = width, height
        size = {"viewBox": f"0 0 {_n(width)} {_n(height)}", "width": _n(width), "height": _n(height)}
        self._root = ET.Element("svg", {**size, "role": "img", "aria-label": label, "class": "chart"})

    def add(self, tag: str, css: str, tip: str = "", **attributes: float | str) -> ET.Element:
        given = {k.replace("_", "-"): v if isinstance(v, str) else _n(v) for k, v in attributes.items()}
        element = ET.SubElement(self._root, tag, {"class": css, **given})
        if tip:
            ET.SubElement(element, "title").text = tip
        return element

    def text(self, x: float, y: float, text: str, css: str = "label", anchor: str = "start") -> None:
        self.add("text", css, x=x, y=y, text_anchor=anchor).text = text

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str = "rule") -> None:
        self.add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[tuple[float, float]], css: str, closed: bool = False) -> None:
        steps = " L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self.add("path", css, d=f"M{steps}{' Z' if closed else ''}")

    def __str__(self) -> str:
        return ET.tostring(self._root, encoding="unicode")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Axis:
    """A linear map from [lo, hi] to pixels, with round ticks."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.lo) / (self.hi - self.lo) * (self.end - self.start)

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, margin: float = 0.12) -> Axis:
        """Wide enough for the values, the outermost off the frame; equal values get room of their own."""
        lo, hi = min(values), max(values)
        room = (hi - lo) * margin or max(abs(hi) * 0.02, 1e-3)
        return cls(lo - room, hi + room, start, end)

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """Round values and their labels, all with the decimals that the step needs."""
        step = 10.0 ** math.floor(math.log10((self.hi - self.lo) / about))
        step *= next((m for m in (1, 2, 5) if (self.hi - self.lo) / (step * m) <= about), 10)
        first = math.ceil(self.lo / step - 1e-9)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        values = [i * step for i in range(first, math.floor(self.hi / step + 1e-9) + 1)]
        if decimals > 6 or self.hi >= 1e7:
            return [(v, number(v)) for v in values]
        return [(v, "0" if abs(v) < step / 2 else f"{v:.{decimals}f}".replace("-", _MINUS)) for v in values]


def number(value: float) -> str:
    """A label as short as it may be."""
    return f"{value:.4g}".replace("-", _MINUS)


def _power_of_ten(exponent: int) -> str:
    if exponent >= -3:
        return f"{10.0**exponent:g}"
    return "10\N{SUPERSCRIPT MINUS}" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(-exponent))


def shorten(text: str, room: float) -> str:
    """The end of a name is what tells it from others."""
    most = max(4, int(room / _CHAR))
    return text if len(text) <= most else "\N{HORIZONTAL ELLIPSIS}" + text[1 - most :]


# ---- where the bits go ----------------------------------------------------------------------------------------------


def size_bars(bars: Sequence[tuple[str, str, Sequence[tuple[str, str, float]]]], label: str) -> str:
    """Bars under one scale, each of (name, text behind it, parts of (css, tip, amount))."""
    row, bar = 40, 24
    d = Drawing(FULL, row * len(bars), label)
    left, right = 96, 96
    longest = max(sum(amount for _, _, amount in parts) for _, _, parts in bars) or 1
    for i, (name, behind, parts) in enumerate(bars):
        y, x = i * row + (row - bar) / 2, float(left)
        d.text(left - 12, y + bar / 2 + 4, name, "label strong", "end")
        for css, tip, amount in parts:
            width = amount / longest * (FULL - left - right)
            if width > 0:
                # A hair of paper between parts; slivers stay visible.
                d.add("rect", f"fill {css}", tip, x=x, y=y, width=max(0.6, width - 1), height=bar)
            x += width
        d.text(x + 8, y + bar / 2 + 4, behind, "label strong")
    return str(d)


# ---- figures per layer and kind -------------------------------------------------------------------------------------


def per_layer(points: Sequence[tuple[int, float, float, float]], unit: str, digits: int, label: str) -> str:
    """(layer, all of it, least, most) over layers: a line in the range of the layer's weights."""
    height, left, top, bottom = 250, 52, 28, 34
    d = Drawing(HALF, height, label)
    y = Axis.around([v for p in points for v in p[1:]], height - bottom, top)
    layers = [p[0] for p in points]
    x = Axis(min(layers) - 0.5, max(layers) + 0.5, left, HALF - 12)
    d.text(0, 14, unit, "label")
    for tick, text in y.ticks():
        d.line(left, y(tick), HALF - 12, y(tick))
        d.text(left - 8, y(tick) + 4, text, anchor="end")
    every = max(1, math.ceil(len(layers) / 16))
    for layer in layers[::every]:
        d.text(x(layer), height - bottom + 18, str(layer), anchor="middle")
    d.text(HALF - 12, height - 2, "layer", anchor="end")
    band = [(x(p[0]), y(p[3])) for p in points] + [(x(p[0]), y(p[2])) for p in reversed(points)]
    if len(points) > 1:
        d.path(band, "band", closed=True)
        d.path([(x(p[0]), y(p[1])) for p in points], "curve")
    else:
        d.line(x(layers[0]), y(points[0][2]), x(layers[0]), y(points[0][3]), "spread")
    for layer, value, low, high in points:
        tip = f"layer {layer}: {value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
        d.add("circle", "dot", tip, cx=x(layer), cy=y(value), r=3 if len(points) <= 48 else 1.8)
    return str(d)


def per_kind(
    kinds: Sequence[tuple[str, float, Sequence[tuple[str, float]]]], unit: str, digits: int, label: str
) -> str:
    """(kind, all of it, [(weight, value)]): a dot per weight, a bar at the whole."""
    left, right, top = 150, 58, 28
    height = max(250, top + 24 * len(kinds) + 34)
    row = min(34.0, (height - top - 34) / len(kinds))
    d = Drawing(HALF, height, label)
    x = Axis.around([v for _, all_, each in kinds for v in (all_, *(e for _, e in each))], left, HALF - right, 0.06)
    d.text(HALF, 14, unit, anchor="end")
    bottom = top + row * len(kinds)
    for tick, text in x.ticks(5):
        d.line(x(tick), top - 4, x(tick), bottom)
        d.text(x(tick), bottom + 18, text, anchor="middle")
    for i, (kind, whole, each) in enumerate(kinds):
        middle = top + row * (i + 0.5)
        d.text(left - 10, middle + 4, shorten(kind, left - 10), anchor="end")
        for name, value in each:
            d.add("circle", "speck", f"{name}: {value:.{digits}f}", cx=x(value), cy=middle, r=4)
        tip = f"{kind}: {whole:.{digits}f}"
        d.add("rect", "mark", tip, x=x(whole) - 1.5, y=middle - 9, width=3, height=18)
        d.text(HALF, middle + 4, f"{whole:.{digits}f}", "label strong", "end")
    return str(d)


def heat_map(
    kinds: Sequence[str],
    layers: Sequence[int],
    values: Sequence[Sequence[float]],
    digits: int,
    large_is_worse: bool,
    label: str,
) -> str:
    """A cell for every kind and layer, stronger where the value is worse; NaN is left empty."""
    left, row = 150, 24
    d = Drawing(FULL, row * len(kinds) + 26, label)
    width = min(144.0, (FULL - left) / len(layers))
    known = sorted(v for line in values for v in line if math.isfinite(v))
    # One odd matrix must not take all the colour from the others.
    lo, hi = known[len(known) // 50], known[-1 - len(known) // 50]
    every = max(1, math.ceil(22 / width))
    for j, layer in enumerate(layers):
        if j % every == 0:
            d.text(left + (j + 0.5) * width, row * len(kinds) + 18, str(layer), anchor="middle")
    for i, kind in enumerate(kinds):
        d.text(left - 10, row * (i + 0.5) + 4, shorten(kind, left - 10), anchor="end")
        for j, layer in enumerate(layers):
            value = values[i][j]
            if not math.isfinite(value):
                continue
            strength = min(max((value - lo) / (hi - lo), 0.0), 1.0) if hi > lo else 0.5
            strength = strength if large_is_worse else 1 - strength
            x, tip = left + j * width, f"layer {layer}, {kind}: {value:.{digits}f}"
            box = {"x": x, "y": row * i, "width": max(0.8, width - 1.5), "height": row - 1.5}
            d.add("rect", "heat", tip, fill_opacity=0.1 + 0.9 * strength, **box)
            if width >= _CHAR * (digits + 4):
                css = "label on-heat" if strength > 0.6 else "label strong"
                d.text(x + width / 2 - 0.75, row * i + row / 2 + 3.5, f"{value:.{digits}f}", css, "middle")
    return str(d)


# ---- distributions --------------------------------------------------------------------------------------------------


def _steps(counts: Sequence[float], edges: Sequence[float], x: Axis, y: Axis) -> list[tuple[float, float]]:
    """The outline of a histogram, down to the axis at both ends."""
    points = [(x(edges[0]), y.start)]
    for i, count in enumerate(counts):
        level = max(min(y(count), y.start), y.end)
        points += [(x(edges[i]), level), (x(edges[i + 1]), level)]
    return [*points, (x(edges[-1]), y.start)]


def weight_histogram(
    half: float,
    before: Sequence[int] | None,
    after: Sequence[int],
    kept: Sequence[int] | None,
    threshold: float | None,
    label: str,
) -> str:
    """Histograms over [-half, half], logarithmic: the weights before and after, and those kept as outliers."""
    height, left, top, bottom = 190, 58, 20, 30
    d = Drawing(HALF, height, label)
    total = max(1, sum(after))
    x = Axis(-half, half, left, HALF - 8)
    lowest = math.floor(math.log10(1 / total))
    peak = max([*after, *(before or ())], default=1)
    y = Axis(lowest, max(math.log10(max(1, peak) / total), lowest + 1) + 0.1, height - bottom, top)

    def logs(counts: Sequence[int]) -> list[float]:
        return [math.log10(c / total) if c else lowest for c in counts]

    for power in range(lowest, 1):
        if power <= y.hi and (power - lowest) % (2 if y.hi - lowest > 4.5 else 1) == 0:
            d.line(left, y(power), HALF - 8, y(power))
            d.text(left - 7, y(power) + 4, _power_of_ten(power + 2) + "\N{NARROW NO-BREAK SPACE}%", anchor="end")
    for tick, text in x.ticks(6):
        d.text(x(tick), height - bottom + 17, text, anchor="middle")
    edges = [-half + 2 * half * i / len(after) for i in range(len(after) + 1)]
    if before is not None:
        d.path(_steps(logs(before), edges, x, y), "before", closed=True)
    if kept is not None:
        d.path(_steps(logs(kept), edges, x, y), "kept", closed=True)
    d.path(_steps(logs(after), edges, x, y), "after")
    d.line(left, height - bottom, HALF - 8, height - bottom, "axis")
    if threshold is not None and 0 < threshold < half:
        for sign in (-1, 1):
            d.line(x(sign * threshold), top, x(sign * threshold), height - bottom, "threshold")
        d.text(
            x(threshold),
            top - 6,
            f"\N{PLUS-MINUS SIGN}\N{SQUARE ROOT}\N{GREEK SMALL LETTER LAMDA} = {threshold:.3g}",
            "label hot",
            "middle",
        )
    return str(d)


def level_histogram(
    levels: Sequence[float],
    mass: Sequence[int],
    before: Sequence[int] | None,
    half: float,
    label: str,
) -> str:
    """Dense weights in units of levels: their density before over [-half, half], and each level's mass after it, spread
    over the level's cell; the levels are marks below the axis."""
    height, left, top, bottom = 190, 8, 20, 30
    d = Drawing(HALF, height, label)
    cells = cell_edges(levels)
    reach = min(half, max(abs(cells[0]), abs(cells[-1])) * 1.12)
    x = Axis(-reach, reach, left, HALF - 8)
    density = [m / max(1e-9, cells[i + 1] - cells[i]) for i, m in enumerate(mass)]
    edges: list[float] = []
    outline: list[float] = []
    if before is not None:
        width = 2 * half / len(before)
        first = max(0, math.floor((half - reach) / width))
        shown = before[first : len(before) - first]
        edges = [-half + width * (first + i) for i in range(len(shown) + 1)]
        outline = [count / width for count in shown]
    peak = max([*density, *outline, 1e-9])
    y = Axis(0, peak * 1.06, height - bottom, top)
    if before is not None:
        d.path(_steps(outline, [min(max(e, -reach), reach) for e in edges], x, y), "before", closed=True)
    for i, value in enumerate(density):
        for side in (cells[i], cells[i + 1]):
            d.line(x(side), height - bottom, x(side), min(y(value), height - bottom), "cell")
    d.path(_steps(density, cells, x, y), "after")
    d.line(left, height - bottom, HALF - 8, height - bottom, "axis")
    for level in levels:
        d.line(x(level), height - bottom - 5, x(level), height - bottom + 6, "level")
    shown_at = -math.inf
    for level in levels:
        if x(level) - shown_at >= 26:  # no label onto its neighbour
            d.text(x(level), height - bottom + 19, number(level), anchor="middle")
            shown_at = x(level)
    return str(d)


def cell_edges(levels: Sequence[float]) -> list[float]:
    """Midpoints between distinct increasing levels, and as far again beyond the outermost."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    if not middles:
        return [levels[0] - 1, levels[0] + 1]
    return [2 * levels[0] - middles[0], *middles, 2 * levels[-1] - middles[-1]]
