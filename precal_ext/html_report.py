"""``precal report``: a page about a quantized directory, self-contained, for the screen and for paper."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from precal_ext import charts, ops
from precal_ext._version import __version__
from precal_ext.checkpoint import TensorInfo
from precal_ext.evaluate import Evaluation
from precal_ext.measure import level_range, outlier_mask, scale_amplitude
from precal_ext.qtensor import QTensor
from precal_ext.survey import KEYS, Original, Row, Stored, printable, rows, sort_rows, take_rows, total

WORST = 10
UNKNOWN = "\N{EN DASH}"
SAMPLE = 1 << 22  # weights of a tensor that go into its histograms
_WEIGHT_BINS = 162  # of the histogram in units of the weights
_BINS_PER_LEVEL = 4

# Part of a quantized weight's name -> what it is for: css class, name.
_PARTS = {
    "packed": ("c-codes", "codes"),
    "scale": ("c-scales", "group scales"),
    "outlier": ("c-outliers", "outliers"),
    "row_scale": ("c-rows", "row scales and grids"),
    "grid": ("c-rows", "row scales and grids"),
    "shape": ("c-vectors", "norms, biases, other"),  # 16 bytes a matrix, no rate
}
_DENSE = ("c-dense", "matrices left alone")
_VECTORS = ("c-vectors", "norms, biases, other")
_LINEARS = ("c-linears", "the quantized matrices, before")
_ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Distribution:
    """Histograms of one weight, or of evenly spaced rows of it.

    Args:
        half: weights are counted over [-half, half]; beyond: how many lie outside.
        before, after, kept: counts of W (None without the original), of W', and of those W kept as outliers.
        threshold: sqrt(lam) at which the share of weights that are outliers survives in the whole tensor.
        levels, mass: the grid and how many dense weights have each level.
        dense_before: counts of W / (row_scale * scale) over [-level_half, level_half] without the outliers.
        sampled: weights that were counted.
    """

    half: float
    beyond: int
    before: list[int] | None
    after: list[int]
    kept: list[int] | None
    threshold: float | None
    levels: list[float]
    mass: list[int]
    dense_before: list[int] | None
    level_half: float
    sampled: int


@dataclass(frozen=True)
class Content:
    """Everything the page shows but the loss."""

    stored: Stored
    rows: list[Row]
    measured: bool
    original: Original | None
    typical: list[tuple[Row, Distribution]]
    worst: list[tuple[Row, Distribution]]


def gather(folder: Path, original: Path | None = None) -> Content:
    """Read a directory for its page; one weight at a time is in memory.

    Args:
        original: model it was made from; figures are measured against it when the directory records none.
    Raises:
        CheckpointError: the directory is damaged, was not quantized by precal, or the original is another model.
    """
    stored = Stored.open(folder)
    other = None if original is None else Original(original)
    found = rows(stored)
    measured = other is not None and any(math.isnan(row.sqnr_db) for row in found)
    if measured:
        found = rows(stored, other)
    known = [row for row in sort_rows(found, "sqnr") if not math.isnan(row.sqnr_db)]
    kinds: dict[str, list[Row]] = {}
    for row in sort_rows(found, "sqnr"):
        kinds.setdefault(row.kind, []).append(row)
    middle = [members[(len(members) - 1) // 2] for _, members in sorted(kinds.items())]
    cache: dict[str, Distribution] = {}

    def drawn(row: Row) -> tuple[Row, Distribution]:
        if row.module not in cache:
            cache[row.module] = _distribution(stored, other, row)
        return row, cache[row.module]

    return Content(stored, found, measured, other, [drawn(r) for r in middle], [drawn(r) for r in known[:WORST]])


def _distribution(stored: Stored, original: Original | None, row: Row) -> Distribution:
    q, chosen = take_rows(stored.read_valid(row.module), SAMPLE)
    w = None
    if original is not None:
        whole = stored.spec(row.module)
        w = original.weight(row.module, whole, stored.is_conv1d(row.module))[chosen].contiguous()
    return distribution(w, q)


def distribution(w: Tensor | None, q: QTensor) -> Distribution:
    """Histograms of a weight [N, K] before (None: unknown) and after quantization."""
    restored = q.dequantize()
    seen = restored if w is None else w
    largest = float(seen.abs().max()) if seen.numel() else 0.0
    rms = math.sqrt(float(seen.double().square().mean())) if seen.numel() else 0.0
    # A lone giant would press everything else into one bin.
    half = max(min(largest, 24 * rms) * 1.02, 1e-30)

    def counts(x: Tensor) -> tuple[list[int], int]:
        inside, outside = ops.histogram(x.contiguous(), _WEIGHT_BINS, -half, half)
        return inside.tolist(), int(outside[:2].sum())

    mask = outlier_mask(q)
    share = 0.0 if mask is None else float(mask.sum()) / max(1, mask.numel())
    kept = counts(seen.masked_fill(~mask, math.nan))[0] if mask is not None and share else None
    lam = float(ops.salience_threshold(seen.contiguous(), share)) if share else None
    level_half, levels, mass, dense = _in_levels(w, restored, q, mask)
    return Distribution(
        half,
        counts(seen)[1],
        None if w is None else counts(w)[0],
        counts(restored)[0],
        kept,
        None if lam is None else math.sqrt(lam),
        levels,
        mass,
        dense,
        level_half,
        seen.numel(),
    )


def _in_levels(
    w: Tensor | None, restored: Tensor, q: QTensor, mask: Tensor | None
) -> tuple[float, list[float], list[int], list[int] | None]:
    spec = q.spec
    half = level_range(spec.uniform, spec.bits)
    grid = q.tensors.get("weight_grid")
    if grid is not None:
        levels = sorted({float(v) for v in grid.flatten().tolist()})
    else:
        levels = [float(v) for v in range(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1))]
    bins = int(2 * half) * _BINS_PER_LEVEL
    # Half a bin further down, levels are in the middle of bins and rounding does not move them to a neighbour.
    shift = 0.5 / _BINS_PER_LEVEL
    mass = torch.zeros(bins, dtype=torch.int64)
    before = torch.zeros(bins, dtype=torch.int64)
    scales = [("weight_scale", mask)]
    if spec.split and mask is not None:
        scales.append(("weight_outlier_scale", ~mask))
    for key, leave_out in scales:
        divisor = scale_amplitude(q.tensors[key], q.tensors["weight_row_scale"])
        weight = (divisor != 0).long()

        def count(x: Tensor, lo: float, leave_out=leave_out, divisor=divisor, weight=weight) -> Tensor:  # type: ignore[no-untyped-def]
            dense = x if leave_out is None else x.masked_fill(leave_out, math.nan)
            return ops.histogram(dense.contiguous(), bins, lo, lo + 2 * half, divisor, weight, spec.group_size)[0]

        mass += count(restored, -half - shift)
        if w is not None:
            before += count(w, -half)
    at = [int((level + half) * _BINS_PER_LEVEL) for level in levels]
    # Bins of a small tensor hold so few weights that their noise would hide its shape.
    shown = min(bins, 256)
    while shown > 64 and shown * 400 > spec.N * spec.K:
        shown //= 2
    pooled = None if w is None else before.reshape(shown, -1).sum(1).tolist()
    return half, levels, [int(mass[i]) for i in at], pooled


# ---- what the page says ---------------------------------------------------------------------------------------------


def render(content: Content, loss: tuple[str, Evaluation] | None = None) -> str:
    """The page.

    Args:
        loss: name of a text, and the loss on it.
    """
    text = resources.files("precal_ext").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(_context(content, loss))


def write(path: Path, page: str) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _context(content: Content, loss: tuple[str, Evaluation] | None) -> dict[str, Any]:
    stored, all_ = content.stored, total(content.rows)
    known = any(math.isfinite(row.sqnr_db) for row in content.rows)
    name = printable(stored.folder.resolve().name)
    parts, vectors = _parts(stored)
    return {
        "name": name,
        "version": __version__,
        "settings": _settings(stored),
        "tiles": _tiles(content, all_),
        "notes": [printable(note) for note in (stored.recorded.notes if stored.recorded else ())],
        "source": _source(content, known),
        "loss": None if loss is None else _loss(*loss),
        "bits": _bits(content, parts, vectors),
        "figures": _figures(content.rows) if known else None,
        "typical": [_panel(row, d) for row, d in content.typical],
        "worst": [_panel(row, d) for row, d in content.worst],
        "worst_share": _percent(sum(r.noise for r, _ in content.worst) / all_.noise) if known and all_.noise else "",
        "known": known,
        "has_original": content.original is not None,
        "original": "" if content.original is None else printable(content.original.folder.resolve().name),
        "split": stored.format.config.split,
        "rows": [_row(row) for row in content.rows],
        "total": _row(all_),
        "planned": any(row.planned for row in content.rows),
    }


def _settings(stored: Stored) -> str:
    c = stored.format.config
    text = f"recipe {c.recipe}, {c.bits} bits, groups of {c.group_size}, "
    text = text.replace("groups of -1", "a scale per row")
    text += f"{c.c} outlier{'' if c.c == 1 else 's'} per 256 weights, " if not c.split else "two scales per group, "
    text += f"{c.grid} grid" + (" with a trellis" if c.trellis else "")
    if stored.format.module_overrides:
        text += f"; {len(stored.format.module_overrides)} modules with settings of their own"
    return text


def _tiles(content: Content, all_: Row) -> list[tuple[str, str, str]]:
    """(value, unit, what it is)."""
    stored = content.stored
    after = sum(info.nbytes for info in stored.index.values())
    before = _bytes_before(content)
    tiles = [
        (f"{all_.bits_per_weight:.3f}", "bits per weight", "of the quantized weights, everything counted"),
        (_number(all_.sqnr_db, 2), "dB SQNR", "signal over error, all weights pooled"),
        (_number(all_.kl_nats, 4), "nats KL", "from the weights' distribution, mean"),
        (
            _megabytes(after),
            "MB",
            f"from {_megabytes(before)} MB, {before / after:.2f}\N{MULTIPLICATION SIGN} smaller"
            if before
            else "of tensors",
        ),
    ]
    count = f"{all_.weights / 1e6:,.1f}" if all_.weights < 1e9 else f"{all_.weights / 1e9:,.2f}"
    unit = "million weights" if all_.weights < 1e9 else "billion weights"
    tiles = [tile for tile in tiles if tile[0] != UNKNOWN]
    return [*tiles, (count, unit, f"quantized, in {len(content.rows)} matrices")]


def _source(content: Content, known: bool) -> str:
    if content.measured and content.original is not None:
        return "SQNR and KL were measured for this page against the original."
    if known:
        return "SQNR and KL are as recorded when the model was quantized."
    return "SQNR and KL are not recorded beside this model, and no original was given to measure them against."


def _loss(text: str, result: Evaluation) -> dict[str, Any]:
    def pm(value: float | None, stderr: float | None, digits: int) -> str:
        if value is None:
            return "-"
        return f"{value:.{digits}f}" + ("" if stderr is None else f" \N{PLUS-MINUS SIGN} {stderr:.{digits}f}")

    delta = result.delta_nll_nats or 0.0
    return {
        "text": printable(text),
        "tokens": f"{result.tokens:,}",
        "perplexity": f"{result.perplexity:.3f}",
        "perplexity_before": f"{math.exp(min(result.nll_nats - delta, 700.0)):.3f}",
        "kld": pm(result.kld_nats, result.kld_stderr, 4),
        "delta": pm(result.delta_nll_nats, result.delta_nll_stderr, 4),
        "top1": "-" if result.top1 is None else _percent(result.top1),
    }


def _part_of(key: str) -> tuple[str, str]:
    leaf = key.removeprefix("weight_")
    return _PARTS["outlier" if leaf.startswith("outlier") else leaf]


def _parts(stored: Stored) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """Bytes of the quantized weights by what they are for, and of everything else."""
    weights: dict[tuple[str, str], int] = {part: 0 for part in _PARTS.values() if part != _VECTORS}
    others = {_DENSE: 0, _VECTORS: 0}
    for module, keys in stored.modules.items():
        for key in keys:
            info = stored.index[f"{module}.{key}"]
            if key in KEYS:
                part = _part_of(key)
                parts = others if part == _VECTORS else weights
                parts[part] += info.nbytes
    for info in stored.dense:
        others[_class(info)] += info.nbytes
    return weights, others


def _class(info: TensorInfo) -> tuple[str, str]:
    return _DENSE if len(info.shape) >= 2 else _VECTORS


def _bytes_before(content: Content) -> int:
    """Bytes of the tensors before quantization, 0 when unknown."""
    if content.original is not None:
        return sum(info.nbytes for info in content.original.index.values())
    recorded = content.stored.recorded
    if recorded is None or any(d not in _ITEMSIZE for d in recorded.dtypes.values()):
        return 0
    return sum(math.prod(shape) * _ITEMSIZE[recorded.dtypes[name]] for name, shape in recorded.shapes.items())


def _bits(content: Content, weights: dict[tuple[str, str], int], others: dict[tuple[str, str], int]) -> dict[str, Any]:
    count = sum(row.weights for row in content.rows)
    every = {**weights, **others}
    size = sum(every.values())
    after = [(css, f"{name}: {_megabytes(n)} MB", float(n)) for (css, name), n in every.items()]
    bars: list[tuple[str, str, Sequence[tuple[str, str, float]]]] = []
    before = _bytes_before(content)
    left = sum(others.values())
    if before > left:
        linears = before - left
        css, name = _LINEARS
        old = [(css, f"{name}: {_megabytes(linears)} MB", float(linears))]
        bars.append(("before", f"{_megabytes(before)} MB", old + after[len(weights) :]))
    bars.append(("after", f"{_megabytes(size)} MB", after))
    table = [
        {
            "css": css,
            "name": name,
            "mb": _megabytes(n),
            "share": _percent(n / size),
            "bits": f"{8 * n / count:.4f}" if (css, name) in weights and count else "",
        }
        for (css, name), n in every.items()
        if n
    ]
    biggest = sorted(content.stored.dense, key=lambda info: -info.nbytes)[:3]
    return {
        "bars": Markup(charts.size_bars(bars, "Sizes of the tensors before and after quantization, by purpose")),
        "table": table,
        "size": _megabytes(size),
        "all": f"{8 * sum(weights.values()) / count:.4f}",
        "left": [f"{printable(i.name)} ({_megabytes(i.nbytes)} MB)" for i in biggest if len(i.shape) >= 2],
        "has_before": before > left,
        "linears": _LINEARS,
    }


def _figures(found: Sequence[Row]) -> dict[str, Any]:
    """The charts of SQNR and KL per layer, per kind, and per weight."""
    finite = [r for r in found if math.isfinite(r.sqnr_db) and math.isfinite(r.kl_nats)]
    layers = sorted({r.layer for r in finite if r.layer >= 0})
    kinds = sorted({r.kind for r in finite})
    charted: dict[str, Any] = {"exact": len([r for r in found if r.sqnr_db == math.inf])}
    for key, field, unit, digits, title in (
        ("sqnr", "sqnr_db", "dB", 2, "SQNR in dB"),
        ("kl", "kl_nats", "nats", 4, "KL in nats"),
    ):

        def whole(members: Sequence[Row], field: str = field) -> float:
            return float(getattr(total(members), field)) if members else math.nan

        points = []
        for layer in layers:
            members = [r for r in finite if r.layer == layer]
            values = [getattr(r, field) for r in members]
            points.append((layer, whole(members), min(values), max(values)))
        by_kind = []
        for kind in kinds:
            members = [r for r in finite if r.kind == kind]
            by_kind.append((kind, whole(members), [(printable(r.tensor), getattr(r, field)) for r in members]))
        shown = [printable(kind) for kind in kinds]
        grid = [
            [whole([r for r in finite if (r.kind, r.layer) == (kind, layer)]) for layer in layers] for kind in kinds
        ]
        charted[key] = {
            "layer": Markup(charts.per_layer(points, unit, digits, f"{title} per layer")) if points else None,
            "kind": Markup(
                charts.per_kind(
                    [(printable(k), v, e) for k, v, e in by_kind], unit, digits, f"{title} per kind of module"
                )
            ),
            "heat": Markup(
                charts.heat_map(shown, layers, grid, digits, key == "kl", f"{title} of every kind in every layer")
            )
            if layers
            else None,
        }
    return charted


def _panel(row: Row, d: Distribution) -> dict[str, Any]:
    name = printable(row.tensor)
    note = "" if d.sampled == row.weights else f"{d.sampled:,} of {row.weights:,} weights counted"
    if d.beyond:
        note = (note + "; " if note else "") + f"{d.beyond:,} beyond the axis"
    return {
        "id": re.sub(r"\W", "-", row.tensor),
        **_row(row),
        "note": note,
        "weights": Markup(
            charts.weight_histogram(d.half, d.before, d.after, d.kept, d.threshold, f"Histogram of {name}")
        ),
        "levels": Markup(
            charts.level_histogram(d.levels, d.mass, d.dense_before, d.level_half, f"{name} in units of levels")
        ),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "tensor": printable(row.tensor),
        "kind": printable(row.kind),
        "shape": f"{row.N:,} \N{MULTIPLICATION SIGN} {row.K:,}",
        "count": f"{row.weights:,}",
        "bits": row.bits or "",
        "group": row.group_size or "",
        "c": row.c,
        "grid": row.grid,
        "alpha": _percent(row.alpha) if math.isfinite(row.alpha) else UNKNOWN,
        "sqnr": _number(row.sqnr_db, 2),
        "kl": _number(row.kl_nats, 4),
        "bpw": f"{row.bits_per_weight:.3f}",
        "cost": UNKNOWN if row.planned is None or row.planned.cost is None else _percent(row.planned.cost),
        "why": "" if row.planned is None else printable(row.planned.reason),
    }


def _number(value: float, digits: int) -> str:
    if value == math.inf:
        return "exact"
    return f"{value:.{digits}f}" if math.isfinite(value) else UNKNOWN


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\N{NARROW NO-BREAK SPACE}%"


def _megabytes(n: float) -> str:
    return f"{n / 1e6:,.2f}" if n < 1e9 else f"{n / 1e6:,.0f}"
