"""What to do with a model: one frozen, validated object that travels through JSON unchanged."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from precal_ext import _C

RECIPES = ("precal", "paper", "rtn")
GRIDS = ("fitted", "constant", "uniform")
SCOPES = ("tensor", "row", "group")
NORMALIZE = ("none", "row", "group")
HEAD_BITS = (8, 4)

_GROUP_SIZE = {"precal": 64, "paper": 128, "rtn": 128}
# Fields that a module may have of its own; everything else belongs to the whole model.
MODULE_FIELDS = ("bits", "group_size", "c", "grid", "trellis")


def _check(field_name: str, value: Any, good: bool, contract: str) -> None:
    if not good:
        raise ValueError(f"config: {field_name} must be {contract}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not (_is_int(value) or isinstance(value, float)):
        return False
    return abs(value) <= sys.float_info.max  # also refuses NaN, and integers beyond float


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of one quantization. Fields left at None take the recipe's default.

    Args:
        recipe: "precal" (fitted grid, searched 8-bit scales, a few outliers), "paper" (the published split into two
            symmetric grids) or "rtn" (round to nearest on a symmetric uniform grid).
        bits: width of a code, 2 to 8; fast kernels exist for 3 and 4.
        group_size: columns that share a scale, >= 1 (64; paper and rtn 128). -1: the whole row.
        c: outliers in every block of 256 columns, 0 to 16 (precal 1; the others have none).
        grid: "fitted", "constant" or "uniform" (precal: fitted up to 6 bits, else uniform; the others uniform).
        trellis: twice the levels, each code choosing among those its two predecessors leave it (docs/format.md); needs
            a grid that is not uniform (true where there is one).
        fit_rounds: Lloyd-Max rounds on the histogram, 0 to 100.
        mu: weight of the KL term in the fit, >= 0 (why 0.03: docs/method.md).
        alpha, scope, normalize: share and unit of the salient weights of the paper recipe; alpha in [0, 1].
        lm_head: bits of the output head, 8 or 4, its other settings those of the model; None leaves it as it is. A head
            that shares its weight with the embedding gets one of its own, beside the dense embedding.
        include, exclude: regular expressions (``re.search`` on the module name) that add modules to the automatic
            choice or take them away; ``exclude`` wins.
        skip_nonfinite: leave a weight that holds NaN or an infinity as it is, and its fusion set with it, instead of
            refusing the model.
        overrides: regular expression -> fields of its own, any of bits, group_size, c, grid, trellis. The first that
            matches counts.
    Raises:
        ValueError: a field breaks its contract.
    """

    recipe: str = "precal"
    bits: int = 4
    group_size: int | None = None
    c: int | None = None
    grid: str | None = None
    trellis: bool | None = None
    fit_rounds: int = 1
    mu: float = 0.03
    alpha: float = 0.05
    scope: str = "tensor"
    normalize: str = "none"
    lm_head: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_nonfinite: bool = False
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        _check("recipe", self.recipe, self.recipe in RECIPES, f"one of {', '.join(RECIPES)}")
        _check("bits", self.bits, _is_int(self.bits) and 2 <= self.bits <= 8, "an integer from 2 to 8")
        if self.group_size is None:
            settle("group_size", _GROUP_SIZE[self.recipe])
        g: Any = self.group_size
        good = _is_int(g) and (g == -1 or 1 <= g <= 1 << 20)
        _check("group_size", g, good, "an integer from 1 to 2**20, or -1 for the whole row")
        if self.c is None:
            settle("c", 1 if self.recipe == "precal" else 0)
        limit = _C.MAX_CAPACITY if self.recipe == "precal" else 0
        contract = f"an integer from 0 to {limit}" + ("" if limit else f" for recipe {self.recipe}")
        c: Any = self.c
        _check("c", c, _is_int(c) and 0 <= c <= limit, contract)
        if self.grid is None:
            settle("grid", "fitted" if self.recipe == "precal" and self.bits <= 6 else "uniform")
        allowed = GRIDS if self.recipe == "precal" and self.bits <= 6 else ("uniform",)
        why = f"one of {', '.join(allowed)} for recipe {self.recipe} at {self.bits} bits"
        _check("grid", self.grid, self.grid in allowed, why)
        able = self.grid != "uniform"
        if self.trellis is None:
            settle("trellis", able)
        contract = "true or false" if able else "false with a uniform grid"
        _check("trellis", self.trellis, isinstance(self.trellis, bool) and (able or not self.trellis), contract)
        good = _is_int(self.fit_rounds) and 0 <= self.fit_rounds <= 100
        _check("fit_rounds", self.fit_rounds, good, "an integer from 0 to 100")
        _check("mu", self.mu, _is_number(self.mu) and self.mu >= 0, "a finite number >= 0")
        _check("alpha", self.alpha, _is_number(self.alpha) and 0 <= self.alpha <= 1, "a number in [0, 1]")
        _check("scope", self.scope, self.scope in SCOPES, f"one of {', '.join(SCOPES)}")
        _check("normalize", self.normalize, self.normalize in NORMALIZE, f"one of {', '.join(NORMALIZE)}")
        contract = f"one of {', '.join(map(str, HEAD_BITS))}, or none"
        good = self.lm_head is None or (_is_int(self.lm_head) and self.lm_head in HEAD_BITS)
        _check("lm_head", self.lm_head, good, contract)
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            _check(name, patterns, isinstance(patterns, (list, tuple)), "a list of regular expressions")
            settle(name, tuple(patterns))
            for pattern in patterns:
                _check_pattern(name, pattern)
        _check("skip_nonfinite", self.skip_nonfinite, isinstance(self.skip_nonfinite, bool), "true or false")
        overrides = self.overrides
        _check("overrides", overrides, isinstance(overrides, Mapping), "a mapping from pattern to fields")
        for pattern, fields in overrides.items():
            _check_pattern("overrides", pattern)
            _check_fields("overrides", pattern, fields)
        settle("overrides", {pattern: dict(fields) for pattern, fields in overrides.items()})
        for fields in self.overrides.values():
            self._with(fields)

    def _with(self, fields: Mapping[str, Any]) -> QuantizeConfig:
        changed = dict(fields)
        if changed.get("bits", self.bits) != self.bits:
            changed.setdefault("grid", None)  # its default depends on the width
        if self.trellis and (changed.get("grid", self.grid) != self.grid or "bits" in changed):
            changed.setdefault("trellis", None)  # its default depends on both
        return dataclasses.replace(self, lm_head=None, overrides={}, **changed)

    def for_module(self, name: str, head: bool = False) -> QuantizeConfig:
        """The settings of one module: the first override whose pattern is found in its name, applied; ``lm_head``
        decides the bits of an output head."""
        found = next((fields for pattern, fields in self.overrides.items() if re.search(pattern, name)), {})
        if head and self.lm_head is not None:
            found = {**found, "bits": self.lm_head}
        return self._with(found) if self.overrides or self.lm_head is not None else self

    @property
    def uniform(self) -> bool:
        return self.grid == "uniform"

    @property
    def grid_size(self) -> int:
        """Levels of the grid: 0 for a uniform one, 2**bits, or twice that with a trellis."""
        return 0 if self.uniform else 2 ** (self.bits + bool(self.trellis))

    @property
    def split(self) -> bool:
        return self.recipe == "paper"

    @property
    def scale_dtype(self) -> str:
        """8-bit scales for precal; the baselines keep the 16 bits they are published with."""
        return "e4m3" if self.recipe == "precal" else "float16"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``from_dict`` gives the same config back."""
        data = dataclasses.asdict(self)
        data["include"], data["exclude"] = list(self.include), list(self.exclude)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeConfig:
        _check("settings", data, isinstance(data, Mapping), "a mapping from field to value")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"config: fields must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
        return cls(**data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> QuantizeConfig:
        return cls.from_dict(json.loads(text))


def _check_fields(name: str, key: str, fields: Any) -> None:
    _check(f"{name}[{key!r}]", fields, isinstance(fields, Mapping), "a mapping from field to value")
    for item in fields:
        _check(f"{name}[{key!r}]", item, item in MODULE_FIELDS, f"a field out of {MODULE_FIELDS}")


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"config: {name} must hold regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"config: {name} must hold regular expressions, got {pattern!r} ({error})") from None


def variants(name: str, prefix: str) -> tuple[str, ...]:
    """A module's name as it is, and with or without the prefix of the base model."""
    if not prefix:
        return (name,)
    return name, f"{prefix}.{name}", name.removeprefix(prefix + ".")


_BLOCK = re.compile(r"[^.]+\.experts(?=\.|$)")


def same_experts(name: str) -> str:
    """A module's name with one name for the block that holds experts, which is ``mlp`` here and ``block_sparse_moe``
    there."""
    return _BLOCK.sub("*.experts", name)


# ---- quantization_config of a model's config.json -------------------------------------------------------------------

QUANT_METHOD = "precal"


@dataclass(frozen=True)
class ModelFormat:
    """What a loader must know of a quantized model: the settings of each of its modules.

    Args:
        config: settings shared by all modules.
        modules_to_not_convert: linear modules that were left as they are, by exact name.
            Experts that were left are one name together, that of the module they are in.
        module_overrides: exact module name -> fields that differ; the others are those of ``config`` as they are there.
        conv1d_modules: those whose dense weight is [K, N] in the model (transformers' ``Conv1D``); what is stored is
            [N, K], as of any linear layer.
    """

    config: QuantizeConfig
    modules_to_not_convert: tuple[str, ...] = ()
    module_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    conv1d_modules: tuple[str, ...] = ()

    def for_module(self, name: str, prefix: str = "") -> QuantizeConfig:
        """Settings of a module; ``prefix`` as in ``converts``."""
        found = next((v for v in _names_of(name, prefix) if v in self._overrides), "")
        return self._overridden(self._overrides.get(found, {}))

    def _overridden(self, fields: Mapping[str, Any]) -> QuantizeConfig:
        # Unlike the overrides of QuantizeConfig, nothing here follows from anything: a file says all of it.
        return dataclasses.replace(self.config, lm_head=None, overrides={}, **fields)

    def converts(self, name: str, prefix: str = "") -> bool:
        """Whether a linear module is quantized.

        Args:
            prefix: name under which the base model sits in the whole one ("model" in Llama): a base model loaded alone
                lacks it, and its checkpoint may.
        """
        names = _names_of(name, prefix)
        blocks = [v[: v.index("experts") + len("experts")] for v in names if "*.experts." in v]
        return not any(v in self._skipped for v in (*names, *blocks))

    @cached_property
    def _overrides(self) -> dict[str, Mapping[str, Any]]:
        return {same_experts(name): fields for name, fields in self.module_overrides.items()}

    @cached_property
    def _skipped(self) -> frozenset[str]:
        return frozenset(map(same_experts, self.modules_to_not_convert))

    def is_conv1d(self, name: str, prefix: str = "") -> bool:
        """Whether the dense weight of a module is [K, N]; ``prefix`` as in ``converts``."""
        return any(v in self.conv1d_modules for v in variants(name, prefix))

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""
        from precal_ext._version import __version__

        c = self.config
        conv1d = {"conv1d_modules": list(self.conv1d_modules)} if self.conv1d_modules else {}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": _C.FORMAT_VERSION,
            "precal_version": __version__,
            "recipe": c.recipe,
            "bits": c.bits,
            "group_size": c.group_size,
            "c": c.c,
            "grid": c.grid,
            "trellis": c.trellis,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "module_overrides": {name: dict(fields) for name, fields in self.module_overrides.items()},
            **conv1d,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelFormat:
        """Read a ``quantization_config``; it comes from a file and is not trusted.

        Raises:
            ValueError: another method, another version of the format, or a field that is absent or breaks its contract.
        """
        method: Any = data.get("quant_method")
        version: Any = data.get("format_version")
        _check("quant_method", method, method == QUANT_METHOD, f"{QUANT_METHOD!r}")
        known = _is_int(version) and 1 <= version <= _C.FORMAT_VERSION
        old = _is_int(version) and version < 1  # before the first release
        remedy = "quantize the model again" if old else "install a precal that knows this format"
        _check("format_version", version, known, f"{_C.FORMAT_VERSION}; {remedy}")
        fields = {}
        for key in ("recipe", *MODULE_FIELDS):
            # None is what QuantizeConfig takes for "the default", which may change; the meaning of a file may not.
            _check(key, data.get(key), data.get(key) is not None, "there in format version 1")
            fields[key] = data[key]
        config = QuantizeConfig(**fields)
        skipped, conv1d = (_names(data, key) for key in ("modules_to_not_convert", "conv1d_modules"))
        overrides = data.get("module_overrides") or {}
        _check("module_overrides", overrides, isinstance(overrides, Mapping), "a mapping from module name to fields")
        for name, fields in overrides.items():
            _check_fields("module_overrides", name, fields)
            for key, value in fields.items():
                _check(f"module_overrides[{name!r}]", {key: value}, value is not None, "fields with values")
        fmt = cls(config, skipped, overrides, conv1d)
        for fields in overrides.values():
            fmt._overridden(fields)
        return fmt


def _names_of(name: str, prefix: str) -> list[str]:
    return [same_experts(v) for v in variants(name, prefix)]


def _names(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = data.get(key) or []
    good = isinstance(found, (list, tuple)) and all(isinstance(name, str) for name in found)
    _check(key, found, good, "a list of module names")
    return tuple(found)
