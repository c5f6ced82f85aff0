"""The forecast of a plan: against gradients and real quantized models, which prediction is used, and the file."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, forced_threads
from models import DEMO, Run, save_tiny

from precal_ext import (
    BitPlan,
    Candidates,
    CheckpointError,
    QuantizeConfig,
    dequantize_model,
    forecast_plan,
    outlook,
    plan_bits,
    quantize_model,
)
from precal_ext import landscape as ls
from precal_ext.budget import plan_as_chosen
from precal_ext.distortion import Setting, planned_sets
from precal_ext.evaluate import evaluate, load, load_model, read_windows
from precal_ext.forest import Forest
from precal_ext.formats import parse_format, quantized_weights
from precal_ext.predict import FEATURES, LEAST, Surroundings, features_of

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "bench"))
pytest_plugins = ["package_fixtures"]

DEMO_TEXT = DEMO.parent / "text.txt"
FEW = Candidates(group_sizes=(16, 32), capacities=(0, 1))
WINDOWS = [[(7 * i + 3 * w) % 64 for i in range(24)] for w in range(12)]
FAR = 1e30


def closed_forest(half: float = 0.1, rival: tuple[float, float, float] = (0.5, -20, 20), **ranges: Any) -> Forest:
    """Says what ``log_along`` says, with an interval of ``half``; ``ranges``: of features, else without end."""
    low, high = np.full(len(FEATURES), -FAR, dtype=np.float32), np.full(len(FEATURES), FAR, dtype=np.float32)
    for name, (least, most) in ranges.items():
        low[FEATURES.index(name)], high[FEATURES.index(name)] = least, most
    arrays = {
        "start": np.array([0, 1], dtype=np.int32),
        "feature": np.array([-1], dtype=np.int16),
        "threshold": np.zeros(1, dtype=np.float32),
        "left": np.zeros(1, dtype=np.int32),
        "right": np.zeros(1, dtype=np.int32),
        "value": np.zeros(1, dtype=np.float32),
        "low": low,
        "high": high,
        "base": np.array(FEATURES.index("log_along"), dtype=np.int32),
        "width": np.array([1, half], dtype=np.float32),
        "rival": np.array(rival, dtype=np.float32),
    }
    return Forest(FEATURES, arrays)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About as many tokens as a forecast asks for."""
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(DEMO_TEXT.read_text()[:2400])
    return path


@pytest.fixture(scope="module")
def trained(source: Any) -> Path:
    return source("llama-6m")


@pytest.fixture(scope="module")
def plan(trained: Path, text: Path) -> BitPlan:
    return plan_bits(trained, 3.6, text=text, windows=3, within=Candidates(group_sizes=(64, 128), capacities=(0,)))


@pytest.fixture(scope="module")
def foreseen(trained: Path, plan: BitPlan, text: Path) -> BitPlan:
    return forecast_plan(trained, plan, text=text, windows=3, forest=closed_forest())


def all_same(plan: BitPlan, setting: Setting) -> BitPlan:
    return dataclasses.replace(plan, sets=tuple(dataclasses.replace(s, choice=setting) for s in plan.sets))


# ---- what is measured ------------------------------------------------------------------------------------------------


def measured(plan: BitPlan, folder: Path, windows: ls.Windows) -> tuple[dict[str, float], float, float, int]:
    sets = planned_sets(chosen := plan_as_chosen(folder, "/dev/null", plan))
    model = load_model(folder).float()
    sites = outlook._places(model, sets, chosen.found.model_names)
    runs = outlook._Runs(model, windows, [job for jobs in sets.values() for job in jobs], sites, None)
    with torch.no_grad():
        found = outlook._features(plan, sets, model, outlook._quantized(plan, sets), runs)
    return *found, runs.done


def test_differences_say_what_gradients_say(trained: Path, plan: BitPlan, text: Path) -> None:
    """The features of a plan with one setting everywhere are those of the format, up to the luck of random signs."""
    model, tokenizer = load(trained)
    model = model.float()
    windows = read_windows(tokenizer, text, 256, 3)
    uniform = dataclasses.replace(all_same(plan, Setting(3, 64, 1)), target_bits=8.0)
    found, theorem, start, runs = measured(uniform, trained, windows)
    assert outlook.FIXED_RUNS < runs <= outlook.FIXED_RUNS + 5 * 2 * outlook.DIRECTIONS
    with torch.no_grad():
        around = Surroundings.measure(model, windows)
        fmt = parse_format("precal3_g64_c1")
        weights = dict(quantized_weights(model, fmt))
        error = ls.error_of(around.sites, weights)
        expected, _ = features_of(around, fmt, weights, ls.curvature_along(model, around.sites, windows, error))
    exact = {"log10_parameters", "bits", "log2_group", "power_of_two_scales", "gptq", "log_gptq_gain"}
    exact |= {"sqnr_mean_db", "sqnr_min_db", "shrinkage"}
    for name in exact:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert start == found["nll_nats"] == pytest.approx(around.nll_nats, abs=1e-5)
    assert found["slope_nats"] == pytest.approx(expected["slope_nats"], abs=2e-3)
    for name, ratio in {"log_radial": 1.2, "log_along": 1.25, "log_shaped": 1.35, "log_trace": 1.35}.items():
        assert abs(found[name] - expected[name]) < math.log(ratio), name
    t2 = ls.set_errors(around.sites, error)
    assert theorem == pytest.approx(sum(plan.sensitivities[s] * t2[s] for s in t2), rel=1e-4)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Qwen3Moe"])
def test_the_weights_are_those_that_the_quantizer_makes(architecture: str, tmp_path: Path) -> None:
    """In their places: turned, an expert's, an output head. And the originals come back."""
    folder = save_tiny(tmp_path / "model", architecture)
    config = QuantizeConfig(include=("lm_head",) if architecture == "Llama" else ())
    plan = plan_bits(folder, 5.0, config, within=Candidates(widths=(3, 4, 6), group_sizes=(16, 32), min_sqnr_db=0.0))
    sets = planned_sets(chosen := plan_as_chosen(folder, "/dev/null", plan))
    model = load_model(folder).float()
    start = ls.mean_nll(model, WINDOWS)
    sites = outlook._places(model, sets, chosen.found.model_names)
    errors = outlook._quantized(plan, sets)
    assert len(errors.quantized) == sum(len(s.modules) for s in plan.sets)
    runs = outlook._Runs(model, WINDOWS, [job for jobs in sets.values() for job in jobs], sites, None)
    with torch.no_grad():
        there = runs.loss(lambda module, w: errors.quantized[module].dequantize())
        back = runs.loss(lambda module, w: w)
    made = load_model(folder).float()
    report = quantize_model(made, plan.config())
    dequantize_model(made, torch.float32)
    assert there == pytest.approx(evaluate(made, WINDOWS).nll_nats, abs=2e-6)
    assert back == start != there
    noise = sum(e.figures.noise for e in report.quantized)
    assert sum(errors.noise.values()) == pytest.approx(noise, rel=1e-5)


def test_what_is_forecast_comes(trained: Path, foreseen: BitPlan, plan: BitPlan, text: Path) -> None:
    model, tokenizer = load(trained)
    windows = read_windows(tokenizer, text, 256, 3)
    start = evaluate(model.float(), windows).nll_nats
    quantize_model(model, plan.config())
    dequantize_model(model, torch.float32)
    rise = evaluate(model, windows).nll_nats - start
    f = foreseen.forecast
    assert f is not None
    assert f.nll_nats == pytest.approx(start, abs=1e-3)
    assert f.predictor.rise_nats == pytest.approx(rise, rel=0.3, abs=2e-3)
    assert f.theorem.rise_nats == pytest.approx(plan.loss, rel=0.02)  # of whole weights, not of a sample
    assert f.tokens == sum(len(w) - 1 for w in windows)


def test_weights_without_an_error_lose_nothing(trained: Path, plan: BitPlan, text: Path) -> None:
    model, tokenizer = load(trained)
    sets = planned_sets(chosen := plan_as_chosen(trained, "/dev/null", plan))
    errors = outlook._quantized(plan, sets)
    errors.noise = dict.fromkeys(errors.noise, 0.0)
    errors.along = 0.0
    model = model.float()
    sites = outlook._places(model, sets, chosen.found.model_names)
    windows = read_windows(tokenizer, text, 256, 3)
    runs = outlook._Runs(model, windows, [job for jobs in sets.values() for job in jobs], sites, None)
    with torch.no_grad():
        features, theorem, _ = outlook._features(plan, sets, model, errors, runs)
    assert theorem == 0
    assert features["log_along"] == features["log_radial"] == pytest.approx(math.log(LEAST))
    assert all(map(math.isfinite, features.values()))


def test_results_hardly_depend_on_threads(trained: Path, plan: BitPlan, foreseen: BitPlan, text: Path) -> None:
    with forced_threads(3):
        again = forecast_plan(trained, plan, text=text, windows=3, forest=closed_forest()).forecast
    first = foreseen.forecast
    assert first is not None
    assert again is not None
    for a, b in ((first.predictor, again.predictor), (first.theorem, again.theorem)):
        assert dataclasses.astuple(a)[:3] == pytest.approx(dataclasses.astuple(b)[:3], rel=0.02)
    assert foreseen.record() == plan.record()  # nothing of it gets into a checkpoint


# ---- which is used ---------------------------------------------------------------------------------------------------


def test_the_narrower_interval_is_used(
    trained: Path, plan: BitPlan, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = measured(plan, trained, read_windows(load(trained)[1], text, 256, 3))[:3]
    monkeypatch.setattr(outlook, "_features", lambda *_: known)  # once is enough

    def of(forest: Forest) -> Any:
        return forecast_plan(trained, plan, text=text, windows=3, forest=forest).forecast

    shrinkage = known[0]["shrinkage"]
    inside = of(closed_forest(0.1, (0.5, -20, 20), shrinkage=(shrinkage - 1, shrinkage + 1)))
    assert (inside.used, inside.figure, inside.predictor.outside) == ("predictor", inside.predictor, ())
    other = of(closed_forest(0.5, (0.1, -20, 20)))
    assert (other.used, other.figure) == ("theorem", other.theorem)
    # Ten widths of its range away, the predictor is ten and a half half-widths less certain, and says why.
    beyond = of(closed_forest(0.1, (0.5, -20, 20), shrinkage=(shrinkage + 10, shrinkage + 11)))
    assert (beyond.used, beyond.predictor.outside) == ("theorem", ("shrinkage",))
    assert beyond.predictor.rise_nats == inside.predictor.rise_nats
    half = math.log((inside.predictor.high_nats + LEAST) / (inside.predictor.rise_nats + LEAST))
    wider = math.log((beyond.predictor.high_nats + LEAST) / (beyond.predictor.rise_nats + LEAST))
    assert wider == pytest.approx(half * (1 + 0.5 * 11), rel=1e-3)
    # And so is the theorem.
    said = known[0]["log_theorem"]
    both = of(closed_forest(0.1, (0.5, said + 2, said + 3), shrinkage=(shrinkage + 10, shrinkage + 11)))
    assert (both.used, both.theorem.outside) == ("predictor", ("log_theorem",))
    lines = both.lines()
    assert ", by the predictor, which is more certain here; the theorem: " in lines[0]
    assert lines[1:] == [
        "beyond what the predictor was fitted on, so its interval is wider: shrinkage",
        "beyond what the theorem was fitted on, so its interval is wider: log_theorem",
    ]
    assert len(inside.lines()) == 1


def test_the_shipped_predictor_and_its_theorem(trained: Path, plan: BitPlan, text: Path) -> None:
    shipped = forecast_plan(trained, plan, text=text, windows=3).forecast
    assert shipped is not None
    for f in (shipped.predictor, shipped.theorem):
        assert 0 <= f.low_nats <= f.rise_nats <= f.high_nats
    widths = {
        name: math.log((f.high_nats + LEAST) / (f.rise_nats + LEAST))
        for name, f in (("predictor", shipped.predictor), ("theorem", shipped.theorem))
    }
    assert shipped.used == min(widths, key=lambda name: widths[name])


# ---- the file and the command ----------------------------------------------------------------------------------------


def test_the_file_keeps_it_until_a_choice_changes(foreseen: BitPlan, tmp_path: Path) -> None:
    foreseen.save(tmp_path / "plan.json")
    again = BitPlan.load(tmp_path / "plan.json")
    assert again == foreseen
    assert again.forecast == foreseen.forecast
    data = json.loads((tmp_path / "plan.json").read_text())
    assert set(data["forecast"]) == {
        "text", "tokens", "nll_nats", "runs", "used", "predictor", "theorem", "choices"
    }  # fmt: skip
    reasons = copy.deepcopy(data)
    reasons["sets"][0]["reason"] = "mine"
    assert BitPlan.from_dict(reasons).forecast == foreseen.forecast
    edited = copy.deepcopy(data)
    options = edited["sets"][0]["alternatives"]
    edited["sets"][0]["choice"] = {
        key: next(o for o in options if o["bits_per_weight"] != edited["sets"][0]["bits_per_weight"])[key]
        for key in ("bits", "group_size", "c")
    }
    assert BitPlan.from_dict(edited).forecast is None
    earlier = {key: value for key, value in data.items() if key != "forecast"}  # as versions before it wrote them
    assert BitPlan.from_dict(earlier) == foreseen
    assert BitPlan.from_dict(earlier).forecast is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "forecast must be an object, got []"),
        (("used",), "luck", "used of forecast must be predictor or theorem, got luck"),
        (("tokens",), 0, "tokens of forecast must be an integer >= 1, got 0"),
        (("nll_nats",), -1, "nll_nats of forecast must be a number >= 0, got -1"),
        (("more",), 1, "forecast must be without other fields than"),
        (("choices",), "f", "choices of forecast must be 64 hexadecimal digits, got f"),
        (("predictor", "low_nats"), "1", "low_nats of forecast predictor must be a number >= 0, got 1"),
        (("theorem", "outside"), [1], "outside of forecast theorem must be a list of names, got [1]"),
    ],
)
def test_a_forecast_that_cannot_be_is_refused(
    foreseen: BitPlan, path: tuple[str, ...], value: Any, message: str
) -> None:
    data = json.loads(foreseen.to_json())
    place = data
    for name in ("forecast", *path)[:-1]:
        place = place[name]
    place[("forecast", *path)[-1]] = value
    with pytest.raises(CheckpointError, match=re.escape(message)):
        BitPlan.from_dict(data)


def test_the_command(run: Run, talking: Path, text: Path, tmp_path: Path) -> None:
    options = ("--target-bits", 4.2, "--text", text, "--windows", 3)
    code, out, err = run("plan", talking, *options, "--out", tmp_path / "plan.json")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("on some.txt: NLL ")]
    assert re.search(r"a rise of \S+ \(90%: \S+ to \S+\), by the (predictor|theorem), which is more certain here", line)
    assert re.search(r"plan: forecast (\d+)/\1 runs over the text", err)
    made = BitPlan.load(tmp_path / "plan.json")
    assert made.forecast is not None
    assert made.forecast.figure in (made.forecast.predictor, made.forecast.theorem)
    code, out, _ = run("plan", talking, *options, "--no-forecast", "--json", "--quiet")
    assert code == 0
    without = json.loads(out)
    assert "forecast" not in without
    assert BitPlan.from_dict(without) == made


def test_the_plan_is_there_before_the_forecast(
    run: Run, talking: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(outlook, "forecast_plan", stopped)
    command = ("plan", talking, "--target-bits", 4.2, "--text", text, "--windows", 3, "--out", tmp_path / "plan.json")
    assert run(*command)[0] != 0
    assert BitPlan.load(tmp_path / "plan.json").forecast is None


def test_without_a_text_nothing_changes(run: Run, talking: Path) -> None:
    code, out, err = run("plan", talking, "--target-bits", 4.6, "--json")
    assert code == 0
    assert "forecast" not in json.loads(out)
    assert "forecast" not in err
    plan = plan_bits(talking, 4.6, within=FEW)
    with pytest.raises(ValueError, match="forecast: plan must be made with a text, got one without"):
        forecast_plan(talking, plan, text=DEMO_TEXT)


def test_what_cannot_be_forecast(talking: Path, trained: Path, plan: BitPlan, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(CheckpointError, match="text must have at least 256 tokens to predict, got"):
        forecast_plan(trained, plan, text=short)
    with pytest.raises(CheckpointError, match="digest must be that of "):
        forecast_plan(talking, plan, text=DEMO_TEXT)


# ---- the fit ---------------------------------------------------------------------------------------------------------


def row(name: str, **features: float) -> dict[str, Any]:
    found = {**dict.fromkeys(FEATURES, 0.0), **features}
    return {"format": name, "features": found, "delta_nll_nats": math.exp(features.get("log_theorem", 0.0)) - LEAST}


def test_the_theorems_interval_holds_ninety_in_a_hundred() -> None:
    from laws_fit import theorem_range

    random = np.random.default_rng(0)
    rows = [row("mxint4_32", log_theorem=float(v)) for v in random.uniform(-6, 0, 500)]
    misses = random.normal(size=500)
    for r, miss in zip(rows, misses, strict=True):
        r["delta_nll_nats"] = math.exp(r["features"]["log_theorem"] + miss) - LEAST
    after = [row("mxint4_32+gptq", log_theorem=50.0)]
    half, low, high = theorem_range(rows + after)
    y = [math.log(max(r["delta_nll_nats"], 0.0) + LEAST) for r in rows]
    inside = [abs(a - r["features"]["log_theorem"]) <= half for a, r in zip(y, rows, strict=True)]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.005)
    said = [r["features"]["log_theorem"] for r in rows]
    assert (low, high) == pytest.approx((min(said), max(said)))


def test_a_row_as_a_plan_would_have_it() -> None:
    """In a bowl the profile at the length by a curvature is that curvature, whatever a trace by gradients said."""
    from laws_fit import without_gradients

    r = row("mxint4_32", slope_nats=0.01, log_radial=-2.0, log_trace=5.0)
    r |= {"radii": list(ls.RADII), "profile": [3 * t * t for t in ls.RADII]}
    r |= {"curvature_along_nats": 0.04, "diagonal_nats": 0.05}
    found = without_gradients(r)
    assert found["along_nats"] == pytest.approx(0.05)
    assert found["shaped_nats"] == pytest.approx(0.05)
    assert found["features"]["log_trace"] == pytest.approx(math.log(3))
    assert found["features"]["log_along"] == pytest.approx(math.log(0.051))
    assert found["features"]["radial_over_along"] == pytest.approx(-2.0 - math.log(0.051))
    assert r["features"]["log_trace"] == 5.0


def test_certainty_counts_what_is_used() -> None:
    from laws_fit import certainty

    rows = [row("mxint4_32", log_theorem=-3.0), row("mxint3_32", log_theorem=-2.0), row("mxint3_32+gptq")]
    for r, curvature in zip(rows, (math.exp(-3.0) - LEAST, 0.5, 1.0), strict=True):
        r |= {"radii": list(ls.RADII), "profile": [3 * t * t for t in ls.RADII]}
        r |= {"curvature_along_nats": curvature, "diagonal_nats": curvature}
    found = certainty(rows, closed_forest(0.1, (0.2, -4, 0)))
    assert found["rows"] == 2
    assert found["predictor"] == {"covered": 0.5, "factor": pytest.approx(math.exp(0.1), rel=1e-4)}
    assert found["theorem"] == {"covered": 1.0, "factor": pytest.approx(math.exp(0.2), rel=1e-4)}
    assert (found["predictor_narrower"], found["covered"]) == (1.0, 0.5)
    assert certainty(rows, closed_forest(0.3, (0.2, -4, 0)))["covered"] == 1.0
