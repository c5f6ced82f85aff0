"""linear: against float64 on the dequantized weight, and what must hold exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import reference
import shapes
import torch
from conftest import LINEAR_ISAS, THREADS, forced_isa, forced_threads
from shapes import Weight
from torch import Tensor

from precal_ext import ops

# Relative Frobenius error. float32: sums of up to 11008 terms in 4 chains, about sqrt(K/4) * eps / 2 = 3e-6 at worst.
# 16 bits: the result is rounded once, half an ulp is 2^-9 (bfloat16) or 2^-12 .. 2^-11 (float16) of it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)
CASES_PER_BITS = {2: 40, 3: 200, 4: 200, 5: 40, 6: 40, 7: 40, 8: 40}
CHUNK = 20  # cases per test: hundreds of ids would say no more than these


@pytest.fixture(params=LINEAR_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_isa(request.param) as name:
        yield name


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, prepacked: Tensor | None = None, mode: str = "f32"
) -> Tensor:
    return ops.linear(x, ops.prepack(*weight) if prepacked is None else prepacked, bias, *weight.numbers, mode)


def activations(M: int | tuple[int, ...], K: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (M, K) if isinstance(M, int) else (*M, K)
    return torch.randn(shape, generator=shapes.generator(seed)).to(dtype)


def relative_error(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> float:
    """|y - want| / |want|. A lone output may cancel: |want| is at least what random signs give, |x| |w| / sqrt(K)."""
    want = reference.linear(x, w, bias)
    expected = x.double().norm() * w.double().norm() / max(w.shape[1], 1) ** 0.5
    return float((y.double() - want).norm() / torch.maximum(want.norm(), expected).clamp(min=1e-30))


@pytest.mark.parametrize(
    ("bits", "chunk"), [(bits, i) for bits, count in CASES_PER_BITS.items() for i in range(count // CHUNK)]
)
def test_random_shapes(isa: str, bits: int, chunk: int) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        weight = shapes.random_case(seed, bits)
        N, K = weight.numbers[:2]
        w, prepacked = ops.dequantize(*weight), ops.prepack(*weight)
        M, dtype = [0, 1, 2, 3, 4, 5, 7, 64, 65, 70][seed % 10], DTYPES[seed % 3]
        x = activations(M, K, seed, dtype)
        bias = activations(1, N, seed, DTYPES[seed % 4 - 1])[0] if seed % 4 else None
        y = linear(x, weight, bias, prepacked)
        assert (y.shape, y.dtype) == ((M, N), dtype), seed
        assert relative_error(y, x, w, bias) <= TOLERANCE[dtype], f"seed {seed}: {weight.numbers}, M {M}, {dtype}"


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
@pytest.mark.parametrize(("N", "K"), shapes.TAIL_SHAPES)
def test_tails(bits: int, N: int, K: int) -> None:
    for c in (0, 1, 2, 4):
        weight = shapes.random_weight(c, N, K, bits, 64, c, trellis=c % 2 == 1)
        w, x = ops.dequantize(*weight), activations(3, K)
        for isa in LINEAR_ISAS:
            with forced_isa(isa):
                assert relative_error(linear(x, weight), x, w, None) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_every_pair_of_dtypes(isa: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    weight = shapes.random_weight(0, 33, 300, 4, 64, c=2)
    x, bias = activations(5, 300, 1, dtype), activations(1, 33, 2, bias_dtype)[0]
    y = linear(x, weight, bias)
    assert y.dtype == dtype
    assert relative_error(y, x, ops.dequantize(*weight), bias) <= TOLERANCE[dtype]


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 1, 1, 4)])
def test_any_number_of_dimensions(isa: str, lead: tuple[int, ...]) -> None:
    weight = shapes.random_weight(0, 17, 65, 3, 32, c=1)
    x = activations(lead, 65)
    y = linear(x, weight)
    assert y.shape == (*lead, 17)
    assert torch.equal(y.reshape(-1, 17), linear(x.reshape(-1, 65), weight))


def test_a_strided_x_is_the_same_as_its_copy(isa: str) -> None:
    weight = shapes.random_weight(0, 17, 65, 4, 32)
    wide = activations(9, 130)
    for x in (wide[:, ::2], wide[::2, :65], activations(65, 9).T, activations(1, 65).expand(4, 65)):
        assert not x.is_contiguous()
        assert torch.equal(linear(x, weight), linear(x.contiguous(), weight))


@pytest.mark.parametrize(("N", "K"), [(0, 64), (4, 0), (0, 0)])
def test_empty_weights(isa: str, N: int, K: int) -> None:
    weight = shapes.random_weight(0, N, K, 4, 32, c=1)
    bias = activations(1, N)[0]
    y = linear(activations(3, K), weight, bias)
    assert torch.equal(y, bias.expand(3, N) if K == 0 else torch.empty(3, 0))


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_row_of_y_depends_on_its_row_of_x_alone(isa: str, dtype: torch.dtype, bits: int) -> None:
    weight = shapes.random_weight(0, 33, 300, bits, 64, c=2)
    prepacked, bias = ops.prepack(*weight), activations(1, 33)[0]
    x = activations(70, 300, 1, dtype)
    x[5] = torch.nan  # a bad row stays where it is
    y = linear(x, weight, bias, prepacked)
    assert y[5].isnan().all() and y.isnan().sum() == 33
    for m in [0, 1, 3, 4, 63, 64, 68, 69]:  # in blocks of 4, in the tail, and after the first 64 rows
        assert torch.equal(linear(x[m], weight, bias, prepacked), y[m])
        assert torch.equal(linear(x[m:], weight, bias, prepacked)[0], y[m])


@pytest.mark.parametrize("M", [1, 5, 70])
def test_threads_change_no_bit(isa: str, M: int) -> None:
    weight = shapes.random_weight(0, 200, 2304, 3, 64, c=2)
    prepacked, x, bias = ops.prepack(*weight), activations(M, 2304), activations(1, 200)[0]
    results = []
    for count in THREADS:
        with forced_threads(count):
            results.append(linear(x, weight, bias, prepacked))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_linear_in_x(isa: str) -> None:
    weight = shapes.random_weight(0, 33, 300, 4, 64, c=2)
    a, b = activations(4, 300, 1), activations(4, 300, 2)
    both = linear(3 * a - b, weight)
    error = (both - (3 * linear(a, weight) - linear(b, weight))).norm() / both.norm()
    assert error <= 3 * TOLERANCE[torch.float32]  # three products, each within it
    assert torch.equal(linear(4 * a, weight), 4 * linear(a, weight))  # a power of two rounds nothing
    assert torch.equal(linear(-a, weight), -linear(a, weight))
    assert (linear(torch.zeros(2, 300), weight) == 0).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_no_outliers_is_the_same_as_unused_entries(isa: str, bits: int) -> None:
    weight = shapes.random_weight(0, 33, 600, bits, 64)
    unused = weight._replace(
        outlier_index=torch.zeros(33, 3, 2, dtype=torch.uint8),
        outlier_value=torch.zeros(33, 3, 2, dtype=torch.uint8),
    )
    x = activations(5, 600)
    assert torch.equal(linear(x, weight), linear(x, unused))


def test_a_unit_vector_reads_a_column(isa: str) -> None:
    weight = shapes.random_weight(0, 33, 300, 3, 64, c=4)
    # row_scale * (scale * level + outlier), one product per output: the very bits of W'
    assert torch.equal(linear(torch.eye(300), weight), ops.dequantize(*weight).T)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(
    "form", [{"c": 2, "trellis": True}, {"uniform": True}, {"split": True, "scale_dtype": "float16"}]
)
def test_gradients(dtype: torch.dtype, lead: tuple[int, ...], form: dict) -> None:
    weight = shapes.random_weight(0, 17, 172, 4, 64, **form)
    w = ops.dequantize(*weight)
    x = activations(lead, 172, 1, dtype).requires_grad_()
    bias = activations(1, 17, 2, dtype)[0].requires_grad_()
    grad = activations(lead, 17, 3, dtype)
    linear(x, weight, bias).backward(grad)
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    reference.linear(x64, w, bias64).backward(grad.double())
    for got, want in ((x.grad, x64.grad), (bias.grad, bias64.grad)):
        assert (got.dtype, got.shape) == (dtype, want.shape)
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_gradients_are_the_slope() -> None:
    """y is linear in x and bias, so a difference quotient is the gradient up to rounding, whatever the step."""
    weight = shapes.random_weight(0, 9, 65, 3, 32, c=1)
    x, bias, direction = activations(3, 65, 1).requires_grad_(), activations(1, 9, 2)[0], activations(3, 65, 3)
    linear(x, weight, bias).sum().backward()
    slope = (
        linear(x.detach() + direction, weight, bias).double().sum() - linear(x.detach(), weight, bias).double().sum()
    )
    assert float((x.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_gradients_only_where_asked_for() -> None:
    weight = shapes.random_weight(0, 17, 65, 4, 32)
    bias = activations(1, 17)[0].requires_grad_()
    y = linear(activations(2, 65), weight, bias)
    assert y.requires_grad
    y.sum().backward()
    assert bias.grad.tolist() == [2.0] * 17
    assert not linear(activations(2, 65), weight, bias.detach()).requires_grad


def test_gradients_of_an_empty_weight() -> None:
    weight = shapes.random_weight(0, 0, 65, 4, 32)
    x, bias = activations(2, 65).requires_grad_(), torch.zeros(0, requires_grad=True)
    linear(x, weight, bias).sum().backward()
    assert (x.grad == 0).all() and bias.grad.shape == (0,)


# ---- errors; those of the prepacked weight are in test_prepack.py ----------------------------------------------------

# ---- integer activations ---------------------------------------------------------------------------------------------

# What a mode may round x to, in units of the largest |x| of a span.
ROUNDING = {"a16": 1 / 65024, "a8": 1 / 254}
KINDS: dict[str, dict[str, bool]] = {"plain": {}, "uniform": {"uniform": True}, "trellis": {"trellis": True}}


def span_of(group_size: int) -> int:
    span = group_size if group_size <= 128 else 128
    while group_size % span:
        span //= 2
    return span


def rounding_bound(x: Tensor, w: Tensor, span: int, mode: str) -> Tensor:
    """[M, N]: the most that rounding x can move y, and float32 sums beside it."""
    K = x.shape[1]
    steps = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in x.double().split(span, 1)], 1)
    exact = x.double().abs() @ w.double().abs().T
    return steps * ROUNDING[mode] @ w.double().abs().T * (1 + 1e-5) + exact * (2 + K / 64) * 2.0**-23


@pytest.mark.parametrize("mode", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(4, 16), (4, 48), (3, 32), (4, 32), (3, 64), (4, 64), (3, 96), (4, 128), (3, 192), (4, 1024), (8, 16), (8, 64)],
)
def test_rounded_activations_keep_their_bound(isa: str, bits: int, group_size: int, kind: str, mode: str) -> None:
    # 8 bits have no trellis, and only uniform ones are integers.
    more = {} if (bits, kind) == (8, "trellis") else KINDS[kind]
    for i, K in enumerate([1, 44, 64, 172, 257, 600, 2304]):
        N, M = [17, 40, 3][i % 3], [1, 3, 4, 7, 9, 16, 33][(i + group_size) % 7]
        weight = shapes.random_weight(i, N, K, bits, group_size, i % 3, **more)
        w, x = ops.dequantize(*weight), activations(M, K, i)
        x[0] *= 1e-20  # scales are each row's own
        error = (linear(x, weight, mode=mode).double() - reference.linear(x, w)).abs()
        assert (error <= rounding_bound(x, w, span_of(group_size), mode)).all(), (N, K, M)


@pytest.mark.parametrize("mode", ROUNDING)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_row_does_not_see_the_others(isa: str, bits: int, mode: str) -> None:
    weight = shapes.random_weight(0, 50, 600, bits, 64, c=1, **KINDS["uniform" if bits == 8 else "trellis"])
    prepacked, x = ops.prepack(*weight), activations(150, 600)
    alone = torch.cat([linear(row[None], weight, None, prepacked, mode) for row in x])
    for M in (*range(2, 42), 63, 64, 65, 127, 128, 129, 150):  # every width of a panel, every kernel
        assert torch.equal(linear(x[:M], weight, None, prepacked, mode), alone[:M]), M
    for count in THREADS:
        with forced_threads(count):
            assert torch.equal(linear(x, weight, None, prepacked, mode), alone)


@pytest.mark.skipif(len(LINEAR_ISAS) < 3, reason="compares AVX2 with AVX-VNNI and AVX-512")
@pytest.mark.parametrize("mode", ROUNDING)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_vector_isas_give_the_same_bits(bits: int, mode: str) -> None:
    """The integers are the same, and the float operations and their order are."""
    for i, (M, K) in enumerate([(1, 300), (4, 2304), (9, 600), (40, 4096)]):
        kind = "uniform" if bits == 8 else "trellis" if i % 2 else "plain"
        weight = shapes.random_weight(i, 50, K, bits, 64, c=i % 3, **KINDS[kind])
        x, prepacked = activations(M, K, i), ops.prepack(*weight)
        results = []
        for isa in LINEAR_ISAS[:-1]:  # not scalar
            with forced_isa(isa):
                results.append(linear(x, weight, None, prepacked, mode))
        assert all(torch.equal(y, results[0]) for y in results[1:]), (M, K)


@pytest.mark.parametrize("mode", ROUNDING)
def test_rounding_of_strange_activations(isa: str, mode: str) -> None:
    weight = shapes.random_weight(0, 20, 256, 4, 64, c=1, trellis=True)
    x = activations(6, 256)
    x[0, 3], x[1, 100], x[2, 255], x[3], x[4] = float("nan"), float("inf"), -float("inf"), 0, x[4] * 1e-40
    y = linear(x, weight, mode=mode)
    assert not y[:3].isfinite().all(1).any()  # what is not a number does not come out as one
    assert (y[3] == 0).all()
    assert (y[4].abs() < 1e-30).all()
    assert y[5].isfinite().all()


@pytest.mark.parametrize("mode", ROUNDING)
def test_a_scale_that_is_not_a_number_stays_one(isa: str, mode: str) -> None:
    weight = shapes.random_weight(0, 3, 128, 4, 64, c=1)
    weight.scale[1, 1] = 0xFF
    weight.outlier_value[2, 0, 0] = 0x7F
    y = linear(activations(2, 128), weight, mode=mode)
    assert y[:, 0].isfinite().all()
    assert y[:, 1:].isnan().all()


def test_codes_of_other_forms_take_float32(isa: str) -> None:
    for bits, group_size, more in [(5, 64, {}), (3, 16, {}), (4, 13, {}), (4, 128, {"split": True, "uniform": True})]:
        weight = shapes.random_weight(0, 17, 300, bits, group_size, **more)
        x = activations(3, 300)
        assert torch.equal(linear(x, weight, mode="a8"), linear(x, weight))


WEIGHT = shapes.random_weight(0, 17, 65, 4, 32)
X = activations(2, 65)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (X.double(), None, TypeError, "linear: x must have dtype float32 or float16 or bfloat16, got float64"),
        (X.int(), None, TypeError, "linear: x must have dtype float32 or float16 or bfloat16, got int32"),
        (X[:, :64], None, ValueError, "linear: x must be [..., K] with K = 65, got [2, 64]"),
        (X[0, 0], None, ValueError, "linear: x must be [..., K] with K = 65, got []"),
        (X, torch.zeros(17).double(), TypeError, "linear: bias must have dtype float32 or float16 or bfloat16"),
        (X, torch.zeros(16), ValueError, "linear: bias must be [17] (N), got [16]"),
        (X, torch.zeros(1, 17), ValueError, "linear: bias must be [17] (N), got [1, 17]"),
        (X, torch.zeros(34)[::2], ValueError, "linear: bias must be contiguous"),
        (X[(None,) * 7], None, ValueError, "must have at most 8 dimensions, got 9"),
    ],
)
def test_errors(x: Tensor, bias: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        linear(x, WEIGHT, bias)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="linear: activations must be f32, a16 or a8, got int8"):
        linear(X, WEIGHT, mode="int8")
