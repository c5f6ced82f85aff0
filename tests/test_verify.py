"""precal verify: sound directories pass, every kind of damage is found and named."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Run, altered, digests, edit_config, save_tiny, stored_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from precal_ext import _C, QuantizeConfig, cli, quantize_checkpoint
from precal_ext.checkpoint import INDEX_NAME
from precal_ext.qtensor import WeightSpec
from precal_ext.shards import fitting_groups, why_not_by_columns, why_not_by_rows
from precal_ext.verify import (
    LOAD_WARNING,
    TP_SIZES,
    Verification,
    tensor_parallel_sizes,
    verify,
)

pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def by_recipe(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model by every recipe; together they have every kind of tensor."""
    made = {}
    for recipe in ("precal", "paper", "rtn"):
        made[recipe] = tmp_path_factory.mktemp("recipes") / recipe
        quantize_checkpoint(tiny, made[recipe], QuantizeConfig(recipe=recipe, bits=3))
    return made


@pytest.fixture
def copy(tiny_quantized: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_quantized, tmp_path / "copy")


def errors(folder: Path, original: Path | None = None) -> str:
    result = verify(folder, original)
    assert result.sound == (not result.errors)
    return "\n".join(f"{check}: {message}" for check, message in result.errors)


def status(result: Verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in result.checks}


def without_report(folder: Path) -> Path:
    (folder / "precal_report.json").unlink()
    return folder


def edit_report(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "precal_report.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def flip(folder: Path, tensor: str, byte: int = 0, bit: int = 0) -> None:
    """One bit of a tensor in its file."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    assert begin + byte < end
    data[8 + length + begin + byte] ^= 1 << bit
    path.write_bytes(data)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["precal", "paper", "rtn"])
def test_a_sound_directory_passes_every_check(by_recipe: dict[str, Path], tiny: Path, recipe: str) -> None:
    result = verify(by_recipe[recipe], tiny)
    assert result.errors == []
    names = ("config", "headers", "shapes", "values", "digests", "original", "model")
    assert status(result) == dict.fromkeys(names, True)
    assert [message for _, message in result.warnings] == [LOAD_WARNING]


def test_the_command_says_so_and_exits_0(run: Run, tiny_quantized: Path, tiny: Path) -> None:
    code, out, err = run("verify", tiny_quantized, "--original", tiny)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"{tiny_quantized}: sound"
    assert "without `import precal_ext`" in out
    assert "FAILED" not in out
    code, out, _ = run("verify", tiny_quantized, "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["sound"], data["errors"]) == (True, [])
    assert [c["name"] for c in data["checks"] if c["passed"] is None] == ["original"]


def test_shards_pass(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path / "out", max_shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert errors(tmp_path / "out", tiny) == ""


@pytest.mark.parametrize("architecture", ["OPT", "GPTNeoX", "Falcon", "Gemma", "Mixtral", "Qwen2Moe"])
def test_other_architectures_pass(tmp_path: Path, architecture: str) -> None:
    """Tied heads, other names, and experts, whose tensors transformers renames."""
    source = save_tiny(tmp_path / "source", architecture)
    quantize_checkpoint(source, tmp_path / "out")
    result = verify(tmp_path / "out", source)
    assert result.errors == []
    assert status(result)["model"] is (None if architecture in ("GPTNeoX", "Mixtral", "Qwen2Moe") else True)


def test_a_model_saved_from_memory_has_no_report_and_passes(tmp_path: Path, tiny: Path) -> None:
    import transformers

    import precal_ext

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    precal_ext.quantize_model(model)
    precal_ext.save_quantized(model, tmp_path / "out")
    result = verify(tmp_path / "out", tiny)
    assert result.errors == []
    assert status(result)["digests"] is None


def test_the_report_has_the_digest_of_every_tensor(tiny_quantized: Path) -> None:
    import hashlib

    recorded = json.loads((tiny_quantized / "precal_report.json").read_text())["sha256"]
    assert recorded == {
        name: hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in stored_tensors(tiny_quantized).items()
    }


# ---- flipped bits ----------------------------------------------------------------------------------------------------

KINDS = {
    "precal": ["packed", "scale", "row_scale", "grid", "outlier_index", "outlier_value"],
    "paper": ["packed", "scale", "row_scale", "outlier_scale", "outlier_mask"],
}


@pytest.mark.parametrize(("recipe", "kind"), [(recipe, kind) for recipe, kinds in KINDS.items() for kind in kinds])
def test_a_flipped_bit_is_found_in_every_kind_of_tensor(
    by_recipe: dict[str, Path], tmp_path: Path, recipe: str, kind: str
) -> None:
    folder = shutil.copytree(by_recipe[recipe], tmp_path / "copy")
    flip(folder, f"{UP}.weight_{kind}")
    found = errors(folder)
    expected = f"digests: {folder / 'model.safetensors'}: {UP}.weight_{kind} must have the recorded digest"
    assert expected in found
    assert found.count("digests:") == 1


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", UP + ".bias", "lm_head.weight"])
def test_a_flipped_bit_of_what_was_copied_is_found(tmp_path: Path, tiny: Path, name: str) -> None:
    source = save_tiny(tmp_path / "source", mlp_bias=True)
    quantize_checkpoint(source, tmp_path / "copy")
    flip(tmp_path / "copy", name)
    assert f"{name} must have the recorded digest" in errors(tmp_path / "copy")
    without_report(tmp_path / "copy")
    assert errors(tmp_path / "copy") == ""  # nothing left to tell
    assert f"{name} must be the original's unchanged" in errors(tmp_path / "copy", source)


def test_a_flipped_bit_is_found_against_the_original_without_digests(copy: Path, tiny: Path) -> None:
    edit_report(copy, lambda data: data.pop("sha256"))
    assert errors(copy, tiny) == ""
    flip(copy, UP + ".weight_packed", 5, 3)
    assert errors(copy) == ""
    assert re.search(
        rf"original: .*{UP} must have SQNR [\d.]+ dB against its original by the report", errors(copy, tiny)
    )


def test_another_model_as_the_original_is_found(tiny_quantized: Path, tmp_path: Path, tiny: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=7)
    found = errors(tiny_quantized, other)
    assert f"{UP} must have SQNR" in found
    assert "the weight is damaged or this is another model" in found
    bare = without_report(shutil.copytree(tiny_quantized, tmp_path / "bare"))
    assert errors(bare, tiny) == ""
    assert f"{UP} must have SQNR at least 3 dB against its original by a quantized weight" in errors(bare, other)
    wider = save_tiny(tmp_path / "wider", intermediate_size=64)
    assert f"{UP}.weight must have shape [48, 32], got [64, 32]" in errors(tiny_quantized, wider)
    assert "must be the model before quantization" in errors(tiny_quantized, tiny_quantized)
    assert "original: " in errors(tiny_quantized, tmp_path / "nothing")


def test_only_a_sample_of_a_large_weight_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.setattr("precal_ext.verify.SAMPLE", 300)
    quantize_checkpoint(tiny, tmp_path / "out")
    assert errors(tmp_path / "out", tiny) == ""
    edit_report(tmp_path / "out", lambda data: data.pop("sha256"))
    change_tensors(tmp_path / "out", lambda t: t[UP + ".weight_row_scale"].mul_(3))
    assert re.search(rf"{UP} must have SQNR .* on 9 of 48 rows", errors(tmp_path / "out", tiny))


# ---- tensors and config ----------------------------------------------------------------------------------------------


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def drop_module(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.startswith(UP + ".")]:
        del tensors[name]


TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    *[
        (f"no {key}", drop(f"{UP}.{key}"), f"{UP}.{key} must be there, got nothing; the checkpoint is incomplete")
        for key in WeightSpec.from_config(1, 1, QuantizeConfig()).tensors()
    ],
    ("no norm", drop("model.norm.weight"), "model.norm.weight must be there for the model of config.json"),
    ("no module", drop_module, UP),
    ("dtype", lambda t: t.update({UP + ".weight_row_scale": t[UP + ".weight_row_scale"].half()}),
     f"{UP}.weight_row_scale must be torch.bfloat16 [48], got torch.float16 [48]"),
    ("shape", lambda t: t.update({UP + ".weight_scale": t[UP + ".weight_scale"].repeat(1, 2)}),
     f"{UP}.weight_scale must be torch.uint8 [48, 1], got torch.uint8 [48, 2]"),
    ("rows", lambda t: t.update({UP + ".weight_packed": t[UP + ".weight_packed"][1:].clone()}),
     f"{UP}.weight_packed must be torch.int32 [N, ceil(K * 4 / 32)] for 4 bits and weight_shape [48, 32]"),
    ("flat", lambda t: t.update({UP + ".weight_packed": t[UP + ".weight_packed"].flatten()}),
     f"{UP}.weight_packed must be torch.int32 [N, ceil"),
    ("shape lies", put(UP + ".weight_shape", torch.tensor([48, 2**62])), "weight_shape [48, 4611686018427387904]"),
    ("shape below 0", put(UP + ".weight_shape", torch.tensor([48, -32])), "weight_shape [48, -32]"),
    ("shape a little", put(UP + ".weight_shape", torch.tensor([48, 31])), f"{UP} must be [48, 32]"),
    ("shape of three", put(UP + ".weight_shape", torch.tensor([48, 32, 1])), "weight_shape must be torch.int64 [2]"),
    ("surplus", put("model.extra.weight", torch.zeros(3)), "model.extra.weight must belong to the model"),
    ("surplus of a weight", put(UP + ".weight_outlier_mask", torch.zeros(48, 4, dtype=torch.uint8)),
     f"{UP} must have the tensors of its settings, got also weight_outlier_mask"),
    ("dense as well", put(UP + ".weight", torch.zeros(48, 32)),
     f"{UP} must have the tensors of its settings, got also weight"),
    ("norm of another size", put("model.norm.weight", torch.zeros(31)), "model.norm.weight must be [32] for the model"),
]  # fmt: skip


@pytest.mark.parametrize("report", [True, False], ids=["report", "no report"])
@pytest.mark.parametrize(("change", "message"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_tensors_that_do_not_fit_are_named(
    copy: Path, report: bool, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    if not report:
        without_report(copy)
    found = errors(change_tensors(copy, change))
    assert message in found
    assert found.count("\n") < 12  # other weights are not drawn in


def test_without_transformers_the_report_tells_what_is_missing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    def change(tensors: dict[str, Tensor]) -> None:
        drop_module(tensors)
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(2)

    result = verify(change_tensors(copy, change))
    found = "\n".join(message for _, message in result.errors)
    assert f"{UP} must be quantized as the report says, got no tensors of it" in found
    assert "model.norm.weight must be there as the report says, got nothing" in found
    assert "model.extra must be in the report, got a tensor that is not" in found
    assert status(result)["model"] is None


VALUES: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("weight_scale", lambda t: torch.full_like(t, 0x7F), "must hold no NaN or infinity"),
    ("weight_row_scale", lambda t: -t, "must be finite and >= 0"),
    ("weight_row_scale", lambda t: t * float("inf"), "must be finite and >= 0"),
    ("weight_grid", lambda t: t.flip(1), "must be non-decreasing"),
    ("weight_grid", lambda t: torch.zeros_like(t), "not all zero"),
    ("weight_outlier_index", lambda t: torch.full_like(t, 200), "must lie inside its block"),
]


@pytest.mark.parametrize(("key", "change", "message"), VALUES, ids=[f"{k}: {m}" for k, _, m in VALUES])
def test_values_out_of_range_are_named(copy: Path, key: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    name = f"{UP}.{key}"
    found = errors(without_report(change_tensors(copy, lambda t: t.update({name: change(t[name])}))))
    assert found.count("\n") == 0
    assert found.startswith(f"values: {copy / 'model.safetensors'}: {name}: ")
    assert message in found


def test_nan_in_what_was_copied_is_a_warning(copy: Path) -> None:
    without_report(change_tensors(copy, lambda t: t["model.norm.weight"].fill_(float("nan"))))
    result = verify(copy)
    assert result.sound
    assert "model.norm.weight has NaN or infinity in it" in result.warnings[-1][1]


def settings(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        edit_config(folder, quantization_config={**data["quantization_config"], **fields})

    return change


CONFIG: list[tuple[str, Callable[[Path], None], str]] = [
    ("bits", settings(bits=3), f"{UP}.weight_packed must be torch.int32 [N, ceil(K * 3 / 32)] for 3 bits"),
    ("group", settings(group_size=16), f"{UP}.weight_scale must be torch.uint8 [48, 2], got torch.uint8 [48, 1]"),
    ("outliers", settings(c=2), f"{UP}.weight_outlier_index must be torch.uint8 [48, 1, 2]"),
    ("no outliers", settings(c=0), f"{UP} must have the tensors of its settings, got also weight_outlier_index"),
    (
        "grid",
        settings(grid="uniform", trellis=False),
        f"{UP} must have the tensors of its settings, got also weight_grid",
    ),
    ("recipe", settings(recipe="rtn", c=0, grid="uniform", trellis=False), f"{UP}.weight_scale must be torch.float16"),
    ("one module", settings(module_overrides={UP: {"bits": 5}}), f"{UP}.weight_packed must be torch.int32"),
    ("nobody", settings(module_overrides={"model.none": {"bits": 5}}),
     "module_overrides must name quantized modules, got model.none"),
    ("kept", settings(modules_to_not_convert=["lm_head", UP]),
     f"modules_to_not_convert must not name {UP}, got quantized tensors of it"),
    ("head", settings(modules_to_not_convert=[]), "modules_to_not_convert must name lm_head"),
    ("newer", settings(format_version=_C.FORMAT_VERSION + 1),
     f"format_version must be {_C.FORMAT_VERSION}; install a precal that knows this format, got "),
    ("GPTQ", settings(quant_method="gptq"), "quant_method must be 'precal', got 'gptq'"),
    ("bitsandbytes", lambda f: edit_config(f, quantization_config={"load_in_4bit": True}), "quant_method must be"),
    ("none", lambda f: edit_config(f, quantization_config=None), "must be a model quantized by precal"),
    ("unknown bits", settings(bits=11), "bits must be an integer from 2 to 8, got 11"),
    ("layers", lambda f: edit_config(f, num_hidden_layers=3), "model.layers.2.mlp.up_proj.weight must be there"),
    ("fewer layers", lambda f: edit_config(f, num_hidden_layers=1), "model.layers.1.mlp.up_proj must be a linear"),
    ("width", lambda f: edit_config(f, intermediate_size=64), f"{UP} must be [64, 32] for the model of config.json"),
    ("a billion layers", lambda f: edit_config(f, num_hidden_layers=10**9), "num_hidden_layers must be an integer"),
    ("a billion inside", lambda f: edit_config(f, text_config={"n_layers": 10**9}), "n_layers must be an integer"),
    ("a billion experts", lambda f: edit_config(f, num_experts=10**9), "num_experts must be an integer, at most 1024"),
    ("layers in words", lambda f: edit_config(f, num_hidden_layers="two"), "num_hidden_layers must be an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in CONFIG], ids=[c[0] for c in CONFIG])
def test_a_config_that_disagrees_is_named(copy: Path, change: Callable[[Path], None], message: str) -> None:
    change(copy)
    started = time.monotonic()
    assert message in errors(copy)
    assert time.monotonic() - started < 60


def test_a_model_that_wants_its_own_code_is_not_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(copy, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    result = verify(copy)
    assert result.sound
    assert status(result)["model"] is None


def test_a_model_without_quantized_weights_is_named(tiny: Path, tiny_quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "dense")
    shutil.copyfile(tiny_quantized / "config.json", folder / "config.json")
    assert "must hold quantized weights, got none" in errors(folder)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tiny: Path, tmp_path: Path) -> Path:
    quantize_checkpoint(tiny, tmp_path / "out", max_shard_bytes=8000)
    return tmp_path / "out"


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def edit_map(**entries: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        data = json.loads((folder / INDEX_NAME).read_text())
        data["weight_map"].update(entries)
        (folder / INDEX_NAME).write_text(json.dumps(data))

    return change


def link_out(folder: Path) -> None:
    link, target = first(folder), folder.parent / "outside.safetensors"
    shutil.move(link, target)
    link.symlink_to(target)


def lie(folder: Path) -> None:
    path = first(folder)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1))


FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("truncated", lambda f: first(f).write_bytes(first(f).read_bytes()[:-100]), "must be a whole safetensors file"),
    ("missing", lambda f: first(f).unlink(), "must exist, the index names it"),
    ("out by ..", edit_map(w="../outside.safetensors"), "files must lie in the directory itself, got '../outside"),
    ("out by a link", link_out, "must lie in the directory itself, got a link to"),
    ("lie", lie, "must be a whole safetensors file, got: "),
    ("stray", lambda f: shutil.copy(first(f), f / "b.safetensors"), "b.safetensors: must be named by the index"),
    ("pickle", lambda f: (f / "pytorch_model.bin").touch(), "pytorch_model.bin: must be named by the index"),
    ("no config", lambda f: (f / "config.json").unlink(), "got no config.json"),
    ("config cut", lambda f: (f / "config.json").write_text("{"), "config.json: must be JSON"),
    ("report cut", lambda f: (f / "precal_report.json").write_text("{"), "precal_report.json: must be JSON"),
    ("report deep", lambda f: (f / "precal_report.json").write_text("[" * 100_000), "report.json: must be JSON"),
    ("nothing", shutil.rmtree, "must be a model directory, got nothing there"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_damaged_files_are_named(run: Run, sharded: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(sharded)
    code, out, err = run("verify", sharded)
    assert (code, err) == (3, "")
    assert message in out
    assert re.search(r"not sound, \d+ errors?$", out)
    code, out, _ = run("verify", sharded, "--json")
    data = json.loads(out)
    assert code == 3
    assert data["sound"] is False
    assert any(message in error["message"] for error in data["errors"])


def test_an_index_that_names_a_tensor_no_shard_has(sharded: Path) -> None:
    name = json.loads((sharded / INDEX_NAME).read_text())["weight_map"]["lm_head.weight"]
    edit_map(absent=name)(sharded)
    assert "absent must be in its shard, got no such tensor" in errors(sharded)


REPORTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.update(tensors=3), "tensors must be a list, got '3'"),
    (lambda d: d["tensors"].append(7), "tensors must hold objects with a shape, got '7'"),
    (lambda d: d["tensors"][0].update(shape=["x"]), "tensors must hold objects with a shape"),
    (lambda d: d["tensors"][0].update(tensor=3), "tensors must have a name and a dtype"),
    (lambda d: d["tensors"][0].update(figures={"noise": "much"}), "figures must be numbers"),
    (lambda d: d["tensors"][0].update(figures={"noise": 10**400}), "figures must be numbers"),
    (lambda d: d.update(sha256=[1]), "sha256 must be a dict"),
    (lambda d: d.update(sha256={"a": 1}), "sha256 must map names to digests"),
]


@pytest.mark.parametrize(("change", "message"), REPORTS, ids=[m for _, m in REPORTS])
def test_a_report_of_somebody_else_is_named(
    copy: Path, run: Run, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_report(copy, change)
    assert message in errors(copy)
    for command in (["inspect", copy], ["report", copy, "--html", tmp_path / "page.html"]):
        code, out, err = run(*command)
        assert (code, out) == (3, "")
        assert err.startswith(f"precal: {copy / 'precal_report.json'}: {message}")
    assert not (tmp_path / "page.html").exists()


def test_only_some_of_many_messages_are_printed(run: Run, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", num_hidden_layers=4)
    quantize_checkpoint(source, tmp_path / "out")
    settings(bits=3)(tmp_path / "out")
    _, out, _ = run("verify", tmp_path / "out")
    assert out.count("\nerror: ") == cli.MOST_SHOWN + 1
    assert re.search(r"error: and \d+ more; --json lists all", out)


def test_names_cannot_move_the_cursor(copy: Path, run: Run) -> None:
    change_tensors(without_report(copy), put("evil\x1b[2Jname", torch.zeros(2)))
    _, out, _ = run("verify", copy)
    assert "\x1b" not in out
    assert r"evil\x1b[2Jname must belong to the model" in out


def spoil(folder: Path, changes: list[tuple[int, int, int]], cut: int | None) -> bool:
    """Change bytes of the three files (each change: which, where, value), or cut one; whether weights changed."""
    files = [folder / name for name in ("model.safetensors", "config.json", "precal_report.json")]
    spoiled = False
    for which, at, value in changes:
        data = bytearray(files[which].read_bytes())
        at %= len(data)
        begin = 8 + int.from_bytes(data[:8], "little")
        spoiled |= which == 0 and at >= begin and data[at] != value
        data[at] = value
        files[which].write_bytes(data)
    if cut is not None:
        data = bytearray(files[cut % 3].read_bytes())
        files[cut % 3].write_bytes(data[: cut % len(data)])
        spoiled |= cut % 3 == 0
    return spoiled


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3),
    st.none() | st.integers(0, 1 << 20),
)
@hypothesis.settings(max_examples=30)
def test_no_damage_is_raised_and_none_to_weights_passes(
    tiny_quantized: Path,
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, int, int]],
    cut: int | None,
) -> None:
    folder = shutil.copytree(tiny_quantized, tmp_path_factory.mktemp("spoiled") / "copy")
    spoiled = spoil(folder, changes, cut)
    result = verify(folder)
    # A report whose digests are gone, or no report, cannot tell.
    if spoiled and (folder / "precal_report.json").read_bytes() == (tiny_quantized / "precal_report.json").read_bytes():
        assert not result.sound
    json.dumps(result.to_dict())


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def cuts(width: int, K: int, size: int) -> bool:
    """Whether a boundary between slices of columns lies inside a run of ``width`` columns."""
    return any((K // size * i) % width for i in range(1, size))


@pytest.mark.parametrize("K", [32, 768, 2048, 4096, 11008, 11000, 14336])
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "c"), [(4, 64, 1), (3, 64, 1), (3, 32, 0), (4, 128, 0), (4, -1, 0)])
def test_slices_of_columns_cut_nothing(K: int, bits: int, group_size: int, c: int, trellis: bool) -> None:
    config = QuantizeConfig(bits=bits, group_size=group_size, c=c, trellis=trellis)
    spec = WeightSpec.from_config(64, K, config)
    blocks = [range(*b) for b in _C.outlier_blocks(K)]
    for size in TP_SIZES:
        fits = K % size == 0
        if fits:
            part = K // size
            inside = {part * i for i in range(1, size)}
            fits = (
                not cuts(spec.group_size, K, size)
                and all(part * i * bits % 32 == 0 for i in range(1, size))
                and not ((c or spec.trellis) and any(set(block[1:]) & inside for block in blocks))
            )
        assert (why_not_by_columns(spec, size) == "") == fits, size
    assert why_not_by_columns(spec, 1) == ""


def test_sizes_of_a_model_and_why_not() -> None:
    config = QuantizeConfig(group_size=32)
    specs = {
        "layers.0.gate_proj": WeightSpec.from_config(11008, 4096, config),
        "layers.0.down_proj": WeightSpec.from_config(4096, 11008, config),
        "layers.0.q_proj": WeightSpec.from_config(4096, 4096, config),
    }
    sizes = tensor_parallel_sizes(specs)
    assert [size for size, why in sizes.items() if not why] == [1, 2, 4, 8]
    assert sizes[16] == "layers.0.down_proj: a slice of 688 columns cuts a group of 32"
    assert sizes[3] == "layers.0.gate_proj: N = 11008 is no multiple of 3"
    assert why_not_by_rows(specs["layers.0.q_proj"], 64) == ""
    wide = {"o_proj": WeightSpec.from_config(64, 4096, QuantizeConfig(bits=3, group_size=8, c=0, trellis=False))}
    assert tensor_parallel_sizes(wide)[64] == ""
    odd = {"o_proj": WeightSpec.from_config(64, 4096 + 64, QuantizeConfig(bits=3, group_size=4, c=0, trellis=False))}
    assert tensor_parallel_sizes(odd)[16] == "o_proj: a slice of 260 codes of 3 bits ends inside an int32 word"


def test_the_command_prints_the_sizes(run: Run, tiny_quantized: Path) -> None:
    _, out, _ = run("verify", tiny_quantized)
    assert re.search(r"tensor-parallel sizes up to 64: 1\n +not 2: model\.layers\.0\.mlp\.down_proj: ", out)
    _, out, _ = run("verify", tiny_quantized, "--json")
    parallel = json.loads(out)["tensor_parallel"]
    assert parallel["fits"] == [1]
    assert sorted(map(int, parallel["does_not_fit"])) == list(range(2, 65))


def test_groups_that_fit_a_size() -> None:
    shapes = {
        "layers.0.self_attn.o_proj": (4096, 4096),
        "layers.0.mlp.down_proj": (4096, 11008),
        "layers.0.mlp.gate_proj": (11008, 4096),
        "layers.1.mlp.down_proj": (4096, 688),
        "layers.1.fc2": (64, 96),
    }
    config = QuantizeConfig()
    assert fitting_groups(shapes, config, 1) == fitting_groups(shapes, config, 2) == config
    got = fitting_groups(shapes, config, 8)
    assert {name: got.for_module(name).group_size for name in shapes} == {
        **dict.fromkeys(shapes, 64),
        "layers.0.mlp.down_proj": 32,
        "layers.1.mlp.down_proj": 32,  # of the same name; 688 / 8 fits no group, which is for others to say
    }
    plain = fitting_groups(shapes, QuantizeConfig(c=0, trellis=False, overrides={"gate": {"bits": 3}}), 2)
    assert plain.overrides == {"gate": {"bits": 3}, r"(^|\.)fc2$": {"group_size": 16}}


def test_quantize_makes_groups_that_fit(run: Run, tmp_path: Path) -> None:
    model, out = save_tiny(tmp_path / "model", hidden_size=64, intermediate_size=96), tmp_path / "out"
    plain = ["--outliers", 0, "--no-trellis", "--quiet"]
    assert run("quantize", model, tmp_path / "default", *plain)[0] == 0
    assert not {2, 4} & set(json.loads(run("verify", tmp_path / "default", "--json")[1])["tensor_parallel"]["fits"])
    assert run("quantize", model, out, *plain, "--tp", 2)[0] == 0
    quantize_checkpoint(model, tmp_path / "api" / "out", QuantizeConfig(c=0, trellis=False), tensor_parallel=2)
    assert digests(tmp_path / "api" / "out") == digests(out)
    found = json.loads(run("verify", out, "--original", model, "--json")[1])
    assert found["sound"]
    assert found["tensor_parallel"]["fits"] == [1, 2]
    groups = {e["tensor"]: e["group_size"] for e in json.loads(run("inspect", out, "--json")[1])["tensors"]}
    assert {name.split(".")[4]: size for name, size in groups.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 64),
        "o_proj": 32,
        "down_proj": 16,
    }


def test_quantize_refuses_a_size_that_no_group_fits(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, _, err = run("quantize", tiny, tmp_path / "out", "--tp", 2)
    assert code == 3
    assert re.search(r"\S+_proj must be cut into 2 slices, got: a slice of \d+ columns cuts a (block|group) of ", err)
    assert list(tmp_path.iterdir()) == []


def test_an_original_is_left_as_it_was(tiny: Path, tmp_path: Path) -> None:
    folder = altered(tiny, tmp_path / "model", lambda t: None)
    quantize_checkpoint(folder, tmp_path / "out")
    before = {p: p.read_bytes() for p in (*folder.iterdir(), *(tmp_path / "out").iterdir())}
    verify(tmp_path / "out", folder)
    assert {p: p.read_bytes() for p in before} == before
