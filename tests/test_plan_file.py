"""plan.json: what an edited one does, and every way it can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import save_tiny

from precal_ext import BitPlan, Candidates, CheckpointError, QuantizeConfig, plan_bits, quantize_checkpoint
from precal_ext.survey import Stored, rows

pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def plan(tiny: Path) -> BitPlan:
    return plan_bits(tiny, 4.6, within=Candidates(group_sizes=(16, 32), capacities=(0, 1)))


def test_a_plan_survives_its_file(plan: BitPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    found = BitPlan.load(tmp_path / "plan.json")
    assert found == plan
    assert found.to_json() == plan.to_json()
    assert found.record() == plan.record()
    assert found.config() == plan.config()


def edited(plan: BitPlan, path: Path, change: Edit) -> Path:
    data = plan.to_dict()
    change(data)
    path.write_text(json.dumps(data))
    return path


def test_an_edited_choice_is_what_is_done(tiny: Path, plan: BitPlan, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["target_bits"] = 8
        data["sets"][0]["choice"] = {"bits": 8, "group_size": 32, "c": 3}
        data["sets"][0]["reason"] = "because I say so"

    path = edited(plan, tmp_path / "plan.json", change)
    report = quantize_checkpoint(tiny, tmp_path / "out", plan=path)
    name = plan.sets[0].name
    for e in report.quantized:
        if e.fusion_set == name:
            assert (e.settings["bits"], e.settings["group_size"], e.settings["c"]) == (8, 32, 3)
    assert report.plan["sets"][name] == {"cost": None, "reason": "because I say so"}
    assert report.plan["loss"] is None
    found = rows(Stored.open(tmp_path / "out"))
    assert {r.planned.reason for r in found if r.module in plan.sets[0].modules} == {"because I say so"}


def drop(*keys: Any) -> Edit:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def put(value: Any, *keys: Any) -> Edit:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


BAD: list[tuple[Edit, str]] = [
    (put(2, "plan_version"), r"plan\.json: plan_version must be 1, got 2"),
    (drop("plan_version"), r"plan\.json: plan_version must be 1, got nothing"),
    (put("4.6", "target_bits"), r"plan\.json: target_bits must be a number > 0, got 4\.6"),
    (put(True, "target_bits"), r"plan\.json: target_bits must be a number > 0, got True"),
    (put(4.0, "target_bits"), r"plan\.json: target_bits must be at least what the choices take, 4\.\d+ bits"),
    (put("x", "digest"), r"plan\.json: digest must be 64 hexadecimal digits, got x"),
    (put("0" * 64, "digest"), r"plan\.json: digest must be that of .*, got 000000000000\.\.\."),
    (put(0, "tensor_parallel"), r"plan\.json: tensor_parallel must be an integer >= 1, got 0"),
    (put([], "sets"), r"plan\.json: sets must be at least one set, got none"),
    (put({}, "sets"), r"plan\.json: sets must be a list of sets, got \{\}"),
    (put(7, "sets", 0), r"plan\.json: sets\[0\] must be an object, got 7"),
    (drop("sets", 0), r"plan\.json: sets must be all of the model's, .* too, got none of that name"),
    (put("model.layers.9.x", "sets", 0, "set"), r"plan\.json: sets must be all of the model's"),
    (lambda d: d["sets"].append(d["sets"][0]), r"plan\.json: sets must be each set once, got .* again"),
    (lambda d: d["sets"].append({**d["sets"][0], "set": "new", "modules": ["new"]}), "an unknown one, new"),
    (
        lambda d: d["sets"][0]["modules"].append("more"),
        r"plan\.json: modules of .* must be .*, got a difference in more",
    ),
    (lambda d: d["sets"][1]["modules"].append(d["sets"][0]["modules"][0]), r"sets must be each module once, got"),
    (put(7, "sets", 0, "weights"), r"plan\.json: weights of .* must be \d+, got 7"),
    (put(-1.0, "sets", 0, "sensitivity"), r"plan\.json: sensitivity of set .* must be a number >= 0, got -1\.0"),
    (
        put([3, 32, 0], "sets", 0, "choice"),
        r"plan\.json: choice of set .* must be an object with bits, group_size and c",
    ),
    (drop("sets", 0, "choice", "c"), r"plan\.json: c of choice of .* must be an integer, got nothing"),
    (
        put(3.0, "sets", 0, "choice", "bits"),
        r"plan\.json: bits of choice of .* must be an integer from 2 to 8, got 3\.0",
    ),
    (put(9, "sets", 0, "choice", "bits"), r"plan\.json: choice of .* must be settings of the recipe, got config: bits"),
    (put(99, "sets", 0, "choice", "c"), r"plan\.json: choice of .* must be settings of the recipe, got config: c must"),
    (put(1, "sets", 0, "choice", "grid"), r"plan\.json: choice of .* must be without other fields than .*, got grid"),
    (put(1, "sets", 0, "whatever"), r"plan\.json: set .* must be without other fields than .*, got whatever"),
    (put(1, "whatever"), r"plan\.json: fields must be without other fields than .*, got whatever"),
    (put(None, "sets", 0, "reason"), r"plan\.json: reason of set .* must be a text, got None"),
    (put("x", "sets", 0, "alternatives", 0, "error"), r"error of alternatives\[0\] of .* must be a number >= 0, got x"),
    (put(8, "settings", "bits"), r"plan\.json: settings must be without bits, which every set chooses, got 8"),
    (put("rtn", "settings", "recipe"), r"plan\.json: settings must be good, got config: "),
    (put(1, "settings", "wings"), r"plan\.json: settings must be good, got config: fields must be among"),
    (put(["o_proj"], "settings", "exclude"), r"plan\.json: sets must be those of the model, got an unknown one"),
    (put({"seconds": "x"}, "totals"), r"plan\.json: totals must be numbers"),
    (put({"text": 3}, "request"), r"plan\.json: request text must be an object with a name, or null, got 3"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_a_file_that_is_wrong(tiny: Path, plan: BitPlan, tmp_path: Path, change: Edit, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        quantize_checkpoint(tiny, tmp_path / "out", plan=edited(plan, tmp_path / "plan.json", change))
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_plans(tiny: Path, tmp_path: Path) -> None:
    for content, said in (("[]", "must hold a JSON object"), ("{", "must be JSON"), ('{"a": NaN}', "must be JSON")):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(CheckpointError, match=said):
            BitPlan.load(tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="must be a file made by `precal plan`, got nothing there"):
        BitPlan.load(tmp_path / "other.json")


def test_another_model_is_refused(plan: BitPlan, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"plan\.json: digest must be that of"):
        quantize_checkpoint(other, tmp_path / "out", plan=plan)


def test_a_config_beside_a_plan_is_refused(tiny: Path, plan: BitPlan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config must be None with a plan"):
        quantize_checkpoint(tiny, tmp_path / "out", QuantizeConfig(), plan=plan)
