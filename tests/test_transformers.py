"""Inside transformers: quantizing while loading, sizes, dequantizing, pipelines, adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    RECIPES,
    Folder,
    InMemory,
    Source,
    altered,
    assert_same_tensors,
    edit_config,
    logits,
    run_python,
    same_bytes,
    save_tiny,
    sha256,
    stored_tensors,
)
from torch import nn

import precal_ext
from precal_ext import (
    ModelFormat,
    PrecalLinear,
    QuantizeConfig,
    dequantize_model,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
)

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

AutoModel = transformers.AutoModelForCausalLM
PrecalConfig = precal_ext.PrecalConfig


def on_the_fly(folder: Path, dtype: Any = "auto", **settings: Any) -> Any:
    return AutoModel.from_pretrained(folder, quantization_config=PrecalConfig(**settings), dtype=dtype)


def linears(model: nn.Module) -> dict[str, type]:
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, PrecalLinear))}


# ---- quantized while it is loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bits", [4, 3])
def test_the_same_bits_while_loading_in_memory_and_on_disk(
    source: Source, quantized: Folder, in_memory: InMemory, tmp_path: Path, recipe: str, bits: int
) -> None:
    model = on_the_fly(source("llama-6m"), recipe=recipe, bits=bits)
    expected, report = in_memory("llama-6m", recipe, bits)
    assert linears(model) == linears(expected)
    assert_same_tensors(dict(model.state_dict()), dict(expected.state_dict()))
    assert torch.equal(logits(model), logits(expected))
    assert model.config.quantization_config.report.to_dict() == report.to_dict()
    folder = quantized("llama-6m", recipe, bits)
    model.save_pretrained(tmp_path / "out")
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(folder / "model.safetensors")
    settings = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path / "out", folder)]
    assert settings[0] == settings[1]
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "out", dtype="auto")), logits(expected))


SETTINGS: dict[str, dict[str, Any]] = {
    "include and exclude": {"exclude": ["o_proj"], "include": ["lm_head"]},
    "overrides": {"overrides": {"down_proj": {"bits": 3, "grid": "uniform"}, "(up|gate)_proj": {"bits": 8, "c": 0}}},
    "a head": {"lm_head": 8},
    "everything finite": {"skip_nonfinite": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings_while_loading(tmp_path: Path, name: str, tied: bool) -> None:
    if tied and name == "include and exclude":
        pytest.skip("a tied head cannot be included")
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    model = on_the_fly(folder, **SETTINGS[name])
    quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig.from_dict(SETTINGS[name]))
    stored = stored_tensors(tmp_path / "out")
    state = model.state_dict()
    if tied and name != "a head":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        del state["lm_head.weight"]
    assert_same_tensors(dict(state), stored)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(stored_tensors(tmp_path / "saved"), stored)
    untied = json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert untied == (tied and name != "a head")


def test_a_model_in_shards_whose_sets_lie_apart(tiny: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tiny).save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert_same_tensors(dict(on_the_fly(tmp_path / "many").state_dict()), dict(on_the_fly(tiny).state_dict()))


def test_a_weight_that_is_not_finite_is_named_or_left(tiny: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")

    folder = altered(tiny, tmp_path / "model", damage)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight must be finite, got nan at \[7, 3\]"):
        on_the_fly(folder)
    model = on_the_fly(folder, skip_nonfinite=True)
    dense = {n for n, kind in linears(model).items() if kind is nn.Linear}
    assert dense == {"lm_head", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"}
    assert set(model.config.quantization_config.modules_to_not_convert) == dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weights_are_those_of_the_dtype_that_was_asked_for(tiny: Path, dtype: torch.dtype) -> None:
    """As everywhere in from_pretrained; where it is the checkpoint's own, the bits are those of ``precal quantize``."""
    expected = AutoModel.from_pretrained(tiny, dtype=dtype)
    quantize_model(expected)
    model = on_the_fly(tiny, dtype)
    assert_same_tensors(dict(model.state_dict()), dict(expected.state_dict()))
    assert logits(model).dtype == dtype
    assert torch.equal(logits(model), logits(expected))


def test_a_mapping_says_it_too_and_one_config_serves_two_models(tiny: Path) -> None:
    config = PrecalConfig(bits=3)
    models = [AutoModel.from_pretrained(tiny, quantization_config=config, dtype="auto") for _ in range(2)]
    models.append(AutoModel.from_pretrained(tiny, quantization_config={"quant_method": "precal", "bits": 3}))
    assert [m.model.layers[0].mlp.up_proj.spec.bits for m in models] == [3, 3, 3]
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert config.format is None


def test_only_one_fusion_set_is_dense_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of quantizing while loading: a model that fits in memory only when it is quantized."""
    from precal_ext.inplace import Quantizing

    seen: list[tuple[str, ...]] = []
    take = Quantizing.take

    def watched(self: Quantizing, parameter: str, value: Any = None) -> Any:
        found = take(self, parameter, value)
        seen.append(tuple(sorted(name for waiting in self._waiting.values() for name in waiting)))
        return found

    monkeypatch.setattr(Quantizing, "take", watched)
    on_the_fly(tiny)
    assert len(seen) == 14
    assert max(map(len, seen)) <= 2  # q and k wait for v, gate for up
    assert seen[-1] == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 9}, "config: bits must be an integer from 2 to 8, got 9"),
        ({"width": 4}, "config: fields must be among .*, got width"),
        (ModelFormat(QuantizeConfig()).to_dict(), r"must say what to do with a dense model, as PrecalConfig\(bits=4\)"),
        ({"lm_head": 8, "exclude": ["lm_head"]}, "--lm-head must find an output head"),
    ],
)
def test_settings_that_cannot_be(tiny: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tiny, quantization_config={"quant_method": "precal", **config})


def test_a_checkpoint_without_a_version_is_refused(tiny_quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_quantized, tmp_path / "other")
    edit_config(folder, quantization_config={"quant_method": "precal", "bits": 4})
    with pytest.raises(ValueError, match="format_version must be 1; install a precal that knows this format, got None"):
        AutoModel.from_pretrained(folder)


def test_a_part_on_the_disk_is_refused_while_quantizing(tiny: Path) -> None:
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    with pytest.raises(ValueError, match="device_map must leave no part on the disk"):
        AutoModel.from_pretrained(
            tiny, quantization_config=PrecalConfig(), device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}
        )


def test_the_name_needs_no_transformers_before_it_is_asked_for(tmp_path: Path) -> None:
    code = """
import sys, precal_ext
assert "transformers" not in sys.modules
print(precal_ext.PrecalConfig(bits=3).settings.bits)
assert "transformers" in sys.modules
sys.modules["transformers"] = None
for name in [n for n in sys.modules if n.startswith(("transformers.", "precal_ext.integrations._hf"))]:
    del sys.modules[name]
try:
    precal_ext.PrecalConfig
except ImportError as error:
    print(error)
"""
    done = run_python("-c", code, cwd=tmp_path)
    assert done.stdout.startswith("3\nprecal_ext.PrecalConfig needs transformers"), done.stderr
    assert not hasattr(precal_ext, "PrecalConfiguration")


# ---- dense again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm_head", [None, 8])
def test_dequantize_gives_the_dense_model_it_stands_for(tmp_path: Path, lm_head: int | None) -> None:
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig(lm_head=lm_head))
    model = AutoModel.from_pretrained(tmp_path / "out")
    weights = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, PrecalLinear)}
    expected = logits(model)
    dense = model.dequantize()
    assert set(linears(dense).values()) == {nn.Linear}
    assert all(same_bytes(dense.get_submodule(n).weight.data, w) for n, w in weights.items())
    assert (logits(dense) - expected).norm() < 1e-3 * expected.norm()  # activations in 16 bits
    assert not hasattr(dense.config, "quantization_config")
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (lm_head is None)


def test_dequantize_in_another_dtype(tiny_quantized: Path) -> None:
    model = load_quantized(tiny_quantized)
    expected = model.model.layers[0].mlp.up_proj.dequantize()
    assert dequantize_model(model, torch.bfloat16) == 14
    assert same_bytes(model.model.layers[0].mlp.up_proj.weight.data, expected.to(torch.bfloat16))
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_for_a_device_map() -> None:
    """What ``device_map="auto"`` divides: the bytes that modules will take, before anything is loaded."""
    accelerate = pytest.importorskip("accelerate")
    from models import tiny_model

    from precal_ext.integrations._hf_quantizer import ConversionOps, PrecalHfQuantizer

    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    made = tiny_model(**settings)
    with torch.device("meta"):
        model = AutoModel.from_config(made.config)
    quantizer = PrecalHfQuantizer(PrecalConfig(bits=4), pre_quantized=False)
    quantizer.preprocess_model(model)
    quantize_model(made, QuantizeConfig(bits=4))

    def real(name: str) -> int:
        return sum(t.nbytes for t in made.get_submodule(name).state_dict().values())

    if ConversionOps is None:  # transformers 4 knows dtypes only
        special = quantizer.get_special_dtypes_update(model, torch.float32)
        sizes = accelerate.utils.compute_module_sizes(model, torch.float32, special)
        assert 0.9 < sizes["model.layers.0"] / real("model.layers.0") < 1.1
        return
    from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

    sizes, _ = compute_module_sizes(model, quantizer)
    layers = [name for name in sizes if name.startswith("model.layers")]
    assert {name: round(sizes[name]) for name in layers} == {name: real(name) for name in layers}
    # Two devices, of which the first has room for a few layers.
    room = int(sizes["model.embed_tokens"] + 3.5 * sizes["model.layers.0"])
    limits: dict[str, Any] = {"max_memory": {0: room, "cpu": 10**9}, "no_split_module_classes": {"LlamaDecoderLayer"}}
    places = infer_auto_device_map(model, **limits, hf_quantizer=quantizer)
    inside = [name for name, place in places.items() if place == 0]
    assert len({name.split(".")[2] for name in inside if "layers" in name}) >= 2
    assert sum(sizes[name] for name in inside) <= room
    dense = infer_auto_device_map(model, **limits)
    assert not {"model.layers.0", "model.layers.1"} & {name for name, place in dense.items() if place == 0}


def test_device_map_auto_loads_both_ways(tiny: Path, tiny_quantized: Path) -> None:
    pytest.importorskip("accelerate")
    expected = logits(load_quantized(tiny_quantized))
    loaded = AutoModel.from_pretrained(tiny_quantized, device_map="auto")
    made = AutoModel.from_pretrained(tiny, device_map="auto", quantization_config=PrecalConfig(), dtype="auto")
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(made), expected)


# ---- what people do with a model -------------------------------------------------------------------------------------


def test_a_pipeline_generates(talking: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(talking / "tokenizer.json"))
    model = on_the_fly(talking)
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate("Once upon a time", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time") and len(text) > len("Once upon a time")


def test_a_pipeline_loads_a_directory(talking: Path, tmp_path: Path) -> None:
    quantize_checkpoint(talking, tmp_path / "out")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(talking / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path / "out")
    generate = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, PrecalLinear)
    assert generate("Once", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("Once")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_step_on_the_frozen_base(tiny_quantized: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    from precal_ext.integrations.peft import LoraPrecalLinear, adapted

    model = AutoModel.from_pretrained(tiny_quantized, dtype=dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids = torch.arange(24).reshape(2, 12)
    untouched = logits(model)
    torch.manual_seed(0)
    config = adapted(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    trained = peft.get_peft_model(model, config)
    assert sum(isinstance(m, LoraPrecalLinear) for m in trained.modules()) == 6
    assert torch.equal(logits(trained), untouched)  # B starts at zero
    parameters = [p for p in trained.parameters() if p.requires_grad]
    assert len(parameters) == 12
    optimizer = torch.optim.SGD(parameters, lr=10.0)
    losses = []
    for _ in range(4):
        loss = trained(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
        optimizer.step()
    assert losses[-1] < losses[0]
    after = {n.replace(".base_layer", ""): t for n, t in trained.get_base_model().state_dict().items()}
    assert_same_tensors({n: after[n] for n in before}, before)
    with pytest.raises(ValueError, match="merge: the base must be dense, got a quantized one"):
        trained.merge_and_unload()
    trained.save_pretrained(tmp_path / "adapter")
    base = AutoModel.from_pretrained(tiny_quantized, dtype=dtype)
    config = adapted(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    assert torch.equal(logits(again), logits(trained))
    assert not torch.equal(logits(again), untouched)
