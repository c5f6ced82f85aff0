"""The tables and the picture of docs/planning.md, from bench/results/{plan,foreseen,plan_along}.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rows import Row, panels, source

COLORS = {3.25: "#d1495b", 3.6: "#2a9d6f", 4.0: "#2e6fbb"}
# KLD of a plan over the best uniform setting's: what was asked for with a text.
TARGET = 0.90


def measured(data: list[Row]) -> list[Row]:
    return [r for r in data if not r["format"].startswith("sensitivity")]


def of(data: list[Row], panel: tuple[str, str]) -> list[Row]:
    return [r for r in measured(data) if (r["model"], r["text"]) == panel]


def best_uniform(rows: list[Row], target: float) -> Row:
    within = [r for r in rows if r["format"].startswith("uniform") and r["bits_per_weight"] <= target]
    return min(within, key=lambda r: float(r["kld_nats"]))


def domain(text: str) -> str:
    return text.split("_")[0]


def ways(data: list[Row]) -> list[str]:
    return list(dict.fromkeys(r["format"].split(", ")[1] for r in measured(data) if r["target"] is not None))


def plan_of(rows: list[Row], target: float, way: str, fit: str | None) -> Row | None:
    name = f"plan {target:g}, {way}, {fit or 'no text'}"
    return next((r for r in rows if r["format"] == name), None)


def cell(row: Row | None, base: Row, target: float | None) -> str:
    """KLD over the best uniform setting's, its standard error, and whether it misses the target."""
    if row is None:
        return "-"
    ratio = row["kld_nats"] / base["kld_nats"]
    error = ratio * math.hypot(row["kld_stderr"] / row["kld_nats"], base["kld_stderr"] / base["kld_nats"])
    limit = 1 + 2 * error if target is None else target
    return f"{ratio:.2f} +/- {error:.2f}" + ("" if ratio <= limit else " (missed)")


def targets_table(data: list[Row]) -> str:
    lines = [
        "KLD of a plan over that of the best uniform setting at no more bits. Of all settings of 2, 3, 4 bits, groups",
        "of 16 to 256, c = 0 to 4 the four with most bits at or below each target were measured (fewer bits lose more:",
        "[quality.md](quality.md)), and the very text that is measured chooses among them. Target without a text: not",
        f"worse within two standard errors; with one: at most {TARGET:.2f}. Own text: a_l fitted on the calibration",
        "text of the same domain; other text: on that of the other.",
    ]
    for way in ways(data):
        lines += [
            "",
            f"Candidates of {way}:",
            "",
            "| model, measured on | target | best uniform | KLD | no text | own text | other text |",
            "|---|---|---|---|---|---|---|",
        ]
        for panel in panels(measured(data)):
            rows = of(data, panel)
            fits = {domain(fit): fit for fit in dict.fromkeys(r["fit"] for r in rows if r["fit"])}
            own = fits.get(domain(panel[1]))
            other = next((fit for name, fit in fits.items() if name != domain(panel[1])), None)
            for target in sorted({r["target"] for r in rows if r["target"]}):
                if not any(r["bits_per_weight"] <= target for r in rows if r["target"] is None):
                    continue
                base = best_uniform(rows, target)
                if plan_of(rows, target, way, None) is None:
                    continue
                cells = [
                    cell(plan_of(rows, target, way, None), base, None),
                    cell(plan_of(rows, target, way, own), base, TARGET),
                    cell(plan_of(rows, target, way, other), base, TARGET) if other else "-",
                ]
                name = base["format"].removeprefix("uniform ")
                lines.append(
                    f"| {panel[0]}, {domain(panel[1])} | {target:g} | {name} ({base['bits_per_weight']:.3f}) | "
                    f"{base['kld_nats']:.4f} | " + " | ".join(cells) + " |"
                )
    first = {r["model"]: r for r in reversed(measured(data))}
    others = [f"`{r['command']}`" for name, r in first.items() if name != data[0]["model"]]
    return "\n".join([*lines, "", f"{source(first[data[0]['model']])}, {', '.join(reversed(others))}."])


def sensitivity_table(data: list[Row]) -> str:
    """How unequal a model's sets are, and what that could bring."""
    lines = [
        "Sensitivity per weight over the model's mean, by kind of set: least, median and most over the layers. Gain:",
        "the weighted geometric mean over the arithmetic one, what the loss could fall to if every set could have any",
        "width.",
        "",
    ]
    fits = [r for r in data if r["format"] == "sensitivity by gradients"]
    kinds = list(dict.fromkeys(kind(name) for r in fits for name in r["a"]))
    lines += [
        "| model, text | tokens, CPU s | " + " | ".join(kinds) + " | gain |",
        "|---|---|" + "---|" * len(kinds) + "---|",
    ]
    for r in fits:
        mean = math.fsum(r["a"].values()) / sum(r["weights"].values())
        relative = {name: a / r["weights"][name] / mean for name, a in r["a"].items()}
        cells = []
        for k in kinds:
            values = sorted(v for name, v in relative.items() if kind(name) == k)
            cells.append(f"{values[0]:.2f}, {values[len(values) // 2]:.2f}, {values[-1]:.2f}" if values else "-")
        whole = sum(r["weights"].values())
        gain = math.exp(math.fsum(r["weights"][n] * math.log(max(v, 1e-9)) for n, v in relative.items()) / whole)
        cost = f"{r['tokens']}, {r['seconds']:.1f}"
        lines.append(f"| {r['model']}, {domain(r['text'])} | {cost} | " + " | ".join(cells) + f" | {gain:.2f} |")
    return "\n".join(lines)


def ways_table(data: list[Row]) -> str:
    """Noise beside gradients."""
    lines = [
        "a_l by noise over a_l by gradients: mean over the sets weighted by a_l, and the standard deviation of single",
        "sets; the errors that each says it has; CPU seconds of one thread.",
        "",
        "| model, text | sets | noise / gradients | said by noise | by gradients | s by noise | by gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for noise in (r for r in data if r["format"] == "sensitivity by noise"):
        key = (noise["model"], noise["text"], "sensitivity by gradients")
        other = next(r for r in data if (r["model"], r["text"], r["format"]) == key)
        names = list(noise["a"])
        ratios = [noise["a"][n] / other["a"][n] for n in names]
        whole = sum(noise["a"].values()) / sum(other["a"].values())
        spread = math.sqrt(sum((r - whole) ** 2 for r in ratios) / max(1, len(ratios) - 1))
        said = [sum(r["stderr"][n] / r["a"][n] for n in names) / len(names) for r in (noise, other)]
        lines.append(
            f"| {noise['model']}, {domain(noise['text'])} | {len(names)} | {whole:.2f}, {spread:.2f} | "
            f"{said[0]:.0%} | {said[1]:.0%} | {noise['seconds']:.1f} | {other['seconds']:.1f} |"
        )
    return "\n".join(lines)


def kind(name: str) -> str:
    return name.split(".", 3)[-1].replace("self_attn.", "").replace("mlp.", "").replace("_proj", "")


def fidelity_table(data: list[Row]) -> str:
    """Measured over predicted."""
    lines = [
        "Measured over predicted loss, a_l fitted on the calibration text of the same domain: mean over the rows of a",
        "range of bits, and in parentheses the standard deviation. KLD is what is fitted; dNLL is what it stands for.",
        "",
        "| model, text | rows | 2 to 2.9 bits: KLD | dNLL | 3 to 3.9: KLD | dNLL | 4 and more: KLD | dNLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for panel in panels(measured(data)):
        rows = of(data, panel)
        cells = []
        for low, high in ((2, 3), (3, 4), (4, 9)):
            part = [(r, p) for r in rows if low <= r["bits_per_weight"] < high and (p := own_prediction(r))]
            for figure in ("kld_nats", "delta_nll_nats"):
                ratios = [r[figure] / p for r, p in part]
                mean = sum(ratios) / max(1, len(ratios))
                spread = math.sqrt(sum((x - mean) ** 2 for x in ratios) / max(1, len(ratios) - 1))
                cells.append(f"{mean:.2f} ({spread:.2f})" if ratios else "-")
        lines.append(f"| {panel[0]}, {domain(panel[1])} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def own_prediction(row: Row) -> float | None:
    return next((p for fit, p in row["predicted"].items() if domain(fit) == domain(row["text"])), None)


def foreseen_table(data: list[Row]) -> str:
    """Forecasts of plans beside what came."""
    lines = [
        "Rise of NLL in nats per token: measured on the windows of the calibration text that the forecast is made on",
        "and, with its standard error, on the evaluation text of the domain; what predictor and theorem say, with",
        "their 90 % intervals. Bold: the one that is used.",
        "",
        "| model, text | target | measured | on unseen text | predictor | theorem |",
        "|---|---|---|---|---|---|",
    ]
    inside: dict[str, list[bool]] = {"used": [], "predictor": [], "theorem": []}
    unseen: list[bool] = []
    miss: dict[str, list[tuple[float, float]]] = {"predictor": [], "theorem": []}
    for r in data:
        f, rise, other = r["forecast"], r["same"]["delta_nll_nats"], r["unseen"]
        cells = []
        for name in ("predictor", "theorem"):
            v = f[name]
            cells.append(shown := f"{v['rise_nats']:.4f} ({v['low_nats']:.4f} to {v['high_nats']:.4f})")
            cells[-1] = (f"**{shown}**" if f["used"] == name else shown) + (" beyond the fit" if v["outside"] else "")
            inside[name].append(v["low_nats"] <= rise <= v["high_nats"])
            if rise < 1:
                miss[name].append((abs(v["rise_nats"] - rise), abs(v["rise_nats"] - other["delta_nll_nats"])))
        used = f[f["used"]]
        inside["used"].append(inside[f["used"]][-1])
        unseen.append(used["low_nats"] <= other["delta_nll_nats"] <= used["high_nats"])
        lines.append(
            f"| {r['model']}, {domain(r['text'])} | {r['target']:g} | {rise:.4f} | "
            f"{other['delta_nll_nats']:.4f} +/- {other['delta_nll_stderr']:.4f} | {cells[0]} | {cells[1]} |"
        )
    share = {name: f"{sum(found)} of {len(found)}" for name, found in inside.items()}
    mean = {
        name: " and ".join(f"{sum(part) / len(part):.4f}" for part in zip(*found, strict=True))
        for name, found in miss.items()
    }
    cost = " and ".join(f"{min(v)} to {max(v)} {what}" for what, v in (
        ("runs", [r["forecast"]["runs"] for r in data]), ("CPU seconds", [round(r["seconds"]) for r in data]),
    ))  # fmt: skip
    lines += [
        "",
        f"In the interval of the predictor: {share['predictor']}; of the theorem: {share['theorem']}; of the one that",
        f"is used: {share['used']}, and of the rises on unseen text {sum(unseen)}. Mean absolute error of rises under",
        f"a nat, on this text and on unseen one: predictor {mean['predictor']}, theorem {mean['theorem']}. A forecast",
        f"took {cost}. {source(data[0])}.",
    ]
    return "\n".join(lines)


def along_table(data: list[Row]) -> str:
    """Plans by other sensitivities over plans by gradients."""
    plans, ways = [r for r in data if "way" in r], ("error, KLD", "error, loss")
    lines = [
        "KLD of a plan over that of the plan by gradients, both fitted on the same text, means over several roundings",
        "of the same weights; in parentheses the standard error of the KLD over windows, as a share.",
        "",
        "| model, measured on | fitted on | target | roundings | gradients: KLD | " + " | ".join(ways) + " |",
        "|---|---|---|---|---|---|---|",
    ]
    logs: dict[str, list[float]] = {way: [] for way in ways}
    for base in (r for r in plans if r["way"] == "gradients"):
        cells = []
        for way in ways:
            key = (base["model"], base["text"], base["fit"], base["target"], way)
            other = next(r for r in plans if (r["model"], r["text"], r["fit"], r["target"], r["way"]) == key)
            ratio = other["kld_nats"] / base["kld_nats"]
            logs[way].append(math.log(ratio))
            cells.append(f"{ratio:.2f}")
        lines.append(
            f"| {base['model']}, {domain(base['text'])} | {domain(base['fit'])} | {base['target']:g} | "
            f"{base['roundings']} | {base['kld_nats']:.4f} ({base['kld_stderr'] / base['kld_nats']:.0%}) | "
            + " | ".join(cells)
            + " |"
        )
    means = []
    for way, found in logs.items():
        mean = sum(found) / len(found)
        error = math.sqrt(sum((v - mean) ** 2 for v in found) / max(1, len(found) - 1) / len(found))
        means.append(f"{way} {math.exp(mean):.3f} +/- {error:.3f}")
    seconds = {
        way: [r["seconds"] for r in data if r["format"] == f"sensitivity by {way}"] for way in ("gradients", ways[0])
    }
    spent = [f"{min(v):.1f} to {max(v):.1f}" for v in seconds.values()]
    commands = ", ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in data))
    machine = source(data[0]).rsplit("; ", 1)[0]
    lines += [
        "",
        f"Geometric mean of the {len(logs[ways[0]])} ratios: {'; '.join(means)}.",
        f"CPU seconds of a fit: {spent[0]} by gradients, {spent[1]} by errors. {machine}; {commands}.",
    ]
    return "\n".join(lines)


def plot_planned(data: list[Row], path: Path) -> None:
    """Measured against predicted delta-NLL, a panel per model and text."""
    from matplotlib import pyplot

    shown = panels(measured(data))
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(lines, columns, figsize=(3.5 * columns, 3.4 * lines), squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, shown, strict=False):
            draw(axis, panel, of(data, panel))
        axes.flat[0].set_ylabel("measured dNLL, nats per token")
        axes.flat[0].legend(frameon=False, fontsize=7.5)
        figure.tight_layout()
        figure.savefig(path, dpi=80, metadata={"Software": None})
        pyplot.close(figure)


def draw(axis: Any, panel: tuple[str, str], rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    def points(part: list[Row]) -> tuple[list[float], list[float], list[float]]:
        known = [(p, r["delta_nll_nats"], 2 * r["delta_nll_stderr"]) for r in part if (p := own_prediction(r))]
        return [k[0] for k in known], [max(k[1], 1e-4) for k in known], [k[2] for k in known]

    uniform = [r for r in rows if r["target"] is None]
    x, y, error = points(uniform)
    axis.errorbar(x, y, error, fmt="o", color="#999999", ms=2.5, lw=0.6, alpha=0.7, label="uniform, +/- 2 s.e.")
    for target, color in COLORS.items():
        x, y, _ = points([r for r in rows if r["target"] == target])
        axis.plot(x, y, "D", color=color, ms=4, mec="white", mew=0.4, label=f"plans for {target:g} bits", zorder=3)
    ends = [min(points(rows)[0]), max(points(rows)[0])]
    axis.plot(ends, ends, color="black", lw=0.8, label="measured = predicted")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(ends[0] / 3, ends[1] * 3)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(NullFormatter())
    axis.set_title(f"{panel[0]}, {domain(panel[1])}", loc="left", fontweight="bold", fontsize=9)
    axis.set_xlabel("predicted: sum of a_l t_l^2")
    axis.grid(True, alpha=0.25)
