"""precal plan, quantize --plan and --target-bits: what is chosen, stored and refused, and the same bytes."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forced_threads
from crew import job
from models import DEMO, Run, altered, digests, save_tiny
from test_resume import Interruption, stop_after

from precal_ext import (
    BitPlan,
    Candidates,
    CheckpointError,
    QuantizeConfig,
    plan_bits,
    planner,
    quantize_checkpoint,
    quantize_model,
    sensitivity,
)
from precal_ext.distortion import Setting, measure_points, planned_sets
from precal_ext.evaluate import load, read_windows
from precal_ext.plan import plan_quantization
from precal_ext.staging import read_journal

pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

DEMO_TEXT = DEMO.parent / "text.txt"
FEW = Candidates(group_sizes=(16, 32), capacities=(0, 1))


@pytest.fixture(scope="module")
def plan(tiny: Path) -> BitPlan:
    return plan_bits(tiny, 4.6, within=FEW)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("The old man looked at the sea, and the sea said nothing at all to him.\n" * 40)
    return path


@pytest.fixture(scope="module")
def with_text(talking: Path, text: Path) -> BitPlan:
    return plan_bits(talking, 4.2, text=text, windows=2, within=FEW)


# ---- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [3.9, 4.4, 4.6, 5.2])
def test_the_checkpoint_has_the_bits_that_were_asked_for(tiny: Path, tmp_path: Path, target: float) -> None:
    plan = plan_bits(tiny, target, within=FEW)
    report = quantize_checkpoint(tiny, tmp_path / "out", plan=plan)
    assert 0.98 * target <= report.bits_per_weight <= target  # the model is so small that a step is a per cent
    assert plan.estimate["bits_per_weight"] == pytest.approx(report.bits_per_weight, rel=1e-5)
    # The whole matrix was the sample, so what was predicted is what came.
    noise = math.fsum(e.figures.noise / e.figures.power * math.prod(e.shape) for e in report.quantized)
    assert plan.error == pytest.approx(noise / report.weights, rel=1e-5)


def test_a_real_model_gets_within_half_a_per_cent(source: Any) -> None:
    model = source("llama-6m")
    for target in (3.25, 3.6, 4.0):
        plan = plan_bits(model, target, within=Candidates(group_sizes=(64, 128), capacities=(0, 1)))
        assert 0.995 * target <= plan.estimate["bits_per_weight"] <= target
        assert {s.choice.bits for s in plan.sets} <= {3, 4}


def test_without_a_text_all_weights_count_the_same(tiny: Path, plan: BitPlan) -> None:
    assert len({s.sensitivity * sum(t.weights for t in plan.sets) / s.weights for s in plan.sets}) <= len(plan.sets)
    for s in plan.sets:
        assert s.sensitivity / s.weights * sum(t.weights for t in plan.sets) == pytest.approx(1, rel=1e-5)
    assert not plan.with_text
    assert plan.loss == pytest.approx(plan.error, rel=1e-5)


def test_without_a_text_sqnr_is_equal_as_far_as_whole_bits_allow(source: Any) -> None:
    """A bit is 6 dB: sets end within one of each other. With unequal sensitivities they do not."""
    model = source("llama-6m")
    wide = Candidates(widths=(2, 3, 4, 5), group_sizes=(64,), capacities=(0, 1))
    made = plan_bits(model, 3.5, within=wide)
    decibels = [s.chosen.sqnr_db for s in made.sets]
    assert len({s.choice.bits for s in made.sets}) == 2
    assert max(decibels) - min(decibels) < 6.5
    fitted = {s.name: s.sensitivity * (16 if "down_proj" in s.name else 1) for s in made.sets}
    minded = plan_bits(model, 3.5, text=__file__, fitted=fitted, within=wide)
    downs = [s.chosen.sqnr_db for s in minded.sets if "down_proj" in s.name]
    assert min(downs) > max(s.chosen.sqnr_db for s in minded.sets if "down_proj" not in s.name)


def test_results_do_not_depend_on_threads(tiny: Path) -> None:
    made = []
    for count in (1, 3):
        with forced_threads(count):
            made.append(plan_bits(tiny, 4.3, within=FEW).record())
    assert made[0] == made[1]


def test_points_are_those_of_the_quantizer(tiny: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(bits=3, group_size=16, c=1)
    report = quantize_checkpoint(tiny, tmp_path / "out", config)
    for name, members in planned_sets(plan_quantization(tiny, tmp_path / "unused")).items():
        (point,) = measure_points(members, {Setting(3, 16, 1): config})
        entries = [e for e in report.quantized if e.fusion_set == name]
        errors = {e.tensor: e.figures.noise / e.figures.power for e in entries}
        sizes = {e.tensor: math.prod(e.shape) for e in entries}
        assert point.worst == pytest.approx(max(errors.values()), rel=1e-9)
        mean = sum(sizes[t] * errors[t] for t in errors) / sum(sizes.values())
        assert point.error == pytest.approx(mean, rel=1e-9)
        assert point.stored_bits == sum(round(e.figures.bits_per_weight * sizes[e.tensor]) for e in entries)


def test_widths_beyond_the_fast_ones_come_when_the_budget_needs_them(tiny: Path) -> None:
    ways = {"group_sizes": (32, 64), "capacities": (0,)}
    assert {s.choice.bits for s in plan_bits(tiny, 6.4, within=Candidates(**ways)).sets} & {5, 6, 8}
    narrow = plan_bits(tiny, 3.3, within=Candidates(**ways, min_sqnr_db=0))
    assert {o.setting.bits for s in narrow.sets for o in s.alternatives} == {2, 3, 4}
    told = plan_bits(tiny, 5.0, within=Candidates(widths=(4, 6), **ways))
    assert {o.setting.bits for s in told.sets for o in s.alternatives} <= {4, 6}


def test_the_output_head_is_planned_when_it_is_included_and_not_otherwise(tiny: Path, tmp_path: Path) -> None:
    assert not any("lm_head" in s.name for s in plan_bits(tiny, 4.6, within=FEW).sets)
    included = plan_bits(tiny, 4.6, QuantizeConfig(include=("lm_head",)), within=FEW)
    assert any(s.name == "lm_head" for s in included.sets)
    apart = plan_bits(tiny, 4.6, QuantizeConfig(lm_head=8), within=FEW)
    assert not any("lm_head" in s.name for s in apart.sets)
    report = quantize_checkpoint(tiny, tmp_path / "out", plan=apart)
    assert {e.tensor: e.settings["bits"] for e in report.quantized}["lm_head.weight"] == 8


def test_experts_of_a_layer_are_one_set(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "Qwen3Moe")
    made = plan_bits(model, 5.2, within=Candidates(widths=(3, 4, 5), group_sizes=(16, 32), capacities=(0, 1)))
    experts = [s for s in made.sets if "experts.*" in s.name]
    assert len(experts) == 4  # gate and up, down; two layers
    assert all(len(s.modules) in (4, 8) for s in experts)
    report = quantize_checkpoint(model, tmp_path / "out", plan=made)
    chosen = {s.name: s.choice for s in made.sets}
    for e in report.quantized:
        want = chosen[e.fusion_set]
        assert (e.settings["bits"], e.settings["group_size"], e.settings["c"]) == (want.bits, want.group_size, want.c)
    assert len(made.config().overrides) == len(set(chosen.values()))


def test_slices(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", hidden_size=64, intermediate_size=128)
    config = QuantizeConfig(trellis=False)
    sliced = plan_bits(
        model, 4.4, config, within=Candidates(group_sizes=(16, 32, 64), capacities=(0,)), tensor_parallel=4
    )
    for s in sliced.sets:
        if s.modules[0].endswith(("o_proj", "down_proj")):
            assert all(o.setting.group_size <= 32 for o in s.alternatives)
    assert any(o.setting.group_size == 64 for s in sliced.sets for o in s.alternatives)
    report = quantize_checkpoint(model, tmp_path / "out", plan=sliced)
    assert {e.tensor: e.settings["group_size"] for e in report.quantized} == {
        f"{m}.weight": s.choice.group_size for s in sliced.sets for m in s.modules
    }
    with pytest.raises(CheckpointError, match="must be cut into 3 slices with one of the candidates, got: "):
        plan_bits(model, 4.4, config, tensor_parallel=3)
    with pytest.raises(CheckpointError, match="must be cut into 8 slices, got"):
        quantize_checkpoint(model, tmp_path / "other", plan=sliced, tensor_parallel=8)


# ---- with a text -----------------------------------------------------------------------------------------------------


def test_sensitivities_are_those_of_the_model(talking: Path, text: Path) -> None:
    """KLD of noise that is not among those it was fitted on is what the fit says; the model is as it was."""
    model, tokenizer = load(talking)
    windows = read_windows(tokenizer, text, 128, 4)
    modules = {
        name: [f"{j.module}" for j in jobs] for name, jobs in planned_sets(plan_quantization(talking, "x")).items()
    }
    before = copy.deepcopy(model.state_dict())
    seen: list[tuple[int, int]] = []
    fitted = sensitivity.fit(model, windows, modules, progress=lambda *p: seen.append(p))
    assert seen[-1] == (sensitivity.passes(len(modules)), sensitivity.passes(len(modules)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert fitted.tokens == sum(len(w) - 1 for w in windows)
    other = sensitivity.fit(model, windows, modules, levels=(0.004, 0.008, 0.016), seed=7)
    for name in modules:  # single ones are a matter of luck: the text says the same again and again
        assert fitted.a[name] / 3 < other.a[name] < fitted.a[name] * 3
    assert sum(other.a.values()) == pytest.approx(sum(fitted.a.values()), rel=0.35)
    together = math.fsum(fitted.a.values()) * 0.01
    noisy = sensitivity.fit(model, windows, {"all": [m for names in modules.values() for m in names]}, levels=(0.01,))
    assert noisy.kld["all"][0] == pytest.approx(together, rel=0.3)  # losses add up


def test_gradients_say_what_noise_measures(source: Any) -> None:
    folder = source("llama-6m")
    model, tokenizer = load(folder)
    model = model.float()
    windows = read_windows(tokenizer, DEMO_TEXT, 96, 6)
    modules = {name: [j.module for j in jobs] for name, jobs in planned_sets(plan_quantization(folder, "x")).items()}
    before = copy.deepcopy(model.state_dict())
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    seen: list[tuple[int, int]] = []
    found = sensitivity.by_gradients(model, windows, modules, samples=4, progress=lambda *p: seen.append(p))
    assert seen == [(n + 1, 6) for n in range(6)]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    noise = sensitivity.fit(model, windows, modules)
    for name in modules:
        assert found.a[name] == pytest.approx(noise.a[name], rel=0.4)
    assert sum(found.a.values()) == pytest.approx(sum(noise.a.values()), rel=0.12)
    again = sensitivity.by_gradients(model, windows, modules, samples=4)
    assert again.a == found.a


def test_the_same_text_gives_the_same_plan(talking: Path, text: Path, with_text: BitPlan) -> None:
    again = plan_bits(talking, 4.2, text=text, windows=2, within=FEW)
    assert again.record() == with_text.record()
    assert with_text.with_text
    reused = plan_bits(talking, 4.2, text=text, windows=2, within=FEW, fitted=with_text.sensitivities)
    assert reused.record() == with_text.record()
    assert BitPlan.from_dict(json.loads(with_text.to_json())) == with_text


def test_a_set_that_the_text_minds_gets_more(talking: Path, text: Path, with_text: BitPlan) -> None:
    favoured = with_text.sets[0].name
    fitted = {name: a * (100 if name == favoured else 1) for name, a in with_text.sensitivities.items()}
    made = plan_bits(talking, 4.2, text=text, windows=2, within=FEW, fitted=fitted)
    bits = {s.name: s.chosen.bits_per_weight for s in made.sets}
    assert bits[favoured] == max(o.bits_per_weight for o in made.sets[0].alternatives)
    assert "minds errors" in made.sets[0].reason


def test_text_that_is_no_good(talking: Path, tmp_path: Path, text: Path, with_text: BitPlan) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(CheckpointError, match="text must have at least 256 tokens to predict, got "):
        plan_bits(talking, 4.2, text=short, within=FEW)
    with pytest.raises(CheckpointError, match=r"no\.txt: must be a readable text file, got: No such file"):
        plan_bits(talking, 4.2, text=tmp_path / "no.txt", within=FEW)
    with pytest.raises(ValueError, match="fitted must have a number >= 0 for each of 8 sets"):
        plan_bits(talking, 4.2, text=text, within=FEW, fitted={**with_text.sensitivities, "more": 1.0})


def test_models_with_nan_are_refused_by_name(talking: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    def norm(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = math.nan

    nothing = altered(talking, tmp_path / "norm", norm)
    for fit in planner.FITS:
        with pytest.raises(CheckpointError, match="the loss on the text must be finite, got nan"):
            plan_bits(nothing, 4.2, text=text, windows=2, fit=fit, within=FEW)

    def weight(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = math.nan

    broken = altered(tiny, tmp_path / "weight", weight)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight must be finite, got nan at \[3, 5\]"):
        plan_bits(broken, 4.6, within=FEW)
    skipping = plan_bits(broken, 4.6, QuantizeConfig(skip_nonfinite=True), within=FEW)
    assert not any(s.name.endswith("1.self_attn.o_proj") for s in skipping.sets)
    quantize_checkpoint(broken, tmp_path / "out", plan=skipping)


# ---- budgets that cannot be ------------------------------------------------------------------------------------------


def test_infeasible_budgets_name_the_nearest(tiny: Path) -> None:
    within = Candidates(widths=(3, 4), group_sizes=(32,), capacities=(0,))
    with pytest.raises(
        CheckpointError, match=r"target_bits must lie in \[(\d\.\d{3}), (\d\.\d{3})\].*nearest is"
    ) as low:
        plan_bits(tiny, 2.5, within=within)
    with pytest.raises(CheckpointError, match="got 7; the nearest is") as high:
        plan_bits(tiny, 7, within=within)
    nearest = [float(str(e.value).split("nearest is ")[1].split(",")[0]) for e in (low, high)]
    cheapest, dearest = (plan_bits(tiny, target, within=within) for target in nearest)
    assert {s.choice.bits for s in cheapest.sets} == {3}
    assert {s.choice.bits for s in dearest.sets} >= {4}
    with pytest.raises(CheckpointError, match="target_bits must lie in"):
        plan_bits(tiny, nearest[0] - 0.002, within=within)


def test_sets_below_the_veto_are_refused_unless_told(tiny: Path) -> None:
    ways = {"widths": (2,), "group_sizes": (64,), "capacities": (0,)}
    with pytest.raises(CheckpointError, match=r"must keep 20 dB SQNR in every matrix.*--min-sqnr allows less"):
        plan_bits(tiny, 4.0, within=Candidates(**ways, min_sqnr_db=20))
    assert plan_bits(tiny, 2.759, within=Candidates(**ways, min_sqnr_db=0))
    made = plan_bits(tiny, 5.0, within=Candidates(widths=(3, 4, 5), group_sizes=(16, 32), min_sqnr_db=20))
    assert all(-10 * math.log10(o.worst) >= 20 for s in made.sets for o in s.alternatives)


@pytest.mark.parametrize("target", [0, -1, math.nan, math.inf, "4", True, None])
def test_targets_that_are_none(tiny: Path, target: Any) -> None:
    with pytest.raises(ValueError, match="plan: target_bits must be a finite number > 0, got"):
        plan_bits(tiny, target)


def test_settings_that_cannot_be_planned(tiny: Path) -> None:
    with pytest.raises(ValueError, match="recipe must be precal"):
        plan_bits(tiny, 4, QuantizeConfig(recipe="rtn"))
    with pytest.raises(ValueError, match="overrides must be empty"):
        plan_bits(tiny, 4, QuantizeConfig(overrides={"o_proj": {"bits": 8}}))
    with pytest.raises(ValueError, match="fit must be one of gradients, noise, got 'luck'"):
        plan_bits(tiny, 4, fit="luck")
    with pytest.raises(ValueError, match="widths must not be empty"):
        Candidates(widths=())
    with pytest.raises(ValueError, match="min_sqnr_db must be a finite number"):
        Candidates(min_sqnr_db=math.nan)


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny: Path, plan: BitPlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(tiny, out, plan=plan)
    return digests(out)


def test_the_file_the_object_and_the_command_give_the_same_bytes(
    run: Run, tiny: Path, plan: BitPlan, tmp_path: Path, whole: dict[str, str]
) -> None:
    plan.save(tmp_path / "plan.json")
    assert run("quantize", tiny, tmp_path / "a" / "out", "--plan", tmp_path / "plan.json", "--quiet")[0] == 0
    assert digests(tmp_path / "a" / "out") == whole


def test_a_model_in_memory_gets_the_same_weights(tiny: Path, plan: BitPlan, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    report = quantize_model(model, plan.config())
    quantize_checkpoint(tiny, tmp_path / "out", plan=plan)
    stored = json.loads((tmp_path / "out" / "precal_report.json").read_text())
    assert {e.tensor: e.figures.sqnr_db for e in report.quantized} == {
        t["tensor"]: t["figures"]["sqnr_db"] for t in stored["tensors"] if "figures" in t
    }


def test_a_planned_run_is_continued(tiny: Path, plan: BitPlan, tmp_path: Path, whole: dict[str, str]) -> None:
    with pytest.raises(Interruption):
        quantize_checkpoint(tiny, tmp_path / "out", plan=plan, progress=stop_after(20))
    recorded = len(read_journal(tmp_path / "out")[1])
    assert recorded > 10
    data = plan.to_dict()
    data["sets"][0]["reason"] = "another"
    other = BitPlan.from_dict(data)
    with pytest.raises(CheckpointError, match="an unfinished run must be continued with the same plan, got"):
        quantize_checkpoint(tiny, tmp_path / "out", plan=other)
    with pytest.raises(CheckpointError, match="must be continued with the same settings overrides"):
        quantize_checkpoint(tiny, tmp_path / "out", plan=plan_bits(tiny, 5.1, within=FEW))
    with pytest.raises(CheckpointError, match="must be continued with the same settings"):
        quantize_checkpoint(tiny, tmp_path / "out")
    seen = []
    quantize_checkpoint(tiny, tmp_path / "out", plan=plan, progress=seen.append)
    assert seen[0].tensors_done == recorded + 1
    assert digests(tmp_path / "out") == whole


def test_in_one_go_the_unfinished_run_keeps_its_plan(
    run: Run, talking: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made once: fitting again could differ in a last digit, with another number of threads."""
    command = ("quantize", talking, tmp_path / "out", "--target-bits", 4.2, "--text", text, "--windows", 2, "--quiet")
    assert run(*command)[0] == 0
    expected = digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    made = plan_bits(talking, 4.2, text=text, windows=2)
    with pytest.raises(Interruption):
        quantize_checkpoint(talking, tmp_path / "out", plan=made, progress=stop_after(20))

    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("planned again")

    with monkeypatch.context() as patched:
        patched.setattr(planner, "measure_points", never)
        assert run(*command)[0] == 0
    assert digests(tmp_path / "out") == expected


def test_two_processes_follow_a_plan(tiny: Path, plan: BitPlan, tmp_path: Path, whole: dict[str, str]) -> None:
    plan.save(tmp_path / "plan.json")
    command = ["quantize", tiny, tmp_path / "out", "--plan", tmp_path / "plan.json"]
    with job(tmp_path / "job", [command, command]) as running:
        assert running.wait() == [0, 0], running.err
    assert digests(tmp_path / "out") == whole


def test_two_processes_in_one_go(run: Run, tiny: Path, tmp_path: Path) -> None:
    """Rank 0 plans alone, the others wait for it."""
    options = ["--target-bits", "4.6", "--widths", "3", "4"]
    assert run("quantize", tiny, tmp_path / "one" / "out", *options)[0] == 0
    command = ["quantize", tiny, tmp_path / "two" / "out", *options]
    with job(tmp_path / "job", [command, command]) as running:
        assert running.wait() == [0, 0], running.err
    assert running.err.count("plan: measured 8/8 fusion sets") == 1
    assert digests(tmp_path / "two" / "out") == digests(tmp_path / "one" / "out")


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_the_table_and_the_json(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, err = run("plan", tiny, "--target-bits", 4.6, "--out", tmp_path / "plan.json")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["set", "weights", "bits", "group", "c", "bits/w", "SQNR", "dB", "minds", "cost"]
    assert len(lines) == 1 + 8 + 3
    costs = [float(line.split()[-1].rstrip("%")) for line in lines[1:9]]
    assert sum(costs) == pytest.approx(100, abs=0.5)
    assert "of 4.6 bits per weight; files " in lines[9]
    assert lines[10].startswith("predicted: ")
    assert "plan: measured 8/8 fusion sets" in err
    code, out, err = run("plan", tiny, "--target-bits", 4.6, "--json", "--quiet")
    assert (code, err) == (0, "")
    found = BitPlan.from_dict(json.loads(out))
    assert found == BitPlan.load(tmp_path / "plan.json")


def test_a_dry_run_shows_the_planned_settings(run: Run, tiny: Path, tmp_path: Path, plan: BitPlan) -> None:
    plan.save(tmp_path / "plan.json")
    code, out, _ = run("quantize", tiny, tmp_path / "out", "--plan", tmp_path / "plan.json", "--dry-run", "--json")
    assert code == 0
    shown = {t["tensor"]: t for t in json.loads(out)["tensors"]}
    for s in plan.sets:
        for name in s.modules:
            t = shown[f"{name}.weight"]
            assert (t["bits"], t["group_size"], t["c"]) == (s.choice.bits, s.choice.group_size, s.choice.c)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plan", "P", "--bits", "3"], "--plan must stand without --bits, the plan has settings of its own"),
        (["--plan", "P", "--target-bits", "3"], "--plan must stand without --target-bits"),
        (["--plan", "P", "--windows", 2], "--plan must stand without --windows"),
        (["--plan", "P"], "P: must be a file made by `precal plan`, got nothing there"),
        (["--target-bits", "4", "--bits", "3"], "--target-bits must stand without --bits, which it chooses"),
        (["--target-bits", "4", "--group-size", "64"], "--target-bits must stand without --group-size"),
        (["--target-bits", "4", "--outliers", "1"], "--target-bits must stand without --outliers"),
        (["--text", "T"], "quantize: --text must come with --target-bits, --calibrate or --compensate, got it alone"),
        (["--min-sqnr", "3"], "quantize: --min-sqnr must stand with --target-bits"),
        (["--target-bits", "nan"], "target_bits must be a finite number > 0, got nan"),
        (["--target-bits", "1.5"], "target_bits must lie in"),
    ],
)
def test_options_that_do_not_go_together(run: Run, tiny: Path, tmp_path: Path, options: list[str], said: str) -> None:
    code, _, err = run("quantize", tiny, tmp_path / "out", *options, "--quiet")
    assert code == 3
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_inspect_and_report_show_the_plan(run: Run, tiny: Path, plan: BitPlan, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path / "out", plan=plan)
    code, out, _ = run("inspect", tmp_path / "out")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].endswith("cost  planned")
    shares = plan.summary()["sets"]
    for line in lines[1:-1]:
        module = line.split()[0].removesuffix(".weight")
        s = next(s for s in plan.sets if module in s.modules)
        assert line.endswith(s.reason)
        assert f" {shares[s.name]['cost']:.1%} " in line
    data = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert all(t["planned"]["reason"] for t in data["tensors"])
    assert run("report", tmp_path / "out", "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "planned cost" in page
    assert plan.sets[0].reason in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert "planned for 4.6 bits per weight" in card
    assert run("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("damage", [3, {"sets": 3}, {"sets": {"x": 3}}, {"sets": {"x": {"cost": "a", "reason": "b"}}}])
def test_a_damaged_record_is_refused(tiny: Path, plan: BitPlan, tmp_path: Path, run: Run, damage: Any) -> None:
    quantize_checkpoint(tiny, tmp_path / "out", plan=plan)
    path = tmp_path / "out" / "precal_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plan": damage}))
    code, _, err = run("inspect", tmp_path / "out")
    assert code == 3
    assert "plan must" in err
