"""pack and unpack: against compressed-tensors, against Python integers, and against each other on every ISA."""

from __future__ import annotations

import re

import pytest
import reference
import shapes
import torch
from conftest import ISAS, THREADS, forced_isa, forced_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from precal_ext import ops


def random_codes(N: int, K: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=shapes.generator(K * 9 + bits))


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
@pytest.mark.parametrize(("N", "K"), shapes.TAIL_SHAPES)
def test_the_stream_is_an_integer(isa: str, bits: int, N: int, K: int) -> None:
    codes = random_codes(N, K, bits)
    packed = ops.pack(codes, bits)
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (N, reference.ceil_div(K * bits, 32)))
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(ops.unpack(packed, bits, K), codes)


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
@pytest.mark.parametrize(("N", "K"), shapes.TAIL_SHAPES)
def test_the_order_is_that_of_compressed_tensors(bits: int, N: int, K: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(N, K, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)  # what they pack; they add the offset themselves
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(ops.pack(codes, bits), theirs)
    assert torch.equal(ops.unpack(theirs, bits, K), codes)
    assert torch.equal(helpers.unpack_from_int32(ops.pack(codes, bits), bits, codes.shape), signed)


def test_the_example_of_the_format() -> None:
    packed = ops.pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0x1F58D1]]


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
def test_pack_on_one_isa_unpack_on_another(bits: int) -> None:
    codes = random_codes(17, 300, bits)
    for writer in ISAS:
        for reader in ISAS:
            with forced_isa(writer):
                packed = ops.pack(codes, bits)
            with forced_isa(reader):
                assert torch.equal(ops.unpack(packed, bits, 300), codes)


@given(st.integers(2, 8), st.integers(0, 5), st.integers(0, 200), st.randoms(use_true_random=False))
def test_unpack_inverts_pack(bits: int, N: int, K: int, random) -> None:
    values = [random.randrange(2**bits) for _ in range(N * K)]
    codes = torch.tensor(values, dtype=torch.uint8).reshape(N, K)
    assert torch.equal(ops.unpack(ops.pack(codes, bits), bits, K), codes)


@given(st.integers(2, 8), st.integers(1, 200), st.randoms(use_true_random=False))
def test_unpack_ignores_the_bits_past_the_row(bits: int, K: int, random) -> None:
    words = reference.ceil_div(K * bits, 32)
    packed = torch.tensor([[random.randrange(-(2**31), 2**31) for _ in range(words)]], dtype=torch.int32)
    codes = ops.unpack(packed, bits, K)
    assert torch.equal(codes, reference.unpack(packed, bits, K))
    repacked = ops.pack(codes, bits)
    used = K * bits - 32 * (words - 1)
    mask = torch.full((words,), -1, dtype=torch.int32)
    mask[-1] = (1 << used) - 1 if used < 32 else -1
    assert torch.equal(repacked, packed & mask)  # and they come out as zeros


@pytest.mark.parametrize("bits", [3, 4])
def test_threads_change_nothing(isa: str, bits: int) -> None:
    codes = random_codes(100, 2304, bits)
    results = []
    for count in THREADS:
        with forced_threads(count):
            packed = ops.pack(codes, bits)
            results.append((packed, ops.unpack(packed, bits, 2304)))
    assert all(torch.equal(packed, results[0][0]) and torch.equal(back, codes) for packed, back in results)


CODES = random_codes(3, 20, 3)
PACKED = reference.pack(CODES, 3)
TOO_LARGE = torch.cat([random_codes(50, 1000, 3), torch.full((1, 1000), 8, dtype=torch.uint8)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack(CODES.int(), 3), TypeError, "pack: codes must have dtype uint8, got int32"),
        (lambda: ops.pack(CODES.T, 3), ValueError, "pack: codes must be contiguous"),
        (lambda: ops.pack(CODES[0], 3), ValueError, "pack: codes must be [N, K], got [20]"),
        (lambda: ops.pack(CODES, 1), ValueError, "pack: bits must lie in [2, 8], got 1"),
        (lambda: ops.pack(CODES, 9), ValueError, "pack: bits must lie in [2, 8], got 9"),
        (lambda: ops.pack(CODES, 2), ValueError, "pack: codes must be below 2^2 = 4, got a larger one"),
        (lambda: ops.pack(TOO_LARGE, 3), ValueError, "pack: codes must be below 2^3 = 8, got a larger one"),
        (lambda: ops.unpack(PACKED.long(), 3, 20), TypeError, "unpack: packed must have dtype int32, got int64"),
        (lambda: ops.unpack(PACKED.T, 3, 20), ValueError, "unpack: packed must be contiguous"),
        (lambda: ops.unpack(PACKED[0], 3, 20), ValueError, "unpack: packed must be [N, words], got [2]"),
        (lambda: ops.unpack(PACKED, 1, 20), ValueError, "unpack: bits must lie in [2, 8], got 1"),
        (lambda: ops.unpack(PACKED, 9, 20), ValueError, "unpack: bits must lie in [2, 8], got 9"),
        (lambda: ops.unpack(PACKED, 3, 22), ValueError, "packed must be [3, 3] (N, ceil(K*bits/32)), got [3, 2]"),
        (lambda: ops.unpack(PACKED, 3, 10), ValueError, "packed must be [3, 1] (N, ceil(K*bits/32)), got [3, 2]"),
        (lambda: ops.unpack(PACKED, 3, -1), ValueError, "unpack: K must lie in [0, 2^30], got -1"),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
