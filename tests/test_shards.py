"""Slices of columns: each is a weight of its own whose numbers are the whole one's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import reference
import shapes
import torch
from conftest import LINEAR_ISAS, forced_isa
from shapes import Weight
from torch import Tensor

from precal_ext import _C, PrecalLinear, QTensor, QuantizeConfig, WeightSpec, ops
from precal_ext.quantize import fit_set_grid, quantize_weight
from precal_ext.shards import by_columns, slice_columns, slice_rows

# K, slices: blocks of 256 throughout; segments of 320 = 256 + 64 and of 1376, several to a slice; one short segment.
CUTS = [(1536, 3), (2048, 8), (2560, 4), (4096, 16), (11008, 2), (14336, 2)]
FORMATS = [
    {"bits": 4, "group_size": 32, "c": 1, "trellis": True},
    {"bits": 3, "group_size": 32, "c": 2, "trellis": True},
    {"bits": 3, "group_size": 64, "c": 0, "trellis": True},
    {"bits": 4, "group_size": 64, "c": 1},
    {"bits": 8, "group_size": 32, "c": 1, "uniform": True},
    {"bits": 5, "group_size": 32, "c": 1, "trellis": True},
    {"bits": 4, "group_size": 64, "split": True, "scale_dtype": "float16"},
]


def spec_of(weight: Weight) -> WeightSpec:
    return WeightSpec(*weight.numbers)


def slices(weight: Weight, size: int) -> list[Weight]:
    spec = by_columns(spec_of(weight), size)
    cut: list[list[Any]] = [[] for _ in range(size)]
    for name, tensor in zip(Weight._fields[:8], weight[:8], strict=True):
        same = tensor is None or name in ("row_scale", "grid")
        for i in range(size):
            cut[i].append(tensor if same else tensor.chunk(size, 1)[i].contiguous())
    return [Weight(*tensors, spec.K, spec.bits, spec.group_size, spec.segment) for tensors in cut]


def cases() -> list[Any]:
    return [
        pytest.param(K, size, options, id=f"{K} in {size}, {options['bits']} bits {i}")
        for K, size in CUTS
        for i, options in enumerate(FORMATS)
        if K // size % options["group_size"] == 0
    ]


@pytest.mark.parametrize(("K", "size", "options"), cases())
def test_slices_hold_what_the_whole_holds(K: int, size: int, options: dict[str, Any]) -> None:
    weight = shapes.random_weight(1, 19, K, **options)
    want = reference.dequantize(*weight[:11]).chunk(size, 1)
    assert torch.equal(ops.dequantize(*weight), torch.cat(list(want), 1))
    x = torch.randn(5, K, generator=shapes.generator(2))
    for part, expected, x_part in zip(slices(weight, size), want, x.chunk(size, 1), strict=True):
        for isa in LINEAR_ISAS:
            with forced_isa(isa):
                assert torch.equal(ops.dequantize(*part), expected)
                prepacked = ops.prepack(*part)
                assert len(prepacked) == _C.prepacked_bytes(*part.numbers)
                for name, got in zip(Weight._fields, ops.unprepack(prepacked, *part.numbers), strict=False):
                    tensor = getattr(part, name)
                    assert tensor is None or torch.equal(got, tensor), name
                for tokens in (x_part, x_part[:1]):
                    y = ops.linear(tokens, prepacked, None, *part.numbers, "f32")
                    bound = tokens.abs().double() @ expected.abs().double().T * (K * 2.0**-23)
                    assert bool(((y.double() - reference.linear(tokens, expected)).abs() <= bound).all())
                    for mode, step in (("a16", 1 / 65024), ("a8", 1 / 254)):
                        y = ops.linear(tokens, prepacked, None, *part.numbers, mode)
                        error = (y.double() - reference.linear(tokens, expected)).abs()
                        rounded = step * tokens.abs().max().double() * expected.abs().double().sum(1)
                        assert bool((error <= bound + rounded).all())


def test_without_its_segment_a_slice_would_be_another_weight() -> None:
    """14336 columns have segments of 1792, whole blocks; half of them as a row of its own would have 896, and cut."""
    weight = shapes.random_weight(1, 4, 14336, 4, 64, 1, trellis=True)
    first = slices(weight, 2)[0]
    assert _C.outlier_segment(7168) == 896
    with pytest.raises(ValueError, match="dequantize: outlier_index must be "):
        ops.dequantize(*first._replace(segment=0))
    bare = first._replace(segment=0, outlier_index=None, outlier_value=None)
    assert not torch.equal(ops.dequantize(*bare), ops.dequantize(*bare._replace(segment=256)))


@pytest.mark.parametrize("K", [1536, 11008, 14336])
def test_a_module_of_a_slice(K: int) -> None:
    config = QuantizeConfig(bits=4, group_size=32, c=1)
    whole = quantized(shapes.student_t(24, K), config)
    x = torch.randn(3, K, generator=shapes.generator(4))
    y = torch.zeros(3, 24, dtype=torch.float64)
    for i, part in enumerate(x.chunk(2, 1)):
        q = slice_columns(whole, i, 2)
        q.validate()
        module = PrecalLinear.from_qtensor(q)
        assert torch.equal(module.dequantize(), whole.dequantize().chunk(2, 1)[i])
        assert all(torch.equal(tensor, q.tensors[key]) for key, tensor in module.state_dict().items())
        part = part.clone().requires_grad_()
        module(part).sum().backward()
        torch.testing.assert_close(part.grad, q.dequantize().sum(0).expand(3, -1))
        y += module(part).detach()
    torch.testing.assert_close(y.float(), x @ whole.dequantize().T, rtol=1e-3, atol=1e-3)


def quantized(w: Tensor, config: QuantizeConfig) -> QTensor:
    from test_qtensor import quantize

    return quantize(w, config)


@pytest.mark.parametrize("op", ["dequantize", "prepack", "unprepack", "linear"])
def test_opcheck_of_a_slice(op: str) -> None:
    part = slices(shapes.random_weight(1, 5, 14336, 4, 64, 1, trellis=True), 2)[1]
    arguments: tuple[Any, ...] = tuple(part)
    if op in ("unprepack", "linear"):
        arguments = (ops.prepack(*part), *part.numbers)
    if op == "linear":
        arguments = (torch.randn(2, part.K, requires_grad=True), arguments[0], None, *part.numbers)
    torch.library.opcheck(getattr(torch.ops.precal, op).default, arguments)


@pytest.mark.parametrize(("K", "segment"), [(256, -32), (256, 96), (256, 16), (256, 512), (300, 150)])
def test_segments_that_kernels_cannot_have(K: int, segment: int) -> None:
    weight = shapes.random_weight(1, 3, K, 4, 32)._replace(segment=segment)
    contract = f": segment must be 0, K or a divisor of K that 32 divides, got {segment} for K={K}"
    calls = {
        "dequantize": lambda: ops.dequantize(*weight),
        "prepack": lambda: ops.prepack(*weight),
        "unprepack": lambda: ops.unprepack(ops.prepack(*weight._replace(segment=0)), *weight.numbers),
        "linear": lambda: ops.linear(
            torch.zeros(1, K), ops.prepack(*weight._replace(segment=0)), None, *weight.numbers
        ),
        "prepacked_bytes": lambda: _C.prepacked_bytes(*weight.numbers),
        "num_outlier_blocks": lambda: _C.num_outlier_blocks(K, segment),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(op + contract)):
            call()


def test_a_prepacked_weight_knows_its_segment() -> None:
    part = slices(shapes.random_weight(1, 3, 2048, 4, 64, 1), 2)[0]
    prepacked = ops.prepack(*part)
    other = part._replace(segment=part.K)  # the same number of blocks
    with pytest.raises(ValueError, match=r"linear: prepacked must come from prepack\(\) with the same .* and segment"):
        ops.linear(torch.zeros(1, part.K), prepacked, None, *other.numbers)


def test_by_columns_says_why_not() -> None:
    spec = WeightSpec.from_config(8, 11008, QuantizeConfig(group_size=32))
    message = "by_columns: size must cut [8, 11008] into whole groups and blocks, got 3: K = 11008 is no multiple of 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        by_columns(spec, 3)


@pytest.mark.parametrize("config", [QuantizeConfig(c=2), QuantizeConfig(recipe="paper"), QuantizeConfig(recipe="rtn")])
def test_slices_of_rows(config: QuantizeConfig) -> None:
    w = shapes.student_t(24, 300)
    q = quantize_weight(w, config, fit_set_grid([w], config))
    parts = [slice_rows(q, i, 3) for i in range(3)]
    for part in parts:
        part.validate()
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), q.dequantize())
    with pytest.raises(ValueError, match=re.escape("slice_rows: size must cut [24, 300] into equal parts, got 5")):
        slice_rows(q, 0, 5)
