"""Which modules are quantized: the rules on names, what is found on transformers' model, and without transformers."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from models import DEMO, edit_config, logits, save_tiny, tiny_model

from precal_ext import QuantizeConfig, SelectionError, load_quantized, quantize_checkpoint
from precal_ext.architectures import _DECODERS
from precal_ext.checkpoint import read_config, read_index
from precal_ext.select import (
    LinearModules,
    _from_config,
    _from_transformers,
    decide,
    find_linears,
    fusion_set_of,
    model_format,
)

pytest_plugins = ["package_fixtures"]


def kept(names: list[str], config: QuantizeConfig | None = None, **known: set[str]) -> dict[str, str]:
    """Module -> reason, of those left alone."""
    return {d.module: d.reason for d in decide(names, config or QuantizeConfig(), **known) if not d.quantized}


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lm_head", "embed_out", "head", "output", "score", "classifier", "model.decoder.output_projection"]
)
def test_output_heads_are_left_alone(name: str) -> None:
    assert kept([name, "model.layers.0.mlp.up_proj"]) == {name: "output head"}
    assert kept([name], QuantizeConfig(include=(name,))) == {}


def test_a_head_is_known_by_more_than_its_name() -> None:
    assert kept(["model.readout", "model.up"], heads={"model.readout"}) == {"model.readout": "output head"}


@pytest.mark.parametrize("name", ["layers.0.attention.output", "h.1.self_attention.dense", "layers.0.mlp.head_proj"])
def test_what_only_sounds_like_a_head_is_quantized(name: str) -> None:
    assert kept([name]) == {}


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.block_sparse_moe.gate",
        "layers.0.mlp.gate",
        "layers.0.mlp.shared_expert_gate",
        "m.router",
        "m.router.layer",
    ],
)
def test_routers_are_left_alone(name: str) -> None:
    assert kept([name, "layers.0.mlp.gate_proj"]) == {name: "router"}
    assert kept([name], QuantizeConfig(include=("gate|router",))) == {}


def test_a_tied_weight_is_never_quantized() -> None:
    names, tied = ["lm_head", "model.up"], {"lm_head"}
    assert kept(names, tied=tied) == {"lm_head": "shares its weight with the embedding"}
    with pytest.raises(SelectionError, match="lm_head must not be included, it shares its weight with the embedding"):
        decide(names, QuantizeConfig(include=("lm_head",)), tied=tied)
    assert "lm_head" in kept(names, QuantizeConfig(include=("lm_head",), exclude=("head",)), tied=tied)


def test_exclude_wins_over_include_and_include_over_the_rules() -> None:
    names = ["lm_head", "a.up_proj", "a.down_proj"]
    config = QuantizeConfig(include=("head", "down"), exclude=("down",))
    assert kept(names, config) == {"a.down_proj": "excluded by 'down'"}
    reasons = {d.module: d.reason for d in decide(names, config) if d.quantized}
    assert reasons == {"lm_head": "included by 'head'", "a.up_proj": "linear layer"}


@pytest.mark.parametrize(
    ("members", "outsiders"),
    [
        (["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.attn.v_proj"], ["l.0.attn.o_proj", "l.1.attn.q_proj"]),
        (["l.0.mlp.gate_proj", "l.0.mlp.up_proj"], ["l.0.mlp.down_proj", "l.1.mlp.up_proj"]),
        (["l.0.moe.experts.0.w1", "l.0.moe.experts.17.w3"], ["l.0.moe.experts.0.w2", "l.1.moe.experts.0.w1"]),
        (["l.0.moe.experts.0.w2", "l.0.moe.experts.1.w2"], ["l.0.moe.experts.0.w1", "l.1.moe.experts.0.w2"]),
        (["l.0.mlp.experts.0.gate_proj", "l.0.mlp.experts.1.up_proj"], ["l.0.mlp.shared_expert.up_proj"]),
        (["fc1"], ["fc2"]),
    ],
)  # fmt: skip
def test_fusion_sets(members: list[str], outsiders: list[str]) -> None:
    assert len({fusion_set_of(name) for name in members}) == 1
    assert fusion_set_of(members[0]) not in {fusion_set_of(name) for name in outsiders}


def test_a_fusion_set_cannot_have_two_settings() -> None:
    names = ["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.attn.o_proj"]
    with pytest.raises(SelectionError, match=r"k_proj and l.0.attn.q_proj must share their settings"):
        decide(names, QuantizeConfig(overrides={"k_proj": {"bits": 3}}))
    # Writing the same, another module of its own, and one that is not quantized at all are no contradiction.
    for overrides in ({"k_proj": {"bits": 4}}, {"o_proj": {"bits": 3}}, {"[qk]_proj": {"bits": 3}}):
        decide(names, QuantizeConfig(overrides=overrides))
    decide(names, QuantizeConfig(overrides={"k_proj": {"bits": 3}}, exclude=("k_proj",)))


def test_the_format_names_what_differs_by_the_models_names() -> None:
    config = QuantizeConfig(overrides={"down": {"bits": 3, "group_size": 64}})
    fmt = model_format(
        decide(["h.0.down", "h.0.up", "head"], config), config, absent={"lm_head"}, names={"h.0.down": "model.h.0.down"}
    )
    assert fmt.module_overrides == {"model.h.0.down": {"bits": 3}}
    assert fmt.modules_to_not_convert == ("head", "lm_head")
    assert fmt.config.overrides == {}


# ---- on transformers' model ------------------------------------------------------------------------------------------


def found_in(folder: Path, config: QuantizeConfig | None = None) -> LinearModules:
    shapes = {name: info.shape for name, info in read_index(folder).items()}
    return find_linears(folder, read_config(folder), shapes, config or QuantizeConfig())


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


LLAMA = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
NEOX = {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
# Architecture -> prefix of its layers, its linears in a layer, the head it leaves alone or lacks in the file.
EXPECTED = {
    "Llama": ("model.layers", LLAMA, "lm_head"),
    "Qwen3": ("model.layers", LLAMA, "lm_head"),
    "Mistral": ("model.layers", LLAMA, "lm_head"),
    "Gemma": ("model.layers", LLAMA, None),
    "Phi": ("model.layers", {*ATTENTION, "self_attn.dense", "mlp.fc1", "mlp.fc2"}, "lm_head"),
    "OPT": ("model.decoder.layers", {*ATTENTION, "self_attn.out_proj", "fc1", "fc2"}, None),
    "GPTNeoX": ("gpt_neox.layers", {"attention.query_key_value", "attention.dense", *NEOX}, None),
    "GPT2": ("transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, None),
    "Falcon": ("transformer.h", {"self_attention.query_key_value", "self_attention.dense", *NEOX}, None),
}


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
@pytest.mark.parametrize("installed", [True, False], ids=["with transformers", "without"])
def test_the_linears_of_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, installed: bool
) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    if not installed:
        monkeypatch.setitem(sys.modules, "transformers", None)
    prefix, leaves, head = EXPECTED[architecture]
    found = found_in(folder)
    chosen = [d.module for d in decide(found.names, QuantizeConfig(), found.heads, found.tied) if d.quantized]
    assert set(chosen) == {f"{prefix}.{i}.{leaf}" for i in range(2) for leaf in leaves}
    assert len(chosen) == len(set(chosen))
    known = architecture in ("Gemma", "Llama", "Mistral", "Qwen3")
    assert found.source == ("architecture" if known else "transformers" if installed else "name patterns")
    assert found.heads == ({head} if head else set())
    if head is None:
        assert found.absent == {"lm_head"}


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen2Moe"])
def test_experts_are_quantized_or_the_report_says_why_not(tmp_path: Path, architecture: str) -> None:
    """Most of such a model is in its experts: linear weights on disk, one tensor of no nn.Linear in memory."""
    folder = save_tiny(tmp_path / "model", architecture)
    report = quantize_checkpoint(folder, tmp_path / "out")
    experts = [e for e in report.entries if ".experts." in e.tensor]
    assert experts
    assert [e for e in experts if e.action != "quantize" and "expert" not in e.reason] == []


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen2Moe"])
def test_a_mixture_of_experts_is_the_same_saved_and_in_memory(tmp_path: Path, architecture: str) -> None:
    import transformers

    from precal_ext import quantize_model

    folder = save_tiny(tmp_path / "model", architecture)
    report = quantize_checkpoint(folder, tmp_path / "out")
    assert not any(
        e.action == "quantize" for e in report.entries if e.tensor.endswith(("gate.weight", "lm_head.weight"))
    )
    in_memory = transformers.AutoModelForCausalLM.from_pretrained(folder)
    quantize_model(in_memory)
    assert logits(load_quantized(tmp_path / "out")).equal(logits(in_memory))


def test_experts_found_by_name_are_refused_or_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one machine writes without transformers another must be able to load with it."""
    import transformers

    folder = save_tiny(tmp_path / "model", "Mixtral")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)
        try:
            quantize_checkpoint(folder, tmp_path / "out")
        except SelectionError as refusal:
            assert "expert" in str(refusal)
            return
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_base_model_lacks_its_prefix(tmp_path: Path) -> None:
    import transformers

    model = tiny_model()
    model.model.save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    quantize_checkpoint(tmp_path / "model", tmp_path / "out")
    assert read_config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "PrecalLinear"


def test_a_tied_head_that_is_in_the_file_is_copied(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    edit_config(folder, tie_word_embeddings=True)
    found = found_in(folder)
    assert found.tied == {"lm_head"}
    assert kept(list(found.names), heads=found.heads, tied=found.tied) == {
        "lm_head": "shares its weight with the embedding"
    }


def test_include_adds_matrices_that_were_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "Phi")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "model.embed_tokens" not in found_in(folder).names
    assert "model.embed_tokens" in found_in(folder, QuantizeConfig(include=("embed",))).names


@pytest.mark.parametrize(
    ("architecture", "include", "named"),
    [("Llama", "embed_tokens", "embed_tokens"), ("Llama", ".", "embed_tokens"), ("GPT2", "wte", "wte")],
)
def test_what_is_no_linear_in_the_model_cannot_be_included(
    tmp_path: Path, architecture: str, include: str, named: str
) -> None:
    """An embedding has no quantized form to load: from_pretrained would fill it with noise."""
    folder = save_tiny(tmp_path / "model", architecture)
    with pytest.raises(SelectionError, match=named):
        quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig(include=(include,)))
    assert not (tmp_path / "out").exists()


def test_the_base_model_loads_alone(tiny: Path, tmp_path: Path) -> None:
    """Its modules lack the prefix under which the format names what has settings of its own."""
    import transformers

    config = QuantizeConfig(overrides={"down_proj": {"bits": 3}}, exclude=("o_proj",))
    quantize_checkpoint(tiny, tmp_path / "out", config)
    ids = torch.arange(9)[None]
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base(ids).last_hidden_state, load_quantized(tmp_path / "out").model(ids).last_hidden_state)


def test_a_new_head_on_a_quantized_model_is_dense(tiny_quantized: Path) -> None:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_quantized, num_labels=3)
    assert type(model.score) is torch.nn.Linear


# ---- by the config alone ---------------------------------------------------------------------------------------------


def named_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def said_by(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> LinearModules | None:
    matrices = {n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
    return _from_config(config, matrices, shapes)


def switches() -> list[Any]:
    """Each decoder of the list with what its config may say: nothing, and each value of each switch."""
    cases = []
    for (model_type, architecture), decoder in _DECODERS.items():
        keys = ["tie_word_embeddings", *filter(None, decoder.biases)]
        said: list[dict[str, bool]] = [{}, *({key: value} for key in keys for value in (False, True))]
        cases += [pytest.param(model_type, architecture, s, id=f"{architecture}-{s}") for s in said]
    return cases


@pytest.mark.parametrize(("model_type", "architecture", "said"), switches())
def test_a_config_says_what_transformers_model_says(
    tmp_path: Path, model_type: str, architecture: str, said: dict[str, bool]
) -> None:
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = {
        "model_type": model_type, "architectures": [architecture], "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64, **said,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    shapes = named_shapes(model)
    for present in (True, False):
        if not present:
            del shapes["lm_head.weight"]
        matrices = {n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
        theirs = _from_transformers(tmp_path, matrices)
        ours = said_by(config, shapes)
        assert theirs is not None
        if ours is None:  # a head that is neither there nor the embedding: transformers is asked
            assert not present
            assert not theirs.shared
            continue
        assert sorted(ours.names) == sorted(theirs.names)
        assert dataclasses.replace(ours, names=theirs.names, source="transformers") == theirs


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"}, {"model_type": ["llama"]}, {"model_type": None}, {"architectures": []},
        {"architectures": "LlamaForCausalLM"}, {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": ["LlamaModel"]}, {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
        {"num_hidden_layers": 7}, {"num_hidden_layers": 0}, {"num_hidden_layers": True}, {"num_hidden_layers": "2"},
        {"num_hidden_layers": 10**18}, {"tie_word_embeddings": None}, {"tie_word_embeddings": 1},
        {"attention_bias": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_is_odd_is_left_to_transformers(change: dict[str, Any]) -> None:
    config, shapes = {**read_config(DEMO)}, {name: info.shape for name, info in read_index(DEMO).items()}
    assert said_by(config, shapes) is not None
    assert said_by({**config, **change}, shapes) is None


def test_a_checkpoint_that_differs_is_left_to_transformers() -> None:
    config, shapes = read_config(DEMO), {name: info.shape for name, info in read_index(DEMO).items()}
    prefixed = {f"base.{name}": shape for name, shape in shapes.items()}
    assert said_by(config, prefixed) is None
    flat = {**shapes, "model.layers.0.mlp.up_proj.weight": (1, 2, 3)}
    assert said_by(config, flat) is None
    more = {**shapes, "model.layers.0.mlp.adapter.weight": (4, 4)}
    found, usual = said_by(config, more), said_by(config, shapes)
    assert found == usual


def test_a_known_model_is_quantized_without_another_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(folder: Path) -> dict[str, Any]:
        raise AssertionError(folder)

    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr("precal_ext.select._ask_another_process", never)
    assert quantize_checkpoint(tiny, tmp_path / "out").quantized


# ---- without transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["Llama", "Phi"])
def test_the_same_choice_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    folder = DEMO if architecture == "Llama" else save_tiny(tmp_path / "model", architecture)
    with_it = found_in(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    without = found_in(folder)
    assert (without.names, without.heads, without.tied, without.absent) == (
        with_it.names, with_it.heads, with_it.tied, with_it.absent,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "reason"), [("ANSWER_SECONDS", "no answer after"), ("ANSWER_MEMORY", "(Memory|memory|bad_alloc)")]
)
def test_a_config_that_takes_too_long_or_too_much_is_read_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: str, reason: str
) -> None:
    """transformers builds the model in a process of its own, which has an end."""
    folder = save_tiny(tmp_path / "model", "Phi")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr("precal_ext.select." + limit, 0.05 if limit == "ANSWER_SECONDS" else 20 << 20)
    found = found_in(folder)
    assert found.source == "name patterns"
    assert re.search(rf"transformers cannot build this model \(.*{reason}.*\); choosing by name", caplog.text)


def test_an_unknown_architecture_asks_for_include(tiny: Path, tmp_path: Path, without_transformers: None) -> None:
    config = {**read_config(tiny), "architectures": ["NewForCausalLM"]}
    shapes = {name: info.shape for name, info in read_index(tiny).items()}
    with pytest.raises(
        SelectionError, match=r"got NewForCausalLM; install precal\[hf\] or .*--include REGEX .*q_proj|lm_head"
    ):
        find_linears(tiny, config, shapes, QuantizeConfig())
    named = find_linears(tiny, config, shapes, QuantizeConfig(include=("_proj$",)))
    assert named.source == "include"
    assert len([n for n in named.names if n.endswith("_proj")]) == 14
    assert kept(list(named.names), heads=named.heads) == {"lm_head": "output head"}


def test_a_recurrent_model_runs_or_is_refused(tmp_path: Path) -> None:
    """transformers' RWKV rescales the weights of some linears itself, so it may not be quantizable; then say so."""
    import transformers

    folder = shared("models", "tiny-rwkv-660K")
    try:
        quantize_checkpoint(folder, tmp_path / "out")
    except SelectionError as refusal:
        assert "rwkv" in str(refusal).lower()
        return
    dense = logits(transformers.AutoModelForCausalLM.from_pretrained(folder))
    assert (logits(load_quantized(tmp_path / "out")) - dense).norm() < 0.3 * dense.norm()
