"""Rows of bench/models.py and bench/head.py -> the part of docs/performance.md about whole models."""

from __future__ import annotations

from typing import Any

from rows import Row

PARTS = ("linear", "lm_head", "attention", "norms", "other")
TARGET = 2.5  # decode at 4 bits over bfloat16, on the larger model
EMPTY = "No run of `make bench-models` is committed yet: it wants a quiet machine."

HOW = """\
`precal bench` on a quantized directory and on its original, in rounds that alternate: a prompt at once, then tokens one
by one. Each model has a process of its own; medians of rounds, ratios paired inside them. The code around `linear` is
transformers' own, not compiled. llama-6m is trained and tiny; llama-1b has the shape of a Llama of 1.1 billion
parameters and random weights (`bench/models.py`). Weights are everything in memory; `peak` is the process, torch and
Python included, and counts pages of the file that loading mapped."""

SPLIT = """\
Where a token's time goes, in ms: `linear` is the layers that are quantized (or their originals), `lm_head` the output
head, `attention` what attention does besides its linear layers (rotary embedding, cache, softmax), `other` residual
sums, choosing the token, and the Python of the blocks. `read` is the least that reading the weights of a token takes,
at the memory bandwidth measured in the same rounds."""

SERVED = """\
vLLM's own server on a CPU with precal's plug-in, beside the bfloat16 original in vLLM's own kernels, both running and
asked by turns (`bench/vllm_serve.py`)."""

HEAD = """\
`--lm-head 8` or `4` quantizes the output head too. An untied head shrinks. A model that ties it to the embedding keeps
the embedding dense and gets a head of its own beside it: more bytes, for reading fewer of them in a token, which pays
where the head is a good part of what a token reads: the larger the vocabulary, the more. Below, KLD on llama-6m (tied)
by the measure of docs/quality.md; the head's bytes are those in the file, where `dense` is the embedding's own."""


def machines(data: list[Row]) -> list[tuple[str, str, int]]:
    return list(dict.fromkeys((r["cpu"], r["isa"], r["threads"]) for r in data))


def ms_per_token(measured: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = measured["milliseconds"]["decode"]
    return found


def speed_table(data: list[Row]) -> list[str]:
    lines = [
        "| model | setting | decode, tokens/s | original | x | prompt, tokens/s | original | x | weights | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in data:
        q, o, ratio = r["quantized"], r["original"], r["ratio"]
        cells = [r["model"], r["format"]]
        for phase in ("decode", "prefill"):
            rates = q["tokens_per_second"][phase], o["tokens_per_second"][phase]
            cells += [f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"**{ratio[phase]:.2f}**"]
        cells += [f"{megabytes(q[key])} of {megabytes(o[key])}" for key in ("weight_bytes", "peak_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def split_table(data: list[Row]) -> list[str]:
    lines = [
        "| model | setting | " + " | ".join(PARTS) + " | all | outside `linear` | read | ops, us each |",
        "|---|---|" + "---|" * (len(PARTS) + 4),
    ]
    for name in dict.fromkeys(r["model"] for r in data):
        part = [r for r in data if r["model"] == name]
        dense = "original, " + str(part[0]["settings"]["dtype"])
        for label, r, m in [(dense, part[0], part[0]["original"]), *((r["format"], r, r["quantized"]) for r in part)]:
            ms = ms_per_token(m)
            total = sum(ms.values())
            rest = total - ms["linear"] - ms["lm_head"]
            cells = [name, label, *(f"{ms[p]:.2f}" for p in PARTS), f"{total:.2f}", f"{1 - ms['linear'] / total:.0%}"]
            cells += [f"{(m['linear_bytes'] + m['lm_head_bytes']) / r['read_gbps'] / 1e6:.2f}"]
            cells += [f"{m['ops_outside']}, {rest / max(1, m['ops_outside']) * 1e3:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdict(data: list[Row]) -> list[str]:
    """The target, and what dominates a token of the largest model."""
    lines = []
    for name in dict.fromkeys(r["model"] for r in data):
        for r in (r for r in data if r["model"] == name and r["format"] == "4 bits"):
            ms = ms_per_token(r["quantized"])
            total = sum(ms.values())
            order = sorted(PARTS, key=lambda p: -ms[p])[:3]
            shares = ", ".join(f"{p} {ms[p] / total:.0%}" for p in order)
            target = ""
            if name == "llama-1b":
                reached = "reached" if r["ratio"]["decode"] >= TARGET else "missed"
                target = f" Target {TARGET:g} x: {reached}, {r['ratio']['decode']:.2f} x."
            lines.append(f"- {name}, 4 bits: {shares} of a token.{target}")
    return lines


def sources(data: list[Row]) -> list[str]:
    lines = []
    for key in dict.fromkeys((r["date"], r["commit"], r["command"]) for r in data):
        part = [r for r in data if (r["date"], r["commit"], r["command"]) == key]
        first, s = part[0], part[0]["settings"]
        turns = f"prompt of {s['prompt_length']}, {s['tokens']} tokens, {s['rounds']} rounds"
        lines.append(
            f"- {first['date']}, commit {first['commit']}, precal {first['precal']}, torch {first['torch']}, "
            f"transformers {first['transformers']}; `{first['command'].strip()}`; {turns}; others used at most "
            f"{max(r['foreign'] for r in part):.0%} of the CPU."
        )
    return lines


def head_speeds(data: list[Row]) -> list[str]:
    """Tokens per second by the head, where one run has them."""
    lines = []
    for name in dict.fromkeys(r["model"] for r in data):
        part = {r["format"]: r["quantized"] for r in data if r["model"] == name}
        found = [
            f"{what} {part[label]['tokens_per_second']['decode']:.1f} ({megabytes(part[label]['weight_bytes'])})"
            for label, what in (
                ("4 bits", "dense"),
                ("4 bits, head 8 bits", "8 bits"),
                ("4 bits, head 4 bits", "4 bits"),
            )
            if label in part
        ]
        lines.append(f"- {name}, 4 bits: tokens per second of decode (all weights) with the head " + ", ".join(found))
    return lines


def head_table(heads: list[Row]) -> list[str]:
    texts = list(dict.fromkeys(r["text"] for r in heads))
    lines = [
        "| setting | head, bits per weight | bytes | " + " | ".join(f"KLD, {t.split('_')[0]}" for t in texts) + " |",
        "|---|---|---|" + "---|" * len(texts),
    ]
    for label in dict.fromkeys(r["format"] for r in heads):
        part = {r["text"]: r for r in heads if r["format"] == label}
        first = next(iter(part.values()))
        klds = [f"{part[t]['kld_nats']:.4f} +/- {part[t]['kld_stderr']:.4f}" for t in texts]
        cells = [label, f"{first['head_bits_per_weight']:.2f}", f"{first['head_bytes']:,}", *klds]
        lines.append("| " + " | ".join(cells) + " |")
    first = heads[0]
    where = f"{first['date']}, {first['cpu']} ({first['isa']}), torch {first['torch']}, precal {first['precal']}"
    return [*lines, "", f"{where}; `{first['command'].strip()}`."]


def served_section(served: list[Row]) -> list[str]:
    """Rows of bench/vllm_serve.py."""
    if not served:
        return []
    lines = ["", "### Served by vLLM", "", *SERVED.splitlines(), ""]
    head = (
        "model | setting | threads | alone, tokens/s | original | x | at once, tokens/s | original | x | first token, s"
    )
    lines += [f"| {head} | original |", "|" + "---|" * 11]
    for r in served:
        q, o, x = r["quantized"], r["original"], r["ratio"]
        cells = [r["model"], r["format"], r["threads"]]
        for key in ("decode", "together"):
            cells += [f"{q[key][0]:.1f}", f"{o[key][0]:.1f}", f"**{x[key][0]:.2f}**"]
        cells += [f"{side['first_token_seconds'][0]:.2f}" for side in (q, o)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    r, asked = served[-1], served[-1]["settings"]
    where = f"{r['date']}, commit {r['commit']}, {r['cpu']} ({r['isa']}), vLLM {r['vllm']}, torch {r['torch']}"
    how = f"prompts of {asked['prompt_length']}, {asked['tokens']} tokens, {asked['requests']} requests at once"
    return [*lines, "", f"{where}; `{r['command'].strip()}`: {how}, {asked['rounds']} rounds."]


def models_section(data: list[Row], heads: list[Row]) -> list[str]:
    lines = ["", "## Whole models", "", *(HOW.splitlines() if data else [EMPTY])]
    for machine in machines(data):
        part = [r for r in data if (r["cpu"], r["isa"], r["threads"]) == machine]
        cpu, isa, threads = machine
        lines += ["", f"{cpu}, {isa}, {threads} thread{'s' * (threads > 1)}:", "", *sources(part)]
        lines += ["", *speed_table(part), "", *SPLIT.splitlines(), "", *split_table(part), "", *verdict(part)]
    if heads:
        lines += ["", "### The output head", "", *HEAD.splitlines(), "", *head_table(heads)]
        for machine in machines(data):
            part = [r for r in data if (r["cpu"], r["isa"], r["threads"]) == machine]
            lines += [
                "",
                f"{machine[0]}, {machine[1]}, {machine[2]} thread{'s' * (machine[2] > 1)}:",
                "",
                *head_speeds(part),
            ]
    return lines
