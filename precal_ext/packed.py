"""Weights that GPTQ, AWQ and compressed-tensors wrote: their headers, checked, and their bytes as a weight of ours.

    GPTQ                qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales [G, N], g_idx int32 [K]
    AWQ, 4 bits         qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]; columns of eight in another order
    compressed-tensors  weight_packed int32 [N, ceil(K*bits/32)], weight_scale [N, G], weight_shape int64 [2],
                        with zero points weight_zero_point int32 [ceil(N*bits/32), G]

All of them are little-endian bit streams: GPTQ's down the columns of qweight, so that its transpose is our
``weight_packed``. The weight is scale * (u - zero); where every zero is 2^(bits-1), it is a uniform weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext import _C, ops
from precal_ext.checkpoint import CheckpointError, TensorInfo, read_config, read_index, read_json, read_tensor
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.uniform import first_unsplit, split_scales, uniform_qtensor, uniform_spec

METHODS = ("gptq", "awq", "compressed-tensors")
REMEDY = "such a weight has no exact form here; --requantize quantizes it again, with a loss that the report states"
WIDER = "--widen stores it exactly with 8 bits, --requantize quantizes it again with a loss that the report states"
WIDE_BITS = 8  # holds u - zero of up to 7 bits, and has fast kernels, which 5 bits have not
SCALES = (torch.float16, torch.bfloat16, torch.float32)

_GPTQ_BITS = (2, 3, 4, 8)
# Nibble i of a word of AWQ holds column _AWQ_ORDER[i] of eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GPTQ_LEAVES = frozenset({"qweight", "qzeros", "scales", "g_idx"})
_CT_LEAVES = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})
_ROWS_AT_ONCE = 1 << 20  # weights


@dataclass(frozen=True)
class Loaded:
    """A weight in memory, whoever wrote it.

    Args:
        packed: our ``weight_packed``.  scale: [N, G].  zero: uint8 [N, G], None when it is 2^(bits-1) everywhere.
        group: int64 [K], the group of every column, None when it is k // group_size.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    group: Tensor | None

    def dequantize(self, spec: WeightSpec) -> Tensor:
        """float32 [N, K]: scale * (u - zero), the difference exact, the product rounded once."""
        group = torch.arange(spec.K) // spec.group_size if self.group is None else self.group
        w = torch.empty(spec.N, spec.K)
        step = max(1, _ROWS_AT_ONCE // max(1, spec.K))
        for begin in range(0, spec.N, step):
            rows = slice(begin, begin + step)
            level = ops.unpack(self.packed[rows].contiguous(), spec.bits, spec.K).float()
            level -= 2 ** (spec.bits - 1) if self.zero is None else self.zero[rows].float()[:, group]
            w[rows] = level.mul_(self.scale[rows].float()[:, group])
        return w


@dataclass(frozen=True)
class PackedWeight:
    """A weight by its headers, which fit each other.

    Args:
        tensors: last part of the name -> where it is.
        offset: what is added to stored zero points (the first convention of GPTQ).
    """

    module: str
    method: str
    spec: WeightSpec
    tensors: Mapping[str, TensorInfo]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def load(self) -> Loaded:
        """Its tensors.

        Raises:
            CheckpointError: scales are not finite, or groups or shapes are none.
        """
        found = {key: read_tensor(info) for key, info in self.tensors.items()}
        spec, half = self.spec, 2 ** (self.spec.bits - 1)
        scale = found["scales"].t().contiguous() if "scales" in found else found["weight_scale"]
        zero = self._zero(found)
        if not bool(torch.isfinite(scale).all()):
            n, g = (~torch.isfinite(scale)).nonzero()[0].tolist()
            raise self._refuse(("scales", "weight_scale"), f"be finite, got {float(scale[n, g])} at [{n}, {g}]")
        if "weight_shape" in found and found["weight_shape"].tolist() != [spec.N, spec.K]:
            raise self._refuse(("weight_shape",), f"be {[spec.N, spec.K]}, got {found['weight_shape'].tolist()}")
        if self.method == "awq":
            codes = torch.empty(spec.K, spec.N, dtype=torch.uint8)
            nibbles = ops.unpack(found["qweight"], 4, spec.N)
            for i, column in enumerate(_AWQ_ORDER):
                codes[:, column::8] = nibbles[:, i::8]
            packed = ops.pack(codes.t().contiguous(), 4)
        else:
            packed = found["qweight"].t().contiguous() if "qweight" in found else found["weight_packed"]
        if zero is not None and bool((zero == half).all()):
            zero = None
        return Loaded(packed, scale, zero, self._group(found))

    def _zero(self, found: Mapping[str, Tensor]) -> Tensor | None:
        """uint8 [N, G]."""
        spec, mask = self.spec, 2**self.spec.bits - 1
        if "qzeros" in found:
            stored = ops.unpack(found["qzeros"], spec.bits, spec.N)
            if self.method == "awq":
                ordered = torch.empty_like(stored)
                for i, column in enumerate(_AWQ_ORDER):
                    ordered[:, column::8] = stored[:, i::8]
                stored = ordered
            # One less than a zero of 0 is stored as the largest code.
            return ((stored.to(torch.int16) + self.offset) & mask).to(torch.uint8).t().contiguous()
        if "weight_zero_point" in found:
            words = found["weight_zero_point"].t().contiguous()
            return ops.unpack(words, spec.bits, spec.N).t().contiguous()
        return None

    def _group(self, found: Mapping[str, Tensor]) -> Tensor | None:
        spec = self.spec
        key = "g_idx" if "g_idx" in found else "weight_g_idx"
        if key not in found:
            return None
        group, groups = found[key].long(), -(-spec.K // spec.group_size)
        if key == "weight_g_idx" and bool((group == -1).all()):  # compressed-tensors: not used
            return None
        if bool((group == torch.arange(spec.K) // spec.group_size).all()):
            return None
        if bool(((group < 0) | (group >= groups)).any()):
            k = int(((group < 0) | (group >= groups)).nonzero()[0])
            raise self._refuse((key,), f"be groups below {groups}, got {int(group[k])} for column {k}")
        return group

    def _refuse(self, keys: tuple[str, ...], what: str) -> CheckpointError:
        info = next(self.tensors[key] for key in keys if key in self.tensors)
        return CheckpointError(f"{info.file}: {info.name} must {what}")

    def is_asymmetric(self) -> bool:
        """Whether some zero point is not the middle one; reads nothing else."""
        keys = [key for key in ("qzeros", "weight_zero_point") if key in self.tensors]
        zero = self._zero({key: read_tensor(self.tensors[key]) for key in keys})
        return zero is not None and not bool((zero == 2 ** (self.spec.bits - 1)).all())

    def widened(self, loaded: Loaded) -> tuple[PackedWeight, Loaded]:
        """The same weight with symmetric codes of 8 bits, of up to 7 bits and columns in order."""
        assert self.spec.bits < WIDE_BITS and loaded.group is None
        spec = dataclasses.replace(self.spec, bits=WIDE_BITS)
        packed = torch.empty((spec.N, _C.words_per_row(spec.K, WIDE_BITS)), dtype=torch.int32)
        group = torch.arange(spec.K) // spec.group_size
        step = max(1, _ROWS_AT_ONCE // max(1, spec.K))
        for begin in range(0, spec.N, step):
            rows = slice(begin, begin + step)
            level = ops.unpack(loaded.packed[rows].contiguous(), self.spec.bits, spec.K).to(torch.int16)
            level -= 2 ** (self.spec.bits - 1) if loaded.zero is None else loaded.zero[rows].to(torch.int16)[:, group]
            packed[rows] = ops.pack((level + 2 ** (WIDE_BITS - 1)).to(torch.uint8), WIDE_BITS)
        return dataclasses.replace(self, spec=spec), Loaded(packed, loaded.scale, None, None)

    def misfit(self, loaded: Loaded) -> tuple[str, CheckpointError] | None:
        """Why a weight is not one of ours, in a few words and as a refusal; None when it is."""
        spec, half = self.spec, 2 ** (self.spec.bits - 1)
        if loaded.group is not None:
            k = int((loaded.group != torch.arange(spec.K) // spec.group_size).nonzero()[0])
            what = f"be k // {spec.group_size}, got group {int(loaded.group[k])} for column {k}: columns were reordered"
            return "columns reordered", self._refuse(("g_idx", "weight_g_idx"), f"{what} (desc_act); {REMEDY}")
        if loaded.zero is not None:
            n, g = (loaded.zero != half).nonzero()[0].tolist()
            value = int(loaded.zero[n, g])
            hint = ""
            if self.method == "gptq" and bool((loaded.zero == value).all()) and abs(value - half) == 1:
                version, other = ("gptq_v2", "as they are") if self.offset else ("gptq", "less one")
                hint = f" (or config.json must say checkpoint_format {version}, that zero points are stored {other})"
            what = f"be {half} everywhere once unpacked, got {value} for row {n}, group {g}: it is asymmetric{hint}"
            remedy = WIDER if spec.bits < WIDE_BITS else REMEDY
            return "asymmetric", self._refuse(("qzeros", "weight_zero_point"), f"{what}; {remedy}")
        if split_scales(loaded.scale) is None:
            n, g = first_unsplit(loaded.scale)
            what = (
                f"fit in float16 under a power of two per row, got {float(loaded.scale[n, g])!r} for row {n}, group {g}"
            )
            return "scales beyond float16", self._refuse(("scales", "weight_scale"), f"{what}; {REMEDY}")
        return None

    def exactly(self, loaded: Loaded) -> QTensor:
        """The same weight as one of ours; ``misfit`` is None."""
        parts = split_scales(loaded.scale)
        assert parts is not None
        return uniform_qtensor(loaded.packed, *parts, self.spec)


@dataclass(frozen=True)
class PackedModel:
    """A directory that another method quantized.

    Args:
        settings: what its config says of the quantization.
        weights: in the order of the files.  dense: every other tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    method: str
    settings: Mapping[str, Any]
    weights: tuple[PackedWeight, ...]
    dense: tuple[TensorInfo, ...]


def read_packed(folder: Path) -> PackedModel:
    """Read config and headers.

    Raises:
        CheckpointError: it is no such model, or a tensor's header does not fit the others or the config.
    """
    config = read_config(folder)
    settings = config.get("quantization_config")
    if settings is None and (folder / "quantize_config.json").exists():
        settings = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}  # as AutoGPTQ wrote it
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{folder}: must be quantized by {', '.join(METHODS)}, got a config.json without quantization_config; "
            "`precal quantize` quantizes a model that is not"
        )
    method = settings.get("quant_method")
    if method not in METHODS:
        raise CheckpointError(f"{folder}: quant_method must be one of {', '.join(METHODS)}, got {str(method)[:80]!r}")
    index = read_index(folder)
    leaves = _CT_LEAVES if method == "compressed-tensors" else _GPTQ_LEAVES
    modules: dict[str, dict[str, TensorInfo]] = {}
    dense = []
    for name, info in index.items():
        module, _, leaf = name.rpartition(".")
        if leaf in leaves:
            modules.setdefault(module, {})[leaf] = info
        else:
            dense.append(info)
    if not modules:
        raise CheckpointError(f"{folder}: must hold weights of {method}, got none")
    where = folder / "config.json"
    if method == "compressed-tensors":
        schemes = _ct_schemes(where, settings)
        weights = [_ct_weight(where, module, found, schemes) for module, found in modules.items()]
    else:
        bits, group_size, offset = _gptq_settings(where, method, settings)
        weights = [_gptq_weight(method, m, found, bits, group_size, offset) for m, found in modules.items()]
    for weight in weights:
        if f"{weight.module}.weight" in index:
            raise CheckpointError(f"{folder}: {weight.module} must have one weight, got {weight.module}.weight also")
    return PackedModel(folder, config, method, settings, tuple(weights), tuple(dense))


def _setting(where: Path, key: str, value: Any, good: bool, contract: str) -> None:
    if not good:
        raise CheckpointError(f"{where}: {key} must be {contract}, got {str(value)[:80]!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_group_size(value: Any) -> bool:
    return _is_int(value) and (value == -1 or 1 <= value <= 1 << 20)


def _tensor(
    module: str, found: Mapping[str, TensorInfo], key: str, dtypes: tuple[torch.dtype, ...], rank: int
) -> TensorInfo:
    """A tensor of a module, of a dtype and rank."""
    if key not in found:
        some = next(iter(found.values()))
        raise CheckpointError(f"{some.file}: {module}.{key} must be there, got nothing; the checkpoint is incomplete")
    info = found[key]
    if info.dtype not in dtypes or len(info.shape) != rank:
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        got = f"{info.dtype} {list(info.shape)}"
        raise CheckpointError(f"{info.file}: {info.name} must be {kinds} with {rank} dimensions, got {got}")
    return info


def _of_shape(info: TensorInfo, shape: tuple[int, ...], why: str) -> None:
    if info.shape != shape:
        raise CheckpointError(f"{info.file}: {info.name} must be {list(shape)} {why}, got {list(info.shape)}")


# ---- GPTQ and AWQ ---------------------------------------------------------------------------------------------------


def _gptq_settings(where: Path, method: str, settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """bits, group_size, what is added to stored zero points."""
    bits: Any = settings.get("bits", settings.get("w_bit"))
    group_size: Any = settings.get("group_size", settings.get("q_group_size"))
    known = (4,) if method == "awq" else _GPTQ_BITS
    contract = f"one of {', '.join(map(str, known))} for {method}"
    _setting(where, "bits", bits, _is_int(bits) and bits in known, contract)
    _setting(where, "group_size", group_size, _is_group_size(group_size), "an integer from 1 to 2**20, or -1")
    if method == "awq":
        version = settings.get("version", settings.get("format", "gemm"))
        _setting(where, "version", version, str(version).lower() == "gemm", "'gemm'")
        return bits, group_size, 0
    kind = settings.get("checkpoint_format", settings.get("format")) or "gptq"
    _setting(where, "checkpoint_format", kind, kind in ("gptq", "gptq_v2"), "'gptq' or 'gptq_v2'")
    return bits, group_size, 0 if kind == "gptq_v2" else 1


def _gptq_weight(
    method: str, module: str, found: Mapping[str, TensorInfo], bits: int, group_size: int, offset: int
) -> PackedWeight:
    ints = (torch.int32,)
    qweight, qzeros = _tensor(module, found, "qweight", ints, 2), _tensor(module, found, "qzeros", ints, 2)
    scales = _tensor(module, found, "scales", SCALES, 2)
    G, N = scales.shape
    if method == "awq":
        K = qweight.shape[0]
        _of_shape(qweight, (K, -(-N // 8)), f"for {N} columns of scales")
    else:
        K = 32 * qweight.shape[0] // bits
        if "g_idx" in found:
            K = _tensor(module, found, "g_idx", (torch.int32, torch.int64), 1).shape[0]
            # A module of its own width: GPTQModel's "dynamic".
            bits = next((b for b in (bits, *_GPTQ_BITS) if K * b == 32 * qweight.shape[0]), bits)
        _of_shape(qweight, (K * bits // 32, N), f"for {K} rows of {bits} bits and {N} columns")
    if N * bits % 32 or (method == "gptq" and K * bits % 32) or not N or not K:
        raise CheckpointError(f"{qweight.file}: {qweight.name} must fill its words, got {K} x {N} codes of {bits} bits")
    if group_size == -1 or G == 1:
        group_size = K
    elif -(-K // group_size) != G and G and K % G == 0:
        group_size = K // G
    spec = uniform_spec(N, K, bits, group_size)
    groups = -(-K // spec.group_size)
    _of_shape(scales, (groups, N), f"for groups of {group_size}")
    _of_shape(qzeros, (groups, N * bits // 32), f"for groups of {group_size}")
    known = {key: info for key, info in found.items() if key != "g_idx" or method == "gptq"}
    return PackedWeight(module, method, spec, known, offset)


# ---- compressed-tensors ---------------------------------------------------------------------------------------------


def _ct_schemes(where: Path, settings: Mapping[str, Any]) -> list[tuple[int, int, bool]]:
    """bits, group_size (-1: a row), symmetric of every group of modules."""
    kind = settings.get("format")
    _setting(where, "format", kind, kind == "pack-quantized", "'pack-quantized'")
    for key in ("kv_cache_scheme", "transform_config"):
        _setting(where, key, settings.get(key), not settings.get(key), "null: nothing here does what it says")
    sparsity = settings.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    _setting(where, "sparsity_config", sparse, sparse == "dense", "absent or of format 'dense'")
    groups = settings.get("config_groups")
    _setting(where, "config_groups", groups, isinstance(groups, dict) and bool(groups), "groups of modules by name")
    assert isinstance(groups, dict)
    schemes = []
    for name, group in groups.items():
        key = f"config_groups.{name[:40]}"
        weights = group.get("weights") if isinstance(group, dict) else None
        _setting(where, f"{key}.weights", weights, isinstance(weights, dict), "a scheme")
        assert isinstance(weights, dict) and isinstance(group, dict)
        for other in ("input_activations", "output_activations"):
            _setting(
                where, f"{key}.{other}", group.get(other), not group.get(other), "null: only weights are quantized"
            )
        kind = group.get("format") or "pack-quantized"
        _setting(where, f"{key}.format", kind, kind == "pack-quantized", "'pack-quantized'")
        bits: Any = weights.get("num_bits")
        of, strategy = weights.get("type", "int"), weights.get("strategy")
        _setting(where, f"{key}.weights.type", of, of == "int", "'int'")
        _setting(
            where, f"{key}.weights.num_bits", bits, _is_int(bits) and bits in range(2, 9), "an integer from 2 to 8"
        )
        known = ("group", "channel")
        _setting(where, f"{key}.weights.strategy", strategy, strategy in known, f"one of {', '.join(known)}")
        group_size: Any = weights.get("group_size") if strategy == "group" else -1
        good = _is_group_size(group_size)
        _setting(where, f"{key}.weights.group_size", group_size, good, "an integer from 1 to 2**20, or -1")
        schemes.append((bits, group_size, weights.get("symmetric", True) is not False))
    return schemes


def _ct_weight(
    where: Path, module: str, found: Mapping[str, TensorInfo], schemes: list[tuple[int, int, bool]]
) -> PackedWeight:
    """The scheme of a module is the one that its shapes are of; names are matched by rules of that package's own."""
    packed = _tensor(module, found, "weight_packed", (torch.int32,), 2)
    shape = _tensor(module, found, "weight_shape", (torch.int64, torch.int32), 1)
    _of_shape(shape, (2,), "of N and K")
    scale = _tensor(module, found, "weight_scale", SCALES, 2)
    N, K = read_tensor(shape).tolist()
    fitting = set()
    # Before anything is computed of them: that many codes have room in the words.
    for bits, group_size, symmetric in schemes if packed.shape[0] == N and 0 < K <= 32 * packed.shape[1] else ():
        spec = uniform_spec(N, K, bits, group_size)
        if packed.shape[1] == _C.words_per_row(K, bits) and scale.shape == (N, -(-K // spec.group_size)):
            fitting.add((bits, min(spec.group_size, K), symmetric))
    if len(fitting) != 1:
        got = f"weight_packed {list(packed.shape)}, weight_scale {list(scale.shape)}, weight_shape {[N, K]}"
        count = "none" if not fitting else "more than one"
        raise CheckpointError(
            f"{packed.file}: {module} must have the shapes of one scheme of {where}, got {count}: {got}"
        )
    bits, group_size, symmetric = fitting.pop()
    per_word, words = 32 // bits, packed.shape[1]
    if 32 % bits and words > 1 and words == -(-K // per_word):
        raise CheckpointError(
            f"{packed.file}: {packed.name} must show how its codes are packed, got {words} words of {K} codes of "
            f"{bits} bits, which may be a stream (compressed-tensors >= 0.18) or {per_word} to a word"
        )
    spec = uniform_spec(N, K, bits, group_size)
    if symmetric == ("weight_zero_point" in found):
        there = "there" if not symmetric else "absent"
        raise CheckpointError(f"{packed.file}: {module}.weight_zero_point must be {there}, by symmetric in {where}")
    if not symmetric:
        zero = _tensor(module, found, "weight_zero_point", (torch.int32,), 2)
        _of_shape(zero, (_C.words_per_row(N, bits), -(-K // spec.group_size)), f"for {bits} bits")
    if "weight_g_idx" in found:
        _of_shape(_tensor(module, found, "weight_g_idx", (torch.int32, torch.int64), 1), (K,), "for K columns")
    return PackedWeight(module, "compressed-tensors", spec, found)
