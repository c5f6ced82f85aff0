"""What is to be done to a model, decided from headers and names before the first weight is read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from precal_ext import _C
from precal_ext._version import __version__
from precal_ext.checkpoint import (
    MAX_SHARD_BYTES,
    CheckpointError,
    ShardWriter,
    TensorInfo,
    read_config,
    read_index,
    read_rows,
    weight_files,
)
from precal_ext.config import QuantizeConfig
from precal_ext.foreign import quantized_by
from precal_ext.mixtures import is_expert
from precal_ext.packed import METHODS
from precal_ext.qtensor import WeightSpec
from precal_ext.select import Decision, LinearModules, decide, find_linears, keep_sets_of
from precal_ext.shards import fitting_groups, why_not
from precal_ext.staging import check_apart, fingerprint, read_journal
from precal_ext.weights import first_nonfinite, pieces

EXPERTS_NOTE = "expert weight, not quantized yet"
QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# What all tensors under way may take: bytes per element of the largest, whatever their dtype.
BYTES_PER_ELEMENT = 8

# Bytes that are copied in the time that quantizing one takes, roughly: what balances the shares of several processes.
COPIES_PER_QUANTIZED = 8


@dataclass(frozen=True)
class Job:
    """What happens to one tensor of the model."""

    info: TensorInfo
    decision: Decision | None  # None: not a linear weight
    spec: WeightSpec | None  # None: copied
    source: str | None = None  # another tensor of the model, whose weight it is made from: a tied head has none
    conv1d: bool = False  # the tensor is [K, N]

    @property
    def nbytes_in(self) -> int:
        """Bytes of the model that it stands for."""
        return self.info.nbytes if self.source is None else 0

    @property
    def module(self) -> str:
        return self.info.name.removesuffix(".weight")

    @property
    def outputs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors that take its place."""
        if self.spec is None:
            return {self.info.name: (self.info.dtype, self.info.shape)}
        return {f"{self.module}.{key}": value for key, value in self.spec.tensors().items()}

    @property
    def nbytes_out(self) -> int:
        return self.info.nbytes if self.spec is None else self.spec.stored_bits() // 8

    @property
    def memory(self) -> int:
        """Bytes that it takes from before it is read until it is written: the weight, its codes, the result."""
        if self.spec is None:
            return 0  # copied in small pieces
        held = min(4, self.info.dtype.itemsize) + 1 + self.spec.split
        return held * self.spec.N * self.spec.K + self.nbytes_out


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    model: Path
    out: Path
    config: QuantizeConfig
    model_config: Mapping[str, Any]
    found: LinearModules
    decisions: Sequence[Decision]
    jobs: Sequence[Job]
    max_shard_bytes: int
    known: Mapping[str, Any] = field(repr=False)  # fingerprint of the model
    nonfinite: Mapping[str, str] = field(default_factory=dict)  # modules that are kept for it -> why
    calibration: Mapping[str, Any] | None = None  # settings of the stage of ``run_plan``, if there is one
    planned: Mapping[str, Any] | None = field(default=None, repr=False)  # BitPlan.record() of the plan of its bits

    @property
    def header(self) -> dict[str, Any]:
        """What must be the same for an unfinished run to be continued."""
        return {
            "version": __version__,
            "format_version": _C.FORMAT_VERSION,
            "settings": self.config.to_dict(),
            "plan": None if self.planned is None else self.planned["digest"],
            "max_shard_size": self.max_shard_bytes,
            "calibration": self.calibration,
            "model": dict(self.known),
        }

    @property
    def untied(self) -> bool:
        """Whether an output head gets a weight of its own that shared one with the embedding."""
        return any(
            d.quantized and d.head and (d.module in self.found.tied or d.module in self.found.shared)
            for d in self.decisions
        )

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(math.prod(job.info.shape) for job in self.jobs)

    @property
    def memory_limit(self) -> int:
        """Bytes of all weights under way."""
        return BYTES_PER_ELEMENT * self.largest

    def to_tell(self) -> dict[str, Any]:
        """JSON from which another process makes the same plan, without asking or reading again (``told``)."""
        found = {"linears": self.found.to_dict(), "nonfinite": dict(self.nonfinite)}
        return {
            "model": str(self.model.absolute()),
            "out": str(self.out.absolute()),
            "header": _as_json(self.header),
            **found,
        }

    def writer(self, folder: Path) -> ShardWriter:
        outputs = {name: value for job in self.jobs for name, value in job.outputs.items()}
        elements = sum(math.prod(job.info.shape) for job in self.jobs)
        return ShardWriter(folder, outputs, self.max_shard_bytes, elements)

    def recorded(self) -> int:
        """Tensors that an unfinished run of this plan says it has finished."""
        before, records = read_journal(self.out)
        same = before is not None and all(before.get(k) == v for k, v in _as_json(self.header).items())
        return len({record.get("tensor") for record in records}) if same else 0


def plan_quantization(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tensor_parallel: int = 1,
    told: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide what ``quantize_checkpoint`` does, from headers and names alone; writes nothing.

    Args:
        tensor_parallel: every quantized weight must be cut into so many slices; groups are made smaller for it.
        told: ``to_tell`` of the plan that another process has made.
    Raises:
        CheckpointError: the input or output cannot be used.  SelectionError: it is unclear what to quantize.
    """
    config = config or QuantizeConfig()
    model, out = Path(model), Path(out)
    if not model.is_dir():
        raise CheckpointError(
            f"{model}: must be a model directory, got {'a file' if model.exists() else 'nothing there'}"
        )
    check_apart(model, out)
    model_config = read_config(model)
    existing = model_config.get("quantization_config")
    if existing:
        method = existing.get("quant_method", "unknown") if isinstance(existing, dict) else existing
        hint = "; `precal import` keeps its codes" if method in METHODS else ""
        raise CheckpointError(f"{model}: must not be quantized yet, got a model quantized by {method!r}{hint}")
    index = read_index(model)
    foreign = quantized_by(index)
    if foreign is not None:
        raise CheckpointError(f"{model}: must not be quantized yet, got {foreign[1]}, a tensor of {foreign[0]}")
    found: LinearModules | None = None
    if tensor_parallel > 1:
        found = find_linears(model, model_config, {n: i.shape for n, i in index.items()}, config)
        config = fitting_groups(_shapes(index, found.conv1d), config, tensor_parallel)
    plan = Plan(
        model, out, config, model_config, _NOTHING, (), (), max_shard_bytes, fingerprint(model, weight_files(model))
    )
    before = told or read_journal(out)[0]
    if before is not None and "linears" in before and (told or plan.recorded()):
        found = LinearModules.from_dict(before["linears"])  # asked once, when the run was begun
    elif found is None:
        found = find_linears(model, model_config, {n: i.shape for n, i in index.items()}, config)
    check_complete(model, found)
    shared = found.shared if config.lm_head is not None else {}
    heads, tied = {*found.heads, *shared}, {*found.tied, *shared}
    decisions = decide([*found.names, *shared], config, heads, tied, _model_type(model_config), found.conv1d)
    jobs = _jobs(index, {d.module: d for d in decisions}, config, shared, found.conv1d)
    nonfinite: Mapping[str, str] = {}
    if config.skip_nonfinite:
        nonfinite = told["nonfinite"] if told else _nonfinite(jobs)
        decisions = keep_sets_of(decisions, nonfinite)
        jobs = _jobs(index, {d.module: d for d in decisions}, config, shared, found.conv1d)
    for job in jobs:
        why = "" if job.spec is None else why_not(job.module, job.spec, tensor_parallel)
        if why:
            raise CheckpointError(
                f"{model}: {job.module} must be cut into {tensor_parallel} slices, got: {why}; leave it out with "
                "--exclude, or choose another size or other settings (--group-size; --outliers 0 --no-trellis has no "
                "blocks)"
            )
    if not any(job.spec for job in jobs):
        raise CheckpointError(
            f"{model}: must have linear layers to quantize, found none by {found.source}; see --include"
        )
    return dataclasses.replace(plan, found=found, decisions=decisions, jobs=jobs, nonfinite=nonfinite)


def check_complete(folder: Path, found: LinearModules) -> None:
    """Refuse a model that lacks a linear weight: who loads what is made of it would refuse it, or make one up."""
    for name in sorted(found.missing):
        raise CheckpointError(
            f"{folder}: {name}.weight must be there for the model of config.json, got nothing; download the model again"
        )


def plan_as_told(model: Path, told: Mapping[str, Any]) -> Plan:
    """The plan of another process, made again from the model as this one sees it.

    Raises:
        CheckpointError: this is another model, or another precal.
    """
    header = told["header"]
    config, shard_size = QuantizeConfig.from_dict(header["settings"]), header["max_shard_size"]
    plan = plan_quantization(model, told["out"], config, max_shard_bytes=shard_size, told=told)
    mine = _as_json(plan.header)
    for what in ("version", "format_version", "settings"):
        if mine[what] != header[what]:
            raise CheckpointError(f"precal: {what} must be that of rank 0, {header[what]}, got {mine[what]}")
    for what in ("files", "config"):
        if mine["model"][what] != header["model"][what]:
            raise CheckpointError(
                f"{model}: must be the model of rank 0, with the same times of change, got other {what}; let every "
                "machine see the same directory, or copy it with its times (rsync -a)"
            )
    return plan


def shares(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """What each of ``count`` processes does, each in the order given: about the same number of bytes.

    A fusion set stays together, so that its grid is fitted once; the largest goes first, to who has least. What is
    copied is the first process's, which writes.
    """
    units: dict[str, list[Job]] = {}
    load, owner = [0.0] * count, {}
    for job in jobs:
        if job.spec is None or job.decision is None:
            owner[job.info.name] = 0
            load[0] += job.info.nbytes / COPIES_PER_QUANTIZED
        else:
            units.setdefault(job.decision.fusion_set, []).append(job)
    for unit in sorted(units.values(), key=lambda unit: -sum(job.info.nbytes for job in unit)):
        least = min(range(count), key=load.__getitem__)
        load[least] += sum(job.info.nbytes for job in unit)
        owner.update((job.info.name, least) for job in unit)
    return [[job for job in jobs if owner[job.info.name] == rank] for rank in range(count)]


def _shapes(index: Mapping[str, TensorInfo], turned: Collection[str]) -> dict[str, tuple[int, int]]:
    """N, K of every matrix by its module's name; ``turned``: those that are stored [K, N]."""
    matrices = {n.removesuffix(".weight"): i.shape for n, i in index.items() if n.endswith(".weight")}
    matrices = {m: shape for m, shape in matrices.items() if len(shape) == 2 and 0 not in shape}
    return {m: (b, a) if m in turned else (a, b) for m, (a, b) in matrices.items()}


_NOTHING = LinearModules((), frozenset(), frozenset(), frozenset(), {}, "")


def _as_json(data: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(data)))


def _jobs(
    index: Mapping[str, TensorInfo],
    decisions: Mapping[str, Decision],
    config: QuantizeConfig,
    shared: Mapping[str, str],
    turned: Collection[str],
) -> list[Job]:
    jobs = []
    sources = {f"{module}.weight": name for module, name in shared.items() if decisions[module].quantized}
    # The weight of a tied head is where the embedding's is.
    apart = [dataclasses.replace(index[source], name=name) for name, source in sources.items()]
    for info in (*index.values(), *apart):
        decision = decisions.get(info.name.removesuffix(".weight")) if info.name.endswith(".weight") else None
        spec, conv1d = None, decision is not None and decision.module in turned
        if decision is not None and decision.quantized:
            if info.dtype not in QUANTIZABLE:
                raise CheckpointError(
                    f"{info.file}: {info.name} must be float32, float16, bfloat16 or float64, got {info.dtype}; "
                    "start from the model in its original precision, or leave it out with --exclude"
                )
            if 0 in info.shape:
                raise CheckpointError(f"{info.file}: {info.name} must have elements, got shape {list(info.shape)}")
            N, K = reversed(info.shape) if conv1d else info.shape
            spec = WeightSpec.from_config(N, K, decision.settings(config))
        jobs.append(Job(info, decision, spec, sources.get(info.name), conv1d))
    return jobs


def _nonfinite(jobs: Sequence[Job]) -> dict[str, str]:
    """Modules whose weight cannot be quantized -> why. Reads all of them once."""
    found = {}
    for job in jobs:
        if job.spec is None:
            continue
        for begin, end in pieces(job.info):
            rows = read_rows(job.info, range(begin, end))
            place = first_nonfinite(rows)
            if place is not None:
                n, k = place
                found[job.module] = f"holds {rows[n, k].item()} at [{begin + n}, {k}]"
                break
    return found


def what_is_copied(job: Job) -> tuple[str, str]:
    """Action and reason of a tensor that is not quantized."""
    if job.decision is not None:
        return "keep", job.decision.reason
    if is_expert(job.info.name):
        return "keep", EXPERTS_NOTE
    return "copy", "not a linear weight"


def _model_type(model_config: Mapping[str, Any]) -> str:
    return str(model_config.get("model_type") or "")
