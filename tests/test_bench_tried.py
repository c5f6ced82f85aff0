"""bench/tried.py and the quantizer in plain torch that it compares with."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench() -> dict[str, ModuleType]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "bench"))
        import method
        import tried
        import tried_coder

        return {"method": method, "tried": tried, "coder": tried_coder}


def test_the_search_finds_what_trying_every_sequence_finds(bench: dict[str, ModuleType]) -> None:
    """Codes of 2 bits, with the levels that docs/format.md gives a sequence of them."""
    T, bits = 5, 2
    random = torch.Generator().manual_seed(0)
    levels = torch.randn(2 ** (bits + 1), generator=random).sort().values
    x, weight = torch.randn(20, T, generator=random), torch.rand(20, T, generator=random)
    least = torch.full((20,), torch.inf)
    for codes in itertools.product(range(2**bits), repeat=T):
        low = [0, 0, *(c & 1 for c in codes)]
        index = torch.tensor([2 * (c ^ low[k]) + low[k + 1] for k, c in enumerate(codes)])
        least = torch.minimum(least, ((levels[index] - x).square() * weight).sum(1))
    error, index = bench["coder"].search(x, weight, levels, 4)
    assert torch.allclose(error, least)
    assert torch.allclose(((levels[index] - x).square() * weight).sum(1), least)


def test_more_states_find_more(bench: dict[str, ModuleType]) -> None:
    random = torch.Generator().manual_seed(0)
    x, levels = torch.randn(50, 256, generator=random), torch.linspace(-3, 3, 16)
    errors = []
    for states in (1, 4, 8, 16):
        found, index = bench["coder"].search(x, torch.ones(1), levels[::2] if states == 1 else levels, states)
        assert torch.allclose(((levels[::2] if states == 1 else levels)[index] - x).square().sum(1), found, rtol=1e-4)
        errors.append(float(found.sum()))
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.85 * errors[0]


def test_every_part_runs_on_a_few_matrices(bench: dict[str, ModuleType]) -> None:
    tried = bench["tried"]
    torch.set_grad_enabled(False)
    try:
        on = tried.Bench(limit=1, rows=1)
        model = tried.Model(ROOT / "demo" / "llama-6m", [ROOT / "demo" / "text.txt"], 1)
        model.weights = {
            n: w for n, w in model.weights.items() if "layers.0" in n and n.endswith(("k_proj", "v_proj", "o_proj"))
        }
        on.models["llama-6m"] = model
        rows = {
            cell.name: cell.measure()
            for part in tried.PARTS.values()
            for cell in part(on)
            if cell.on == "llama-6m" and cell.bits == 4
        }
    finally:
        torch.set_grad_enabled(True)
    for name, row in rows.items():
        assert 19 < row["sqnr_db"] < 27, name
        assert 4.1 < row["bits_per_weight"] < 5.5, name
        assert all(kld > 0 for kld in row["kld_nats"].values()), name
    assert rows["trellis: trellis, g64"]["sqnr_db"] > rows["trellis: plain, g64"]["sqnr_db"] + 0.8
    assert rows["columns: Hadamard"]["bits_per_weight"] == rows["columns: none"]["bits_per_weight"]
    unused = rows["threshold: c = 4, a quarter, used ones counted"]
    assert abs(unused["entries_used"] - 0.25) < 0.01
    whole = rows["threshold: c = 1, all entries"]
    assert abs(unused["bits_per_weight"] - whole["bits_per_weight"]) < 0.01


def test_what_the_tables_compare_with_is_measured(bench: dict[str, ModuleType]) -> None:
    on = bench["tried"].Bench(limit=1, rows=1)
    on.models["llama-6m"] = None  # cells are made, not measured
    cells = [cell for part in bench["tried"].PARTS.values() for cell in part(on)]
    names = {cell.name for cell in cells}
    assert len({(cell.name, cell.on, cell.bits) for cell in cells}) == len(cells)
    method = bench["method"]
    assert {f"{part}: {variant}" for part, variant in method.OURS.items()} <= names
    assert {f"threshold: {variant}" for variant in method.THRESHOLDS.values()} <= names


def test_times_take_the_place_of_their_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "tried.jsonl"
    kept = {"format": "states: 1", "source": "precal", "on": "Gaussian", "bits": 4, "sqnr_db": 1.0}
    old = {"format": "linear: scalar", "source": "precal", "on": "f32, M = 1", "bits": 4, "ratio": 9.0}
    path.write_text("".join(json.dumps(r) + "\n" for r in (kept, old)))
    command = ["bench/tried.py", "--only", "^(linear|cost): scalar", "--quick", "--out", str(path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, *others = (json.loads(line) for line in path.read_text().splitlines())
    assert first == kept and second["on"] == old["on"] and second["isa"] == "scalar"
    assert second["ratio"] == second["trellis_us"] / second["plain_us"]
    assert len(others) == 2 * 12 - 1 + 2
