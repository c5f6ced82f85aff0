"""bench/cpu.py: cells, the check against float64, which turns count, and the tables. No test asserts a time."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from precal_ext import _C


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.fixture
def cpu(load: Any) -> ModuleType:
    return load("cpu")


@pytest.fixture
def worker(load: Any) -> Iterator[ModuleType]:
    threads = _C.get_num_threads()
    yield load("cpu_worker")
    _C.set_num_threads(threads)  # a contender sets its own


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_cells_are_read_back_from_their_names(cpu: ModuleType) -> None:
    cells = cpu.full_cells()
    assert len(set(cells)) == len(cells) == 4 * 10 * 2 * 3 * 2 * 2 * 2
    assert [cpu.parse_cell(cell.name) for cell in cells] == cells
    assert cpu.parse_cell("64x96 M=3 5b g7 c2 plain f32") == cpu.Cell(64, 96, 3, 5, 7, 2, False, "f32")


@pytest.mark.parametrize("name", ["", "4096x4096 M=1", "4096x4096 M=1 9b g64 c1 plain a8", "4x4 M=1 4b g4 c1 plain b8"])
def test_a_cell_that_is_none_is_refused(cpu: ModuleType, name: str) -> None:
    with pytest.raises(
        SystemExit, match=re.escape(f"a cell must look like '4096x4096 M=1 4b g64 c1 trellis a8', got {name!r}")
    ):
        cpu.parse_cell(name)


def test_the_default_is_about_sixty_of_all_cells(cpu: ModuleType) -> None:
    cells = cpu.default_cells()
    assert len(set(cells)) == len(cells) and 55 <= len(cells) <= 70
    assert set(cells) <= set(cpu.full_cells())
    assert {(cell.N, cell.K) for cell in cells} == set(cpu.SHAPES)
    assert {cell.M for cell in cells} == set(cpu.TOKENS)


def choose(cpu: ModuleType, *arguments: str) -> list[Any]:
    return cpu.chosen_cells(cpu.parser().parse_args(arguments))


def test_only_picks_cells_by_name(cpu: ModuleType) -> None:
    found = choose(cpu, "--full", "--only", "^11008x4096 M=(2|32) 3b g32")
    assert found and {(c.N, c.M, c.bits, c.group_size) for c in found} == {(11008, 2, 3, 32), (11008, 32, 3, 32)}
    with pytest.raises(SystemExit, match="--only must match the name of a cell, got 'no such cell'"):
        choose(cpu, "--only", "no such cell")


class Documented:
    """A module whose `linear` has this docstring, as pybind11 writes them."""

    def __init__(self, arguments: str) -> None:
        def linear() -> None: ...

        linear.__doc__ = f"linear(x: object, scale_dtype: str{arguments}) -> object"
        self.linear = linear


def test_the_activation_mode_is_an_argument_of_linear_where_it_has_one(
    cpu: ModuleType, worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.mode_argument(Documented("")) is None
    assert worker.mode_argument(Documented(", activations: str = 'a16'")) == "activations"
    names = ["64x96 M=1 4b g32 c0 plain a16", "64x96 M=1 4b g32 c0 plain a8"]
    for module, modes in ((Documented(""), ["f32"]), (Documented(", activations: str = 'a16'"), ["a16", "a8"])):
        monkeypatch.setattr(cpu, "_C", module)
        assert [cell.mode for cell in choose(cpu, "--cells", *names)] == modes


# ---- what is computed and checked ------------------------------------------------------------------------------------


def test_bfloat16_bits_are_torchs(worker: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((7, 33), np.float32)
    expected = torch.from_numpy(x).bfloat16()
    bits = worker.bf16_bits(x)
    assert np.array_equal(bits, expected.view(torch.uint16).numpy())
    assert np.array_equal(worker.bf16_values(bits), expected.float().numpy())


def test_copies_of_a_weight_differ_and_together_exceed_what_was_asked(worker: ModuleType) -> None:
    precal = worker.contender("precal", 1)
    settings = {"bits": 4, "group_size": 32, "c": 1, "trellis": True, "mode": "a16"}
    ready = precal.ready(64, 128, 2, 20_000, settings)
    assert ready.copies * ready.packed_bytes >= 20_000
    copies = [value.tobytes() for (_, part), value in precal.made.items() if part != "q"]
    assert len(set(copies)) == len(copies) == ready.copies
    assert worker.error_of(ready, precal.weights) < worker.BOUNDS["a16"]
    assert precal.ready(64, 128, 64, 0, settings).copies == 1


@pytest.mark.parametrize("wrong_copy", ["first", "last"])
def test_a_wrong_result_is_found(worker: ModuleType, wrong_copy: str) -> None:
    precal = worker.contender("precal", 1)
    settings = {"bits": 3, "group_size": 32, "c": 0, "trellis": False, "mode": "a16"}
    ready = precal.ready(64, 128, 2, 20_000, settings)
    found = ready.outputs()
    copy, y = found[0 if wrong_copy == "first" else -1]
    for wrong in (y[:, ::-1], np.full_like(y, np.nan), 1.5 * y):
        outputs = [(i, wrong if i == copy else other) for i, other in found]
        ready.outputs = lambda outputs=outputs: outputs
        assert not worker.error_of(ready, precal.weights) <= worker.BOUNDS["a8"]


def test_a_case_that_fails_the_check_has_no_turns(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    precal, cases = worker.contender("precal", 1), {}
    settings = {"bits": 4, "group_size": 32, "c": 0, "trellis": False, "mode": "a16"}
    command = {
        "do": "case",
        "case": "a",
        "first": True,
        "settings": settings,
        "N": 32,
        "K": 64,
        "M": 1,
        "cold_bytes": 0,
    }
    assert worker.answer(precal, cases, command)["error"] < worker.BOUNDS["a16"] and list(cases) == ["a"]
    monkeypatch.setitem(worker.BOUNDS, "a16", 1e-9)
    monkeypatch.setitem(worker.BOUNDS, "a8", 1e-9)
    assert re.match("relative error must be at most 1e-09, got", worker.answer(precal, cases, command)["failed"])
    assert not cases


def test_only_others_work_counts_as_foreign(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, own = iter([(100.0, 400.0), (103.0, 404.0)]), iter([7.0, 9.0])
    monkeypatch.setattr(worker, "cpu_ticks", lambda: next(ticks))
    monkeypatch.setattr(worker, "own_seconds", lambda: next(own))
    with worker.ForeignShare() as others:
        pass
    assert others.share == (0.25 if others.known else None)  # of 4 s on all CPUs 3 were busy, 2 of them by this process


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="needs /proc/stat")
def test_another_process_is_seen(worker: ModuleType) -> None:
    with worker.ForeignShare() as others:
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert 0 < others.share <= 1


def test_a_peer_that_is_not_installed_says_so(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("raise ImportError('no onnx in this environment')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = cpu.Worker("onnxruntime MatMulNBits g128, level 4", 1, 60)
    assert peer.failed == "no onnx in this environment"
    assert peer.ask("turn", case="x", seconds=1)["failed"] == "its process ended with status 0 (limit 60 s)"
    peer.close()


def test_a_contender_that_takes_too_long_is_ended(cpu: ModuleType) -> None:
    peer = cpu.Worker("limits", 1, 0.001)
    assert peer.failed == "its process ended with status -9 (limit 0.001 s)"
    peer.close()


# ---- a small run -----------------------------------------------------------------------------------------------------

CELLS = ["64x256 M=1 4b g64 c1 trellis a8", "64x256 M=65 3b g32 c0 plain a16"]
QUICK = [
    "--threads",
    "1",
    "--rounds",
    "2",
    "--turn-ms",
    "1",
    "--cold-rounds",
    "2",
    "--cold-turn-ms",
    "1",
    "--pause-ms",
    "0",
    "--cold-mb",
    "1",
]


def bench(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/cpu.py", *QUICK, "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_small_run_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "cpu.jsonl"
    done = bench(out, "--peers", "aten|no such peer", "--foreign", "2", "--cells", *CELLS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [r for r in rows if r["source"] == "precal"]
    assert [(r["M"], r["bits"], r["group_size"], r["c"], r["trellis"]) for r in ours] == [
        (1, 4, 64, 1, True),
        (65, 3, 32, 0, False),
    ]
    assert all(r["mode"] in {"a16", "a8", "f32"} for r in ours)
    assert ours[0]["copies"] * ours[0]["packed_bytes"] >= 1 << 20 and ours[1]["copies"] == 1
    for r in rows:
        assert r["turns"] == r["rounds"] == 2 and r["dropped"] == 0 and r["threads"] == 1
        assert 0 < r["us_min"] <= r["us"] <= r["us_max"] and r["us"] > 0 and r["gbps"] > 0 and r["gops"] > 0
        assert r["limit"] in r["limits"] and r["share"] > 0 and r["limits"]["dram_read"] > 0
        assert r["error"] < 0.03 and r["isa"] == _C.cpu_isa() and r["run"] == rows[0]["run"]
        assert {"commit", "cpu", "date", "command", "python", "numpy", "torch", "precal"} <= set(r)
    peers = {r["format"] for r in rows} - {r["format"] for r in ours}
    assert peers <= {"aten int4pack g128"} and (peers or "is left out" in done.stderr)


def test_without_a_clean_turn_there_is_no_figure(tmp_path: Path) -> None:
    out = tmp_path / "cpu.jsonl"
    done = bench(out, "--peers", "none", "--foreign", "0", "--cells", CELLS[0])
    assert done.returncode == 1 and not out.exists()
    assert "none of 6 turns was free of others' work" in done.stderr
    assert "cpu.py: 1 of 1 cells have no figure: 64x256 M=1 precal 4b g64 c1 trellis" in done.stderr


# ---- figures and tables ----------------------------------------------------------------------------------------------

LIMITS = {"dram_read": 50.0, "copy": 20.0, "fp32_fma": 500.0, "bf16_dot": 1000.0, "int8_dot": 2000.0}


def test_the_limit_is_the_one_that_binds(cpu: ModuleType) -> None:
    facts = {"packed_bytes": 5_000_000, "mode": "a8"}
    assert cpu.bound(facts, 1e6, LIMITS) == (pytest.approx(100.0), "dram_read")
    assert cpu.bound(facts, 1e9, LIMITS) == (pytest.approx(500.0), "int8_dot")
    assert cpu.bound({**facts, "mode": "a16"}, 1e9, LIMITS) == (pytest.approx(1000.0), "bf16_dot")
    without = {**LIMITS, "bf16_dot": None, "int8_dot": None}
    assert cpu.bound({**facts, "mode": "a16"}, 1e9, without) == (pytest.approx(2000.0), "fp32_fma")
    assert cpu.bound(facts, 1e9, without) == (pytest.approx(100.0), "dram_read")


def test_shares_are_paired_inside_rounds(cpu: ModuleType) -> None:
    slow = {**LIMITS, "dram_read": 25.0}
    turns = [
        cpu.Turn(200.0, 0, LIMITS),
        cpu.Turn(400.0, 1, slow),
        cpu.Turn(300.0, 3, None),
    ]  # twice the bound whenever it is known
    entry = cpu.Entry(None, "x", {"packed_bytes": 5_000_000, "mode": "a8"}, turns, dropped=1)
    row = cpu.figures(entry, 1, 1, 1)
    assert (row["us"], row["us_min"], row["us_max"], row["turns"], row["dropped"]) == (300.0, 200.0, 400.0, 3, 1)
    assert row["share"] == 0.5 and row["limit"] == "dram_read" and row["limits"]["dram_read"] == 37.5
    assert row["us_of_rounds"] == {"0": 200.0, "1": 400.0, "3": 300.0}
    alone = cpu.figures(cpu.Entry(None, "x", entry.facts, [cpu.Turn(300.0, 0, None)]), 1, 1, 1)
    assert (alone["us"], alone["share"], alone["limit"], alone["limits"]) == (300.0, None, None, {})


def row(format_: str, source: str, mode: str, us: float, **other: Any) -> dict[str, Any]:
    base = {
        **{"shape": "4096x4096", "M": 1, "format": format_, "source": source, "mode": mode, "us": us, "bits": 4},
        **{"group_size": 64, "c": 1, "trellis": True, "share": 0.5, "limit": "dram_read", "limits": LIMITS},
        **{"turns": 5, "dropped": 1, "foreign_max": 0.04, "error": 1e-3, "run": "r1", "turn_ms": 150.0, "threads": 2},
        **{"commit": "abc1234", "python": "3", "numpy": "2", "date": "2026-01-01", "cpu": "A CPU", "isa": "avx512"},
        **{"precal": "0.1.0", "command": "python bench/cpu.py"},
    }
    return {**base, **other}


DATA = [
    row("precal 4b g64 c1 trellis a8", "precal", "a8", 100.0),
    row("precal 4b g64 c1 trellis a16", "precal", "a16", 200.0),
    row("precal 3b g64 c1 trellis a8", "precal", "a8", 80.0, bits=3, run="r2", share=None, limit=None),
    row("slow int8", "p 1", "a8", 300.0, bits=4.25),
    row("fast int8", "p 1", "a8", 150.0, bits=4.25),
    row("sixteen", "q 2", "a16", 120.0, bits=4.25),
    row("torch bf16, oneDNN prepacked", "torch 2", "bf16", 800.0, bits=16),
    row("other M", "q 2", "a8", 1.0, bits=4.25, M=4),
]


def test_a_peer_is_compared_with_the_same_run_and_kind_only(load: Any) -> None:
    lines = load("performance").our_table(DATA, "4096x4096")
    assert "| 1 | 4b g64 c1 trellis a8 | 100 | 50% read | fast int8 | 150 | 50% read | 1.50 | 8.00 |" in lines
    assert "| 1 | 4b g64 c1 trellis a16 | 200 | 50% read | sixteen | 120 | 50% read | **0.60** | 4.00 |" in lines
    assert "| 1 | 3b g64 c1 trellis a8 | 80.0 | - | - | - | - | - | - |" in lines


def test_ratios_are_paired_inside_rounds(load: Any) -> None:
    """Memory was slow when one was measured first, and the other when it was."""
    targets = load("targets")
    own = row("precal 4b g64 c1 trellis a8", "precal", "a8", 100.0, us_of_rounds={"0": 100.0, "1": 200.0, "2": 90.0})
    twice = row("p", "p 1", "a8", 250.0, us_of_rounds={"1": 400.0, "2": 180.0, "3": 250.0, "4": 1000.0})
    faster = row("q", "p 1", "a8", 260.0, us_of_rounds={"0": 150.0, "1": 260.0, "2": 300.0})
    assert targets.time_over(twice, own) == 2.0 and targets.time_over(faster, own) == 1.5
    assert targets.best_peer([own, twice, faster], own) is faster
    assert targets.time_over({**twice, "run": "r2"}, own) == 2.5  # rounds of another run are others
    assert targets.time_over(row("r", "p 1", "a8", 50.0), own) == 0.5


def test_the_page_has_every_peer_limit_and_run(load: Any) -> None:
    performance, report = load("performance"), load("report")
    page = performance.performance_page(DATA, report.rows("cpu_quoted.jsonl"), [], [])
    assert "## A CPU, avx512, 2 threads" in page and "### 4096x4096" in page
    assert "| int8 dot (vpdpbusd), Gop/s | 2000 | 2000 | 2000 |" in page
    assert "| slow int8 | a8 | 4.25 | 300, 50% read | - | 1.0e-03 |" in page
    assert "8 of 48 turns dropped" not in page and "7 of 42 turns dropped" in page and "1 of 6 turns dropped" in page
    assert "| IQ3_KS (ik_llama.cpp 8337e4cd) | 3.19 |" in page
    readme = performance.readme_performance(DATA)
    assert "| 4 bits, a8 | 100 (50% read), 1.50 x |" in readme and "| 3 bits, a8 | 80.0 (-) |" in readme


def test_a_served_model_stands_beside_its_original(load: Any) -> None:
    rates = {"decode": [20.0, 0.1], "together": [40.0, 0.1], "first_token_seconds": [0.5, 0.0]}
    served = {
        **{"model": "m", "format": "4 bits", "threads": 2, "date": "2026-01-01", "commit": "c", "cpu": "A CPU"},
        **{"isa": "avx2", "vllm": "0.1", "torch": "2", "command": "python x", "quantized": rates},
        "original": {**rates, "decode": [8.0, 0.1]},
        "ratio": {"decode": [2.5, 0.0], "together": [1.0, 0.0]},
        "settings": {"prompt_length": 8, "tokens": 4, "requests": 2, "rounds": 3},
    }
    section = load("whole_models").served_section([served])
    assert "| m | 4 bits | 2 | 20.0 | 8.0 | **2.50** | 40.0 | 40.0 | **1.00** | 0.50 | 0.50 |" in section
    assert load("whole_models").served_section([]) == []


def test_targets_are_judged_by_what_was_measured(load: Any) -> None:
    targets = load("targets")
    many = {"limit": "int8_dot", "packed_bytes": 1}
    data = [
        row("precal 4b g64 c1 trellis a8", "precal", "a8", 100.0, share=0.93, packed_bytes=100),
        row("precal 3b g64 c1 trellis a8", "precal", "a8", 90.0, share=0.9, bits=3, packed_bytes=75),
        row("precal 4b g64 c0 trellis a8", "precal", "a8", 90.0, share=0.96, c=0, packed_bytes=96),
        row("precal 4b g64 c1 trellis a8", "precal", "a8", 330.0, M=4, **many),
        row("peer", "p 1", "a8", 660.0, M=4, bits=4.25),
        row("precal 4b g64 c1 trellis a8", "precal", "a8", 7000.0, M=64, **many) | {"share": 0.7},
        row("precal 4b g32 c1 trellis a8", "precal", "a8", 7000.0, M=64, group_size=32, **many) | {"share": 0.66},
    ]
    extras = [{"what": "L3, a8", "gbps": 140.0}, {"what": "prepack", "share": 0.2}, {"what": "prepack", "share": 0.4}]
    lines = targets.target_lines(data, extras)
    assert lines[1:] == [
        "| target | measured | met |",
        "|---|---|---|",
        "| M = 1, 4 bits: 95 % of reading DRAM, 90 % at 4096x4096 | 93% | all |",
        "| M = 1, 3 bits: 92 % of reading DRAM | 90% | no |",
        "| M = 1: 3 bits 1.25 x as fast as 4 | 1.29 x | all |",
        "| M = 1 from L3, a8: 150 GB/s | 140 GB/s | no |",
        "| M = 4 and 16: 1.5 x the best peer of the same mode | 2.00 x | all |",
        "| a8, M >= 64, groups of 64 and more: 75 % of the int8 peak | 70% | no |",
        "| a8, M >= 64, groups of 32: 65 % | 66% | all |",
        "| time per token at most 1.05 x that of a smaller M | 1.33 x | no |",
        "| c = 1 costs at most 5 % | 8% | no |",
        "| prepack: 30 % of memcpy | 20% to 40% | 1 of 2 |",
    ]
    assert targets.target_lines([], []) == []


@pytest.mark.parametrize("present", [[], ["cpu_quoted.jsonl"], ["cpu.jsonl"], ["fit.jsonl", "sqnr.jsonl"]])
def test_the_documents_can_be_made_from_the_results_there_are(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, present: list[str]
) -> None:
    report = load("report")
    results = tmp_path / "bench" / "results"
    (tmp_path / "docs").mkdir()
    results.mkdir(parents=True)
    for name in ("README.md", "docs/method.md"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name in present:
        text = "".join(json.dumps(r) + "\n" for r in DATA)
        source = report.RESULTS / name
        (results / name).write_text(text if name == "cpu.jsonl" else source.read_text(encoding="utf-8"))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        report.main()
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()
    page = (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")
    assert ("No run of `make bench-cpu` is committed" in page) == ("cpu.jsonl" not in present)
    assert ("## Quoted" in page) == ("cpu_quoted.jsonl" in present)
    assert (tmp_path / "docs" / "sqnr.md").is_file() == ("sqnr.jsonl" in present)
