"""``precal export``: what others load is what the report says, to the bit where nothing is lost."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Folder, Run, Source, altered, logits, run_python, save_tiny, stored_tensors
from packed_models import GPTQ, compressed_tensors, ct_settings, gptq, packed_model
from torch import Tensor

from precal_ext import (
    CheckpointError,
    QuantizeConfig,
    export_checkpoint,
    import_checkpoint,
    load_quantized,
    quantize_checkpoint,
    set_activations,
)
from precal_ext.survey import Stored

pytest_plugins = ["package_fixtures"]

MODEL = "llama-6m"
# A process in which nobody imports precal.
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(24).reshape(2, 12) % 64
mask = torch.ones_like(ids)
mask[1, 7:] = 0
found = []
for folder, dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        found.append(model(input_ids=ids, attention_mask=mask).logits)
torch.save(found, sys.argv[1])
assert not any(name.startswith("precal") for name in sys.modules)
"""


def our_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = load_quantized(folder, dtype=dtype)
    set_activations(model, "f32")
    return logits(model)


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Every packed weight by compressed-tensors' own unpacking, float64."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    widths = {}
    for group in config.config_groups.values():
        widths.update({target: group.weights.num_bits for target in group.targets})
    stored = stored_tensors(folder)
    found = {}
    for name in (n for n in stored if n.endswith(".weight_packed")):
        module = name.removesuffix(".weight_packed")
        shape, scale = stored[f"{module}.weight_shape"], stored[f"{module}.weight_scale"].double()
        level = unpack_from_int32(stored[name], widths.get(module, widths.get("Linear")), torch.Size(shape.tolist()))
        found[module] = level.double() * scale.repeat_interleave(level.shape[1] // scale.shape[1], 1)
    return found


def ours(folder: Path) -> dict[str, Tensor]:
    stored = Stored.open(folder)
    return {module: stored.read_valid(module).dequantize().double() for module in stored.modules}


def sqnr(w: Tensor, there: Tensor) -> float:
    noise = float((w - there).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(w.square().sum()) / noise)


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stock:
    """Exported directories, and their logits by transformers with compressed-tensors and without precal."""

    folders: dict[str, Path]
    logits: dict[tuple[str, str], Tensor]


@pytest.fixture(scope="module")
def stock(quantized: Folder, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """``trained``: two trained layers from the original's weights; ``dense``: the same as they are in float32;
    ``mixed``: a random model with a tied head of 8 bits, which gets a weight of its own, and a layer left alone."""
    folder = tmp_path_factory.mktemp("stock")
    export_checkpoint(quantized(MODEL, "precal", 4), folder / "trained", original=source(MODEL))
    export_checkpoint(quantized(MODEL, "precal", 4), folder / "dense", "fp32")
    tiny = save_tiny(folder / "tiny", hidden_size=64, intermediate_size=64, tie_word_embeddings=True)
    config = QuantizeConfig(lm_head=8, group_size=32, exclude=["layers.0.self_attn.o_proj"])
    quantize_checkpoint(tiny, folder / "tiny-4bit", config)
    export_checkpoint(folder / "tiny-4bit", folder / "mixed")
    cases = [("trained", "float32"), ("trained", "bfloat16"), ("dense", "float32"), ("mixed", "float32")]
    arguments = [part for name, dtype in cases for part in (str(folder / name), dtype)]
    done = run_python("-c", STOCK, str(folder / "logits.pt"), *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "logits.pt", weights_only=True)
    return Stock({name: folder / name for name, _ in cases}, dict(zip(cases, found, strict=True)))


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a.float() - b).abs().max()) < tolerance * float(b.abs().max())


def test_stock_transformers_computes_what_our_kernels_do(stock: Stock, tmp_path: Path) -> None:
    import_checkpoint(stock.folders["trained"], tmp_path / "back")
    exact = our_logits(tmp_path / "back")
    assert_close(stock.logits["trained", "float32"], exact, 1e-4)
    # In bfloat16 both round; neither is further from float32 than the rounding of a few layers.
    for half in (stock.logits["trained", "bfloat16"], our_logits(tmp_path / "back", torch.bfloat16)):
        assert_close(half, exact, 2**-5)


def test_widths_of_their_own_and_layers_left_alone(stock: Stock, tmp_path: Path) -> None:
    """Two schemes name their modules; what was dense is ignored; the head has a weight of its own."""
    settings = json.loads((stock.folders["mixed"] / "config.json").read_text())["quantization_config"]
    found = {g["weights"]["num_bits"]: g["targets"] for g in settings["config_groups"].values()}
    assert found[8] == ["lm_head"]
    assert len(found[4]) == 13
    assert settings["ignore"] == ["model.layers.0.self_attn.o_proj"]
    import_checkpoint(stock.folders["mixed"], tmp_path / "back")
    assert_close(stock.logits["mixed", "float32"], our_logits(tmp_path / "back"), 1e-4)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("from_original", [False, True])
def test_the_stated_loss_is_that_of_the_unpacked_weights(
    quantized: Folder, source: Source, tmp_path: Path, bits: int, from_original: bool
) -> None:
    model = quantized(MODEL, "precal", bits)
    original = source(MODEL) if from_original else None
    report = export_checkpoint(model, tmp_path / "out", original=original)
    before = {m: stored_tensors(source(MODEL))[f"{m}.weight"].double() for m in ours(model)}
    reference = before if from_original else ours(model)
    there = decompressed(tmp_path / "out")
    assert sorted(there) == sorted(reference)
    recorded = json.loads((tmp_path / "out/precal_report.json").read_text())
    figures = {t["tensor"]: t["figures"] for t in recorded["tensors"] if "figures" in t}
    least = {3: 13.5, 4: 19.5}[bits]
    for module, w in there.items():
        expected = sqnr(reference[module], w)
        assert figures[f"{module}.weight"]["sqnr_db"] == pytest.approx(expected, abs=1e-3)
        assert expected > least
    every = sqnr(*(torch.cat([d[m].flatten() for m in sorted(there)]) for d in (reference, there)))
    assert recorded["summary"]["sqnr_db"] == pytest.approx(every, abs=1e-3)
    assert report.bits_per_weight == pytest.approx(bits + 16 / 64, abs=1e-6)
    assert any("--original MODEL" in note for note in report.notes) is not from_original


def test_the_original_is_worth_giving(quantized: Folder, source: Source, tmp_path: Path) -> None:
    model = quantized(MODEL, "precal", 4)
    for name, original in (("again", None), ("original", source(MODEL))):
        export_checkpoint(model, tmp_path / name, original=original)
    before = stored_tensors(source(MODEL))
    for module in ours(model):
        w = before[f"{module}.weight"].double()
        assert (
            sqnr(w, decompressed(tmp_path / "original")[module]) > sqnr(w, decompressed(tmp_path / "again")[module]) + 1
        )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_came_from_there_goes_back_unchanged(tmp_path: Path, bits: int) -> None:
    model, _ = packed_model(tmp_path, ct_settings(bits), compressed_tensors, bits=bits)
    import_checkpoint(model, tmp_path / "ours")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", dtype="float16")
    assert {e.reason for e in report.quantized} == {"codes kept"}
    assert report.sqnr_db == math.inf
    before, after = stored_tensors(model), stored_tensors(tmp_path / "out")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)


def test_a_gptq_model_becomes_one_of_compressed_tensors(tmp_path: Path) -> None:
    model, codes = packed_model(tmp_path, GPTQ, gptq)
    import_checkpoint(model, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", dtype="float16")
    there = decompressed(tmp_path / "out")
    assert all(torch.equal(there[module], c.dense()) for module, c in codes.items())


@pytest.mark.parametrize("recipe", ["rtn", "paper"])
def test_other_recipes(quantized: Folder, tmp_path: Path, recipe: str) -> None:
    """rtn keeps its codes, under scales that bfloat16 rounds; paper has two scales a group and is quantized again."""
    model = quantized(MODEL, recipe, 4)
    report = export_checkpoint(model, tmp_path / "out")
    assert {e.reason for e in report.quantized} == {"codes kept" if recipe == "rtn" else "quantized again"}
    least = 48 if recipe == "rtn" else 17
    there = decompressed(tmp_path / "out")
    assert min(sqnr(w, there[module]) for module, w in ours(model).items()) > least


def test_a_group_size_of_its_own(tmp_path: Path, quantized: Folder, run: Run) -> None:
    model = quantized(MODEL, "precal", 4)
    for size, groups in ((32, 8), (-1, 1)):
        report = export_checkpoint(model, tmp_path / str(size), group_size=size)
        scale = stored_tensors(tmp_path / str(size))["model.layers.0.self_attn.q_proj.weight_scale"]
        assert scale.shape == (256, groups)
        assert report.config.group_size == size
        assert min(sqnr(w, decompressed(tmp_path / str(size))[m]) for m, w in ours(model).items()) > 12
    code, _, err = run("export", model, tmp_path / "out", "--group-size", 48, "--quiet")
    assert code == 3
    assert "must have columns that are a multiple of the group size for compressed-tensors, got 256 and 48" in err


def test_sizes_that_a_server_refuses_are_named(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", intermediate_size=48)
    quantize_checkpoint(source, tmp_path / "q", QuantizeConfig(group_size=16))
    report = export_checkpoint(tmp_path / "q", tmp_path / "out")
    assert [n for n in report.notes if "no multiples of 32" in n and "model.layers.0.mlp.down_proj" in n]


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_experts_are_packed_too(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {} if architecture == "Mixtral" else {"moe_intermediate_size": 32}
    source = save_tiny(tmp_path / "tiny", architecture, **sizes)
    quantize_checkpoint(source, tmp_path / "q", QuantizeConfig(group_size=16))
    export_checkpoint(tmp_path / "q", tmp_path / "packed", original=source)
    export_checkpoint(tmp_path / "q", tmp_path / "dense", "fp32")
    assert sorted(stored_tensors(tmp_path / "dense")) == sorted(stored_tensors(source))
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "q"))
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    packed, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert (dense - ours).norm() < 1e-3 * ours.norm()
    assert (logits(packed) - ours).norm() < 0.2 * ours.norm()


def test_a_conv1d_is_turned_again_or_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "tiny", "GPT2")
    quantize_checkpoint(source, tmp_path / "q")
    export_checkpoint(tmp_path / "q", tmp_path / "dense", "fp32")
    shapes = {name: tensor.shape for name, tensor in stored_tensors(source).items()}
    assert {name: tensor.shape for name, tensor in stored_tensors(tmp_path / "dense").items()} == shapes
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "q"))
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) - ours).norm() < 1e-3 * ours.norm()
    with pytest.raises(
        CheckpointError, match=r"c_attn must be an nn.Linear of the model .* got a Conv1D; export it as"
    ):
        export_checkpoint(tmp_path / "q", tmp_path / "packed")


def test_experts_that_are_dense_are_ignored_by_name(tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16, exclude=("experts",))
    quantize_checkpoint(save_tiny(tmp_path / "tiny", "Mixtral"), tmp_path / "q", config)
    report = export_checkpoint(tmp_path / "q", tmp_path / "out")
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    stored = stored_tensors(tmp_path / "out")
    experts = {name.removesuffix(".weight") for name in stored if ".experts." in name}
    assert len(experts) == 18
    assert experts < set(ignored)
    assert any(note.startswith("experts stay dense") for note in report.notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scales_have_the_dtype_that_is_asked_for(tmp_path: Path, quantized: Folder, dtype: str) -> None:
    """And a form here: what was exported comes back exactly."""
    model = quantized(MODEL, "precal", 4)
    export_checkpoint(model, tmp_path / "out", dtype=dtype)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    assert stored_tensors(tmp_path / "out")[name].dtype == getattr(torch, dtype)
    import_checkpoint(tmp_path / "out", tmp_path / "back")
    back = ours(tmp_path / "back")
    assert all(torch.equal(w, back[module]) for module, w in decompressed(tmp_path / "out").items())


# ---- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("recipe", ["precal", "paper"])
def test_dense_weights_are_ours_rounded(
    quantized: Folder, source: Source, tmp_path: Path, recipe: str, format: str, dtype: torch.dtype
) -> None:
    model = quantized(MODEL, recipe, 4)
    report = export_checkpoint(model, tmp_path / "out", format)
    there, before = stored_tensors(tmp_path / "out"), stored_tensors(source(MODEL))
    assert sorted(there) == sorted(before)
    for module, w in ours(model).items():
        assert torch.equal(there.pop(f"{module}.weight"), w.to(dtype))
    assert all(torch.equal(tensor, before[name]) for name, tensor in there.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert (report.sqnr_db == math.inf) is (dtype == torch.float32)


def test_a_dense_model_computes_the_same(stock: Stock, quantized: Folder) -> None:
    assert_close(stock.logits["dense", "float32"], our_logits(quantized(MODEL, "precal", 4)), 1e-4)


def test_weights_beyond_float16(tmp_path: Path, run: Run) -> None:
    def large(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e7)

    model = altered(save_tiny(tmp_path / "tiny"), tmp_path / "large", large)
    quantize_checkpoint(model, tmp_path / "q", QuantizeConfig(group_size=16))
    for arguments, message in (
        (["--format", "fp16"], "model.layers.1.mlp.up_proj must fit in torch.float16, got"),
        (["--dtype", "float16"], "model.layers.1.mlp.up_proj cannot be quantized: quantize_uniform: scales must fit"),
    ):
        code, _, err = run("export", tmp_path / "q", tmp_path / "out", "--quiet", *arguments)
        assert code == 3
        assert message in err
        assert not (tmp_path / "out").exists()
    assert run("export", tmp_path / "q", tmp_path / "out", "--quiet", "--format", "bf16")[0] == 0


# ---- arguments, input, output ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "gguf"}, "export: format must be one of compressed-tensors, bf16, fp16, fp32, got 'gguf'"),
        ({"dtype": "int8"}, "export: dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"group_size": 0}, r"export: group_size must be an integer from 1 to 2\*\*20, or -1, got 0"),
        ({"format": "bf16", "group_size": 32}, "export: group_size must be left out for format bf16"),
        ({"format": "bf16", "dtype": "float16"}, "export: dtype must be left out for format bf16"),
        ({"format": "fp32", "original": "x"}, "export: original must be left out for format fp32"),
    ],
)
def test_arguments(tiny_quantized: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tiny_quantized, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tiny: Path, tiny_quantized: Path, tmp_path: Path, run: Run) -> None:
    copy = shutil.copytree(tiny_quantized, tmp_path / "copy")
    other = save_tiny(tmp_path / "other", hidden_size=64)
    for model, out, arguments, message in (
        (copy, copy / "inside", [], "must lie outside the model's directory"),
        (copy, tmp_path, [], "must not contain the model"),
        (tiny, tmp_path / "out", [], "must be a model quantized by precal"),
        (tmp_path / "nothing", tmp_path / "out", [], "must be given a model directory, got nothing there"),
        (copy, tmp_path / "out", ["--group-size", 16, "--original", other], "must have shape"),
        (copy, tmp_path / "out", ["--original", copy], "must be the model before quantization"),
        (copy, other, ["--group-size", 16], "must be new or empty"),
    ):
        code, _, err = run("export", model, out, "--quiet", *arguments)
        assert code == 3
        assert message in err, message

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = math.nan

    bad = altered(tiny, tmp_path / "bad", poison)
    with pytest.raises(CheckpointError, match=r"q_proj.weight must be finite, got nan at \[3, 4\]"):
        export_checkpoint(copy, tmp_path / "out", original=bad, group_size=16)
    assert not (tmp_path / "out").exists()


def test_the_command(quantized: Folder, source: Source, tmp_path: Path, run: Run) -> None:
    model = quantized(MODEL, "precal", 4)
    code, text, err = run("export", model, tmp_path / "out")
    assert code == 0, err
    assert f"14 weights as compressed-tensors, 4.250 bits per weight, SQNR 20.9 dB against {model}:" in re_round(text)
    assert "note: SQNR is against the quantized weights" in text
    code, text, _ = run(
        "export", model, tmp_path / "out", "--original", source(MODEL), "--overwrite", "--json", "--quiet"
    )
    assert code == 0
    assert json.loads(text)["tensors_quantized"] == 14
    readme = (tmp_path / "out/README.md").read_text()
    assert "precal_ext" not in readme
    assert not (tmp_path / "out/README.original.md").exists()
    # The same bytes in another process.
    done = run_python("-m", "precal_ext", "export", str(model), str(tmp_path / "two/out"), "--original",
                      str(source(MODEL)), "--quiet", cwd=tmp_path, OMP_NUM_THREADS="2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "two/out"))
    assert one == two


def re_round(text: str) -> str:
    """SQNR to one digit: the second is the machine's trained model's own."""
    return re.sub(r"SQNR (\d+\.\d)\d dB", r"SQNR \1 dB", text)


def test_an_interrupted_export_continues(quantized: Folder, tmp_path: Path) -> None:
    model = quantized(MODEL, "precal", 4)
    export_checkpoint(model, tmp_path / "whole")

    def stop(p: Any) -> None:
        if p.tensors_done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(model, tmp_path / "out", progress=stop)
    seen: list[Any] = []
    export_checkpoint(model, tmp_path / "out", progress=seen.append)
    assert seen[0].bytes_before > 0
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", "out"))
    assert one == two
