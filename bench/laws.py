"""The generated parts of docs/scaling-laws.md, from the rows of `scaling_laws.py` and the fits of `laws_fit.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rows import Row, source

BITS, BLOCKS = (2, 3, 4, 6), (16, 32, 128)  # that GPTQ was run on
LEAST_SHOWN = 0.01  # nats: shares of less are noise
SHOWN_RADII = (0.02, 0.04, 0.08, 0.12, 0.18, 0.27, 0.4, 0.6, 0.9)


def laws_blocks(rows: list[Row], fits: list[Row]) -> dict[str, str]:
    """Name of a marked part -> its text."""
    blocks: dict[str, Callable[[], str]] = {
        "laws-models": lambda: models_table(rows),
        "laws-scores": lambda: scores_table(fits),
        "laws-shipped": lambda: shipped_table(fits),
        "laws-certainty": lambda: certainty_table(fits),
        "laws-flatness": lambda: flatness_table(rows),
        "laws-radial": lambda: radial_table(rows),
        "laws-gptq": lambda: gptq_table(rows),
    }
    return {name: make() for name, make in blocks.items()}


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of every model: the families first, small models first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["held_out"], r["family"], r["parameters"])):
        found.setdefault(row["model"], []).append(row)
    return found


def group_of(row: Row) -> str:
    return str(row["family"])


def models_table(rows: list[Row]) -> str:
    lines = ["| model | family | parameters | NLL | formats |", "|---|---|---|---|---|"]
    for name, part in by_model(rows).items():
        first = part[0]
        lines.append(
            f"| {name} | {group_of(first)} | {first['parameters']:,} | {first['nll_nats']:.3f} | {len(part)} |"
        )
    counts = sorted({r["tokens"] for r in rows})
    tokens = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lines += ["", f"Each judged on {tokens} predicted tokens. {sources(rows)}"]
    return "\n".join(lines)


def sources(rows: Sequence[Row]) -> str:
    return "; ".join(dict.fromkeys(source(r) for r in rows)) + "."


def cell(score: Row) -> str:
    return f"{score['r2']:.3f}, {score['mae_nats']:.4f}"


def scores_table(fits: list[Row]) -> str:
    """R^2 and MAE of everything that was tried."""
    kinds = ("all", "others", "gptq")
    lines = [
        "R^2 and mean absolute error in nats, where the true rise is under 1 nat: families that were left out of the",
        "fit, and the held-out models; all rows, those without GPTQ, those after it. Closed forms need no fit.",
        "",
        "| predictor | families: all | no GPTQ | GPTQ | held out: all | no GPTQ | GPTQ |",
        "|---|---|---|---|---|---|---|",
    ]
    shipped = next(r["variant"] for r in fits if r["kind"] == "shipped")
    for r in fits:
        if r["kind"] == "shipped":
            continue
        cells = [cell(r[split][kind]) for split in ("families", "held_out") for kind in kinds]
        name = f"**{r['predictor']}**" if r["predictor"] == shipped else r["predictor"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    counts = [f"{fits[0][split]['all']['rows']}" for split in ("families", "held_out")]
    lines += ["", f"Rows: {counts[0]} of families, {counts[1]} held out. {source(fits[0])}."]
    return "\n".join(lines)


def shipped_table(fits: list[Row]) -> str:
    """The shipped predictor, family by family and model by model."""
    r = next(r for r in fits if r["kind"] == "shipped")
    lines = [
        f"The shipped predictor ({r['variant']}; {r['rows']} rows of {len(r['models'])} models, {r['nodes']} nodes):",
        "",
        "| left out | R^2, MAE: all | no GPTQ | GPTQ | in the 90 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, score in {**r["left_out_families"], **r["held_out_models"]}.items():
        held = r["covered_held_out"].get(name)
        share = "by construction, over families" if held is None else f"{held:.0%}"
        lines.append(f"| {name} | {cell(score['all'])} | {cell(score['others'])} | {cell(score['gptq'])} | {share} |")
    return "\n".join(lines)


def certainty_table(fits: list[Row]) -> str:
    """The predictor's intervals beside the theorem's."""
    r = next(r for r in fits if r["kind"] == "shipped")
    lines = [
        "Intervals for 90 % of rises, as the factor from the middle to either end (of rise + 0.001 nats, median over",
        "the formats without GPTQ), and the share of true rises in them; features without gradients, as for a plan.",
        "",
        "| left out | rows | theorem: factor, in it | predictor: factor, in it | latter narrower | in the narrower |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in r["certainty"].items():
        cells = [f"{s[key]['factor']:.2f}, {s[key]['covered']:.0%}" for key in ("theorem", "predictor")]
        lines.append(
            f"| {name} | {s['rows']} | {cells[0]} | {cells[1]} | {s['predictor_narrower']:.0%} | {s['covered']:.0%} |"
        )
    return "\n".join(lines)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, without ties."""

    def ranks(values: Sequence[float]) -> list[int]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [order.index(i) for i in range(len(values))]

    n = len(x)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(ranks(x), ranks(y), strict=True)) / (n * (n * n - 1))


def flatness_table(rows: list[Row]) -> str:
    """How steep models are, beside their size."""
    lines = [
        "| model | parameters | NLL | rise at t = 0.08 | at t = 0.18 | rise of mxint4_32 | of mxint3_32 |",
        "|---|---|---|---|---|---|---|",
    ]
    models = by_model(rows)
    for name, part in models.items():
        first = part[0]
        delta = {r["format"]: r["delta_nll_nats"] for r in part}
        profile = dict(zip(first["radii"], first["profile"], strict=True))
        lines.append(
            f"| {name} | {first['parameters']:,} | {first['nll_nats']:.3f} | {profile[0.08]:.4f} | {profile[0.18]:.4f} "
            f"| {delta['mxint4_32']:.4f} | {delta['mxint3_32']:.4f} |"
        )
    lines += [
        "",
        "Rank correlation with the number of parameters, and with the pretrained loss, of the rise at 0.08:",
        "",
    ]
    for family in dict.fromkeys(part[0]["family"] for part in models.values()):
        firsts = [part[0] for part in models.values() if part[0]["family"] == family]
        if len(firsts) < 3:
            continue
        steep = [r["profile"][r["radii"].index(0.08)] for r in firsts]
        size = rank_correlation([r["parameters"] for r in firsts], steep)
        loss = rank_correlation([r["nll_nats"] for r in firsts], steep)
        lines.append(f"- {family} ({len(firsts)} models): {size:+.2f} with size, {loss:+.2f} with loss")
    return "\n".join(lines)


def radial_table(rows: list[Row]) -> str:
    """The radial profile and how fast it grows: the exponent between neighbouring radii is 2 in a quadratic bowl."""
    radii = [t for t in SHOWN_RADII if t in rows[0]["radii"]]
    lines = [
        "Rise in nats at each relative distance t; in parentheses the exponent of its growth from the distance before,",
        "which is 2 in a quadratic bowl:",
        "",
        "| model | " + " | ".join(f"t = {t:g}" for t in radii) + " |",
        "|---|" + "---|" * len(radii),
    ]
    for name, part in by_model(rows).items():
        profile = dict(zip(part[0]["radii"], part[0]["profile"], strict=True))
        cells, before = [], None
        for t in radii:
            text = f"{profile[t]:.3f}" if profile[t] >= 0.01 else f"{profile[t]:.1e}"
            if before is not None and profile[t] > 0 and profile[before] > 0:
                text += f" ({math.log(profile[t] / profile[before]) / math.log(t / before):.1f})"
            cells.append(text)
            before = t
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gptq_table(rows: list[Row]) -> str:
    """What GPTQ takes off the rise, by bits: nats, and as a share."""
    lines = [
        "Rise by round-to-nearest minus rise after GPTQ, nats; in parentheses as a share of the former, where that is",
        f"at least {LEAST_SHOWN}:",
        "",
        "| model, block | " + " | ".join(f"{bits} bits" for bits in BITS) + " |",
        "|---|" + "---|" * len(BITS),
    ]
    most: dict[int, int] = dict.fromkeys(BITS, 0)
    shares: dict[int, int] = dict.fromkeys(BITS, 0)
    for name, part in by_model(rows).items():
        delta = {r["format"]: r["delta_nll_nats"] for r in part}
        for block in BLOCKS:
            pairs = [(delta.get(f"mxint{b}_{block}"), delta.get(f"mxint{b}_{block}+gptq")) for b in BITS]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            if len(known) < len(BITS):
                continue
            gains = [a - b for a, b in known]
            parts = [(a - b) / a if a >= LEAST_SHOWN else -math.inf for a, b in known]
            most[BITS[gains.index(max(gains))]] += 1
            shares[BITS[parts.index(max(parts))]] += 1
            cells = [
                f"{gain:.4f}" + (f" ({share:.0%})" if share > -math.inf else "")
                for gain, share in zip(gains, parts, strict=True)
            ]
            lines.append(f"| {name}, {block} | " + " | ".join(cells) + " |")
    total = sum(most.values())
    lines += [
        "",
        f"Largest gain in nats, of {total} lines: " + counted(most) + ". As a share: " + counted(shares) + ".",
    ]
    return "\n".join(lines)


def counted(found: dict[int, int]) -> str:
    return ", ".join(f"at {bits} bits {count}" for bits, count in found.items())
