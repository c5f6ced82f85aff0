"""bench/results/compensate.jsonl -> the tables of docs/compensation.md."""

from __future__ import annotations

from rows import Row, source

KINDS, WHEN = ("same", "other"), ("before", "after")
RECIPES = {"precal": "precal", "paper": "paper, alpha = 5 %"}


def closed(row: Row, kind: str, key: str = "kld_nats") -> float:
    """Share of the distance from full precision that is gone."""
    return 1 - float(row[f"{kind}_after_{key}"] / row[f"{kind}_before_{key}"])


def _cell(row: Row, kind: str) -> str:
    before, after = row[f"{kind}_before_kld_nats"], row[f"{kind}_after_kld_nats"]
    return f"{before:.4f} -> {after:.4f} (**{closed(row, kind):.1%}**)"


def _searched(row: Row) -> str:
    if row["criterion"] != "kld":
        return f"NLL {row['before']:.4f} -> {row['after']:.4f}"
    return f"{row['before']:.4f} -> {row['after']:.4f} ({1 - row['after'] / row['before']:.1%})"


def _delta(row: Row, kind: str) -> str:
    return f"{row[f'{kind}_before_delta_nll_nats']:+.4f} -> {row[f'{kind}_after_delta_nll_nats']:+.4f}"


def _line(row: Row, first: str) -> str:
    cells = [row["model"], first, _searched(row), *(_cell(row, k) for k in KINDS), *(_delta(row, k) for k in KINDS)]
    return f"| {' | '.join(cells)} | {row['codes']:,} | {row['cpu_seconds']:.0f} |"


HEADER = ["searched on", "same domain", "other domain", "dNLL, same", "dNLL, other", "codes", "CPU s"]


def _table(data: list[Row], first: str, label: str) -> list[str]:
    lines = [f"| model | {first} | {' | '.join(HEADER)} |", "|---|---|" + "---|" * len(HEADER)]
    return lines + [_line(row, row["setting"] if label == "setting" else str(row[label])) for row in data]


def compensation_tables(data: list[Row]) -> str:
    for row in data:
        after = " after GPTQ" if row.get("gptq") else ""
        row["setting"] = f"{RECIPES[row['recipe']]}{after}, {row['bits']} bits: {row['space']}"
        row["trial"] = f"{row['space']}, {row['criterion']}"
    usual = [r for r in data if r["criterion"] == "kld" and r["samples"] == 16]
    usual.sort(key=lambda r: (r["model"], -r["bits"], r.get("gptq", False), r["recipe"], -closed(r, "same")))
    names = {True: "precal after GPTQ"}
    at_3 = {(r["model"], names.get(r.get("gptq", False), r["recipe"]), r["space"]): r for r in usual if r["bits"] == 3}
    best: dict[tuple[str, str], Row] = {}
    for (model, recipe, _), row in at_3.items():
        if closed(row, "same") > closed(best.get((model, recipe), row), "same") or (model, recipe) not in best:
            best[model, recipe] = row
    won = "; ".join(f"{m}, {r}: {closed(row, 'same'):.0%} ({row['space']})" for (m, r), row in best.items())
    worst = min((closed(r, "other"), r["model"], r["setting"]) for r in usual)
    rise = (
        f"{-worst[0]:+.1%} ({worst[1]}, {worst[2]})" if worst[0] < 0 else f"never higher (least: {worst[0]:.1%} lower)"
    )
    tokens = ", ".join(f"{model}: {count}" for model, count in {r["model"]: r["tokens"] for r in usual}.items())
    counts = [r[f"{kind}_after_tokens"] for r in data for kind in KINDS]
    least, most = min(counts), max(counts)
    error = max(r[f"{k}_{w}_kld_stderr"] / r[f"{k}_{w}_kld_nats"] for r in data for k in KINDS for w in WHEN)
    lines = [
        "KLD from the full-precision model, in nats per token, before -> after, and the share of it that is gone.",
        f"Searched on: 16 windows of the domain's text ({tokens} tokens).",
        f"Losses on other text are over {least:,} to {most:,} tokens, with a standard error of {error:.0%} at most.",
        "dNLL: the rise of the negative log likelihood over full precision, on the same texts.",
        "Codes: how many were changed, over all rounds. A negative share: the KLD is higher than before.",
        "",
        *_table(usual, "recipe, bits: space", "setting"),
        "",
        f"Targets. At 3 bits, at least 20 % of the KLD gone on other text of the same domain: {won}. On the other "
        f"domain, KLD at most 1 % higher: {rise}.",
    ]
    data = [r for r in data if not r.get("gptq")]
    more = [r for r in data if r["recipe"] == "precal" and r["bits"] == 3 and r["space"] == "gradient"]
    sizes = sorted((r for r in more if r["criterion"] == "kld"), key=lambda r: (r["model"], r["samples"]))
    if len(sizes) > 2:
        lines += ["", "More or less text (precal, 3 bits, gradient):", "", *_table(sizes, "windows of 256", "samples")]
    both = [r for r in data if r["recipe"] == "precal" and r["bits"] == 3 and r["samples"] == 16]
    trials = {(r["model"], r["space"]) for r in both if r["criterion"] == "perplexity"}
    pairs = sorted((r for r in both if (r["model"], r["space"]) in trials), key=lambda r: (r["model"], r["trial"]))
    if pairs:
        lines += [
            "",
            "The two criteria (precal, 3 bits); dNLL on other text of the same domain:",
            "",
            "| model | space, criterion | same domain | other domain | dNLL |",
            "|---|---|---|---|---|",
        ]
        for r in pairs:
            cells = [r["model"], r["trial"], _cell(r, "same"), _cell(r, "other"), _delta(r, "same")]
            lines.append(f"| {' | '.join(cells)} |")
    times = {r["recipe"]: r["requantize_ns"] for r in data if r["bits"] == 3 and "requantize_ns" in r}
    if times:
        named = ", ".join(f"{ns:.0f} ns (recipe {recipe})" for recipe, ns in times.items())
        lines += ["", f"CPU time of one candidate, per weight, at 3 bits: {named}."]
    largest = max(data, key=lambda r: r["peak_mb"])
    lines += [
        "",
        f"Peak memory: {largest['peak_mb']:.0f} MB ({largest['model']}, {largest['samples']} windows, both models and "
        f"the loss on other text included), of which {largest['start_mb']:.0f} MB before anything was loaded.",
        "",
        "; ".join(dict.fromkeys(source(r) for r in data)) + f"; {data[0]['threads']} thread(s).",
    ]
    return "\n".join(lines)
