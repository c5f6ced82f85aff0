"""The benches keep the rows they were not asked to make again, and measure what they say."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_rows", ROOT / "bench" / "rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(format_: str, source: str, value: int = 0) -> dict[str, Any]:
    return {"model": "m", "format": format_, "source": source, "value": value}


def write(path: Path, *found: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in found))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(path: Path, only: str = "", missing: bool = False) -> argparse.Namespace:
    return argparse.Namespace(out=path, only=only, missing=missing)


def test_a_new_row_takes_the_place_of_the_old_one(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, row("ours a", "precal"), row("hqq", "hqq 1.0"))
    results = rows.Results(options(path, only="^ours"), ("model", "format"))
    assert results.wants(row("ours a", "precal")) and not results.wants(row("hqq", "hqq 1.0"))
    results.put(row("ours a", "precal", 1))
    assert read(path) == [row("ours a", "precal", 1), row("hqq", "hqq 1.0")]


def test_formats_that_no_longer_exist_go_with_their_package_only(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    other_model = {**row("ours old", "precal"), "model": "other"}
    write(path, row("ours old", "precal"), row("hqq", "hqq 1.0"), row("nf4", "bnb 1.0"), other_model)
    results = rows.Results(options(path), ("model", "format"))
    results.put(row("ours new", "precal", 1))
    results.put(row("hqq g64", "hqq 2.0", 1))
    results.drop_gone()
    assert {(r["model"], r["format"]) for r in read(path)} == {
        ("m", "ours new"),
        ("m", "hqq g64"),
        ("m", "nf4"),
        ("other", "ours old"),
    }


def test_after_a_stop_only_missing_rows_are_wanted(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, row("a", "precal"))
    results = rows.Results(options(path, missing=True), ("model", "format"))
    assert not results.wants(row("a", "precal")) and results.wants(row("b", "precal"))
    results.put(row("b", "precal"))
    results.drop_gone()
    assert [r["format"] for r in read(path)] == ["a", "b"]


def test_sqnr_of_one_recipe_on_one_matrix(tmp_path: Path) -> None:
    path = tmp_path / "sqnr.jsonl"
    kept = {"matrix": "Gaussian", "width": 4, "format": "hqq g64", "source": "hqq 1.0", "sqnr_db": 1.0}
    write(path, kept)
    command = ["bench/sqnr.py", "--ours", "--bits", "4", "--matrices", "^Gaussian$", "--only", "^precal g64, c = 0$"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, made = read(path)
    assert first == kept
    # 16 levels under a searched scale per 64 Gaussian weights: between plain rounding and the rate-distortion limit
    assert 4.1 < made["bits_per_weight"] < 4.3
    assert 19.5 < made["sqnr_db"] < 6.02 * made["bits_per_weight"]


def test_the_table_of_faults_has_what_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from faults_table import faults_table

    common = {"date": "2026-01-02", "every": 1, "settings": ["--recipe", "rtn"]}
    memory = {"rss_bytes": 3.5e8, "bound_bytes": 4.6e8, "model_bytes": 2e9}
    hits = {"hit": 7, "finished_with_the_same_bytes": 3}
    table = faults_table([
        {**common, "fault": "a read fails", "result": {"calls": 5, "struck": 4}},
        {**common, "fault": "a read finds the end", "every": 10, "result": {"calls": 5, "struck": 4}},
        {**common, "fault": "full tmpfs", "result": None},
        {**common, "fault": "undisturbed", "result": memory},
        {**common, "fault": "kill -9", "result": hits},
        {**common, "fault": "SIGINT", "result": {**hits, "hit": 0}},
    ])  # fmt: skip
    assert table.splitlines()[2:] == [
        "| every read fails once (EIO) | 4 | 0.4 MB, in pieces | 4 |",
        "| `kill -9` at a random moment of the work | 7 | 2.00 GB, `--recipe rtn` | 3 |",
        "",
        "2026-01-02; peak of the process: 350 MB (promised 460) on 2.00 GB with `--recipe rtn`.",
    ]


def test_a_small_model_is_trained_where_gradients_are_off(tmp_path: Path) -> None:
    """As in the study of scaling laws, which needs none for the rest."""
    code = """
import sys, torch
from pathlib import Path
from small_models import Small, make

with torch.no_grad():
    print(make(Small("llama", 16, 1, 1, 512, 2), Path(sys.argv[1])))
"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "bench")))
    command, environment = [sys.executable, "-c", code, str(tmp_path)], {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = Path(done.stdout.split()[-1])
    assert json.loads((folder / "training.json").read_text())["steps"] == 2
    assert (folder / "model.safetensors").exists()
