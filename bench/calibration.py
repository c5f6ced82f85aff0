"""The tables of docs/calibration.md."""

from __future__ import annotations

from collections.abc import Iterable

from rows import Row, source

TEXTS = {
    "books_eval.txt": "books",
    "python_eval.txt": "python",
    "HumanEval.jsonl": "HumanEval",
    "wikitext2_test.txt": "WikiText-2",
}
OWN = {"books": "books_eval.txt", "python": "python_eval.txt"}  # domain that is calibrated on -> its held-out text
DEFAULT = "precal g64"
THEN = f"{DEFAULT}, then GPTQ"
DAMPING = 0.1  # the default
TARGET, OFF_DOMAIN = 0.8, 1.1


def find(data: list[Row], width: int, name: str, domain: str, text: str) -> Row | None:
    wanted = (width, name, domain, text)
    return next((r for r in data if (r["width"], r["format"], r["calibration"], r["text"]) == wanted), None)


def widths(data: list[Row]) -> list[int]:
    return sorted({r["width"] for r in data}, reverse=True)


def table(data: list[Row], names: Iterable[str], head: str) -> list[str]:
    """A line per width, format and calibration text: KLD on every text, and over that of precal alone; of the widths
    that have more than these two."""
    lines = [f"| {head} | bits | on | " + " | ".join(TEXTS.values()) + " |", "|---|---|---|" + "---|" * len(TEXTS)]
    names = list(names)
    for width in widths([r for r in data if r["format"] in names and r["format"] not in (DEFAULT, THEN)]):
        for name in names:
            for domain in ("-", *OWN):
                found = [find(data, width, name, domain, text) for text in TEXTS]
                if found[0] is None:
                    continue
                cells = []
                for text, r in zip(TEXTS, found, strict=True):
                    base = find(data, width, DEFAULT, "-", text)
                    assert r is not None and base is not None
                    cell = f"{r['kld_nats']:.4f} ({r['kld_nats'] / base['kld_nats']:.2f})"
                    cells.append(f"**{cell}**" if OWN.get(domain) == text else cell)
                lines.append(
                    f"| {width} bits: {name} | {found[0]['bits_per_weight']:.3f} | {domain} | "
                    + " | ".join(cells)
                    + " |"
                )
    return lines


def paragraph(data: list[Row]) -> list[str]:
    """Whether the targets are met."""
    alone = sorted({r["format"] for r in data if r["format"].startswith("GPTQ alone")})
    lines = []
    for width in widths(data):
        own, off = [], []
        for domain, text in OWN.items():
            mine = find(data, width, THEN, domain, text)
            rivals = [r for name in alone if (r := find(data, width, name, domain, text)) is not None]
            assert mine is not None and rivals
            best = min(rivals, key=lambda r: float(r["kld_nats"]))
            own.append((mine["kld_nats"] / best["kld_nats"], domain, best["format"], best["bits_per_weight"]))
            for other in TEXTS:
                base, there = find(data, width, DEFAULT, "-", other), find(data, width, mine["format"], domain, other)
                assert base is not None and there is not None
                if other != text:
                    off.append((there["kld_nats"] / base["kld_nats"], domain, TEXTS[other]))
        worst, far = max(own), max(off)
        rival = f"{worst[2].removeprefix('GPTQ alone, ')}, {worst[3]:.2f} bits"
        lines.append(
            f"- {width} bits, in its own domain: {worst[0]:.2f} x the KLD of the best GPTQ alone ({rival}; {worst[1]}, "
            f"the worse of the two). Target {TARGET:.1f}: {verdict(worst[0] <= TARGET)}."
        )
        lines.append(
            f"- {width} bits, elsewhere: at most {far[0]:.2f} x the KLD of precal alone (calibrated on {far[1]}, "
            f"measured on {far[2]}). Target {OFF_DOMAIN:.1f}: {verdict(far[0] <= OFF_DOMAIN)}."
        )
    return lines


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def claim_tables(data: list[Row]) -> str:
    names = [*dict.fromkeys(r["format"] for r in data if r["format"].startswith("GPTQ alone")), DEFAULT, THEN]
    return "\n".join([*table(data, names, "format"), "", *paragraph(data), "", source(data[0]) + "."])


def damping_table(data: list[Row]) -> str:
    found = {r["format"] for r in data if r["format"].startswith(f"{THEN}, damping ")}
    names = {float(name.rpartition(" ")[2]): name for name in found} | {DAMPING: THEN}
    lines = table(data, [names[value] for value in sorted(names)], "damping")
    default = f"**{THEN}, damping {DAMPING:g}**"
    return "\n".join([*(line.replace(f": {THEN} |", f": {default} |") for line in lines), "", source(data[0]) + "."])


def length_table(data: list[Row]) -> str:
    names = [*dict.fromkeys(r["format"] for r in data if r["format"].endswith(" windows")), THEN]
    default = f"**{THEN}, 64 windows**"
    lines = [line.replace(f": {THEN} |", f": {default} |") for line in table(data, names, "text")]
    return "\n".join([*lines, "", source(data[0]) + "."])


def survivors_table(data: list[Row]) -> str:
    lines = ["| survivors of the search | output error; data-free codes 1 | us a weight, one core |", "|---|---|---|"]
    lines += [f"| {r['way']} | {r['error_ratio']:.2f} | {r['microseconds']:.1f} |" for r in data]
    return "\n".join([*lines, "", source(data[0]) + "."])
