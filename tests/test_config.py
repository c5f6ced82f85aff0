"""QuantizeConfig and ModelFormat: defaults, contracts, JSON, settings of single modules."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precal_ext import _C, ModelFormat, QuantizeConfig, WeightSpec
from precal_ext.config import GRIDS, MODULE_FIELDS, NORMALIZE, RECIPES, SCOPES
from precal_ext.select import decide, model_format

MODULES = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
PATTERNS = ["down", r"layers\.0\.", "o_proj$", "absent"]


@st.composite
def module_fields(draw: st.DrawFn, recipe: str) -> dict[str, Any]:
    """Fields of an override that are valid for any base of the recipe."""
    precal = recipe == "precal"
    bits = draw(st.integers(2, 6))  # precal has all grids up to 6 bits
    choices: dict[str, st.SearchStrategy[Any]] = {
        "group_size": st.sampled_from([-1, 1, 32, 64, 100]),
        "c": st.integers(0, 4 if precal else 0),
    }
    keys = draw(st.lists(st.sampled_from(sorted(choices)), unique=True))
    fields = {key: draw(choices[key]) for key in keys}
    if draw(st.booleans()):
        fields["bits"] = bits
        if draw(st.booleans()):
            fields["grid"] = draw(st.sampled_from(GRIDS)) if precal else "uniform"
    return fields


@st.composite
def configs(draw: st.DrawFn) -> QuantizeConfig:
    recipe = draw(st.sampled_from(RECIPES))
    bits = draw(st.integers(2, 8))
    grids = GRIDS if recipe == "precal" and bits <= 6 else ("uniform",)
    fields: dict[str, Any] = {
        "group_size": st.none() | st.just(-1) | st.integers(1, 1 << 20),
        "c": st.none() | st.integers(0, _C.MAX_CAPACITY if recipe == "precal" else 0),
        "grid": st.none() | st.sampled_from(grids),
        "trellis": st.sampled_from([None, False]),
        "fit_rounds": st.integers(0, 100),
        "mu": st.integers(0, 5) | st.floats(0, allow_infinity=False),
        "alpha": st.floats(0, 1),
        "scope": st.sampled_from(SCOPES),
        "normalize": st.sampled_from(NORMALIZE),
        "include": st.lists(st.sampled_from(PATTERNS)),
        "exclude": st.lists(st.sampled_from(PATTERNS)),
        "overrides": st.dictionaries(st.sampled_from(PATTERNS), module_fields(recipe), max_size=3),
    }
    return QuantizeConfig(recipe=recipe, bits=bits, **{key: draw(value) for key, value in fields.items()})


# ---- defaults and contracts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "bits", "expected"),
    [
        ("precal", 4, (64, 1, "fitted", 32, "e4m3", False, False)),
        ("precal", 3, (64, 1, "fitted", 16, "e4m3", False, False)),
        ("precal", 6, (64, 1, "fitted", 128, "e4m3", False, False)),
        ("precal", 7, (64, 1, "uniform", 0, "e4m3", True, False)),
        ("paper", 4, (128, 0, "uniform", 0, "float16", True, True)),
        ("rtn", 3, (128, 0, "uniform", 0, "float16", True, False)),
    ],
)
def test_defaults_of_the_recipe(recipe: str, bits: int, expected: tuple[Any, ...]) -> None:
    c = QuantizeConfig(recipe=recipe, bits=bits)
    assert (c.group_size, c.c, c.grid, c.grid_size, c.scale_dtype, c.uniform, c.split) == expected


def test_a_trellis_goes_with_its_grid() -> None:
    assert QuantizeConfig(trellis=False).grid_size == 16
    mixed = QuantizeConfig(overrides={"a": {"bits": 6}, "b": {"grid": "uniform"}, "c": {"trellis": False}})
    assert [mixed.for_module(name).grid_size for name in "abcd"] == [128, 0, 16, 32]
    plain = QuantizeConfig(trellis=False, overrides={"a": {"bits": 3}, "b": {"bits": 3, "trellis": True}})
    assert [plain.for_module(name).grid_size for name in "ab"] == [8, 16]


def test_the_default_is_precal_at_four_bits() -> None:
    c = QuantizeConfig()
    assert (c.recipe, c.bits, c.group_size, c.c) == ("precal", 4, 64, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "awq"}, "recipe must be one of precal, paper, rtn, got 'awq'"),
        ({"recipe": None}, "recipe must be one of precal, paper, rtn, got None"),
        *[({"bits": b}, f"bits must be an integer from 2 to 8, got {b!r}") for b in (1, 9, 4.0, True, "4", None)],
        *[({"group_size": g}, f"group_size must be an integer from 1 to 2**20, or -1 for the whole row, got {g!r}")
          for g in (0, -2, 64.0, "64", True, (1 << 20) + 1)],
        *[({"c": c}, f"c must be an integer from 0 to 16, got {c!r}") for c in (-1, 17, 1.0, True)],
        ({"recipe": "rtn", "c": 1}, "c must be an integer from 0 to 0 for recipe rtn, got 1"),
        ({"recipe": "paper", "c": 1}, "c must be an integer from 0 to 0 for recipe paper, got 1"),
        ({"grid": "nf4"}, "grid must be one of fitted, constant, uniform for recipe precal at 4 bits, got 'nf4'"),
        ({"grid": "fitted", "bits": 7}, "grid must be one of uniform for recipe precal at 7 bits, got 'fitted'"),
        ({"trellis": True, "grid": "uniform"}, "trellis must be false with a uniform grid, got True"),
        ({"trellis": True, "bits": 7}, "trellis must be false with a uniform grid, got True"),
        *[({"trellis": t}, f"trellis must be true or false, got {t!r}") for t in (1, "true", 0.0)],
        ({"grid": "fitted", "recipe": "rtn"}, "grid must be one of uniform for recipe rtn at 4 bits, got 'fitted'"),
        *[({"fit_rounds": r}, f"fit_rounds must be an integer from 0 to 100, got {r!r}") for r in (-1, 101, 1.0, None)],
        *[({"mu": m}, f"mu must be a finite number >= 0, got {m!r}") for m in (-1e-9, float("inf"), float("nan"), "0")],
        *[({"alpha": a}, f"alpha must be a number in [0, 1], got {a!r}") for a in (-0.1, 1.1, float("nan"), True, "0")],
        ({"scope": "layer"}, "scope must be one of tensor, row, group, got 'layer'"),
        ({"normalize": "tensor"}, "normalize must be one of none, row, group, got 'tensor'"),
        ({"include": "mlp"}, "include must be a list of regular expressions, got 'mlp'"),
        ({"exclude": None}, "exclude must be a list of regular expressions, got None"),
        ({"include": ["("]}, "include must hold regular expressions, got '('"),
        ({"exclude": [3]}, "exclude must hold regular expressions, got 3"),
        ({"overrides": ["a"]}, "overrides must be a mapping from pattern to fields, got ['a']"),
        ({"overrides": {"(": {}}}, "overrides must hold regular expressions, got '('"),
        ({"overrides": {"a": {"recipe": "rtn"}}}, "overrides['a'] must be a field out of ('bits'"),
        ({"overrides": {"a": {"bits": 9}}}, "bits must be an integer from 2 to 8, got 9"),
        ({"recipe": "rtn", "overrides": {"a": {"c": 1}}}, "c must be an integer from 0 to 0 for recipe rtn, got 1"),
    ],
)  # fmt: skip
def test_a_broken_contract_names_field_contract_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("config: " + message)):
        QuantizeConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"mu": 10**400},  # an integer of JSON may be larger than any float
        {"overrides": {"a": 3}},
        {"overrides": {"a": None}},
        {"include": [b"down"]},  # compiles, and can match no name
    ],
    ids=["huge mu", "override is a number", "override is null", "bytes"],
)
def test_values_of_the_wrong_kind_are_a_broken_contract_too(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"config: {next(iter(fields))}"):
        QuantizeConfig(**fields)


def test_a_config_cannot_be_changed() -> None:
    config = QuantizeConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 3  # type: ignore[misc]


# ---- JSON ------------------------------------------------------------------------------------------------------------


@given(configs())
def test_json_round_trip(config: QuantizeConfig) -> None:
    assert QuantizeConfig.from_json(config.to_json()) == config
    assert QuantizeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"config: fields must be among alpha, .*, got groupsize"):
        QuantizeConfig.from_json('{"bits": 4, "groupsize": 64}')


@pytest.mark.parametrize("text", ["[]", "3", "null", '"bits"'])
def test_settings_that_are_no_object_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="config: "):
        QuantizeConfig.from_json(text)


# ---- single modules --------------------------------------------------------------------------------------------------


def test_the_first_override_found_in_the_name_counts() -> None:
    config = QuantizeConfig(overrides={"down": {"bits": 3}, r"layers\.0": {"group_size": 32}, ".": {"c": 0}})
    found = {name: config.for_module(name) for name in ("layers.0.down", "layers.0.up", "layers.1.up")}
    assert [(c.bits, c.group_size, c.c) for c in found.values()] == [(3, 64, 1), (4, 32, 1), (4, 64, 0)]


@given(configs())
def test_settings_of_a_module_differ_from_the_base_in_the_override_alone(config: QuantizeConfig) -> None:
    for name in MODULES:
        own = config.for_module(name)
        fields = next((f for pattern, f in config.overrides.items() if re.search(pattern, name)), {})
        assert own.overrides == {}
        assert {key: getattr(own, key) for key in fields} == dict(fields)
        # The default grid depends on the width, so a width of its own brings the grid of that width.
        same = {"group_size", "c", "alpha", "mu", "scope"} | (set() if "bits" in fields else {"grid"})
        assert all(getattr(own, key) == getattr(config, key) for key in same - set(fields))


def test_a_width_of_its_own_brings_its_default_grid() -> None:
    config = QuantizeConfig(bits=4, grid="constant", overrides={"down": {"bits": 8}, "up": {"bits": 3}})
    assert config.for_module("down").grid == "uniform"
    assert config.for_module("up").grid == "fitted"
    assert config.for_module("gate").grid == "constant"


# ---- quantization_config ---------------------------------------------------------------------------------------------


def format_of(config: QuantizeConfig) -> ModelFormat:
    return model_format(decide([*MODULES, "lm_head"], config), config)


@given(configs())
def test_a_loader_expects_the_tensors_that_were_written(config: QuantizeConfig) -> None:
    loaded = ModelFormat.from_dict(json.loads(json.dumps(format_of(config).to_dict())))
    for name in MODULES:
        if name in loaded.modules_to_not_convert:
            continue
        assert WeightSpec.from_config(40, 300, loaded.for_module(name)) == WeightSpec.from_config(
            40, 300, config.for_module(name)
        )


def test_model_format_round_trip() -> None:
    config = QuantizeConfig(overrides={"down": {"bits": 3}})
    fmt = format_of(config)
    data = json.loads(json.dumps(fmt.to_dict()))
    assert data["quant_method"] == "precal"
    assert data["format_version"] == _C.FORMAT_VERSION
    assert data["modules_to_not_convert"] == ["lm_head"]
    assert data["module_overrides"] == {MODULES[0]: {"bits": 3}}
    assert ModelFormat.from_dict(data) == fmt
    assert ModelFormat.from_dict(data).to_dict() == data


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "awq"}, "quant_method must be 'precal', got 'awq'"),
        ({"quant_method": None}, "quant_method must be 'precal', got None"),
        (
            {"format_version": _C.FORMAT_VERSION + 1},
            "format_version must be .*; install a precal that knows this format",
        ),
        ({"format_version": None}, "format_version must be"),
        ({"format_version": 0}, "format_version must be 1; quantize the model again, got 0"),
        ({"format_version": True}, "format_version must be"),
        *(({key: None}, f"{key} must be there in format version 1") for key in ("recipe", *MODULE_FIELDS)),
        ({"format_version": "0"}, "format_version must be"),
        ({"format_version": False}, "format_version must be"),
        ({"recipe": "gptq"}, "recipe must be one of"),
        ({"bits": 40}, "bits must be an integer from 2 to 8"),
        ({"bits": "4"}, "bits must be an integer from 2 to 8"),
        ({"group_size": 0}, "group_size must be"),
        ({"c": 1 << 40}, "c must be"),
        ({"grid": []}, "grid must be one of"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of module names"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert must be a list of module names"),
        ({"module_overrides": ["a"]}, "module_overrides must be a mapping"),
        ({"module_overrides": {"a": 3}}, r"module_overrides\['a'\] must be a mapping"),
        ({"module_overrides": {"a": {"alpha": 0.1}}}, r"module_overrides\['a'\] must be a field out of"),
        ({"module_overrides": {"a": {"bits": 1}}}, "bits must be an integer from 2 to 8"),
        (
            {"module_overrides": {"a": {"bits": 8}}},
            "grid must be one of uniform for recipe precal at 8 bits, got 'fitted'",
        ),
        ({"module_overrides": {"a": {"grid": "uniform"}}}, "trellis must be false with a uniform grid"),
        ({"module_overrides": {"a": {"grid": None}}}, r"module_overrides\['a'\] must be fields with values"),
    ],
)
def test_a_quantization_config_is_not_trusted(fields: dict[str, Any], message: str) -> None:
    data = {**format_of(QuantizeConfig()).to_dict(), **fields}
    with pytest.raises(ValueError, match=message):
        ModelFormat.from_dict(data)
