"""WeightSpec and QTensor: shapes and bits by hand, every refusal of untrusted tensors, the tile order and back."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from models import assert_same_tensors
from shapes import student_t
from torch import Tensor

from precal_ext import QTensor, QuantizeConfig, WeightSpec
from precal_ext.quantize import fit_set_grid, quantize_weight


def quantize(w: Tensor, config: QuantizeConfig) -> QTensor:
    return quantize_weight(w, config, fit_set_grid([w], config))


# ---- shapes and bits -------------------------------------------------------------------------------------------------

I32, U8, BF16, F16, I8, I64 = torch.int32, torch.uint8, torch.bfloat16, torch.float16, torch.int8, torch.int64


@pytest.mark.parametrize(
    ("shape", "config", "expected"),
    [
        (
            # 11008 * 4 / 32 = 1376 words; 11008 / 64 = 172 groups; eight segments of 1376 = 5 * 256 + 96: 48 blocks
            (4096, 11008),
            QuantizeConfig(),
            {
                "weight_packed": (I32, (4096, 1376)),
                "weight_scale": (U8, (4096, 172)),
                "weight_row_scale": (BF16, (4096,)),
                "weight_grid": (I8, (1, 32)),
                "weight_outlier_index": (U8, (4096, 48, 1)),
                "weight_outlier_value": (U8, (4096, 48, 1)),
                "weight_shape": (I64, (2,)),
            },
        ),
        (
            # 172 * 3 = 516 bits: 17 words; groups of 64, 64, 44; one short block
            (10, 172),
            QuantizeConfig(bits=3, c=2, grid="uniform"),
            {
                "weight_packed": (I32, (10, 17)),
                "weight_scale": (U8, (10, 3)),
                "weight_row_scale": (BF16, (10,)),
                "weight_outlier_index": (U8, (10, 1, 2)),
                "weight_outlier_value": (U8, (10, 1, 2)),
                "weight_shape": (I64, (2,)),
            },
        ),
        (
            (8, 300),
            QuantizeConfig(recipe="paper", bits=3),
            {
                "weight_packed": (I32, (8, 29)),
                "weight_scale": (F16, (8, 3)),
                "weight_row_scale": (BF16, (8,)),
                "weight_outlier_scale": (F16, (8, 3)),
                "weight_outlier_mask": (U8, (8, 38)),
                "weight_shape": (I64, (2,)),
            },
        ),
        (
            (8, 300),
            QuantizeConfig(recipe="rtn", group_size=-1),
            {
                "weight_packed": (I32, (8, 38)),
                "weight_scale": (F16, (8, 1)),
                "weight_row_scale": (BF16, (8,)),
                "weight_shape": (I64, (2,)),
            },
        ),
    ],
    ids=["precal", "precal uniform", "paper", "rtn by row"],
)
def test_shapes_by_hand(shape: tuple[int, int], config: QuantizeConfig, expected: dict) -> None:
    spec = WeightSpec.from_config(*shape, config)
    assert spec.tensors() == expected
    assert list(spec.tensors()) == list(expected)  # the order is that of every report and file plan


@pytest.mark.parametrize(
    ("shape", "config", "bits"),
    [
        # codes 4, scales 8/64, row scale 16/11008, outliers 48 * (8 + 8) / 11008, one grid of 32 bytes
        ((4096, 11008), QuantizeConfig(), 4 + 0.125 + 16 / 11008 + 48 * 16 / 11008 + 256 / (4096 * 11008)),
        ((4096, 4096), QuantizeConfig(bits=3), 3 + 0.125 + 16 / 4096 + 16 / 256 + 128 / 4096**2),
        # as stored, the bitmap costs a bit and the second scale 16/128
        ((4096, 4096), QuantizeConfig(recipe="paper"), 4 + 32 / 128 + 1 + 16 / 4096),
        ((256, 256), QuantizeConfig(recipe="rtn", bits=3), 3 + 16 / 128 + 16 / 256),
        ((3, 10), QuantizeConfig(bits=3, c=0), (32 + 8 + 16 + 128 / 3) / 10),  # a row of 30 bits fills a word
    ],
)
def test_bits_per_weight_by_hand(shape: tuple[int, int], config: QuantizeConfig, bits: float) -> None:
    assert WeightSpec.from_config(*shape, config).bits_per_weight() == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("recipe", ["precal", "paper", "rtn"])
def test_stored_bits_are_those_of_the_tensors(recipe: str) -> None:
    q = quantize(student_t(17, 300), QuantizeConfig(recipe=recipe))
    assert q.spec.stored_bits() == 8 * sum(t.numel() * t.element_size() for t in q.tensors.values())
    assert {k: (t.dtype, tuple(t.shape)) for k, t in q.tensors.items()} == q.spec.tensors()


# ---- values that are refused -----------------------------------------------------------------------------------------

# 300 columns: blocks of 256 and 44, 3-bit rows of 29 words with 28 unused bits.
CONFIGS = {
    "precal": QuantizeConfig(bits=3, c=2),
    "paper": QuantizeConfig(recipe="paper", bits=3),
    "rtn": QuantizeConfig(recipe="rtn", bits=3),
}


@pytest.fixture(scope="module")
def sound() -> dict[str, QTensor]:
    w = student_t(6, 300)
    return {recipe: quantize(w, config) for recipe, config in CONFIGS.items()}


def replaced(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(t: dict[str, Tensor]) -> None:
        t[key] = make(t[key])

    return change


def written(key: str, index: tuple, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(t: dict[str, Tensor]) -> None:
        t[key] = t[key].clone()
        t[key][index] = value

    return change


def entries(*pairs: tuple[int, float]) -> Callable[[dict[str, Tensor]], None]:
    """The two outlier entries of row 0, block 0."""

    def change(t: dict[str, Tensor]) -> None:
        for i, (index, value) in enumerate(pairs):
            written("weight_outlier_index", (0, 0, i), index)(t)
            bits = int(torch.tensor(value).to(torch.float8_e4m3fn).view(torch.uint8))
            written("weight_outlier_value", (0, 0, i), bits)(t)

    return change


INF, NAN = float("inf"), float("nan")
DAMAGE: list[tuple[str, str, Callable[[dict[str, Tensor]], None], str]] = [
    *[
        (recipe, f"no {key}", lambda t, key=key: t.pop(key), f"{key}: must be present for this format")
        for recipe, config in CONFIGS.items()
        for key in WeightSpec.from_config(6, 300, config).tensors()
    ],
    (
        "rtn",
        "extra",
        lambda t: t.update(weight_grid=torch.zeros(1, 8)),
        "must be those of its settings, got also weight_grid",
    ),
    (
        "precal",
        "dtype",
        replaced("weight_packed", Tensor.long),
        "weight_packed: must be int32 [6, 29], got int64 [6, 29]",
    ),
    (
        "precal",
        "cast",
        replaced("weight_row_scale", Tensor.half),
        "weight_row_scale: must be bfloat16 [6], got float16 [6]",
    ),
    (
        "precal",
        "rows",
        replaced("weight_scale", lambda x: x[:5]),
        "weight_scale: must be uint8 [6, 5], got uint8 [5, 5]",
    ),
    ("precal", "rank", replaced("weight_row_scale", lambda x: x[:, None]), "must be bfloat16 [6], got bfloat16 [6, 1]"),
    ("precal", "shape lies", written("weight_shape", (0,), 7), "weight_shape: must be [6, 300], got [7, 300]"),
    ("precal", "+NaN scale", written("weight_scale", (0, 0), 0x7F), "weight_scale: must hold no NaN or infinity"),
    ("precal", "-NaN scale", written("weight_scale", (5, 4), 0xFF), "weight_scale: must hold no NaN or infinity"),
    ("rtn", "inf scale", written("weight_scale", (0, 0), INF), "weight_scale: must hold no NaN or infinity"),
    ("rtn", "NaN scale", written("weight_scale", (5, 2), NAN), "weight_scale: must hold no NaN or infinity"),
    (
        "paper",
        "inf outlier scale",
        written("weight_outlier_scale", (5, 2), -INF),
        "weight_outlier_scale: must hold no NaN",
    ),
    *[
        ("precal", f"row scale {v}", written("weight_row_scale", (5,), v), "weight_row_scale: must be finite and >= 0")
        for v in (-1.0, NAN, INF)
    ],
    ("precal", "decreasing grid", replaced("weight_grid", lambda x: x.flip(1)), "weight_grid: must be non-decreasing"),
    (
        "precal",
        "level -128",
        written("weight_grid", (0, 0), -128),
        "weight_grid: must be non-decreasing in [-127, 127]",
    ),
    ("precal", "zero grid", replaced("weight_grid", torch.zeros_like), "weight_grid: must be .* and not all zero"),
    ("precal", "padding bit", written("weight_packed", (5, 28), 1 << 4), "weight_packed: must have zero bits after"),
    ("precal", "sign bit", written("weight_packed", (0, 28), -(1 << 31)), "weight_packed: must have zero bits after"),
    (
        "precal",
        "outside block",
        written("weight_outlier_index", (5, 1, 1), 44),
        "weight_outlier_index: must lie inside",
    ),
    ("precal", "not increasing", entries((9, 1.0), (8, 1.0)), "weight_outlier_index: must strictly increase"),
    ("precal", "twice", entries((9, 1.0), (9, 1.0)), "weight_outlier_index: must strictly increase"),
    (
        "precal",
        "unused first",
        entries((0, 0.0), (9, 1.0)),
        "must strictly increase over the used entries, unused ones last",
    ),
    (
        "precal",
        "unused elsewhere",
        entries((9, 1.0), (10, 0.0)),
        "weight_outlier_index: must be 0 where the value is 0",
    ),
    (
        "precal",
        "minus zero is unused",
        entries((9, -0.0), (0, 0.0)),
        "weight_outlier_index: must be 0 where the value is 0",
    ),
    ("precal", "outlier NaN", entries((0, 1.0), (9, NAN)), "weight_outlier_value: must hold no NaN"),
]


@pytest.mark.parametrize(
    ("recipe", "change", "message"), [(r, c, m) for r, _, c, m in DAMAGE], ids=[f"{r}: {n}" for r, n, _, _ in DAMAGE]
)
def test_damage_is_refused_by_name(
    sound: dict[str, QTensor], recipe: str, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = dict(sound[recipe].tensors)
    change(tensors)
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern) as caught:
        QTensor(sound[recipe].spec, tensors).validate("model.layers.0.up")
    assert str(caught.value).startswith("model.layers.0.up")


@pytest.mark.parametrize("pairs", [[(0, 0.0), (0, 0.0)], [(0, 1.0), (0, 0.0)], [(0, 1.0), (255, -1.0)]])
def test_what_the_format_allows_is_not_refused(sound: dict[str, QTensor], pairs: list[tuple[int, float]]) -> None:
    tensors = dict(sound["precal"].tensors)
    entries(*pairs)(tensors)
    QTensor(sound["precal"].spec, tensors).validate()


@pytest.mark.parametrize("recipe", sorted(CONFIGS))
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_quantization_writes_is_sound(recipe: str, bits: int) -> None:
    w = student_t(5, 300)
    w[1] = 0
    quantize(w, QuantizeConfig(recipe=recipe, bits=bits)).validate()


# ---- the tile order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(CONFIGS))
@pytest.mark.parametrize("shape", [(1, 1), (17, 300), (33, 2304)])
def test_prepacked_and_back(recipe: str, shape: tuple[int, int]) -> None:
    q = quantize(student_t(*shape), CONFIGS[recipe])
    restored = QTensor.from_prepacked(q.spec, q.prepack())
    assert restored.spec == q.spec
    assert list(restored.tensors) == list(q.tensors)
    assert_same_tensors(dict(restored.tensors), dict(q.tensors))
