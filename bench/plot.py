"""The picture of docs/quality.md: KLD against bits per weight, one panel a model and text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from rows import Row, frontier, in_panel, ours, panels

# How a family of formats is drawn, and what its legend says.
FAMILIES = {
    "ggml": ("#d1495b", "D", "ggml (no importance matrix)"),
    "bitsandbytes": ("#2e6fbb", "s", "bitsandbytes NF4"),
    "auto-round": ("#8d5bb5", "^", "auto-round, no data"),
    "hqq": ("#2a9d6f", "v", "hqq"),
    "SINQ": ("#c98a1b", "<", "SINQ"),
    "two-level": ("#7a4b2a", "p", "two-level g16, g32 (lab)"),
    "precal": ("#4d8f9c", "h", "paper recipe"),
    "auto_adpq": ("#4d8f9c", "H", "auto_adpq"),
    "torchao": ("#8a8a8a", "P", "torchao intx"),
    "quanto": ("#8a8a8a", "X", "quanto qint4"),
    "RTN": ("#b5b5b5", "o", "round to nearest (lab)"),
}
# Of these, the formats that no other of them beats are named in the picture; the legend is enough for the rest.
NAMED = ("ggml", "bitsandbytes", "auto-round", "hqq", "two-level")
# What a label says instead.
SHORT = {
    "bitsandbytes ": "",
    "ggml ": "",
    "auto-round ": "",
    "optimized ": "opt. ",
    "double quantization": "d.q.",
    " (k-quant-like)": "",
    "precal --recipe ": "",
    "auto_adpq ": "",
}
# Where a label may go, in points from its mark.
SIDES = ((1, 0.5), (1, 0), (0, 1), (-1, -0.5), (-0.5, -1), (0, -1), (1, 1), (0.5, 1), (-1, 0), (-1, 1), (1, -0.5))
OFFSETS = [(x * far, y * far) for far in (10, 18, 28, 40, 54, 70, 90) for x, y in SIDES]
STEPS = [step / 20 for step in range(1, 20)]
HEIGHT = 5.4  # of a panel, in inches
RANGE = 2.4, 5.05  # bits that are shown


def plot_quality(data: list[Row], path: Path) -> None:
    from matplotlib import pyplot

    shown = panels(data)
    columns = 2 if len(shown) > 1 else 1
    lines = math.ceil(len(shown) / columns)
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(lines, columns, figsize=(6.6 * columns, HEIGHT * lines), squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        used = axes.flat[: len(shown)]
        for axis, panel in zip(used, shown, strict=True):
            draw(axis, panel, in_panel(data, panel))
        handles = {}
        for axis in axes.flat:
            found, labels = axis.get_legend_handles_labels()
            handles.update(zip(labels, found, strict=True))
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0.9 / (HEIGHT * lines), 1, 1))
        for axis, panel in zip(used, shown, strict=True):
            named = [r for r in in_panel(data, panel) if not ours(r) and family(r) in NAMED]
            name_peers(figure, axis, frontier(named))
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def draw(axis: Any, panel: tuple[str, str], data: list[Row]) -> None:
    mine = [r for r in data if ours(r)]
    best = frontier(mine)
    peers = [r for r in data if not ours(r)]
    for first in sorted({family(r) for r in peers}, key=[*FAMILIES, *(family(r) for r in peers)].index):
        color, marker, label = style(first)
        part = points([r for r in peers if family(r) == first])
        axis.plot(*part, marker, ls="", color=color, ms=5.5, mec="white", mew=0.5, alpha=0.9, label=label)
    axis.plot(*points(mine), "o", ls="", color="black", ms=3, alpha=0.3)
    axis.plot(*points(best), "o-", color="black", lw=2.2, ms=4.5, label="precal, its frontier", zorder=3)
    axis.fill_between(*points(best), 1e-9, color="black", alpha=0.05, lw=0)
    klds = [r["kld_nats"] for r in best if RANGE[0] <= r["bits_per_weight"] <= RANGE[1]]
    axis.set_yscale("log")
    axis.set_xlim(RANGE)
    # what is far above the frontier is left out
    axis.set_ylim(min(klds) * 0.65, max(klds) * 1.8)
    axis.set_title(f"{panel[0]}, {panel[1].split('_')[0]}", loc="left", fontweight="bold")
    axis.set_xlabel("bits per weight, everything counted")
    axis.set_ylabel("KLD from full precision, nats per token")
    axis.grid(True, which="major", alpha=0.3)
    axis.grid(True, which="minor", alpha=0.1)


def family(row: Row) -> str:
    return str(row["format"]).split(" ")[0]


def style(first: str) -> tuple[str, str, str]:
    return FAMILIES.get(first, ("#999999", ".", first))


def points(data: list[Row]) -> tuple[list[float], list[float]]:
    ordered = sorted((r["bits_per_weight"], r["kld_nats"]) for r in data)
    return [bits for bits, _ in ordered], [kld for _, kld in ordered]


def name_peers(figure: Any, axis: Any, named: list[Row]) -> None:
    """Write names beside marks, where the text covers least."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    halo = [withStroke(linewidth=2, foreground="white", alpha=0.8)]

    def extent(text: Any) -> Any:
        """Of the text without its line."""
        text.update_positions(renderer)
        return Text.get_window_extent(text, renderer)

    drawn = axis.transData.transform([p for line in axis.lines for p in covered_by(line)])
    taken: list[Any] = []
    for row in named:
        name, color = row["format"], style(family(row))[0]
        for part, short in SHORT.items():
            name = name.replace(part, short)
        point = row["bits_per_weight"], row["kld_nats"]
        low, high = axis.get_ylim()
        if not (axis.get_xlim()[0] <= point[0] <= axis.get_xlim()[1] and low <= point[1] <= high):
            continue

        def place(offset: tuple[float, float], name: str = name, point: Any = point, color: str = color) -> Any:
            side = "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center"
            line = {"arrowstyle": "-", "color": color, "lw": 0.7, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3}
            style_ = {
                "ha": side,
                "va": "center",
                "fontsize": 8,
                "color": color,
                "arrowprops": line,
                "path_effects": halo,
            }
            return axis.annotate(name, point, offset, textcoords="offset points", **style_)

        def cost(offset: tuple[float, float]) -> float:
            text = place(offset)
            box = extent(text)
            text.remove()
            inside = (drawn > (box.x0 - 3, box.y0 - 2)) & (drawn < (box.x1 + 3, box.y1 + 2))
            outside = not axis.bbox.contains(box.x0, box.y0) or not axis.bbox.contains(box.x1, box.y1)
            covered = 100 * sum(box.overlaps(other) for other in taken) + 8 * int(inside.all(axis=1).sum())
            return covered + 50 * outside + math.hypot(*offset) / 8

        best = min(OFFSETS, key=cost)
        taken.append(extent(place(best)))


def covered_by(line: Any) -> list[tuple[float, float]]:
    """The marks of a line and, if it is drawn, points between them, so close that no text fits there unseen."""
    pairs = list(zip(*line.get_data(), strict=True))
    between: list[tuple[float, float]] = []
    if line.get_linestyle() == "None":
        return pairs
    for (x0, y0), (x1, y1) in itertools.pairwise(pairs):
        between += [(x0 + t * (x1 - x0), y0 * (y1 / y0) ** t) for t in STEPS]
    return pairs + between
