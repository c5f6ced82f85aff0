"""Which versions of transformers work: runs the core tests under each interpreter, writes the table of docs/serving.md.

    python tests/compatibility.py .venv-4.57.6/bin/python .venv-5.0.0/bin/python .venv/bin/python

An interpreter needs torch, transformers, pytest, hypothesis, safetensors, compressed-tensors, accelerate, peft, tqdm
and jinja2; precal is the one of this folder.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "serving.md"
CORE = ["transformers", "architectures", "lm_head", "compile"]
PACKAGES = ["transformers", "torch", "peft", "accelerate"]
HEAD = """| transformers | torch | peft | accelerate | Python | core tests |
|---|---|---|---|---|---|
"""


def versions_of(python: str) -> list[str]:
    code = f"""
import importlib.metadata, platform
print(*[importlib.metadata.version(name) for name in {PACKAGES!r}], platform.python_version())
"""
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def outcome_of(python: str) -> str:
    """How many of the core tests passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/test_{name}.py" for name in CORE]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        suites = ElementTree.parse(report).getroot().findall("testsuite")
    count = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    parts = [f"{passed} passed", *([f"{failed} failed"] if failed else []), f"{count['skipped']} skipped"]
    return ", ".join(parts)


def main(interpreters: list[str]) -> None:
    if not interpreters:
        sys.exit(f"usage: python tests/compatibility.py PYTHON...\n\n{__doc__}")
    rows = [f"| {' | '.join([*versions_of(python), outcome_of(python)])} |\n" for python in interpreters]
    names = ", ".join(f"`test_{name}.py`" for name in CORE)
    end = f"\n{datetime.date.today()}, Linux, CPU; `python tests/compatibility.py`: {names}.\n"
    pattern = r"(<!-- begin compatibility.*?-->\n).*?(<!-- end compatibility -->)"
    text, found = re.subn(
        pattern, lambda m: m[1] + HEAD + "".join(rows) + end + m[2], PAGE.read_text(), flags=re.DOTALL
    )
    assert found == 1
    PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
