"""Microscaling formats: every element against a float64 oracle, and what the OCP MX specification says."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from models import model_folder
from safetensors.torch import load_file
from shapes import gaussian, student_t
from torch import Tensor

from precal_ext.formats import parse_format
from precal_ext.mx import MXFormat, decode, encode, fake_quantize, parse_mx

FORMATS = [MXFormat(bits, block) for bits in (2, 3, 4, 6, 8) for block in (16, 32, 128)] + [MXFormat(4, 32, True)]
IDS = [f.name for f in FORMATS]


def elements_of(fmt: MXFormat) -> list[float]:
    """All values of an element that are not negative, from the definition: E2M1 by its bits, integers by theirs."""
    if not fmt.floating:
        return [i / 2 ** (fmt.bits - 2) for i in range(2 ** (fmt.bits - 1))]
    found = []
    for code in range(8):
        exponent, mantissa = code >> 1, code & 1
        found.append(mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return found


def oracle(w: np.ndarray, fmt: MXFormat) -> np.ndarray:
    """One weight after the other, in exact fractions; of two elements equally near the one with an even code."""
    values = elements_of(fmt)
    emax = math.floor(math.log2(values[-1])) if fmt.floating else 0
    out = np.zeros(w.shape)
    for n in range(w.shape[0]):
        for begin in range(0, w.shape[1], fmt.block):
            block = w[n, begin : begin + fmt.block]
            largest = float(np.abs(block).max())
            exponent = math.frexp(largest)[1] - 1 - emax if largest else -127
            scale = Fraction(2) ** max(-127, min(127, exponent))
            for i, x in enumerate(block):
                size = abs(Fraction(float(x))) / scale
                code = min(range(len(values)), key=lambda c: (abs(Fraction(values[c]) - size), c % 2))
                out[n, begin + i] = math.copysign(float(Fraction(values[code]) * scale), x)
    return out


def hard_weights() -> Tensor:
    """Rows that end in part of a block: ordinary ones, zeros, ties, one huge weight, subnormal numbers, both ends."""
    w = torch.cat([gaussian(2, 75), student_t(2, 75)])
    rows = torch.zeros(6, 75)
    rows[1] = torch.arange(75) / 16 - 2.3125  # ties of every format
    rows[2, 3], rows[2, 4] = 3e38, 1e30
    rows[3, :40] = torch.arange(40) * 1.4e-45
    rows[4] = 2.0**-127 * torch.linspace(-1.99, 1.99, 75)
    rows[5, ::2] = -0.0
    return torch.cat([w, rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_every_weight_against_the_oracle(fmt: MXFormat, dtype: torch.dtype) -> None:
    w = hard_weights()
    w = (w.clamp(-6e4, 6e4) if dtype == torch.float16 else w).to(dtype)
    found = fake_quantize(w, fmt)
    assert found.dtype == torch.float32
    assert np.array_equal(found.double().numpy(), oracle(w.double().numpy(), fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_on_weights_of_a_trained_model(fmt: MXFormat) -> None:
    w = load_file(model_folder("llama-6m") / "model.safetensors")["model.layers.0.mlp.down_proj.weight"][:4].float()
    assert np.array_equal(fake_quantize(w, fmt).double().numpy(), oracle(w.double().numpy(), fmt))


# ---- what the specification says -------------------------------------------------------------------------------------


def test_mxint8_has_elements_up_to_one_and_63_64ths() -> None:
    fmt = MXFormat(8, 32)
    elements, scale = encode(torch.tensor([[1.9999, -1.9999, 1.0, 1 / 64, 1 / 128, 3 / 128]]), fmt)
    assert scale.tolist() == [[127]]  # 2^0
    assert elements.tolist() == [[127, -127, 64, 1, 0, 2]]  # 1/128 and 3/128 are ties
    assert decode(elements, scale, fmt)[0, 0] == 1 + 63 / 64


def test_mxfp4_is_e2m1_and_saturates_at_6() -> None:
    fmt = parse_mx("mxfp4")
    assert fmt is not None
    assert elements_of(fmt) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    w = torch.tensor([[7.99, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.26, -5.01]])
    assert fake_quantize(w, fmt).tolist() == [[6, 4, 4, 2, 2, 1, 1, 0, -0.5, -6]]
    assert encode(w, fmt)[1].tolist() == [[127]]  # floor(log2(7.99)) - 2 = 0


def test_the_scale_is_e8m0_and_never_nan() -> None:
    w = torch.tensor([[0.0], [2.0**127 * 1.5], [2.0**-126], [1.0], [1.4e-45]])
    assert encode(w, MXFormat(8, 32))[1].flatten().tolist() == [0, 254, 1, 127, 0]
    assert encode(w, MXFormat(4, 32, True))[1].flatten().tolist() == [0, 252, 0, 125, 0]


def test_bits_are_those_of_the_papers() -> None:
    assert MXFormat(4, 128).bits_per_weight(4096) == 4.0625
    assert MXFormat(4, 16).bits_per_weight(4096) == 4.5
    assert MXFormat(4, 32, True).bits_per_weight(4096) == 4.25
    assert MXFormat(8, 32).bits_per_weight(4096) == 8.25
    assert MXFormat(3, 32).bits_per_weight(33) == 3 + 16 / 33  # the short block pays for a whole scale


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_quantizing_again_changes_nothing(fmt: MXFormat) -> None:
    once = fake_quantize(student_t(16, 300), fmt)
    assert torch.equal(fake_quantize(once, fmt), once)
    assert torch.equal(fake_quantize(once.bfloat16(), fmt), once)  # W' has no more than 8 significant bits


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_powers_of_two_and_signs_pass_through(fmt: MXFormat) -> None:
    w = student_t(8, 100)
    assert torch.equal(fake_quantize(-8 * w, fmt), -8 * fake_quantize(w, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_encoding_keeps_its_ranges_and_shapes(fmt: MXFormat) -> None:
    for shape in ((0, 64), (3, 0), (3, 1), (3, fmt.block + 1)):
        elements, scales = encode(torch.ones(shape), fmt)
        assert elements.shape == shape
        assert scales.shape == (shape[0], -(-shape[1] // fmt.block))
        assert torch.equal(decode(elements, scales, fmt), torch.ones(shape))
    elements, _ = encode(student_t(64, 256), fmt)
    least, most = (0, 15) if fmt.floating else (1 - 2 ** (fmt.bits - 1), 2 ** (fmt.bits - 1) - 1)
    assert least <= int(elements.min())
    assert int(elements.max()) <= most


def test_smaller_blocks_and_more_bits_lose_less() -> None:
    w = student_t(64, 512)

    def loss(bits: int, block: int) -> float:
        return float((fake_quantize(w, MXFormat(bits, block)) - w).square().sum())

    for bits in (3, 4, 6):
        assert loss(bits, 16) < loss(bits, 32) < loss(bits, 128)
    assert loss(2, 32) > loss(3, 32) > loss(4, 32) > loss(6, 32) > loss(8, 32)


# ---- names and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=IDS)
def test_a_name_gives_its_format(fmt: MXFormat) -> None:
    assert parse_mx(fmt.name) == fmt
    assert parse_format(fmt.name).how == fmt


@pytest.mark.parametrize(
    ("name", "bits", "group", "gptq"),
    [
        ("mxint4_128+gptq", 4, 128, True),
        ("precal4_g64", 4, 64, False),
        ("precal3_g16_c0", 3, 16, False),
        ("rtn4_g128", 4, 128, False),
    ],
)
def test_other_names(name: str, bits: int, group: int, gptq: bool) -> None:
    fmt = parse_format(name)
    assert (fmt.name, fmt.bits, fmt.group, fmt.gptq) == (name, bits, group, gptq)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mxint9_32", "mx: bits must be an integer from 2 to 8, got 9"),
        ("mxint4_0", "mx: block must be an integer from 1 to 1048576, got 0"),
        ("mxint4", "formats: a name must be one like"),
        ("mxfp4+gptq", "formats: a name must be one like"),
        ("precal4_g64+gptq", "formats: a name must be one like"),
        ("precal9_g64", "config: bits must be an integer from 2 to 8, got 9"),
        ("rtn4_g128_c1", "config: c must be"),
    ],
)
def test_what_is_no_format_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_format(name)


def test_what_is_no_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="encode: w must be finite, got NaN or infinity"):
        encode(torch.tensor([[1.0, math.nan]]), MXFormat(4, 32))
    with pytest.raises(TypeError, match=r"encode: w must be float32, float16 or bfloat16, got torch\.float64"):
        encode(torch.ones(1, 2, dtype=torch.float64), MXFormat(4, 32))
    with pytest.raises(ValueError, match=r"encode: w must be \[N, K\], got \[3\]"):
        encode(torch.ones(3), MXFormat(4, 32))
