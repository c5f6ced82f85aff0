"""prepack and unprepack: exact inverses, and a header that refuses everything else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import shapes
import torch
from conftest import ISAS, ROOT, THREADS, forced_isa, forced_threads
from shapes import Weight
from torch import Tensor

from precal_ext import _C, ops

FIELDS = Weight._fields[:8]


def unprepack(prepacked: Tensor, weight: Weight) -> dict[str, Tensor]:
    return dict(zip(FIELDS, ops.unprepack(prepacked, *weight.numbers), strict=True))


def assert_inverse(weight: Weight) -> None:
    prepacked = ops.prepack(*weight)
    assert prepacked.dtype == torch.uint8
    assert list(prepacked.shape) == [_C.prepacked_bytes(*weight.numbers)]
    for name, got in unprepack(prepacked, weight).items():
        want = getattr(weight, name)
        if want is None:
            assert got.numel() == 0, name
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
@pytest.mark.parametrize("c", [0, 1, 2, 4, 16])
@pytest.mark.parametrize("kind", [{}, {"uniform": True}, {"trellis": True}], ids=["plain", "uniform", "trellis"])
@pytest.mark.parametrize("scale_dtype", ["e4m3", "float16"])
def test_unprepack_inverts_prepack(bits: int, c: int, kind: dict[str, bool], scale_dtype: str) -> None:
    for N, K in shapes.TAIL_SHAPES[(c + bits) % 2 :: 2]:
        assert_inverse(shapes.random_weight(K, N, K, bits, [32, 100][K % 2], c, scale_dtype=scale_dtype, **kind))


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("scale_dtype", ["e4m3", "float16"])
def test_unprepack_inverts_prepack_of_a_split(bits: int, uniform: bool, scale_dtype: str) -> None:
    for N, K in shapes.TAIL_SHAPES:
        assert_inverse(shapes.random_weight(K, N, K, bits, 128, 0, uniform, True, scale_dtype))


@pytest.mark.parametrize(("N", "K"), [(0, 64), (4, 0), (0, 0)])
@pytest.mark.parametrize("c", [0, 2])
def test_empty_weights(N: int, K: int, c: int) -> None:
    assert_inverse(shapes.random_weight(0, N, K, 4, 32, c))


def test_rows_past_the_end_are_zero() -> None:
    """Seventeen rows fill two tiles; fifteen lanes of the second hold nothing that could become a NaN."""
    weight = shapes.random_weight(0, 17, 40, 3, 13, c=1)  # groups of 13 keep words
    words = -(-40 * 3 // 32)
    tile = (len(ops.prepack(*weight)) - 320) // 2
    second = ops.prepack(*weight)[320 + tile :]
    lanes = second[-words * 64 :].view(torch.int32).reshape(words, 16)
    assert torch.equal(lanes[:, 0], weight.packed[16])
    assert (lanes[:, 1:] == 0).all()
    assert (second[2:32] == 0).all()  # row scales
    for section in (second[64:128], second[128:192]):  # values and indices of outliers: one block, c = 1
        assert (section[1:16] == 0).all()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("tile", "chunk"), [(t, n) for t in range(3) for n in range(2)])
def test_codes_of_a_chunk(bits: int, tile: int, chunk: int) -> None:
    """Where csrc/format/interleave.h puts them, byte 4 r + j at step t holds row r, column j T + t; and where
    prepacked.h puts chunks: those of tiles 0 and 1 by turns behind both heads, those of tile 2 by themselves."""
    weight = shapes.random_weight(0, 40, 128, bits, 64)
    codes = reference.unpack(weight.packed, bits, 128)
    data = ops.prepack(*weight)[320:].numpy()
    tile_bytes, chunk_bytes = len(data) // 3, 64 * 16 * bits // 8
    head = tile_bytes - 2 * chunk_bytes
    data = data[
        2 * head + (2 * chunk + tile) * chunk_bytes if tile < 2 else 2 * tile_bytes + head + chunk * chunk_bytes :
    ]
    places = {0: (0, 2), 1: (1, 2), 2: (0, 6), 3: (0, 4), 4: (0, 0), 5: (1, 0), 6: (1, 4), 7: (1, 6)}
    for r, k in [(0, 0), (3, 1), (7, 15), (6, 16), (2, 37), (5, 63)]:
        j, t = divmod(k, 16)
        if bits == 4:
            found = data[t // 2 * 64 + 4 * r + j] >> (4 * (t % 2)) & 15
        else:
            eight = data[t // 8 * 192 :]
            register, shift = places[t % 8]
            pair = eight[register * 64 + 4 * r + j] >> shift & 3
            found = pair << 1 | eight[128 + 4 * r + j] >> t % 8 & 1
        assert found == codes[16 * tile + r, 64 * chunk + k], (r, k)


def test_bytes_depend_on_neither_isa_nor_threads() -> None:
    weight = shapes.random_weight(0, 100, 300, 3, 32, c=2)
    want = ops.prepack(*weight)
    for isa in ISAS:
        for count in THREADS:
            with forced_isa(isa), forced_threads(count):
                assert torch.equal(ops.prepack(*weight), want)
                assert torch.equal(unprepack(want, weight)["packed"], weight.packed)


# ---- errors, shared by unprepack and linear --------------------------------------------------------------------------

WEIGHT = shapes.random_weight(0, 17, 300, 4, 64, c=1)
PREPACKED = ops.prepack(*WEIGHT)
NUMBERS = dict(
    zip(
        ["N", "K", "bits", "group_size", "c", "grid_size", "split", "scale_dtype", "segment"],
        WEIGHT.numbers,
        strict=True,
    )
)


def flipped(byte: int) -> Tensor:
    damaged = PREPACKED.clone()
    damaged[byte] ^= 1
    return damaged


def call(name: str, prepacked: Tensor, **changes) -> None:
    numbers = {**NUMBERS, **changes}
    if name == "unprepack":
        ops.unprepack(prepacked, **numbers)
    else:
        ops.linear(torch.zeros(2, max(0, min(numbers["K"], 1000))), prepacked, None, **numbers)


@pytest.mark.parametrize("name", ["unprepack", "linear"])
@pytest.mark.parametrize(
    ("prepacked", "changes", "error", "message"),
    [
        (PREPACKED.int(), {}, TypeError, "prepacked must have dtype uint8, got int32"),
        (torch.stack([PREPACKED] * 2, 1)[:, 0], {}, ValueError, "prepacked must be contiguous"),
        (
            PREPACKED[:-1],
            {},
            ValueError,
            f"prepacked must be [{len(PREPACKED)}] bytes for N=17, K=300, bits=4, group_size=64",
        ),
        (PREPACKED[:0], {}, ValueError, "bytes for N=17, K=300, bits=4, group_size=64, c=1, grid_size=16, got [0]"),
        (PREPACKED[None], {}, ValueError, f"got [1, {len(PREPACKED)}]"),
        (PREPACKED, {"N": 33}, ValueError, "bytes for N=33, K=300"),
        (PREPACKED, {"K": 400}, ValueError, "bytes for N=17, K=400"),
        (PREPACKED, {"N": -1}, ValueError, "N and K must lie in [0, 2^30], got -1 and 300"),
        (PREPACKED, {"K": -1}, ValueError, "N and K must lie in [0, 2^30], got 17 and -1"),
        (PREPACKED, {"N": 2**40}, ValueError, "N and K must lie in [0, 2^30], got 1099511627776 and 300"),
        (PREPACKED, {"bits": 1}, ValueError, "bits must lie in [2, 8], got 1"),
        (PREPACKED, {"bits": 9}, ValueError, "bits must lie in [2, 8], got 9"),
        (PREPACKED, {"group_size": 0}, ValueError, "group_size must lie in [1, 2^30], got 0"),
        (PREPACKED, {"c": 17}, ValueError, "c must lie in [0, 16], got 17"),
        (PREPACKED, {"c": -1}, ValueError, "c must lie in [0, 16], got -1"),
        (PREPACKED, {"scale_dtype": "bf16"}, ValueError, "scale_dtype must be e4m3 or float16, got bf16"),
        (PREPACKED, {"grid_size": 8}, ValueError, "grid_size must be 0 (uniform), 2^bits or, for a trellis of 2 to 7"),
        (PREPACKED, {"grid_size": 32}, ValueError, "prepacked must come from prepack() with the same"),
        # the same size, another meaning: only the header can tell
        (
            PREPACKED,
            {"N": 18},
            ValueError,
            "prepacked must come from prepack() with the same N, K, bits, group_size, c, grid_size and segment",
        ),
        (PREPACKED, {"grid_size": 0}, ValueError, "prepacked must come from prepack() with the same"),
        (PREPACKED, {"group_size": 65}, ValueError, "prepacked must be ["),
        (torch.zeros_like(PREPACKED), {}, ValueError, "prepacked must come from prepack()"),
        *[
            (flipped(byte), {}, ValueError, "its header says otherwise")
            for byte in (0, 4, 6, 7, 8, 16, 24, 32, 36, 40, 48)
        ],
    ],
)
def test_errors(name: str, prepacked: Tensor, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{name}: .*" + re.escape(message)):
        call(name, prepacked, **changes)


CALLS_WITH_GROUP_SIZE_0 = {
    "_C.prepacked_bytes": "_C.prepacked_bytes(1, 1, 4, 0, 0, 0, False, 'e4m3')",
    "fake": """
packed = torch.empty(4, 1, dtype=torch.int32, device="meta")
scale = torch.empty(4, 1, dtype=torch.uint8, device="meta")
row_scale = torch.empty(4, dtype=torch.bfloat16, device="meta")
ops.prepack(packed, scale, row_scale, None, None, None, None, None, 8, 4, 0)
""",
}


@pytest.mark.parametrize("code", CALLS_WITH_GROUP_SIZE_0.values(), ids=CALLS_WITH_GROUP_SIZE_0.keys())
def test_group_size_0_is_an_error_and_not_a_crash(code: str) -> None:
    """In a process of its own: a division by zero in C++ ends it."""
    script = f"import torch\nfrom precal_ext import _C, ops\n{code}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Error" in done.stderr, f"exit status {done.returncode}: {done.stderr[-500:]}"


def test_a_large_weight_asks_for_huge_pages() -> None:
    """Linux says which mappings were advised (hg), whether or not it has such pages."""
    maps = Path("/proc/self/smaps")
    if not maps.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("needs Linux with transparent huge pages")
    prepacked = ops.prepack(*shapes.random_weight(0, 2048, 8192, 4, 64, c=1))
    middle, inside = prepacked.data_ptr() + prepacked.numel() // 2, False
    for line in maps.read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = int(mapping[1], 16) <= middle < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.skip("smaps has no VmFlags")
