"""``plan.json``: which setting every fusion set gets under a budget of bits, why, and what else there was.

A person may edit it: ``choice`` of a set is what counts. What follows from it (bits, SQNR, loss, totals) is computed
again when the file is read, and the rest is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from precal_ext._version import __version__
from precal_ext.checkpoint import MAX_SHARD_BYTES, CheckpointError, TensorInfo, read_config, read_index
from precal_ext.config import MODULE_FIELDS, QuantizeConfig
from precal_ext.distortion import Setting, planned_sets, weights_of
from precal_ext.forecast import Figure, Forecast
from precal_ext.headers import read_object
from precal_ext.measure import sqnr_db
from precal_ext.plan import Job, Plan, plan_quantization
from precal_ext.qtensor import WeightSpec

PLAN_VERSION = 1
MAX_PLAN_BYTES, MAX_PLAN_ITEMS = 256_000_000, 2**25
_EXPERT = re.compile(r"experts\\\.\d+\\\.")


@dataclass(frozen=True)
class Option:
    """A setting of a set, as measured.

    Args:
        error: t^2, relative squared error, mean over the set's weights; worst: the largest of its matrices.
        loss: sensitivity * error; in nats per token with a text.
    """

    setting: Setting
    bits_per_weight: float
    error: float
    worst: float
    loss: float

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(1.0, self.error)

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.setting),
            "bits_per_weight": round(self.bits_per_weight, 6),
            "error": rounded(self.error),
            "worst": rounded(self.worst),
            "loss": rounded(self.loss),
        }


@dataclass(frozen=True)
class PlannedSet:
    """A fusion set.

    Args:
        sensitivity: a_l, loss per unit of relative squared error.
        alternatives: what it can have, none of them beaten by another of no more bits; the choice may be another one.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    sensitivity: float
    choice: Setting
    reason: str
    alternatives: tuple[Option, ...]

    @property
    def chosen(self) -> Option | None:
        """The choice as measured; None for one that nobody has measured."""
        return next((o for o in self.alternatives if o.setting == self.choice), None)

    def to_dict(self) -> dict[str, Any]:
        measured = self.chosen
        return {
            "set": self.name,
            "modules": list(self.modules),
            "weights": self.weights,
            "sensitivity": rounded(self.sensitivity),
            "choice": dataclasses.asdict(self.choice),
            "bits_per_weight": None if measured is None else measured.bits_per_weight,
            "sqnr_db": None if measured is None or measured.error == 0 else round(measured.sqnr_db, 3),
            "loss": None if measured is None else rounded(measured.loss),
            "reason": self.reason,
            "alternatives": [option.to_dict() for option in self.alternatives],
        }


@dataclass(frozen=True)
class BitPlan:
    """Settings for every fusion set of one model under a budget.

    Args:
        model: name of its directory; digest: ``model_digest`` of it.
        target_bits: stored bits per weight of all planned sets together, at most.
        settings: what the sets share; its bits, group_size and c do not count.
        tensor_parallel: slices that every choice can be cut into.
        request: what was asked for, to know the same question again: text, candidates, limits.
        estimate: bytes of the files, bytes of memory, seconds of ``quantize``, when the plan was made.
        forecast: of the loss, by ``outlook.forecast_plan``; a file whose choices were edited since has none.
    """

    model: str
    digest: str
    target_bits: float
    settings: QuantizeConfig
    tensor_parallel: int
    request: Mapping[str, Any]
    sets: tuple[PlannedSet, ...]
    estimate: Mapping[str, float] = field(default_factory=dict, compare=False)
    source: str = field(default="plan.json", compare=False)
    forecast: Forecast | None = field(default=None, compare=False)

    # ---- what it means ----

    def config(self) -> QuantizeConfig:
        """The settings of the whole model: those of most weights, and an override for every choice."""
        counts: Counter[Setting] = Counter()
        for s in self.sets:
            counts[s.choice] += s.weights
        common = max(counts, key=lambda setting: (counts[setting], -list(counts).index(setting)))
        base = dataclasses.replace(self.settings, overrides={})
        whole = {setting: _fields(setting.config(base._with({}))) for setting in counts}
        overrides = {}
        for setting, fields in whole.items():
            names = [name for s in self.sets if s.choice == setting for name in s.modules]
            overrides[_pattern(names)] = fields
        return dataclasses.replace(base, **whole[common], overrides=overrides)

    @property
    def sensitivities(self) -> dict[str, float]:
        """a_l by set."""
        return {s.name: s.sensitivity for s in self.sets}

    @property
    def with_text(self) -> bool:
        return self.request.get("text") is not None

    @property
    def loss(self) -> float:
        """Predicted: sum of a_l t_l^2; NaN where a choice was not measured. In nats per token with a text, else the
        mean relative squared error."""
        return math.fsum(s.chosen.loss if s.chosen else math.nan for s in self.sets)

    @property
    def error(self) -> float:
        """Mean relative squared error over the planned weights."""
        weights = sum(s.weights for s in self.sets)
        return math.fsum(s.weights * (s.chosen.error if s.chosen else math.nan) for s in self.sets) / weights

    def summary(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        total = self.loss
        shares = {s.name: s.chosen.loss / total if s.chosen and total > 0 else None for s in self.sets}
        return {
            "target_bits": self.target_bits,
            "text": (self.request.get("text") or {}).get("name"),
            "loss": None if math.isnan(total) else rounded(total),
            "sets": {
                s.name: {"cost": None if (share := shares[s.name]) is None else rounded(share), "reason": s.reason}
                for s in self.sets
            },
        }

    def record(self) -> dict[str, Any]:
        """What an unfinished run and a report remember of it; without the estimate, which is of a machine, and the
        forecast, which may depend on it in a last digit."""
        document = {**dataclasses.replace(self, forecast=None).to_dict(), "totals": {}}
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        return {"digest": digest, "document": document, "summary": self.summary()}

    def check(self, plan: Plan) -> None:
        """Hold it against the model, as ``plan_quantization`` with ``config()`` sees it.

        Raises:
            CheckpointError: it is another model, sets or modules are not its own, or the choices exceed the budget.
        """
        expected = _digest(plan.model_config, {job.info.name: job.info for job in plan.jobs if job.source is None})
        if self.digest != expected:
            self._refuse("digest", f"that of {plan.model}, {expected[:12]}...", self.digest[:12] + "...")
        there = planned_sets(plan)
        ours = {s.name: s for s in self.sets}
        for name in there.keys() - ours.keys():
            self._refuse("sets", f"all of the model's, {name} too", "none of that name")
        for name in ours.keys() - there.keys():
            self._refuse("sets", "those of the model", f"an unknown one, {name}")
        for name, members in there.items():
            self._check_set(ours[name], members)
        bits = sum(job.spec.stored_bits() - 128 for jobs in there.values() for job in jobs if job.spec is not None)
        mean = bits / sum(weights_of(jobs) for jobs in there.values())
        if mean > self.target_bits * (1 + 1e-12):
            contract = f"at least what the choices take, {math.ceil(mean * 1e4) / 1e4:.4f} bits per weight"
            self._refuse("target_bits", f"{contract} (or choose less for a set)", self.target_bits)

    def _check_set(self, s: PlannedSet, members: Sequence[Job]) -> None:
        names = [job.module for job in members]
        if sorted(s.modules) != sorted(names):
            wrong = sorted(set(s.modules) ^ set(names)) or ["one twice"]
            self._refuse(f"modules of {s.name}", f"{', '.join(names[:4])}", f"a difference in {', '.join(wrong[:4])}")
        if s.weights != weights_of(members):
            self._refuse(f"weights of {s.name}", str(weights_of(members)), s.weights)
        own = s.choice.config(self.settings._with({}))
        for job in members:  # names that are the end of another's, or slices that need smaller groups
            if job.spec is not None and job.spec != WeightSpec.from_config(job.spec.N, job.spec.K, own):
                self._refuse(f"choice of {s.name}", f"what {job.module} can have here", f"{s.choice}")

    def _refuse(self, what: str, contract: str, got: Any) -> None:
        refuse(self.source, what, contract, got)

    # ---- the file ----

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``from_dict`` gives the same plan back."""
        total = self.loss
        totals = {"loss": None if math.isnan(total) else rounded(total), **self.estimate}
        settings = self.settings.to_dict()
        for name in ("overrides", "bits", "group_size", "c"):
            del settings[name]
        known = self.forecast
        foreseen = {} if known is None else {"forecast": {**known.to_dict(), "choices": self._choices()}}
        return {
            "plan_version": PLAN_VERSION,
            "precal_version": __version__,
            "model": self.model,
            "digest": self.digest,
            "target_bits": self.target_bits,
            "tensor_parallel": self.tensor_parallel,
            "request": dict(self.request),
            "settings": settings,
            "totals": totals,
            **foreseen,
            "sets": [s.to_dict() for s in self.sets],
        }

    def _choices(self) -> str:
        """A digest of what a forecast is of."""
        chosen = [self.settings.to_dict(), sorted((s.name, str(s.choice), s.sensitivity) for s in self.sets)]
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """A line per alternative, so that there is something to read and to edit."""
        data = self.to_dict()
        sets = data.pop("sets")
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in data.items()]
        blocks = []
        for s in sets:
            rows = ",\n".join("    " + json.dumps(option) for option in s.pop("alternatives"))
            head = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in s.items())
            blocks.append(f'  {{\n{head},\n   "alternatives": [\n{rows}\n   ]\n  }}')
        return "\n".join(["{", *lines, ' "sets": [', ",\n".join(blocks), " ]", "}"]) + "\n"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read a plan; it may have been edited, and is not trusted.

        Raises:
            CheckpointError: the file cannot be read, or a field breaks its contract.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(
                f"{path}: must be a file made by `precal plan`, got {'no file' if path.exists() else 'nothing there'}"
            )
        return cls.from_dict(read_object(path, MAX_PLAN_BYTES, MAX_PLAN_ITEMS), path.name)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "plan") -> BitPlan:
        """Raises CheckpointError: a field breaks its contract."""
        get = _Reader(source, "", data)
        version = get("plan_version", int, str(PLAN_VERSION), lambda v: v == PLAN_VERSION)
        assert version == PLAN_VERSION
        settings = get("settings", dict, "an object of settings")
        for name in ("overrides", "bits", "group_size", "c"):
            if name in settings:
                refuse(source, "settings", f"without {name}, which every set chooses", settings[name])
        try:
            config = QuantizeConfig.from_dict(settings)
        except ValueError as error:
            raise CheckpointError(f"{source}: settings must be good, got {error}") from None
        if config.recipe != "precal":
            refuse(source, "settings recipe", "'precal'", config.recipe)
        planned = [_read_set(source, i, item, config) for i, item in enumerate(get("sets", list, "a list of sets"))]
        if not planned:
            refuse(source, "sets", "at least one set", "none")
        for what, names in (
            ("set", [s.name for s in planned]),
            ("module", [name for s in planned for name in s.modules]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                refuse(source, "sets", f"each {what} once", f"{twice[0]} again")
        totals = get("totals", dict, "an object")
        estimate = {k: v for k, v in totals.items() if k != "loss"}
        if not all(_is_number(v) for v in estimate.values()):
            refuse(source, "totals", "numbers", totals)
        get("precal_version", str, "the version that made it")
        plan = cls(
            model=get("model", str, "the name of a model"),
            digest=get("digest", str, "64 hexadecimal digits", lambda v: re.fullmatch("[0-9a-f]{64}", v) is not None),
            target_bits=float(get("target_bits", float, "a number > 0", lambda v: v > 0)),
            settings=config,
            tensor_parallel=get("tensor_parallel", int, "an integer >= 1", lambda v: v >= 1),
            request=get("request", dict, "an object"),
            sets=tuple(planned),
            estimate=estimate,
            source=source,
        )
        text = plan.request.get("text")
        if text is not None and not (isinstance(text, dict) and isinstance(text.get("name"), str)):
            refuse(source, "request text", "an object with a name, or null", text)
        if "forecast" in data:  # plans of earlier versions, and those without a text, have none
            foreseen = get("forecast", dict, "an object")
            known, choices = _read_forecast(source, foreseen)
            if choices == plan._choices():
                plan = dataclasses.replace(plan, forecast=known)
        get.no_more()
        return plan


def plan_as_chosen(
    model: str | Path,
    out: str | Path,
    bits: BitPlan,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tensor_parallel: int = 1,
) -> Plan:
    """``plan_quantization`` with the settings of a plan, which must be one for this model.

    Raises:
        CheckpointError: as there, and as ``BitPlan.check``.
    """
    slices = max(tensor_parallel, bits.tensor_parallel)
    plan = plan_quantization(model, out, bits.config(), max_shard_bytes=max_shard_bytes, tensor_parallel=slices)
    bits.check(plan)
    return dataclasses.replace(plan, planned=bits.record())


def rounded(value: float) -> float:
    """Six digits: more are noise, and a sensitivity's last bits may depend on the number of threads."""
    return float(f"{value:.6g}")


def refuse(source: str, what: str, contract: str, got: Any) -> None:
    text = got if isinstance(got, str) else repr(got)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:200])
    raise CheckpointError(f"{source}: {what} must be {contract}, got {text}")


def model_digest(model: str | Path) -> str:
    """SHA-256 of a model's config and of the names, dtypes and shapes of its tensors, hexadecimal."""
    return _digest(read_config(Path(model)), read_index(Path(model)))


def _digest(config: Mapping[str, Any], index: Mapping[str, TensorInfo]) -> str:
    tensors = sorted([name, str(info.dtype), list(info.shape)] for name, info in index.items())
    return hashlib.sha256(json.dumps([config, tensors], sort_keys=True).encode()).hexdigest()


def _fields(config: QuantizeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in MODULE_FIELDS}


def _pattern(modules: Sequence[str]) -> str:
    """A regular expression for these modules, in a model that may put its prefix before a checkpoint's names; the
    experts of a layer, which share everything, are one name."""
    names = dict.fromkeys(_EXPERT.sub(r"experts\\.\\d+\\.", re.escape(name)) for name in modules)
    return rf"^(?:\w+\.)?(?:{'|'.join(names)})$"


# ---- reading --------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


class _Reader:
    """Takes the fields of an object one by one, each held against its contract."""

    def __init__(self, source: str, where: str, data: Any) -> None:
        self._source, self._where = source, where
        if not isinstance(data, Mapping):
            refuse(source, where or "the file", "an object", data)
        self._data, self._seen = data, set[str]()

    def __call__(self, name: str, kind: type, contract: str, good: Callable[[Any], bool] = lambda v: True) -> Any:
        self._seen.add(name)
        if name not in self._data:
            refuse(self._source, self._name(name), contract, "nothing")
        value = self._data[name]
        right = _is_number(value) if kind is float else isinstance(value, kind) and not isinstance(value, bool)
        if not right or not good(value):
            refuse(self._source, self._name(name), contract, value)
        return value

    def skip(self, *names: str) -> None:
        """Fields that follow from others."""
        self._seen.update(names)

    def no_more(self) -> None:
        unknown = sorted(set(self._data) - self._seen)
        if unknown:
            refuse(
                self._source,
                self._where or "fields",
                f"without other fields than {', '.join(sorted(self._seen))}",
                unknown[0],
            )

    def _name(self, name: str) -> str:
        return f"{name} of {self._where}" if self._where else name


def _read_setting(source: str, where: str, get: _Reader, config: QuantizeConfig) -> Setting:
    bits = get("bits", int, "an integer from 2 to 8")
    setting = Setting(bits, get("group_size", int, "an integer"), get("c", int, "an integer"))
    try:
        setting.config(config._with({}))
    except ValueError as error:
        raise CheckpointError(f"{source}: {where} must be settings of the recipe, got {error}") from None
    return setting


def _read_set(source: str, i: int, data: Any, config: QuantizeConfig) -> PlannedSet:
    get = _Reader(source, f"sets[{i}]", data)
    name = get("set", str, "the name of a fusion set", bool)
    get = _Reader(source, f"set {name}", data)
    modules = get("modules", list, "a list of names", lambda v: bool(v) and all(isinstance(m, str) for m in v))
    choice = _Reader(source, f"choice of {name}", get("choice", dict, "an object with bits, group_size and c"))
    chosen = _read_setting(source, f"choice of {name}", choice, config)
    choice.no_more()
    sensitivity = float(get("sensitivity", float, "a number >= 0", lambda v: v >= 0))
    options = []
    for k, item in enumerate(get("alternatives", list, "a list")):
        where = f"alternatives[{k}] of {name}"
        option = _Reader(source, where, item)
        setting = _read_setting(source, where, option, config)
        bits, error, worst = (
            float(option(f, float, "a number >= 0", lambda v: v >= 0)) for f in ("bits_per_weight", "error", "worst")
        )
        option.skip("loss")
        option.no_more()
        options.append(Option(setting, bits, error, worst, sensitivity * error))
    found = PlannedSet(
        name,
        tuple(modules),
        get("weights", int, "an integer >= 1", lambda v: v >= 1),
        sensitivity,
        chosen,
        get("reason", str, "a text"),
        tuple(options),
    )
    get("set", str, "a name")
    get.skip("bits_per_weight", "sqnr_db", "loss")
    get.no_more()
    return found


def _read_forecast(source: str, data: Mapping[str, Any]) -> tuple[Forecast, str]:
    """And the digest of the choices that it is of."""
    get = _Reader(source, "forecast", data)

    def read(name: str) -> Figure:
        figure = _Reader(source, f"forecast {name}", get(name, dict, "an object"))
        rise, low, high = (
            float(figure(f"{k}_nats", float, "a number >= 0", lambda v: v >= 0)) for k in ("rise", "low", "high")
        )
        outside = figure("outside", list, "a list of names", lambda v: all(isinstance(n, str) for n in v))
        figure.no_more()
        return Figure(rise, low, high, tuple(outside))

    found = Forecast(
        get("text", str, "the name of a file"),
        get("tokens", int, "an integer >= 1", lambda v: v >= 1),
        float(get("nll_nats", float, "a number >= 0", lambda v: v >= 0)),
        get("runs", int, "an integer >= 1", lambda v: v >= 1),
        get("used", str, "predictor or theorem", lambda v: v in ("predictor", "theorem")),
        read("predictor"),
        read("theorem"),
    )
    choices = get("choices", str, "64 hexadecimal digits", lambda v: re.fullmatch("[0-9a-f]{64}", v) is not None)
    get.no_more()
    return found, choices
