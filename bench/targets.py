"""The targets of `linear` on a CPU beside what bench/cpu.py and bench/cpu_extras.py measured: docs/performance.md."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable

from rows import Row

DENSE = "torch bf16, oneDNN prepacked"


def ours(row: Row) -> bool:
    return bool(row["source"] == "precal")


def time_over(rival: Row, row: Row) -> float:
    """The rival's time over the row's: the median over rounds that both have, since memory bandwidth drifts between
    rounds; that of the medians where there are none."""
    theirs, own = rival.get("us_of_rounds") or {}, row.get("us_of_rounds") or {}
    found = [theirs[i] / own[i] for i in theirs if i in own] if rival["run"] == row["run"] else []
    return float(statistics.median(found)) if found else float(rival["us"]) / float(row["us"])


def best_peer(data: list[Row], row: Row) -> Row | None:
    """The fastest int4 kernel at the same point of the same run that treats activations as this row does."""
    rivals = [
        r
        for r in data
        if not ours(r)
        and (r["run"], r["shape"], r["M"]) == (row["run"], row["shape"], row["M"])
        and (r["mode"] == "a8") == (row["mode"] == "a8")
        and r["bits"] < 16
    ]
    return min(rivals, key=lambda r: time_over(r, row), default=None)


def dense(data: list[Row], row: Row) -> Row | None:
    at = (DENSE, row["run"], row["shape"], row["M"])
    return next((r for r in data if (r["format"], r["run"], r["shape"], r["M"]) == at), None)


def standard(r: Row) -> bool:
    """A row of the default setting, but for its bits."""
    return ours(r) and bool(r["trellis"]) and (r["group_size"], r["c"]) == (64, 1)


def key(r: Row) -> tuple[str, int, int, str]:
    return str(r["shape"]), int(r["M"]), int(r["bits"]), str(r["mode"])


def spread(values: Iterable[tuple[float, bool]], form: Callable[[float], str]) -> str:
    """ "a to b; 3 of 8" """
    found = list(values)
    if not found:
        return "not measured | -"
    low, high = min(v for v, _ in found), max(v for v, _ in found)
    text = form(low) if low == high else f"{form(low)} to {form(high)}"
    met = sum(good for _, good in found)
    return f"{text} | {'all' if met == len(found) else f'{met} of {len(found)}' if met else 'no'}"


def percent(v: float) -> str:
    return f"{v:.0%}"


def ratio(v: float) -> str:
    return f"{v:.2f} x"


def one_token(rows: list[Row], bits: int) -> list[tuple[float, bool]]:
    def wanted(r: Row) -> float:
        return 0.92 if bits == 3 else 0.90 if r["shape"] == "4096x4096" else 0.95

    found = [r for r in rows if standard(r) and r["M"] == 1 and r["bits"] == bits and r["limit"] == "dram_read"]
    return [(r["share"], r["share"] >= wanted(r)) for r in found]


def three_over_four(rows: list[Row]) -> list[tuple[float, bool]]:
    """Shares, not times: the two are measured minutes apart, and DRAM drifts."""
    by_key = {key(r): r for r in rows if standard(r) and r["M"] == 1 and r["share"]}
    pairs = [(r, by_key.get((s, M, 4, mode))) for (s, M, bits, mode), r in by_key.items() if bits == 3]
    gains = [r["share"] / r["packed_bytes"] / (four["share"] / four["packed_bytes"]) for r, four in pairs if four]
    return [(g, g >= 1.25) for g in gains]


def over_peers(rows: list[Row]) -> list[tuple[float, bool]]:
    found = [(r, best_peer(rows, r)) for r in rows if standard(r) and r["M"] in (4, 16)]
    return [(v := time_over(rival, r), v >= 1.5) for r, rival in found if rival]


def over_dense(rows: list[Row], tokens: tuple[int, ...], wanted: float) -> list[tuple[float, bool]]:
    found = [(r, dense(rows, r)) for r in rows if standard(r) and r["mode"] == "a16" and r["M"] in tokens]
    return [(v := time_over(rival, r), v >= wanted) for r, rival in found if rival]


def of_int8(rows: list[Row], wide: bool) -> list[tuple[float, bool]]:
    wanted = 0.75 if wide else 0.65
    found = [
        r
        for r in rows
        if ours(r)
        and r["mode"] == "a8"
        and r["M"] >= 64
        and (r["group_size"] >= 64) == wide
        and r["limit"] == "int8_dot"
    ]
    return [(r["share"], r["share"] >= wanted) for r in found]


def cliffs(rows: list[Row]) -> list[tuple[float, bool]]:
    """Time per token over that of the next smaller M, at most."""
    found = []
    groups = itertools.groupby(sorted((r for r in rows if standard(r)), key=key), lambda r: (r["shape"],))
    for _, part in groups:
        series: dict[tuple[int, str], list[Row]] = {}
        for r in part:
            series.setdefault((r["bits"], r["mode"]), []).append(r)
        for line in series.values():
            line.sort(key=lambda r: int(r["M"]))
            for a, b in itertools.pairwise(line):
                rise = b["us"] / b["M"] / (a["us"] / a["M"])
                found.append((rise, rise <= 1.05))
    return [max(found)] if found else []


def outliers(rows: list[Row]) -> list[tuple[float, bool]]:
    """Cost of c = 1, from shares of the limit and, at few tokens, bytes."""
    plain = {
        key(r): r for r in rows if ours(r) and r["trellis"] and (r["group_size"], r["c"]) == (64, 0) and r["share"]
    }
    found = []
    for r in rows:
        other = plain.get(key(r)) if standard(r) and r["share"] else None
        if other is not None:
            more = r["packed_bytes"] / other["packed_bytes"] if r["limit"] == "dram_read" else 1.0
            cost = other["share"] / r["share"] * more - 1
            found.append((cost, cost <= 0.05))
    return found


def int3_at_many(rows: list[Row]) -> list[tuple[float, bool]]:
    by_key = {key(r): r for r in rows if standard(r) and r["M"] >= 16}
    pairs = [(r, by_key.get((s, M, 4, mode))) for (s, M, bits, mode), r in by_key.items() if bits == 3]
    found = [time_over(r, four) for r, four in pairs if four]
    return [(v, v <= 1.15) for v in found]


def extras_of(extras: list[Row], what: str) -> list[Row]:
    return [r for r in extras if r["what"] == what]


def target_lines(rows: list[Row], extras: list[Row]) -> list[str]:
    """The table of one machine and instruction set."""
    l3 = {mode: [(r["gbps"], r["gbps"] >= least) for r in extras_of(extras, f"L3, {mode}")]
          for mode, least in (("a8", 150), ("a16", 100))}  # fmt: skip
    packing = [(r["share"], r["share"] >= 0.3) for r in extras_of(extras, "prepack")]
    gb = "{:.0f} GB/s".format
    lines = [
        ("M = 1, 4 bits: 95 % of reading DRAM, 90 % at 4096x4096", spread(one_token(rows, 4), percent)),
        ("M = 1, 3 bits: 92 % of reading DRAM", spread(one_token(rows, 3), percent)),
        ("M = 1: 3 bits 1.25 x as fast as 4", spread(three_over_four(rows), ratio)),
        ("M = 1 from L3, a8: 150 GB/s", spread(l3["a8"], gb)),
        ("M = 1 from L3, a16: 100 GB/s", spread(l3["a16"], gb)),
        ("M = 4 and 16: 1.5 x the best peer of the same mode", spread(over_peers(rows), ratio)),
        ("a16, M = 64: as fast as dense bfloat16", spread(over_dense(rows, (64,), 1.0), ratio)),
        ("a16, M = 256 and 512: 0.95 x dense bfloat16", spread(over_dense(rows, (256, 512), 0.95), ratio)),
        ("a8, M >= 64, groups of 64 and more: 75 % of the int8 peak", spread(of_int8(rows, True), percent)),
        ("a8, M >= 64, groups of 32: 65 %", spread(of_int8(rows, False), percent)),
        ("time per token at most 1.05 x that of a smaller M", spread(cliffs(rows), ratio)),
        ("c = 1 costs at most 5 %", spread(outliers(rows), percent)),
        ("M >= 16: 3 bits at most 1.15 x the time of 4", spread(int3_at_many(rows), ratio)),
        ("prepack: 30 % of memcpy", spread(packing, percent)),
    ]  # fmt: skip
    shown = [f"| {target} | {figure} |" for target, figure in lines if not figure.startswith("not measured")]
    if not shown:
        return []
    return ["", "| target | measured | met |", "|---|---|---|", *shown]
