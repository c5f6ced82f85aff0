"""precal inspect: the table of a directory's weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Folder, Run, Source, save_tiny
from safetensors.torch import load_file, save_file

from precal_ext import QuantizeConfig, quantize_checkpoint
from precal_ext.survey import Original, Stored, kind_and_layer, natural, rows, sort_rows, take_rows, total

pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "precal_report.json").read_text())


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    return {t["tensor"]: t for t in report(folder)["tensors"] if "figures" in t}


@pytest.mark.parametrize("recipe", ["precal", "paper", "rtn"])
def test_the_rows_are_what_was_recorded(quantized: Folder, recipe: str) -> None:
    folder = quantized("llama-6m", recipe, 4)
    found = {row.tensor: row for row in rows(Stored.open(folder))}
    expected = recorded(folder)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        figures, settings = expected[name]["figures"], expected[name]["settings"]
        assert expected[name]["shape"] == [row.N, row.K]
        assert {
            "bits": row.bits,
            "group_size": row.group_size,
            "c": row.c,
            "grid": row.grid,
            "trellis": row.trellis,
        } == settings
        assert (row.sqnr_db, row.kl_nats, row.alpha) == tuple(
            figures[f] for f in ("sqnr_db", "kl_nats", "salient_share")
        )
        assert row.bits_per_weight == figures["bits_per_weight"]
    summary, all_ = report(folder)["summary"], total(list(found.values()))
    for field in ("sqnr_db", "kl_nats", "bits_per_weight"):
        assert getattr(all_, field) == pytest.approx(summary[field], rel=1e-12)
    assert all_.weights == summary["weights_quantized"]


def test_figures_are_measured_against_an_original(source: Source, quantized: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("llama-6m", "precal", 4), tmp_path / "copy")
    expected = {row.tensor: row for row in rows(Stored.open(folder))}
    (folder / "precal_report.json").unlink()
    bare = rows(Stored.open(folder))
    assert all(math.isnan(row.sqnr_db) and math.isnan(row.kl_nats) for row in bare)
    measured = rows(Stored.open(folder), Original(source("llama-6m")))
    assert {row.tensor: row for row in measured} == expected


def test_the_table(run: Run, tiny_quantized: Path) -> None:
    code, out, err = run("inspect", tiny_quantized)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["tensor", "shape", "bits", "group", "c", "alpha", "SQNR", "dB", "KL", "nats", "bits/w"]
    assert len({len(line) for line in lines}) == 1  # columns are aligned
    assert lines[1].startswith("model.layers.0.mlp.down_proj.weight ")
    assert "32 x 48" in lines[1]
    assert len(lines) == 1 + 14 + 1
    total_line = lines[-1].split()
    summary = report(tiny_quantized)["summary"]
    assert total_line[0] == "total"
    assert total_line[1] == f"{summary['weights_quantized']:,}"
    assert total_line[3:] == [
        f"{summary['sqnr_db']:.2f}",
        f"{summary['kl_nats']:.4f}",
        f"{summary['bits_per_weight']:.3f}",
    ]


def test_json_has_every_field(run: Run, tiny_quantized: Path, tiny: Path) -> None:
    code, out, _ = run("inspect", tiny_quantized, "--json", "--original", tiny)
    data = json.loads(out)
    assert code == 0
    assert len(data["tensors"]) == 14
    for item in data["tensors"]:
        figures = recorded(tiny_quantized)[item["tensor"]]["figures"]
        assert item["sqnr_db"] == figures["sqnr_db"]
        assert item["kl_nats"] == figures["kl_nats"]
    assert data["total"]["noise"] == pytest.approx(sum(t["noise"] for t in data["tensors"]))


COLUMNS = ["tensor", "shape", "bits", "group", "c", "alpha", "sqnr", "kl", "bpw"]
FIELD = {"group": "group_size", "sqnr": "sqnr_db", "kl": "kl_nats", "bpw": "bits_per_weight"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven layers, modules with settings of their own, and a weight that is exact."""
    folder = tmp_path_factory.mktemp("mixed")
    source = save_tiny(folder / "source", num_hidden_layers=11)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    overrides = {"down_proj": {"bits": 6, "c": 3}, "o_proj": {"group_size": 16}}
    quantize_checkpoint(source, folder / "out", QuantizeConfig(overrides=overrides))
    return folder / "out"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_sorts(run: Run, mixed: Path, column: str, reverse: bool) -> None:
    code, out, _ = run("inspect", mixed, "--json", "--sort", column, *(["--reverse"] if reverse else []))
    found = json.loads(out)["tensors"]
    assert (code, len(found)) == (0, 77)

    def key(item: dict[str, Any]) -> Any:
        if column == "tensor":
            return natural(item["tensor"])
        if column == "shape":
            return item["N"] * item["K"]
        value = item[FIELD.get(column, column)]
        return math.inf if value is None else value  # null is an exact weight

    values = [key(item) for item in found]
    assert values == sorted(values, reverse=reverse)


def test_what_has_no_figure_comes_last(mixed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixed, tmp_path / "copy")
    data = report(folder)
    for item in data["tensors"][:5]:
        item.pop("figures", None)
    (folder / "precal_report.json").write_text(json.dumps(data))
    found = rows(Stored.open(folder))
    gone = [row for row in found if math.isnan(row.sqnr_db)]
    assert gone
    for reverse in (False, True):
        assert [math.isnan(r.sqnr_db) for r in sort_rows(found, "sqnr", reverse)][-len(gone) :] == [True] * len(gone)


def test_an_exact_weight_says_so(run: Run, mixed: Path) -> None:
    _, out, _ = run("inspect", mixed)
    (line,) = [line for line in out.splitlines() if "layers.3.mlp.up_proj" in line]
    assert " exact " in line


def test_a_wrong_column_is_wrong_usage(run: Run, tiny_quantized: Path) -> None:
    code, _, err = run("inspect", tiny_quantized, "--sort", "weight")
    assert code == 2
    assert "invalid choice: 'weight'" in err


@pytest.mark.parametrize(
    ("folder", "message"),
    [("dense", "got a config.json without quantization_config"), ("nothing", "got no config.json")],
)
def test_what_is_not_quantized_is_refused(run: Run, tiny: Path, tmp_path: Path, folder: str, message: str) -> None:
    code, out, err = run("inspect", tiny if folder == "dense" else tmp_path)
    assert (code, out) == (3, "")
    assert message in err


def test_a_damaged_weight_is_refused(run: Run, tiny: Path, tiny_quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_quantized, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = torch.full_like(tensors[name], 0x7F)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("inspect", folder, "--original", tiny)
    assert code == 3
    assert f"{name}: must hold no NaN or infinity" in err
    tensors[name] = tensors[name].repeat(1, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("inspect", folder)
    assert code == 3
    assert f"{name} must be torch.uint8 [48, 1], got torch.uint8 [48, 2]" in err


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.mlp.down_proj", ("mlp.down_proj", 3)),
        ("model.layers.12.mlp.experts.7.w1", ("mlp.experts.*.w1", 12)),
        ("lm_head", ("lm_head", -1)),
        ("h.0", ("h.0", -1)),
        ("a." + "9" * 30 + ".b", ("a." + "9" * 30 + ".b", -1)),
    ],
)
def test_kind_and_layer(module: str, expected: tuple[str, int]) -> None:
    assert kind_and_layer(module) == expected


def test_natural_order() -> None:
    names = ["a.10.b", "a.2.b", "a.2.a", "a", "a.\N{SUPERSCRIPT TWO}", "a." + "9" * 5000]
    ordered = [name for name in sorted(names, key=natural) if name in names[:4]]
    assert ordered == ["a", "a.2.a", "a.2.b", "a.10.b"]


@pytest.mark.parametrize("recipe", ["precal", "paper"])
def test_rows_of_a_weight_dequantize_to_its_rows(quantized: Folder, recipe: str) -> None:
    stored = Stored.open(quantized("llama-6m", recipe, 3))
    q = stored.read_valid("model.layers.0.mlp.down_proj")
    part, chosen = take_rows(q, 10 * q.spec.K + 5)
    part.validate()
    assert len(chosen) == part.spec.N == 10
    assert torch.equal(part.dequantize(), q.dequantize()[chosen])
