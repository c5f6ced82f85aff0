"""The table of docs/reliability.md from bench/results/faults.jsonl."""

from __future__ import annotations

from rows import Row

_FAULTS = {
    "a write, sync or rename fails": "every write, sync and rename fails once (ENOSPC)",
    "a write is cut short": "every write is cut short once",
    "a read fails": "every read fails once (EIO)",
    "a read finds the end": "every read finds the end of the file once",
    "RLIMIT_FSIZE": "files may not grow beyond a random size",
    "full tmpfs": "a tmpfs of random size is full",
    "kill -9": "`kill -9` at a random moment of the work",
    "SIGINT": "SIGINT at a random moment of the work",
    "SIGTERM": "SIGTERM at a random moment of the work",
}


def faults_table(data: list[Row]) -> str:
    """A row for every kind of fault and size of model; the peaks of memory below."""
    lines = ["| fault | how often | model | ended with the same bytes |", "|---|---|---|---|"]
    peaks = []
    undisturbed: Row = {}
    for row in data:
        result = row["result"]
        settings = " ".join(row.get("settings", []))
        if row["fault"] == "undisturbed":
            undisturbed = result
            peaks.append(
                f"{result['rss_bytes'] / 1e6:.0f} MB (promised {result['bound_bytes'] / 1e6:.0f}) on "
                f"{result['model_bytes'] / 1e9:.2f} GB" + (f" with `{settings}`" if settings else "")
            )
        elif result is None or row["fault"] not in _FAULTS or (row["every"] > 1 and "calls" in result):
            continue
        elif result.get("hit"):
            model = f"{undisturbed['model_bytes'] / 1e9:.2f} GB" + (f", `{settings}`" if settings else "")
            cells = [_FAULTS[row["fault"]], str(result["hit"]), model, str(result["finished_with_the_same_bytes"])]
            lines.append("| " + " | ".join(cells) + " |")
        elif result.get("struck"):
            lines.append(f"| {_FAULTS[row['fault']]} | {result['struck']} | 0.4 MB, in pieces | {result['struck']} |")
    date = max(row["date"] for row in data)
    return "\n".join([*lines, "", f"{date}; peak of the process: {'; '.join(peaks)}."])
