"""Which versions work: runs the tests of an integration under an interpreter, keeps what came of it in
tests/compatibility.json, and writes the tables of docs/serving.md from that.

    python tests/compatibility.py .venv-4.57.6/bin/python .venv/bin/python build/vllm-venv/bin/python
    python tests/compatibility.py build/vllm-venv/bin/python --files test_vllm_server.py     # that file alone again
    python tests/compatibility.py build/vllm-venv/bin/python --log test_vllm_server.py LOG   # what a run of it printed
    python tests/compatibility.py                                                            # the tables alone

An interpreter needs torch, transformers, pytest, hypothesis, safetensors, compressed-tensors, accelerate, peft, tqdm
and jinja2, or vLLM and what `make test-vllm` installs with it; precal is the one of this folder. What is known of the
same versions and the same file before is replaced.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "serving.md", ROOT / "tests" / "compatibility.json"
# Host -> files of tests, packages whose versions are said. Those of vLLM count where vLLM is installed.
HOSTS = {
    "transformers": (
        ["test_transformers.py", "test_architectures.py", "test_lm_head.py", "test_compile.py"],
        ["transformers", "torch", "peft", "accelerate"],
    ),
    "vllm": (sorted(p.name for p in (ROOT / "tests").glob("test_vllm*.py")), ["vllm", "torch", "transformers"]),
}


def versions_of(python: str) -> dict[str, str]:
    """Of what is installed there."""
    code = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    for package in (name, f"{name}-cpu"):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
print(json.dumps(found))
"""
    names = sorted({name for _, packages in HOSTS.values() for name in packages})
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def outcome_in(printed: str) -> dict[str, int]:
    """How many tests passed, failed and were skipped, by pytest's last line."""
    lines = [
        line for line in printed.splitlines() if re.search(r"\d+ (passed|failed|skipped|errors?)\b.* in [\d.]+s", line)
    ]
    count = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]):
        count["failed" if what == "error" else what] += int(number)
    return count


def outcome_of(python: str, file: str) -> dict[str, int]:
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-2000:])
    return outcome_in(done.stdout)


def row_of(python: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of these versions, a new one if there is none."""
    versions = versions_of(python)
    host = "vllm" if "vllm" in versions else "transformers"
    said = {name: versions[name] for name in (*HOSTS[host][1], "python")}
    for row in rows:
        if (row["host"], row["versions"]) == (host, said):
            return row
    rows.append({"host": host, "versions": said, "date": "", "outcomes": {}})
    return rows[-1]


def total(row: dict[str, Any], key: str) -> int:
    return sum(outcome[key] for outcome in row["outcomes"].values())


def table(host: str, rows: list[dict[str, Any]]) -> str:
    packages = HOSTS[host][1]
    head = [*packages, "Python", "tests", "date"]
    lines = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda row: _order(row["versions"])):
        counts = {key: total(row, key) for key in ("passed", "failed", "skipped")}
        outcome = ", ".join(f"{n} {key}" for key, n in counts.items() if n or key == "passed")
        lines.append([*row["versions"].values(), outcome, row["date"]])
    names = ", ".join(f"`{name}`" for name in sorted({name for row in rows for name in row["outcomes"]}))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\nLinux, CPU; {names}.\n"


def _order(versions: dict[str, str]) -> list[list[int]]:
    return [[int(n) for n in re.findall(r"\d+", version)] for version in versions.values()]


def rendered(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the tables of these rows."""
    for host in HOSTS:
        pattern = rf"(<!-- begin {host} versions.*?-->\n).*?(<!-- end {host} versions -->)"
        own = table(host, [row for row in rows if row["host"] == host])
        page, found = re.subn(pattern, lambda m, own=own: m[1] + own + m[2], page, flags=re.DOTALL)
        assert found == 1, host
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="*")
    parser.add_argument("--files", nargs="+")
    parser.add_argument("--log", nargs=2, metavar=("FILE", "LOG"), action="append", default=[])
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text())
    for python in arguments.python:
        row = row_of(python, rows)
        logs = {file: Path(log).read_text() for file, log in arguments.log}
        for file in logs or arguments.files or HOSTS[row["host"]][0]:
            row["outcomes"][file] = outcome_in(logs[file]) if file in logs else outcome_of(python, file)
            row["date"] = str(datetime.date.today())
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
