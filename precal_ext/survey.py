"""A quantized directory as it lies on disk: its settings, tensors, recorded figures, and a row per weight."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext.checkpoint import CheckpointError, TensorInfo, read_config, read_index, read_json, read_tensor
from precal_ext.config import ModelFormat, QuantizeConfig, same_experts
from precal_ext.measure import Figures, measure, sqnr_db
from precal_ext.model import header_problems, read_format
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.report import REPORT_NAME
from precal_ext.select import is_head
from precal_ext.weights import read_weight

# Last parts of the names by which a weight is known to be quantized.
KEYS = frozenset(
    key
    for config in (QuantizeConfig(), QuantizeConfig(recipe="paper"))
    for key in WeightSpec.from_config(1, 1, config).tensors()
)
# Some 300 bytes and 20 commas a tensor.
MAX_REPORT_BYTES, MAX_REPORT_ITEMS = 128_000_000, 2**23
_INT = re.compile(r"\d+")


@dataclass(frozen=True)
class Planned:
    """Why a weight has its settings: the share of its fusion set in the predicted loss, None if unknown, and words."""

    cost: float | None
    reason: str


@dataclass(frozen=True)
class Recorded:
    """``precal_report.json``, checked; ``figures``, ``shapes`` and ``planned`` by tensor name in the original."""

    figures: Mapping[str, Figures]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    sha256: Mapping[str, str]
    summary: Mapping[str, Any]
    notes: Sequence[str]
    calibration: Mapping[str, Any]  # empty when no data was used
    planned: Mapping[str, Planned] = field(default_factory=dict)


def read_recorded(folder: Path) -> Recorded | None:
    """What the directory's report says, None without one.

    Raises:
        CheckpointError: it is no report of precal.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    data = read_json(path, MAX_REPORT_BYTES, MAX_REPORT_ITEMS)

    def refuse(what: str, got: Any) -> CheckpointError:
        return CheckpointError(f"{path}: {what}, got {str(got)[:80]!r}; it was not written by precal")

    def each(kind: type, key: str) -> Any:
        found = data.get(key, kind())
        if not isinstance(found, kind):
            raise refuse(f"{key} must be a {kind.__name__}", found)
        return found

    figures, shapes, dtypes, planned = {}, {}, {}, {}
    sets = _planned_sets(each(dict, "plan"), refuse)
    for item in each(list, "tensors"):
        shape = item.get("shape") if isinstance(item, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise refuse("tensors must hold objects with a shape", item)
        name, dtype = item.get("tensor"), item.get("dtype")
        if not isinstance(name, str) or not isinstance(dtype, str):
            raise refuse("tensors must have a name and a dtype", item)
        shapes[name], dtypes[name] = tuple(shape), dtype
        if "figures" in item:
            figures[name] = _figures(item["figures"], refuse)
            if str(item.get("fusion_set")) in sets:
                planned[name] = sets[str(item["fusion_set"])]
    digests = each(dict, "sha256")
    if not all(isinstance(value, str) for value in digests.values()):
        raise refuse("sha256 must map names to digests", digests)
    notes = [str(note) for note in each(list, "notes")]
    return Recorded(figures, shapes, dtypes, digests, each(dict, "summary"), notes, each(dict, "calibration"), planned)


def _planned_sets(data: Mapping[str, Any], refuse: Any) -> dict[str, Planned]:
    found = {}
    sets = data.get("sets", {})
    if not isinstance(sets, dict):
        raise refuse("plan must hold sets", sets)
    for name, item in sets.items():
        cost, reason = (item.get("cost"), item.get("reason")) if isinstance(item, dict) else (None, None)
        if not isinstance(reason, str) or not (cost is None or _is_number(cost)):
            raise refuse("plan must hold sets with a cost and a reason", item)
        found[name] = Planned(cost, reason)
    return found


def _figures(data: Any, refuse: Any) -> Figures:
    names = [f.name for f in dataclasses.fields(Figures)]
    if not isinstance(data, dict) or not all(data.get(n) is None or _is_number(data[n]) for n in names):
        raise refuse(f"figures must be numbers: {', '.join(names)}", data)
    # JSON has no infinity: null is an exact tensor, or one without power.
    exact = data.get("noise") == 0
    values = {n: float(data[n]) if data.get(n) is not None else math.nan for n in names}
    if exact:
        values["sqnr_db"] = math.inf
    return Figures(**values)


def _is_number(value: Any) -> bool:
    # Also refuses NaN, which Python's reader takes, and integers beyond float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


@dataclass(frozen=True)
class Stored:
    """A directory whose config and headers were read, and nothing else.

    Args:
        modules: quantized module -> last parts of the names of its tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    format: ModelFormat
    index: Mapping[str, TensorInfo]
    modules: Mapping[str, frozenset[str]]
    recorded: Recorded | None

    @classmethod
    def open(cls, folder: Path) -> Stored:
        """Raises CheckpointError: it cannot be read, or was not quantized by precal."""
        fmt = read_format(folder)
        index = read_index(folder)
        return cls(folder, read_config(folder), fmt, index, quantized_modules(index), read_recorded(folder))

    @cached_property
    def dense(self) -> list[TensorInfo]:
        """Tensors that belong to no quantized weight."""
        return [i for n, i in self.index.items() if _split(n)[0] not in self.modules or _split(n)[1] not in KEYS]

    def settings(self, module: str) -> QuantizeConfig:
        """Settings of a module by its name in the checkpoint, which may lack the base model's prefix, or have it."""
        return self.format.for_module(module, self._prefix(module))

    def is_conv1d(self, module: str) -> bool:
        """Whether its dense weight is [K, N]."""
        names = self.format.conv1d_modules
        return any(n == module or n.endswith("." + module) or module.endswith("." + n) for n in names)

    @cached_property
    def _overridden(self) -> list[str]:
        return [same_experts(name) for name in self.format.module_overrides]

    def _prefix(self, module: str) -> str:
        module = same_experts(module)
        for other in self._overridden:
            if other.endswith("." + module):
                return other[: -len(module) - 1]
            if module.endswith("." + other):
                return module[: -len(other) - 1]
        return ""

    def info(self, module: str, key: str) -> TensorInfo:
        found = self.index.get(f"{module}.{key}")
        if found is None:
            raise CheckpointError(
                f"{self.folder}: {module}.{key} must be there, got nothing; the checkpoint is incomplete"
            )
        return found

    def spec(self, module: str) -> WeightSpec:
        """Spec of a weight by its settings and its ``weight_shape``, which is held against the size of its codes
        before anything is computed from it.

        Raises:
            CheckpointError: tensors are missing, or have shapes that cannot belong together.
        """
        settings = self.settings(module)
        shape, packed = self.info(module, "weight_shape"), self.info(module, "weight_packed")
        if shape.dtype != torch.int64 or shape.shape != (2,):
            got = f"{shape.dtype} {list(shape.shape)}"
            raise CheckpointError(f"{shape.file}: {shape.name} must be torch.int64 [2], got {got}")
        N, K = read_tensor(shape).tolist()
        words = packed.shape[1] if len(packed.shape) == 2 else -1
        if K < 0 or len(packed.shape) != 2 or packed.shape[0] != N or -(-K * settings.bits // 32) != words:
            raise CheckpointError(
                f"{packed.file}: {packed.name} must be torch.int32 [N, ceil(K * {settings.bits} / 32)] for "
                f"{settings.bits} bits and weight_shape {[N, K]}, got {packed.dtype} {list(packed.shape)}"
            )
        return WeightSpec.from_config(N, K, settings)

    def problems(self, module: str, spec: WeightSpec) -> Iterator[str]:
        """Where its headers differ from what the settings imply."""
        return header_problems(module, set(self.modules[module]), spec, self.index)

    def read(self, module: str) -> QTensor:
        """The tensors of one weight, not yet validated.

        Raises:
            CheckpointError: its headers do not fit its settings.
        """
        spec = self.spec(module)
        for problem in self.problems(module, spec):
            raise CheckpointError(problem)
        return QTensor(spec, {key: read_tensor(self.info(module, key)) for key in spec.tensors()})

    def read_valid(self, module: str) -> QTensor:
        """Raises CheckpointError: headers or values are not as the format says."""
        q = self.read(module)
        try:
            q.validate(module)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        return q


def _split(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    return module, leaf


def quantized_modules(names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Module -> last parts of its tensors' names, for modules with tensors of a quantized weight, in natural order."""
    found: dict[str, set[str]] = {}
    for name in names:
        module, leaf = _split(name)
        found.setdefault(module, set()).add(leaf)
    return {m: frozenset(keys) for m, keys in sorted(found.items(), key=lambda i: natural(i[0])) if keys & KEYS}


def natural(name: str) -> tuple[tuple[int, str, int], ...]:
    """Sort key under which layer 10 comes after layer 2."""
    parts = re.split(r"(\d+)", name)
    return tuple((1, "", int(p)) if p.isdecimal() and len(p) < 19 else (0, p, 0) for p in parts)


def take_rows(q: QTensor, limit: int) -> tuple[QTensor, Tensor]:
    """About ``limit`` weights of a tensor, evenly spaced rows, and which rows they are."""
    rows = max(1, min(q.spec.N, limit // max(1, q.spec.K)))
    chosen = torch.arange(rows) * q.spec.N // rows
    spec = dataclasses.replace(q.spec, N=rows)
    tensors = {
        key: t if key == "weight_grid" else t[chosen].contiguous()
        for key, t in q.tensors.items()
        if key != "weight_shape"
    }
    tensors["weight_shape"] = torch.tensor([rows, spec.K], dtype=torch.int64)
    return QTensor(spec, tensors), chosen


class Original:
    """The model that a directory was made from, for comparison."""

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        if config.get("quantization_config"):
            raise CheckpointError(f"{folder}: must be the model before quantization, got a quantized one")
        self.folder, self.index = folder, read_index(folder)

    def weight(self, module: str, spec: WeightSpec, conv1d: bool = False) -> Tensor:
        """The weight as the quantizer saw it; ``conv1d``: it is [K, N] here.

        Raises:
            CheckpointError: it is not there, or has another shape.
        """
        info = self.index.get(module + ".weight")
        if info is None and is_head(module):  # one that shares its weight with the embedding
            same = [i for i in self.index.values() if i.shape == (spec.N, spec.K)]
            info = same[0] if len(same) == 1 else None
        if info is None:
            raise CheckpointError(f"{self.folder}: must be the original of this model, got no {module}.weight in it")
        want = [spec.K, spec.N] if conv1d else [spec.N, spec.K]
        if list(info.shape) != want:
            raise CheckpointError(f"{info.file}: {info.name} must have shape {want}, got {list(info.shape)}")
        if info.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise CheckpointError(f"{info.file}: {info.name} must be a floating-point tensor, got {info.dtype}")
        return read_weight(info, conv1d)


# ---- a row per weight -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One quantized weight.

    Args:
        kind: what all layers have one of, ``mlp.down_proj``; layer: which, -1 outside of layers.
        alpha: share of weights kept as outliers.
        sqnr_db, kl_nats, power, noise: recorded or measured; NaN when neither is to be had, sqnr_db inf when exact.
        planned: by the plan that its directory remembers.
    """

    tensor: str
    kind: str
    layer: int
    N: int
    K: int
    bits: int
    group_size: int
    c: int
    grid: str
    trellis: bool | None  # None: some of them
    alpha: float
    sqnr_db: float
    kl_nats: float
    bits_per_weight: float
    power: float
    noise: float
    planned: Planned | None = None

    @property
    def module(self) -> str:
        return self.tensor.removesuffix(".weight")

    @property
    def weights(self) -> int:
        return self.N * self.K

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: null where there is no finite number."""
        data = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def kind_and_layer(module: str) -> tuple[str, int]:
    """``model.layers.3.mlp.experts.7.w1`` -> ``mlp.experts.*.w1``, 3."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if _INT.fullmatch(part) and len(part) < 10), None)
    if at is None or at == len(parts) - 1:
        return module, -1
    return ".".join("*" if _INT.fullmatch(part) else part for part in parts[at + 1 :]), int(parts[at])


def rows(stored: Stored, original: Original | None = None) -> list[Row]:
    """A row per quantized weight, in natural order.

    Figures are those of the directory's report; with ``original`` they are measured.

    Raises:
        CheckpointError: a weight's headers or values are not as the format says, or the original is another model.
    """
    found = []
    for module in stored.modules:
        settings, spec = stored.settings(module), stored.spec(module)
        for problem in stored.problems(module, spec):
            raise CheckpointError(problem)
        nothing = Figures(math.nan, math.nan, spec.bits_per_weight(), math.nan, math.nan, math.nan)
        figures = stored.recorded.figures.get(module + ".weight", nothing) if stored.recorded else nothing
        if original is not None:
            w = original.weight(module, spec, stored.is_conv1d(module))
            figures = measure(w, stored.read_valid(module))
        kind, layer = kind_and_layer(module)
        found.append(
            Row(
                module + ".weight",
                kind,
                layer,
                spec.N,
                spec.K,
                spec.bits,
                spec.group_size,
                spec.c,
                str(settings.grid),
                spec.trellis,
                figures.salient_share,
                figures.sqnr_db,
                figures.kl_nats,
                spec.bits_per_weight(),
                figures.power,
                figures.noise,
                stored.recorded.planned.get(module + ".weight") if stored.recorded else None,
            )
        )
    if not found:
        raise CheckpointError(f"{stored.folder}: must hold quantized weights, got none")
    return found


def total(found: Sequence[Row]) -> Row:
    """All of them pooled: SQNR of the summed powers, the rest averaged by number of weights."""
    weights = sum(row.weights for row in found)

    def mean(values: Iterable[float]) -> float:
        return sum(v * r.weights for v, r in zip(values, found, strict=True)) / max(1, weights)

    def only(values: Iterable[Any], mixed: Any) -> Any:
        distinct = set(values)
        return distinct.pop() if len(distinct) == 1 else mixed

    power, noise = sum(r.power for r in found), sum(r.noise for r in found)
    return Row(
        "total",
        "",
        -1,
        weights,
        1,
        only((r.bits for r in found), 0),
        only((r.group_size for r in found), 0),
        only((r.c for r in found), 0),
        only((r.grid for r in found), "mixed"),
        only((r.trellis for r in found), None),
        mean(r.alpha for r in found),
        sqnr_db(power, noise),
        mean(r.kl_nats for r in found),
        mean(r.bits_per_weight for r in found),
        power,
        noise,
    )


def why(row: Row) -> str:
    """The end of a line about a weight: what its set costs of the predicted loss, and the plan's reason."""
    if row.planned is None:
        return ""
    cost = "-" if row.planned.cost is None else f"{row.planned.cost:.1%}"
    return f" {cost:>6}  {printable(row.planned.reason)}"


COLUMNS = ("tensor", "shape", "bits", "group", "c", "alpha", "sqnr", "kl", "bpw")
_FIELDS = {"group": "group_size", "sqnr": "sqnr_db", "kl": "kl_nats", "bpw": "bits_per_weight"}


def sort_rows(found: Sequence[Row], column: str, reverse: bool = False) -> list[Row]:
    """By a column of ``COLUMNS``; equal ones stay in order, what has no figure comes last either way."""

    def value(row: Row) -> Any:
        if column == "tensor":
            return natural(row.tensor)
        return row.weights if column == "shape" else getattr(row, _FIELDS.get(column, column))

    def missing(row: Row) -> bool:
        v = value(row)
        return isinstance(v, float) and math.isnan(v)

    known = sorted((r for r in found if not missing(r)), key=value, reverse=reverse)
    return known + [r for r in found if missing(r)]


def printable(text: str) -> str:
    """Text of a checkpoint for a terminal: control characters, which could move its cursor, as escapes."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)
