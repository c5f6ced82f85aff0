"""Rows of bench/fit.py and bench/tried.py -> the tables of docs/method.md."""

from __future__ import annotations

import json
import math

from rows import Row, source

# What precal does, per part of bench/tried.py; other variants are compared with it.
OURS = {
    "states": "4",
    "restart": "256",
    "scale choice": "trellis",
    "scales": "signed e4m3",
    "outlier values": "8 bits",
    "capacity": "c = 1",
    "importance": "none",
    "columns": "none",
    "grids of rows": "all",
}
ON_GAUSSIAN = ("states", "restart", "scale choice", "scales")
THRESHOLDS = {"c = 1": "c = 1, all entries", "c = 2": "c = 2, all entries"}
THRESHOLDS |= {"c = 4, a quarter": "c = 1, all entries", "c = 4, half": "c = 2, all entries"}

TORCH = """\
SQNR in dB of Gaussian weights, groups of 64, no outliers, by a quantizer in plain torch (`bench/tried_coder.py`); in
parentheses the distance from what precal does, which is bold:"""
MODELS = """\
On models: bits, SQNR, and KLD in nats per token (llama-6m: books / python, standard errors about 3 %), in parentheses
its ratio to what precal does. By precal's own quantizer, but for `importance`, which needs the torch one:"""
UNUSED = """\
Outlier entries that a soft threshold lam leaves unused, with constant grids. `least objective`: of seven values of lam
for a weight, which leave it none to all of its entries, the one with the least |W - W'|^2 / |W|^2 + mu * KL, mu = 0.03
where not named; an unused entry still takes its 16 bits. `used ones counted`: lam leaves a quarter or half of the c = 4
entries of a weight, wherever the largest are, and only those are counted; saying which would cost more."""


def sources(data: list[Row]) -> str:
    """Where the rows come from; instruction sets of one run together."""
    runs: dict[str, list[str]] = {}
    for row in data:
        isas = runs.setdefault(f"{source({**row, 'isa': 'ISAS'})}, commit {row['commit']}", [])
        if row["isa"] not in isas:
            isas.append(row["isa"])
    return "; ".join(run.replace("ISAS", ", ".join(isas)) for run, isas in runs.items()) + "."


def fit_table(data: list[Row]) -> str:
    columns = list(dict.fromkeys((r["model"], r["bits"]) for r in data))
    lines = [
        "KLD (nats per token) and SQNR of the default setting with other fits:",
        "",
        "| fit | " + " | ".join(f"{m}, {b} bits" for m, b in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for setting in dict.fromkeys(json.dumps(r["setting"], sort_keys=True) for r in data):
        cells = []
        for model, width in columns:
            r = next(
                r
                for r in data
                if (r["model"], r["bits"]) == (model, width) and json.dumps(r["setting"], sort_keys=True) == setting
            )
            cells.append(f"{r['kld_nats']:.4f} +/- {r['kld_stderr']:.4f}, {r['sqnr_db']:.2f} dB")
        fields: Row = json.loads(setting)
        name = "constant grid" if "grid" in fields else f"{fields.get('fit_rounds', 1)} round(s), mu = {fields['mu']:g}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"{source(data[0])}."]
    return "\n".join(lines)


# ---- bench/tried.py --------------------------------------------------------------------------------------------------


def part_of(row: Row) -> str:
    return str(row["format"]).split(": ", 1)[0]


def variant_of(row: Row) -> str:
    return str(row["format"]).split(": ", 1)[1]


def in_part(data: list[Row], *parts: str) -> list[Row]:
    return [r for r in data if part_of(r) in parts]


def find(data: list[Row], name: str, on: str, bits: int) -> Row | None:
    return next((r for r in data if (r["format"], r["on"], r["bits"]) == (name, on, bits)), None)


def trellis_table(data: list[Row]) -> str:
    """Plain grids and the trellis: SQNR on Gaussian weights, KLD of models."""
    found = in_part(data, "trellis")
    groups = sorted({variant_of(r).split(", ")[1] for r in found if r["on"] == "Gaussian"}, key=lambda g: int(g[1:]))
    lines = [
        "SQNR in dB of Gaussian weights, c = 0, plain grid and trellis:",
        "",
        "| bits | " + " | ".join(groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for bits in sorted({r["bits"] for r in found}):
        cells = []
        for g in groups:
            pair = [find(found, f"trellis: {kind}, {g}", "Gaussian", bits) for kind in ("plain", "trellis")]
            plain, searched = (float(r["sqnr_db"]) for r in pair if r is not None)
            cells.append(f"{plain:.2f}, {searched:.2f} ({searched - plain:+.2f})")
        lines.append(f"| {bits} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "KLD of models with the default groups and outliers, and the bits that a plain grid needs more for that KLD",
        "(along the line through the trellis at 3 and 4 bits):",
        "",
        "| model | text | bits | plain | trellis | worth bits |",
        "|---|---|---|---|---|---|",
    ]
    for on in dict.fromkeys(r["on"] for r in found if "kld_nats" in r):
        ends = [find(found, "trellis: trellis, g64", on, bits) for bits in (3, 4)]
        for bits in (4, 3):
            plain, searched = (find(found, f"trellis: {kind}, g64", on, bits) for kind in ("plain", "trellis"))
            if plain is None or searched is None or None in ends:
                continue
            for text in plain["kld_nats"]:
                three, four = (float(r["kld_nats"][text]) for r in ends if r is not None)
                width = ends[1]["bits_per_weight"] - ends[0]["bits_per_weight"]  # type: ignore[index]
                ratio = plain["kld_nats"][text] / searched["kld_nats"][text]
                worth = math.log(ratio) / math.log(three / four) * width
                lines.append(
                    f"| {on} | {text.split('_')[0]} | {searched['bits_per_weight']:.2f} | "
                    f"{plain['kld_nats'][text]:.4f} | {searched['kld_nats'][text]:.4f} | {worth:.2f} |"
                )
    return "\n".join([*lines, "", sources(found)])


def cost_table(data: list[Row]) -> str:
    """What the trellis costs `linear`, as a ratio of times, and the quantizer, in core-ns a weight."""
    found, search = in_part(data, "linear"), in_part(data, "cost")
    sizes = list(dict.fromkeys(r["M"] for r in found))
    lines = [
        "Time of `linear` with a trellis over that with a plain grid:",
        "",
        "| instruction set | bits | mode | " + " | ".join(f"M = {M}" for M in sizes) + " |",
        "|---|---|---|" + "---|" * len(sizes),
    ]
    for isa, bits, mode in dict.fromkeys((r["isa"], r["bits"], r["mode"]) for r in found):
        at = {r["M"]: r for r in found if (r["isa"], r["bits"], r["mode"]) == (isa, bits, mode)}
        lines.append(f"| {isa} | {bits} | {mode} | " + " | ".join(f"{at[M]['ratio']:.2f}" for M in sizes) + " |")
    lines += [
        "",
        "`ops.quantize_groups`, groups of 64, c = 1, ns of one core per weight:",
        "",
        "| instruction set | bits | plain | trellis |",
        "|---|---|---|---|",
        *(f"| {r['isa']} | {r['bits']} | {r['plain_ns']:.1f} | {r['trellis_ns']:.1f} |" for r in search),
        "",
    ]
    shapes: dict[str, list[str]] = {}
    for r in found:
        shapes.setdefault(" x ".join(map(str, r["shape"])), []).append(r["isa"])
    shown = "; ".join(f"{shape} ({', '.join(dict.fromkeys(isas))})" for shape, isas in shapes.items())
    lines += [f"Weights {shown}; groups of 64, c = 1; one thread, CPU time, by turns, the least of up to 61 calls."]
    return "\n".join([*lines, "", sources(found + search)])


def tried_tables(data: list[Row]) -> str:
    lines = [
        TORCH,
        "",
        "| | 4 bits | 3 bits |",
        "|---|---|---|",
    ]
    shown = in_part(data, *ON_GAUSSIAN)
    for name in sorted(dict.fromkeys(r["format"] for r in shown), key=lambda n: ON_GAUSSIAN.index(n.split(": ")[0])):
        cells = []
        for bits in (4, 3):
            row = find(shown, name, "Gaussian", bits)
            part = name.split(": ")[0]
            base = find(shown, f"{part}: {OURS[part]}", "Gaussian", bits)
            if row is None or base is None:
                cells.append("-")
            else:
                away = row["sqnr_db"] - base["sqnr_db"]
                cells.append(f"{row['sqnr_db']:.2f}" + (f" ({away:+.2f})" if row is not base else ""))
        lines.append(f"| {bold(name, name == f'{part}: {OURS[part]}')} | " + " | ".join(cells) + " |")
    others = [r for r in data if part_of(r) in OURS and part_of(r) not in ON_GAUSSIAN]
    lines += ["", MODELS, "", *model_table(others, {r["format"]: f"{part_of(r)}: {OURS[part_of(r)]}" for r in others})]
    unused = in_part(data, "threshold")
    bases = {}
    for row in unused:
        begins = max((k for k in THRESHOLDS if variant_of(row).startswith(k)), key=len)
        bases[row["format"]] = f"threshold: {THRESHOLDS[begins]}"
    lines += ["", UNUSED, "", *model_table(unused, bases)]
    return "\n".join([*lines, "", sources(shown + others + unused)])


def bold(name: str, ours: bool) -> str:
    part, variant = name.split(": ", 1)
    return f"{part}: **{variant}**" if ours else name


def model_table(data: list[Row], bases: dict[str, str]) -> list[str]:
    """A line for every variant and model; ``bases`` has what each variant is compared with."""
    lines = ["| | on | 4 bits | 3 bits |", "|---|---|---|---|"]
    for name, on in dict.fromkeys((r["format"], r["on"]) for r in data):
        cells = []
        for bits in (4, 3):
            row, base = find(data, name, on, bits), find(data, bases[name], on, bits)
            cells.append("-" if row is None else model_cell(row, base))
        lines.append(f"| {bold(name, name == bases[name])} | {on} | " + " | ".join(cells) + " |")
    return lines


def model_cell(row: Row, base: Row | None) -> str:
    text = f"{row['bits_per_weight']:.3f}: {row['sqnr_db']:.2f} dB"
    if "kld_nats" in row:
        text += ", " + " / ".join(f"{v:.4f}" for v in row["kld_nats"].values())
        if base is not None and row is not base:
            ratios = (v / base["kld_nats"][key] for key, v in row["kld_nats"].items())
            text += f" ({' / '.join(f'{ratio:.2f}' for ratio in ratios)})"
    return text + (f", {row['entries_used']:.0%} used" if "entries_used" in row else "")
