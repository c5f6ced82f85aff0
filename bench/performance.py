"""Rows of bench/cpu.py -> docs/performance.md and the table of the README."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rows import Row
from targets import best_peer, dense, ours, target_lines, time_over
from whole_models import models_section, served_section

LIMITS = {
    "dram_read": "DRAM read, GB/s",
    "copy": "memcpy, GB/s copied",
    "fp32_fma": "float32 multiply-add, Gop/s",
    "bf16_dot": "bfloat16 dot (vdpbf16ps), Gop/s",
    "int8_dot": "int8 dot (vpdpbusd), Gop/s",
}
SHORT = {"dram_read": "read", "fp32_fma": "fp32", "bf16_dot": "bf16", "int8_dot": "int8"}
EMPTY = "No run of `make bench-cpu` is committed yet: it wants a quiet machine."

HOW = """\
Median time of a call, with every thread of the machine. The percentage is the share of what the machine could do at
most, by the limit that binds: reading the packed weight from memory (`read`), or multiply-adds of the kind that the
mode allows (`fp32`, `bf16`, `int8`). Limits are measured in the same rounds; shares and ratios are paired inside them
(medians over rounds), because memory bandwidth drifts. For M < 64 weights are cold: copies that differ, together more
than 4 x L3; from M = 64 on there is one copy, which may stay in L3. Every result was checked against float64. In
detail: `bench/cpu.py`.

Modes: `a16` keeps activations in 16 bits, `a8` rounds them to int8 inside the call, `f32` computes in float32. A peer
is compared with ours of the same kind: one that rounds activations to int8 with `a8`, one that does not with `a16` and
`f32`. "x peer" and "x dense" (bfloat16) are its time over ours, where both come from one run; bold: it is faster."""

QUOTED = """\
These have no wheel that could run in the same rounds. Measured apart, on a machine of the same kind, the same way;
times in us at M = 1, 4, 16, with the share of DRAM read at M = 1, and Gop/s above. All round activations to int8."""


LIMITS_TEXT = """\
## What limits `linear`

Counts are of the AVX-512 kernels (csrc/cpu/linear_int8_avx512-inl.h), per step of 16 rows x 4 columns and vector
instructions unless said otherwise; a Zen 5 core starts two dots and two vector loads a cycle. What is called tried was
compared by hand and has no figures here.

- **M = 1** (wanted: 95 % of reading DRAM, 92 % with 3 bits): memory, not instructions: reading the same bytes in the
  same order without decoding them takes as long. What the order is matters most. Two tiles at a time share their
  activations; as two streams 34 KB apart they were read 7 to 9 % slower (by hand) than now, as one, with chunks that
  lie by turns (csrc/format/prepacked.h). Tried: prefetches 1 to 24 KB ahead, to L1, to L2, past the caches, at two
  distances, the next pair as a whole to L2 (kept: 7 KB ahead to L1); four streams; huge pages or small ones (no
  difference on this machine). Every call has a few microseconds beside the weight, and waits for the later thread.
- **M = 1 from L3** (wanted: 150 GB/s in a8, 100 in a16): the core, not the cache. One thread is no faster from L2 than
  from L3, and far from reading either (table below). By count a register of 128 codes takes 5 instructions to decode, 2
  dots and 3 loads in a8, in a16 4 dots and 5 loads; sums and scales of a group and outliers come on top. Two such
  registers in nine cycles are 14 bytes a cycle, 55 GB/s at 4 GHz: 150 GB/s are three cores' work. Next: fewer selects
  in the decode, which need another order of the codes in memory.
- **M = 4 and 16** (wanted: 1.5 x the best peer): loads and dots are two a cycle each, and decoding and outliers come
  on top. Up to 8 sums (tokens x planes) of two tiles stand in registers, so a load of four activations serves two dots.
  Up to 16 are done in two halves, each of which decodes the span: 4 to 20 % faster (by hand) than one tile at a time,
  where every dot needs its own load, and than decoding into L1 first. From 17 on that is the better way; a16 at M = 16
  has 32. a16 has two dots per 64 codes: 1.5 x a peer at 60 % or more of the bfloat16 peak is hardly to be had.
- **M >= 64, a16** (wanted: as fast as dense bfloat16): 8 sums of each of two tiles run nearly at the dots' peak by
  profile; converting and scaling each sum takes 6 instructions per span of a group, decoding 1 to 2 of 64 to 256
  tokens' worth, storing and outliers the rest. Dense code has none of this to do and reaches the whole peak.
- **M >= 64, a8** (wanted: 75 % of the int8 peak, 65 % at g32): least at M = 64, where decoding and the outliers are
  shared by fewer tokens, and at K = 14336, where 128 tokens of x do not fit in L2. The same three costs as in a16 weigh
  twice as much, as there is one dot instead of two: at g32 a span has 8 dots and 4 instructions to scale their sum.
  Next: fewer tokens per pass where K is large.
- **Outliers** (wanted: 5 % at c = 1): one load and one multiply-add per entry and 16 tokens, by count 3 % of a8 at M
  = 64. The load is a line of x at a random column, from L2, which makes it two to three times that. Tried: gathers
  (slower), permutations instead of broadcasts of the values (no difference). Next: x in 16 bits for this purpose
  where it comes in 16 bits, 32 tokens a line. At M = 1 they come first in a pair of tiles, while no more codes are
  asked of memory; that shows now that the rest waits less. Next: asking for codes between them.
- **AVX2 and AVX-VNNI** (wanted: 85 % of reading DRAM at M = 1): AVX2 has no 8-bit dot product that takes full range.
  Words and vpmaddwd need 4 instructions per 32 products, as many as a float32 multiply-add does, so many tokens run at
  about the float32 peak of AVX2; vpdpbusd of AVX-VNNI needs 1. One token needs 13 instructions to decode 64 codes of 8
  rows, half as wide as AVX-512's 2.5, and 10 (AVX2) or 2 (AVX-VNNI) for their dots: less than DRAM gives to a core.
  Tried: words for one token too (7 instead of 5 instructions per 32 products), decoding into L1 first (slower), two
  sums beside each other against the latency of a dot (kept), scales of a group as vectors instead of one by one (kept:
  they were a third of the time). Next: GFNI on 256 bits for the history of the codes."""


def machines(data: list[Row]) -> list[tuple[str, str, int]]:
    return list(dict.fromkeys((r["cpu"], r["isa"], r["threads"]) for r in data))


def of_machine(data: list[Row], machine: tuple[str, str, int]) -> list[Row]:
    return [r for r in data if (r["cpu"], r["isa"], r["threads"]) == machine]


def shapes(data: list[Row]) -> list[str]:
    return sorted({r["shape"] for r in data}, key=lambda shape: tuple(map(int, shape.split("x"))))


def times(row: Row, rival: Row | None) -> str:
    if rival is None:
        return "-"
    ratio = time_over(rival, row)
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def share(row: Row) -> str:
    return "-" if row["share"] is None else f"{row['share']:.0%} {SHORT[row['limit']]}"


def microseconds(row: Row) -> str:
    us = float(row["us"])
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def setting(row: Row) -> str:
    return str(row["format"]).removeprefix("precal ")


def sources(data: list[Row]) -> list[str]:
    """A line for every run."""
    lines = []
    for run in dict.fromkeys(r["run"] for r in data):
        part = [r for r in data if r["run"] == run]
        first = part[0]
        versions = sorted({r["source"] for r in part if not ours(r)})
        lines.append(
            f"- {first['date']}, commit {first['commit']}, precal {first['precal']}, Python {first['python']}, numpy "
            f"{first['numpy']}{''.join(', ' + v for v in versions)}; `{first['command'].strip()}`; turns of "
            f"{first['turn_ms']:g} ms, at most {max(r['foreign_max'] for r in part):.0%} of the CPU used by others in "
            f"one that counts, {sum(r['dropped'] for r in part)} of "
            f"{sum(r['dropped'] + r['turns'] for r in part)} turns dropped."
        )
    return lines


def limit_table(data: list[Row]) -> list[str]:
    lines = ["| limit | least | median | most |", "|---|---|---|---|"]
    for name, label in LIMITS.items():
        found = [r["limits"][name] for r in data if name in r["limits"]]
        figures = (min(found), statistics.median(found), max(found)) if found else ()
        lines.append(f"| {label} | " + (" | ".join(f"{v:.0f}" for v in figures) or "not on this CPU | - | -") + " |")
    return lines


def our_table(data: list[Row], shape: str) -> list[str]:
    lines = [
        "| M | bits, group, c, coding, mode | us | of the limit | best peer | its us | its share | x peer | x dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    here = [r for r in data if r["shape"] == shape and ours(r)]
    for r in sorted(here, key=lambda r: (r["M"], -r["bits"], r["group_size"], r["c"], setting(r))):
        rival = best_peer(data, r)
        peer = f"{rival['format']} | {microseconds(rival)} | {share(rival)}" if rival else "- | - | -"
        figures = f"{microseconds(r)} | {share(r)} | {peer} | {times(r, rival)} | {times(r, dense(data, r))}"
        lines.append(f"| {r['M']} | {setting(r)} | {figures} |")
    return lines


def peer_table(data: list[Row], shape: str) -> list[str]:
    here = [r for r in data if r["shape"] == shape and not ours(r)]
    if not here:
        return []
    tokens = sorted({r["M"] for r in here})
    lines = [
        "",
        "| peer: us, share of the limit | mode | bits | " + " | ".join(f"M = {M}" for M in tokens) + " | error |",
        "|---|---|---|" + "---|" * (len(tokens) + 1),
    ]
    for name in dict.fromkeys(r["format"] for r in here):
        part = {r["M"]: r for r in here if r["format"] == name}
        first = next(iter(part.values()))
        cells = [f"{microseconds(part[M])}, {share(part[M])}" if M in part else "-" for M in tokens]
        worst = max(r["error"] for r in part.values())
        lines.append(f"| {name} | {first['mode']} | {first['bits']:g} | " + " | ".join(cells) + f" | {worst:.1e} |")
    return lines


def quoted_tables(quoted: list[Row]) -> list[str]:
    if not quoted:
        return []
    first = quoted[0]
    lines = ["", "## Quoted: ggml and ik_llama.cpp", "", f"{QUOTED} {first['date']}, {first['cpu']}."]
    for shape in shapes(quoted):
        lines += [
            "",
            f"{shape}:",
            "",
            "| kernel | bits | M = 1 | M = 4 | M = 16 | M = 64, Gop/s | M = 256 | M = 512 |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in (r for r in quoted if r["shape"] == shape):
            us, gops = r["us"], r["gops"]
            cells = [f"{us['1']}, {r['read_share']:.0%} read", us["4"], us["16"], gops["64"], gops["256"], gops["512"]]
            lines.append(f"| {r['format']} ({r['source']}) | {r['bits']:g} | " + " | ".join(map(str, cells)) + " |")
    return lines


def cache_table(extras: list[Row]) -> list[str]:
    """What one thread does with weights that a cache holds."""
    found = [r for r in extras if r["what"].startswith("one thread")]
    if not found:
        return []
    lines = [
        "",
        "| M = 1, 4 bits, " + found[0]["cpu"] + " | GB/s of packed weights | of reading that cache |",
        "|---|---|---|",
    ]
    lines += [f"| {r['what']} | {r['gbps']} | {r['share']:.0%} |" for r in found]
    return [*lines, "", f"{found[0]['date']}, {found[0]['isa']}; `{found[0]['command']}`."]


def performance_page(
    data: list[Row],
    quoted: list[Row],
    models: list[Row],
    heads: list[Row],
    extras: Sequence[Row] = (),
    served: Sequence[Row] = (),
) -> str:
    lines = [
        "# Speed on the CPU",
        "",
        "Generated by `bench/report.py` from `cpu.jsonl`, `cpu_extras.jsonl`, `cpu_quoted.jsonl`, `models.jsonl`,",
        "`head.jsonl` and `vllm.jsonl` of `bench/results`; do not edit.",
        "",
        *(HOW.splitlines() if data else [EMPTY]),
    ]
    for machine in machines(data):
        part = of_machine(data, machine)
        cpu, isa, threads = machine
        lines += ["", f"## {cpu}, {isa}, {threads} thread{'s' * (threads > 1)}", "", *sources(part)]
        lines += ["", *limit_table(part), *target_lines(part, of_machine(list(extras), machine))]
        for shape in shapes(part):
            lines += ["", f"### {shape}", "", *our_table(part, shape), *peer_table(part, shape)]
    limits = ["", *LIMITS_TEXT.splitlines(), *cache_table(list(extras))] if data else []
    return (
        "\n".join(
            [*lines, *limits, *models_section(models, heads), *served_section(list(served)), *quoted_tables(quoted)]
        )
        + "\n"
    )


def readme_performance(data: list[Row]) -> str:
    """The default setting at a few M on the shape and the machine (and instruction set) that most rows are of."""
    if not data:
        return EMPTY
    machine = statistics.mode((r["cpu"], r["isa"], r["threads"]) for r in data)
    part = of_machine(data, machine)
    main_run = statistics.mode(str(r["run"]) for r in part)
    first = next(r for r in part if r["run"] == main_run)
    found = [r for r in part if ours(r) and r["trellis"] and (r["group_size"], r["c"]) == (64, 1)]
    if not found:
        return EMPTY
    shape = statistics.mode(r["shape"] for r in found)
    here = [r for r in found if r["shape"] == shape]
    tokens = [M for M in (1, 4, 16, 64, 256, 512) if any(r["M"] == M for r in here)]
    lines = [
        f"`linear` on a {shape} weight (N x K), default setting: us, share of the limit of the machine, and the time "
        "of the best peer with the same activations over ours:",
        "",
        "| | " + " | ".join(f"M = {M}" for M in tokens) + " |",
        "|---|" + "---|" * len(tokens),
    ]
    for bits, mode in sorted({(r["bits"], r["mode"]) for r in here}, key=lambda key: (-key[0], key[1])):
        cells = []
        for M in tokens:
            r: Any = next((r for r in here if (r["bits"], r["mode"], r["M"]) == (bits, mode, M)), None)
            if r is None:
                cells.append("-")
                continue
            rival = best_peer(part, r)
            against = f", {times(r, rival)} x" if rival else ""
            cells.append(f"{microseconds(r)} ({share(r)}){against}")
        lines.append(f"| {bits} bits, {mode} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{first['date']}, {first['cpu']} ({first['isa']}, {first['threads']} threads); "
        f"`{first['command'].strip()}`. Every shape, setting and peer: [docs/performance.md](docs/performance.md).",
    ]
    return "\n".join(lines)
