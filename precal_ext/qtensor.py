"""A quantized weight: the integers that fix its shapes, its tensors, and the checks that make untrusted ones safe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precal_ext import _C, ops
from precal_ext.config import QuantizeConfig

PREFIX = "weight_"
# The order in which the ops take and return the tensors of a weight.
_ARGUMENTS = (
    "packed",
    "scale",
    "row_scale",
    "grid",
    "outlier_index",
    "outlier_value",
    "outlier_scale",
    "outlier_mask",
)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class WeightSpec:
    """The integers of one weight [N, K]; every tensor's dtype and shape follows from them (docs/format.md)."""

    N: int
    K: int
    bits: int
    group_size: int
    c: int
    grid_size: int  # levels: 0 (uniform), 2**bits, or 2**(bits + 1) (trellis)
    split: bool
    scale_dtype: str
    segment: int = 0  # columns after which blocks start anew, of a slice of a longer row; 0: as K says

    @classmethod
    def from_config(cls, N: int, K: int, config: QuantizeConfig) -> WeightSpec:
        """Spec of a weight of shape [N, K]; ``config`` is the module's own (``QuantizeConfig.for_module``)."""
        assert config.group_size is not None and config.c is not None
        group_size = max(K, 1) if config.group_size == -1 else config.group_size
        return cls(N, K, config.bits, group_size, config.c, config.grid_size, config.split, config.scale_dtype)

    @property
    def uniform(self) -> bool:
        return self.grid_size == 0

    @property
    def trellis(self) -> bool:
        return self.grid_size == 2 ** (self.bits + 1)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Key without the module's name -> dtype and shape, for every tensor that a checkpoint holds."""
        N, G = self.N, _ceil_div(self.K, self.group_size)
        scale = torch.uint8 if self.scale_dtype == "e4m3" else torch.float16
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (N, _C.words_per_row(self.K, self.bits))),
            "weight_scale": (scale, (N, G)),
            "weight_row_scale": (torch.bfloat16, (N,)),
        }
        if self.grid_size:
            found["weight_grid"] = (torch.int8, (1, self.grid_size))
        if self.c:
            blocks = _C.num_outlier_blocks(self.K, self.segment)
            found["weight_outlier_index"] = (torch.uint8, (N, blocks, self.c))
            found["weight_outlier_value"] = (torch.uint8, (N, blocks, self.c))
        if self.split:
            found["weight_outlier_scale"] = (scale, (N, G))
            found["weight_outlier_mask"] = (torch.uint8, (N, _ceil_div(self.K, 8)))
        found["weight_shape"] = (torch.int64, (2,))
        return found

    def stored_bits(self) -> int:
        """Bits that the tensors take in a file, all of them."""
        return sum(8 * dtype.itemsize * _product(shape) for dtype, shape in self.tensors().values())

    def bits_per_weight(self) -> float:
        """Stored bits per weight. ``weight_shape`` (16 bytes a matrix) is left out: a constant, not a rate."""
        return (self.stored_bits() - 128) / max(1, self.N * self.K)

    def blocks(self) -> list[tuple[int, int]]:
        """First column and end of every block of outliers and of the trellis."""
        return _C.outlier_blocks(self.K, self.segment)

    def op_arguments(self) -> tuple[int, int, int, int, int, int, bool, str, int]:
        """What ``ops.linear`` and ``ops.unprepack`` want to know of the weight."""
        numbers = (self.N, self.K, self.bits, self.group_size, self.c, self.grid_size)
        return *numbers, self.split, self.scale_dtype, self.segment


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


@dataclass(frozen=True)
class QTensor:
    """One quantized weight: ``tensors`` maps the keys of ``spec.tensors()`` to contiguous tensors."""

    spec: WeightSpec
    tensors: Mapping[str, Tensor]

    def _arguments(self) -> tuple[Any, ...]:
        found = [self.tensors.get(PREFIX + name) for name in _ARGUMENTS]
        return (*found, self.spec.K, self.spec.bits, self.spec.group_size, self.spec.segment)

    def dequantize(self) -> Tensor:
        """W' as float32 [N, K]."""
        return ops.dequantize(*self._arguments())

    def measure(self, w: Tensor, num_bins: int, half: float) -> tuple[Tensor, Tensor]:
        """Histogram in units of levels, and squares, of the weight that this was (``ops.measure``)."""
        *before, segment = self._arguments()
        arguments: tuple[Any, ...] = (w, *before, num_bins, half, segment)
        return ops.measure(*arguments)

    def level_index(self) -> Tensor:
        """uint8 [N, K]: which level of the grid each code means (docs/format.md)."""
        codes = ops.unpack(self.tensors["weight_packed"], self.spec.bits, self.spec.K)
        if not self.spec.trellis:
            return codes
        low = codes & 1
        index = codes << 1
        index[:, 1:] += low[:, :-1]
        index[:, 2:] ^= low[:, :-2] << 1
        # A block knows nothing of the one before.
        first = torch.tensor([begin for begin, _ in self.spec.blocks()], dtype=torch.int64)
        second = torch.tensor([begin + 1 for begin, end in self.spec.blocks() if end > begin + 1], dtype=torch.int64)
        index[:, first] = codes[:, first] << 1
        index[:, second] = (codes[:, second] << 1) + low[:, second - 1]
        return index

    def prepack(self) -> Tensor:
        """The tile order of the tensors' device, uint8 (``ops.prepack``)."""
        return ops.prepack(*self._arguments())

    @classmethod
    def from_prepacked(cls, spec: WeightSpec, prepacked: Tensor) -> QTensor:
        """The canonical tensors back from ``prepack``, byte for byte."""
        outputs = ops.unprepack(prepacked, *spec.op_arguments())
        found = dict(zip((PREFIX + name for name in _ARGUMENTS), outputs, strict=True))
        found["weight_shape"] = torch.tensor([spec.N, spec.K], dtype=torch.int64)
        return cls(spec, {key: found[key] for key in spec.tensors()})

    def validate(self, name: str = "weight") -> None:
        """Check shapes, dtypes and every value that a kernel or a reader relies on.

        Raises:
            ValueError: what is wrong, where, and what was expected.
        """
        for key, (dtype, shape) in self.spec.tensors().items():
            if key not in self.tensors:
                raise ValueError(
                    f"{name}.{key}: must be present for this format, got nothing; the checkpoint is incomplete"
                )
            t = self.tensors[key]
            if t.dtype != dtype or tuple(t.shape) != shape:
                raise ValueError(
                    f"{name}.{key}: must be {_dtype(dtype)} {list(shape)}, got {_dtype(t.dtype)} {list(t.shape)}"
                )
        extra = sorted(set(self.tensors) - set(self.spec.tensors()))
        if extra:
            raise ValueError(f"{name}: tensors must be those of its settings, got also {', '.join(extra)}")
        self._validate_values(name)

    def _validate_values(self, name: str) -> None:
        def fail(key: str, contract: str) -> None:
            raise ValueError(f"{name}.{key}: {contract}; the checkpoint is damaged or was not written by precal")

        spec, t = self.spec, self.tensors
        if t["weight_shape"].tolist() != [spec.N, spec.K]:
            fail("weight_shape", f"must be [{spec.N}, {spec.K}], got {t['weight_shape'].tolist()}")
        row_scale = t["weight_row_scale"].float()
        if not bool((torch.isfinite(row_scale) & (row_scale >= 0)).all()):
            fail("weight_row_scale", "must be finite and >= 0")
        for key in ("weight_scale", "weight_outlier_scale"):
            if key not in t:
                continue
            scale = t[key]
            bad = (scale & 0x7F) == 0x7F if scale.dtype == torch.uint8 else ~torch.isfinite(scale)
            if bool(bad.any()):
                fail(key, "must hold no NaN or infinity")
        if "weight_grid" in t:
            grid = t["weight_grid"].flatten().to(torch.int16)
            if bool((grid < -_C.MAX_LEVEL).any()) or bool((grid[1:] < grid[:-1]).any()) or not bool(grid.any()):
                fail("weight_grid", "must be non-decreasing in [-127, 127] and not all zero")
        used = spec.K * spec.bits % 32
        if used and spec.N and bool(((t["weight_packed"][:, -1].to(torch.int64) & 0xFFFFFFFF) >> used).any()):
            fail("weight_packed", "must have zero bits after the last code of a row")
        if spec.split and spec.K % 8 and bool((t["weight_outlier_mask"][:, -1] >> spec.K % 8).any()):
            fail("weight_outlier_mask", "must have zero bits after the last column of a row")
        if spec.c:
            self._validate_outliers(fail)

    def _validate_outliers(self, fail: Any) -> None:
        index = self.tensors["weight_outlier_index"].to(torch.int16)
        value = self.tensors["weight_outlier_value"]
        if bool(((value & 0x7F) == 0x7F).any()):
            fail("weight_outlier_value", "must hold no NaN")
        width = index.new_tensor([end - begin for begin, end in self.spec.blocks()])
        if bool((index >= width[None, :, None]).any()):
            fail("weight_outlier_index", "must lie inside its block")
        unused = (value & 0x7F) == 0
        if bool((unused & (index != 0)).any()):
            fail("weight_outlier_index", "must be 0 where the value is 0")
        later = index[..., 1:]
        if bool(((later <= index[..., :-1]) & ~unused[..., 1:]).any()) or bool(
            (unused[..., :-1] & ~unused[..., 1:]).any()
        ):
            fail("weight_outlier_index", "must strictly increase over the used entries, unused ones last")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
