"""What is asked of a model before it is quantized or imported: all of its linear weights, cut along the right side."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import Run, altered, edit_config, save_tiny
from packed_models import GPTQ, gptq, packed_model

from precal_ext import CheckpointError, QuantizeConfig, import_checkpoint, load_quantized, quantize_checkpoint
from precal_ext.checkpoint import read_index
from precal_ext.model import read_format
from precal_ext.survey import Original, Stored, rows
from precal_ext.verify import verify

pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]


def without(source: Path, target: Path, *names: str) -> Path:
    def change(tensors: dict) -> None:
        for name in names:
            del tensors[name]

    return altered(source, target, change)


# ---- a weight that is not there --------------------------------------------------------------------------------------

LACKING = [
    ("Llama", "model.layers.1.mlp.up_proj"),
    ("Llama", "lm_head"),
    ("OPT", "model.decoder.layers.0.fc1"),
    ("GPT2", "transformer.h.1.mlp.c_proj"),
    ("Mixtral", "model.layers.1.self_attn.o_proj"),  # transformers renames tensors of this one
]


@pytest.mark.parametrize(("architecture", "module"), LACKING)
def test_a_model_that_lacks_a_linear_weight_is_refused_by_its_name(
    tmp_path: Path, architecture: str, module: str
) -> None:
    model = without(save_tiny(tmp_path / "model", architecture), tmp_path / "part", f"{module}.weight")
    with pytest.raises(CheckpointError, match=rf"part: {module}.weight must be there for the model of config.json"):
        quantize_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_that_lacks_one_of_its_weights(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "Mixtral")
    (name,) = (n for n in read_index(source) if "layers.1." in n and n.endswith("experts.2.w3.weight"))
    with pytest.raises(CheckpointError, match=r"layers.1.*experts.2.w3.weight must be there for the model"):
        quantize_checkpoint(without(source, tmp_path / "part", name), tmp_path / "out")


@pytest.mark.parametrize("architecture", ["Gemma", "GPT2", "OPT", "Falcon"])
def test_a_head_that_is_tied_needs_no_weight(tmp_path: Path, architecture: str) -> None:
    source = save_tiny(tmp_path / "model", architecture)
    quantize_checkpoint(source, tmp_path / "out")
    load_quantized(tmp_path / "out")
    # As soon as it is not tied, it does.
    edit_config(source, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"model: lm_head.weight must be there"):
        quantize_checkpoint(source, tmp_path / "other")


def test_an_import_lacks_nothing_either(tmp_path: Path) -> None:
    packed, _ = packed_model(tmp_path, GPTQ, gptq)
    module = "model.layers.1.mlp.up_proj"
    model = without(packed, tmp_path / "part", *(f"{module}.{k}" for k in ("qweight", "qzeros", "scales", "g_idx")))
    with pytest.raises(CheckpointError, match=rf"part: {module}.weight must be there for the model of config.json"):
        import_checkpoint(model, tmp_path / "out")


# ---- slices of a Conv1D ----------------------------------------------------------------------------------------------


def test_groups_for_tensor_parallelism_know_that_a_conv1d_is_turned(tmp_path: Path) -> None:
    """K of mlp.c_proj is 96: two slices of 48 columns want groups of 16. By its stored shape [96, 24] K would be 24,
    which nothing fits."""
    source = save_tiny(tmp_path / "model", "GPT2", n_embd=24)
    config = QuantizeConfig(c=0, trellis=False, exclude=(r"attn\.c_proj$",))
    quantize_checkpoint(source, tmp_path / "out", config, tensor_parallel=2)
    fmt = read_format(tmp_path / "out")
    assert fmt.for_module("transformer.h.0.mlp.c_proj").group_size == 16
    assert fmt.for_module("transformer.h.0.mlp.c_fc").group_size == 64
    assert verify(tmp_path / "out").tensor_parallel[2] == ""


def test_a_conv1d_is_compared_with_its_original_as_the_linear_layer_it_is(run: Run, tmp_path: Path) -> None:
    """Its square matrices too, which fit their transpose."""
    source = save_tiny(tmp_path / "model", "GPT2")
    report = quantize_checkpoint(source, tmp_path / "out")
    measured = {row.tensor: row.sqnr_db for row in rows(Stored.open(tmp_path / "out"), Original(source))}
    recorded = {entry.tensor: entry.figures.sqnr_db for entry in report.quantized}
    assert measured.keys() == recorded.keys() and len(measured) == 8
    assert all(abs(measured[name] - recorded[name]) < 1e-6 for name in recorded)
    code, _, err = run("report", tmp_path / "out", "--html", tmp_path / "page.html", "--original", source)
    assert code == 0, err
