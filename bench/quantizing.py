"""Rows of bench/quantize_speed.py and quantize_checkpoint.py -> the part of docs/performance.md about quantizing."""

from __future__ import annotations

from performance import machines, of_machine
from rows import Row

EMPTY = "No run of `bench/quantize_speed.py` is committed yet."

HOW = """\
Million weights per second, median over rounds that go through all contenders; in brackets core-cycles per weight: CPU
time of the process times the frequency, which follows from float32 multiply-adds measured in the same rounds. memcpy
and read are torch's, of as many bytes as the weight has. In detail: `bench/quantize_speed.py`."""

# GB/s of float32 input on two threads of a machine of the same kind, 4096 x 14336, measured apart.
QUOTED = (("ggml Q4_0", 5.8), ("ggml Q3_K", 0.69), ("ggml Q4_K", 0.155), ("ggml IQ4_NL", 0.044), ("ggml IQ3_S", 0.029))

LIMITS = """\
What limits them; parts of an op were timed and compared by hand, and no command repeats that. **Recipe precal**: about
one vector instruction per weight and candidate scale (62 for 64 rows: one multiplication and four lookups, then a
square per subset of levels and the add-compare-select of four states) and eight scales, so 3 to 4 cycles; the rest is
reading the weight twice, turning it so that rows become lanes, and turning the codes back. **histogram**: a load of an
index and an increment in memory per weight are three quarters of it, and what counts is how much of the first level
cache the counts take: four per bin against waiting for a neighbour were a tenth slower than two (and no faster where
weights are all alike), four tables apart slower still, and so was one branch for 512 weights instead of 32; one count
per bin would gain another twentieth here and lose it where weights are alike. Asking for weights two pages ahead
gained a twentieth, floors in one instruction and a loop without choices of dtype the rest. **salience_threshold** on
one thread is bound by memory: the largest magnitude alone takes 0.40 to 0.44 cycles per weight, the pass that also
counts and collects 0.45, the sample and the end 0.02 each. What it took: no branch per candidate or four vectors but a
list, four pages ahead asked for instead of one (0.52 against 0.41 in a loop of its own), and a sample of whole cache
lines, so that 0.6 % of the weights are collected, not 1 %. In bfloat16 it is bound by its instructions, sixteen
weights at a time. **Recipe paper** is the threshold, 0.5 cycles, and one kernel, 0.9: magnitudes and mask 0.36, codes
0.34, packing 0.09, scales 0.05; fresh pages for 10 MB of results are the rest. Before, mask, codes (2.2 cycles) and
packing went through memory and a division per weight, now a multiplication and two fused ones with the same bits. Next
would be to reduce the maxima of several groups at once. **200 x hqq** would be 2.2 cycles per weight, which the
recipes paper and rtn keep to; the default spends its ten on the trellis, for quality. **kl_nats** is the op `measure`,
which makes SQNR in the same pass: a weight in cache takes 1 cycle for W' (codes, trellis, levels, scales), 1 for its
quotient, its bin and the squares (a division costs nothing beside them), and 1 to be counted, 2 with a trellis, where
it is counted by code: increments wait, it seems, for others under way that have the same low bits of the address. Rows
of counts a little apart took up to a tenth off; XOR of the address with the code, pairs of addresses in one load and a
smaller part of a row brought nothing. Next would be counts by code only at the ends of each code's bins."""


def cell(row: Row | None) -> str:
    return "-" if row is None else f"{row['mweights_per_s']:.4g} ({row['cycles_per_weight']:.3g})"


def _met(value: float, limit: float, at_most: bool) -> str:
    return "yes" if (value <= limit if at_most else value >= limit) else "no"


def target_table(at: dict[tuple[str, str], Row], quoted: bool) -> list[str]:
    """Cycles per weight and ratios of one machine beside what was wanted; what was not measured there is left out."""
    lines = ["", "| target, float32 | measured | met |", "|---|---|---|"]
    cycles = (
        ("recipe precal, 4 bits", 12.0),
        ("recipe paper, 4 bits", 2.5),
        ("histogram, 2048 bins", 1.1),
        ("kl_nats (measure)", 2.5),
    )
    for name, limit in cycles:
        row = at.get((name, "float32"))
        if row is not None:
            value = row["cycles_per_weight"]
            lines.append(f"| {name}: {limit:g} cycles per weight | {value:.3g} | {_met(value, limit, True)} |")
    default, threshold = at.get(("recipe precal, 4 bits", "float32")), at.get(("salience_threshold", "float32"))
    if threshold is not None:
        value = threshold["x_memcpy"]
        lines.append(f"| salience_threshold: 1.8 x memcpy | {value:.2f} x | {_met(value, 1.8, False)} |")
    if default is not None:
        peers = [(name, at.get((name, "float32")), limit) for name, limit in
                 (("hqq, 4 bits g64, optimize", 200.0), ("auto_adpq, 4 bits g128", 400.0))]  # fmt: skip
        ratios = [(n, default["mweights_per_s"] / r["mweights_per_s"], limit) for n, r, limit in peers if r is not None]
        if quoted:
            ratios.append(("ggml Q4_K, quoted", default["mweights_per_s"] / (dict(QUOTED)["ggml Q4_K"] * 250), 12.0))
        for name, value, limit in ratios:
            lines.append(f"| recipe precal: {limit:g} x {name} | {value:.3g} x | {_met(value, limit, False)} |")
        half = at.get(("recipe precal, 4 bits", "bfloat16"))
        if half is not None:
            value = half["mweights_per_s"] / default["mweights_per_s"]
            lines.append(f"| recipe precal: bfloat16 as fast as float32 | {value:.2f} x | {_met(value, 1.0, False)} |")
    return lines


def quantizing_section(steps: list[Row], whole: list[Row]) -> str:
    lines = ["", "# Speed of quantizing", "", *(HOW.splitlines() if steps else [EMPTY])]
    for machine in machines(steps):
        part = of_machine(steps, machine)
        cpu, isa, threads = machine
        newest = max(part, key=lambda r: str(r["date"]))
        lines += [
            "",
            f"## {cpu}, {isa}, {threads} thread{'s' * (threads > 1)}",
            "",
            f"{newest['date']}, commit {newest['commit']}, {newest['ghz']} GHz; `{newest['command']}`.",
            "",
            "| | float32 | bfloat16 | recipe precal is faster, float32 |",
            "|---|---|---|---|",
        ]
        at = {(r["name"], r["dtype"]): r for r in part}
        default = at.get(("recipe precal, 4 bits", "float32"))
        for name in dict.fromkeys(r["name"] for r in part):
            full = at.get((name, "float32"))
            peer = full is not None and full["source"] not in ("precal", "limit")
            ahead = f"{default['mweights_per_s'] / full['mweights_per_s']:.3g} x" if peer and default and full else ""
            label = f"{name} ({full['source']})" if peer and full else name
            lines.append(f"| {label} | {cell(full)} | {cell(at.get((name, 'bfloat16')))} | {ahead} |")
        for name, gbps in QUOTED:
            if threads != 2 or default is None:
                continue
            ahead = f"{default['mweights_per_s'] / (gbps * 250):.3g} x"
            lines.append(f"| {name}, quoted, 2 threads | {gbps * 250:.4g} | - | {ahead} |")
        lines += target_table(at, threads == 2)
    if steps:
        lines += ["", *LIMITS.splitlines()]
    if whole:
        lines += [
            "",
            "## A whole checkpoint",
            "",
            "Seconds for a bfloat16 Llama in the page cache; stages overlap (`bench/quantize_checkpoint.py`).",
            "",
            "| machine | GB | recipe | seconds | plan | read | compute | write | weights per second |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for r in whole:
            stages = " | ".join(f"{r['wall'][stage]:.1f}" for stage in ("plan", "read", "compute", "write"))
            lines.append(
                f"| {r['date']}, {r['cpu']}, {r['isa']}, {r['threads']} threads | {r['bytes'] / 1e9:.2f} | "
                f"{r['recipe']} | {r['seconds']:.1f} | {stages} | {r['weights'] / r['seconds'] / 1e6:.0f} M |"
            )
    return "\n".join(lines) + "\n"
