"""quantize, save, load: the same model in memory and on disk, through every door, for every recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import (
    MODELS,
    RECIPES,
    Folder,
    InMemory,
    Source,
    assert_same_tensors,
    logits,
    sha256,
    stored_tensors,
    tiny_model,
)
from torch import nn

from precal_ext import (
    PrecalLinear,
    QuantizeConfig,
    SelectionError,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
    save_quantized,
)

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

every_model = pytest.mark.parametrize("name", MODELS)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_width = pytest.mark.parametrize("bits", [4, 3])


def from_config(folder: Path) -> nn.Module:
    """The dense architecture with random weights, as ``load_quantized(model=)`` takes it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_config(config)


# ---- one model, five ways --------------------------------------------------------------------------------------------


@every_model
@every_recipe
@every_width
class TestRoundTrip:
    def test_in_memory_equals_on_disk(
        self, quantized: Folder, in_memory: InMemory, name: str, recipe: str, bits: int
    ) -> None:
        model, _ = in_memory(name, recipe, bits)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        assert_same_tensors(stored_tensors(quantized(name, recipe, bits)), state)

    def test_logits_are_the_same_bits_through_every_door(
        self, quantized: Folder, in_memory: InMemory, name: str, recipe: str, bits: int
    ) -> None:
        folder = quantized(name, recipe, bits)
        expected = logits(in_memory(name, recipe, bits)[0])
        assert torch.isfinite(expected).all()
        assert torch.equal(logits(load_quantized(folder)), expected)
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(folder)), expected)
        assert torch.equal(logits(load_quantized(folder, model=from_config(folder))), expected)

    def test_every_writer_writes_the_same_bytes(
        self, quantized: Folder, in_memory: InMemory, tmp_path: Path, name: str, recipe: str, bits: int
    ) -> None:
        folder = quantized(name, recipe, bits)
        model, _ = in_memory(name, recipe, bits)
        save_quantized(model, tmp_path / "ours")
        model.save_pretrained(tmp_path / "theirs")
        load_quantized(folder).save_pretrained(tmp_path / "again")
        expected = sha256(folder / "model.safetensors")
        found = [sha256(tmp_path / door / "model.safetensors") for door in ("ours", "theirs", "again")]
        assert found == [expected] * 3
        for door in ("ours", "theirs", "again"):
            settings = json.loads((tmp_path / door / "config.json").read_text())["quantization_config"]
            assert settings == json.loads((folder / "config.json").read_text())["quantization_config"]

    def test_the_quantized_model_is_near_the_dense_one(
        self, source: Source, in_memory: InMemory, name: str, recipe: str, bits: int
    ) -> None:
        dense = logits(transformers.AutoModelForCausalLM.from_pretrained(source(name))).float().softmax(-1)
        near = logits(in_memory(name, recipe, bits)[0]).float().softmax(-1)
        assert not torch.equal(near, dense)
        # Total variation on a prompt of noise; a model of other weights is at 0.9.
        assert ((near - dense).abs().sum(-1) / 2).mean() < (0.35 if bits == 4 else 0.7)


@every_model
@every_width
def test_precal_is_nearer_than_the_baselines(in_memory: InMemory, name: str, bits: int) -> None:
    sqnr = {recipe: in_memory(name, recipe, bits)[1].sqnr_db for recipe in RECIPES}
    assert sqnr["precal"] > sqnr["rtn"]
    assert sqnr["precal"] > sqnr["paper"]


# ---- variations ------------------------------------------------------------------------------------------------------


@every_recipe
def test_a_sharded_model_loads_the_same(tiny: Path, tmp_path: Path, recipe: str) -> None:
    config = QuantizeConfig(recipe=recipe)
    quantize_checkpoint(tiny, tmp_path / "one", config)
    quantize_checkpoint(tiny, tmp_path / "many", config, max_shard_bytes=4096)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one = load_quantized(tmp_path / "one")
    assert_same_tensors(stored_tensors(tmp_path / "many"), stored_tensors(tmp_path / "one"))
    assert torch.equal(logits(load_quantized(tmp_path / "many")), logits(one))
    built = from_config(tiny)
    assert torch.equal(logits(load_quantized(tmp_path / "many", model=built)), logits(one))
    save_quantized(one, tmp_path / "again", max_shard_bytes=4096)
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(one))


def test_a_sharded_input_gives_the_same_output(tiny: Path, tmp_path: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    dense.save_pretrained(tmp_path / "sharded" / "tiny-llama", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded" / "tiny-llama").glob("*.safetensors"))) > 3
    for source, parent in ((tiny, "a"), (tmp_path / "sharded" / "tiny-llama", "b")):
        quantize_checkpoint(source, tmp_path / parent / "out")
    assert_same_tensors(stored_tensors(tmp_path / "a" / "out"), stored_tensors(tmp_path / "b" / "out"))


@every_model
def test_tied_embeddings_are_written_once(source: Source, quantized: Folder, name: str) -> None:
    folder = quantized(name, "rtn", 4)
    assert json.loads((source(name) / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in stored_tensors(folder)
    for loaded in (load_quantized(folder), load_quantized(folder, model=from_config(folder))):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@every_recipe
def test_a_dtype_asked_for_leaves_what_is_stored(tiny: Path, tmp_path: Path, recipe: str, dtype: str) -> None:
    quantize_checkpoint(tiny, tmp_path / "out", QuantizeConfig(recipe=recipe))
    model = load_quantized(tmp_path / "out", dtype=getattr(torch, dtype))
    assert model.lm_head.weight.dtype == getattr(torch, dtype)
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == getattr(torch, dtype)
    assert logits(model).dtype == getattr(torch, dtype)
    state = model.state_dict()
    stored = {k: t for k, t in stored_tensors(tmp_path / "out").items() if ".weight_" in k}
    assert_same_tensors({k: state[k] for k in stored}, stored)


def test_the_old_name_of_dtype_works_too(tiny_quantized: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_quantized, torch_dtype=torch.float16)
    assert logits(model).dtype == torch.float16


def test_modules_may_have_settings_of_their_own(tiny: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(
        overrides={"down_proj": {"bits": 3, "grid": "uniform"}, r"layers\.1.*(up|gate)_proj": {"bits": 8, "c": 0}},
        exclude=("o_proj",),
        include=("lm_head",),
    )
    quantize_checkpoint(tiny, tmp_path / "out", config)
    in_memory = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    quantize_model(in_memory, config)
    loaded = load_quantized(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(in_memory))
    layer = loaded.model.layers[1]
    assert (layer.mlp.down_proj.spec.bits, layer.mlp.up_proj.spec.bits, layer.self_attn.q_proj.spec.bits) == (3, 8, 4)
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert isinstance(loaded.lm_head, PrecalLinear)
    save_quantized(in_memory, tmp_path / "saved")
    assert sha256(tmp_path / "saved" / "model.safetensors") == sha256(tmp_path / "out" / "model.safetensors")


def test_a_grid_of_ones_own_equal_to_the_base_is_remembered(tiny: Path, tmp_path: Path) -> None:
    """The width resets the grid, so a loader must be told of the grid even where it equals that of the model."""
    config = QuantizeConfig(grid="uniform", overrides={"down_proj": {"bits": 3, "grid": "uniform"}})
    quantize_checkpoint(tiny, tmp_path / "out", config)
    loaded = load_quantized(tmp_path / "out", model=from_config(tiny))
    assert loaded.model.layers[0].mlp.down_proj.spec.uniform


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_of_the_source(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().to(dtype).save_pretrained(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out")
    in_memory = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    quantize_model(in_memory)
    saved = {k: t for k, t in stored_tensors(tmp_path / "out").items() if ".weight_" in k}
    state = in_memory.state_dict()
    assert_same_tensors(saved, {k: state[k] for k in saved})


def test_a_module_without_transformers_around_it(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20, bias=False)).eval()

    model, x = build(), torch.randn(4, 40)
    report = quantize_model(model, QuantizeConfig(group_size=8))
    assert [type(m) for m in model] == [PrecalLinear, nn.ReLU, PrecalLinear]
    assert [e.tensor for e in report.quantized] == ["0.weight", "2.weight"]
    save_quantized(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out", model=build())
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training


def test_a_module_used_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(40, 40)
    model = nn.ModuleDict({"first": shared, "second": shared})
    quantize_model(model, QuantizeConfig(recipe="rtn"))
    assert isinstance(model["first"], PrecalLinear)
    assert model["second"] is model["first"]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(SelectionError, match="the model must have linear layers to quantize, got none"):
        quantize_model(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("exclude", [(), ("mlp",)])
def test_a_model_is_not_quantized_twice(exclude: tuple[str, ...]) -> None:
    """The second time has one format to remember for all of it, which would be wrong for the first."""
    model = tiny_model()
    quantize_model(model, QuantizeConfig(exclude=exclude))
    with pytest.raises(SelectionError):
        quantize_model(model, QuantizeConfig(bits=3))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_that_is_not_finite_is_named_and_the_model_kept(recipe: str) -> None:
    """In place, and yet all or nothing: a model half of which is quantized is of no use to anyone."""
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        quantize_model(model, QuantizeConfig(recipe=recipe))
    assert not any(isinstance(m, PrecalLinear) for m in model.modules())


def test_only_a_quantized_model_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_quantized: model must be quantized by quantize_model or load_quantized"):
        save_quantized(tiny_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
