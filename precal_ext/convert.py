"""Model directory in, quantized model directory out, a few tensors in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext import _C, pipeline
from precal_ext._version import __version__
from precal_ext.checkpoint import (
    MAX_SHARD_BYTES,
    CheckpointError,
    ShardWriter,
    TensorInfo,
    copy_other_files,
    read_chunks,
    read_config,
    read_index,
    read_rows,
    read_tensor,
    weight_files,
    write_file,
)
from precal_ext.config import QuantizeConfig
from precal_ext.digest import sha256
from precal_ext.foreign import quantized_by
from precal_ext.measure import measure
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.quantize import SAMPLE, fit_set_grid, quantize_weight, sample_rows
from precal_ext.report import REPORT_NAME, Entry, Report
from precal_ext.select import (
    Decision,
    LinearModules,
    decide,
    find_linears,
    is_expert,
    keep_sets_of,
    model_format,
)
from precal_ext.staging import Work, fingerprint, read_journal

EXPERTS_NOTE = "expert weight, not quantized yet"
QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# What all tensors under way may take: bytes per element of the largest, whatever their dtype.
BYTES_PER_ELEMENT = 8
_ROWS_AT_ONCE = 1 << 20  # weights that are looked at or converted together


@dataclass(frozen=True)
class Progress:
    """One finished tensor: how many of how many, and bytes of input so far and in all.

    ``bytes_before`` of them were finished by an earlier run.
    """

    tensor: str
    tensors_done: int
    tensors: int
    bytes_done: int
    bytes_total: int
    bytes_before: int = 0


@dataclass(frozen=True)
class Job:
    """What happens to one tensor of the model."""

    info: TensorInfo
    decision: Decision | None  # None: not a linear weight
    spec: WeightSpec | None  # None: copied

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

    @property
    def header(self) -> dict[str, Any]:
        """What must be the same for an unfinished run to be continued."""
        return {
            "version": __version__,
            "format_version": _C.FORMAT_VERSION,
            "settings": self.config.to_dict(),
            "max_shard_size": self.max_shard_bytes,
            "model": dict(self.known),
        }

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(math.prod(job.info.shape) for job in self.jobs)

    @property
    def memory_limit(self) -> int:
        """Bytes of all weights under way."""
        return BYTES_PER_ELEMENT * self.largest

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
) -> Plan:
    """Decide what ``quantize_checkpoint`` does, from headers and names alone; writes nothing.

    Raises:
        CheckpointError: the input or output cannot be used.  SelectionError: it is unclear what to quantize.
    """
    config = config or QuantizeConfig()
    model, out = Path(model), Path(out)
    if not model.is_dir():
        raise CheckpointError(
            f"{model}: must be a model directory, got {'a file' if model.exists() else 'nothing there'}"
        )
    resolved_out, resolved_model = out.resolve(), model.resolve()
    if resolved_out == resolved_model or resolved_model in resolved_out.parents:
        raise CheckpointError(f"{out}: must lie outside the model's directory, got a path inside {model}")
    if resolved_out in resolved_model.parents:
        raise CheckpointError(f"{out}: must not contain the model, got a parent of {model}")
    model_config = read_config(model)
    existing = model_config.get("quantization_config")
    if existing:
        method = existing.get("quant_method", "unknown") if isinstance(existing, dict) else existing
        raise CheckpointError(f"{model}: must not be quantized yet, got a model quantized by {method!r}")
    index = read_index(model)
    foreign = quantized_by(index)
    if foreign is not None:
        raise CheckpointError(f"{model}: must not be quantized yet, got {foreign[1]}, a tensor of {foreign[0]}")
    plan = Plan(
        model, out, config, model_config, _NOTHING, (), (), max_shard_bytes, fingerprint(model, weight_files(model))
    )
    before, _ = read_journal(out)
    if before is not None and "linears" in before and plan.recorded():
        found = LinearModules.from_dict(before["linears"])  # asked once, when the run was begun
    else:
        found = find_linears(model, model_config, {n: i.shape for n, i in index.items()}, config)
    decisions = decide(found.names, config, found.heads, found.tied, _model_type(model_config))
    jobs = _plan(index, {d.module: d for d in decisions}, config)
    if config.skip_nonfinite:
        decisions = keep_sets_of(decisions, _nonfinite(jobs))
        jobs = _plan(index, {d.module: d for d in decisions}, config)
    if not any(job.spec for job in jobs):
        raise CheckpointError(
            f"{model}: must have linear layers to quantize, found none by {found.source}; see --include"
        )
    return dataclasses.replace(plan, found=found, decisions=decisions, jobs=jobs)


_NOTHING = LinearModules((), frozenset(), frozenset(), frozenset(), {}, "")


def _as_json(data: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(data)))


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Quantize a Hugging Face model directory without loading the model.

    Reading, quantizing and writing overlap; weights under way take at most 8 bytes per element of the largest tensor.
    ``out`` appears complete or not at all; the same input and settings give the same bytes. What an interrupted call
    has finished lies in ``.OUT.partial`` beside ``out``, and the same call continues there.

    Args:
        model: directory with config.json and safetensors, single or sharded.
        out: a new or empty directory; ``overwrite`` replaces one with files, and forgets an unfinished run.
        progress: called after every tensor.
    Returns:
        The report, also written to ``out/precal_report.json`` and, in short, to ``out/README.md``.
    Raises:
        CheckpointError: the input or output cannot be used, an unfinished run was of another model, settings or
            version, or another process is at work on ``out``.  SelectionError: it is unclear what to quantize.
        ValueError: a weight is not finite, or a setting does not fit.  OSError: reading or writing failed.
    """
    plan = plan_quantization(model, out, config, max_shard_bytes=max_shard_bytes)
    return run_plan(plan, overwrite=overwrite, progress=progress)


def run_plan(
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[], None] | None = None,
) -> Report:
    """Do what a plan says; arguments and errors as ``quantize_checkpoint``.

    Args:
        announce: called when the output is this process's alone and has room, before the first tensor.
    """
    started = time.monotonic()
    report = Report(plan.config, notes=[f"linear layers found by {plan.found.source}"])
    experts = sum(is_expert(job.info.name) for job in plan.jobs)
    if experts:
        report.notes.append(f"{experts} {EXPERTS_NOTE.replace('weight', 'weights')}: most of this model stays as it is")
    report.bytes_before = sum(job.info.nbytes for job in plan.jobs)
    work = Work(plan.out, {**plan.header, "linears": plan.found.to_dict()}, overwrite)
    try:
        _check_room(plan, work)
        if announce is not None:
            announce()
    except BaseException:
        work.keep()
        raise
    try:
        writer = plan.writer(work.new)
        try:
            report.entries, report.digests = _run(plan, work, writer, progress)
            writer.finish()
        finally:
            writer.close()
        if fingerprint(plan.model, weight_files(plan.model)) != plan.known:
            raise CheckpointError(f"{plan.model}: must stay as it is while it is quantized, got changed files")
        fmt = model_format(plan.decisions, plan.config, plan.found.absent, plan.found.model_names)
        write_file(work.new / "config.json", _json({**plan.model_config, "quantization_config": fmt.to_dict()}))
        copy_other_files(plan.model, work.new)
        report.bytes_after = sum(p.stat().st_size for p in work.new.glob("*.safetensors"))
        write_file(work.new / REPORT_NAME, report.to_json())
        write_file(work.new / "README.md", model_card(plan.model.name, plan.out.name, report))
        work.publish()
    except (ValueError, TypeError):
        work.discard()  # refused for what it is: the same command would be refused again
        raise
    except BaseException:
        work.keep()
        raise
    report.seconds = time.monotonic() - started
    return report


def _check_room(plan: Plan, work: Work) -> None:
    there = sum(path.stat().st_blocks * 512 for path in work.new.iterdir())
    free = shutil.disk_usage(work.folder).free + there
    needed = sum(plan.writer(work.new).sizes.values())
    if needed > free:
        raise CheckpointError(
            f"{plan.out}: must have room for {needed:,} bytes, got {free:,}; make room or write elsewhere"
        )


def _plan(index: Mapping[str, TensorInfo], decisions: Mapping[str, Decision], config: QuantizeConfig) -> list[Job]:
    jobs = []
    for info in index.values():
        decision = decisions.get(info.name.removesuffix(".weight")) if info.name.endswith(".weight") else None
        spec = None
        if decision is not None and decision.quantized:
            if info.dtype not in QUANTIZABLE:
                raise CheckpointError(
                    f"{info.file}: {info.name} must be float32, float16, bfloat16 or float64, got {info.dtype}; "
                    "start from the model in its original precision, or leave it out with --exclude"
                )
            if 0 in info.shape:
                raise CheckpointError(f"{info.file}: {info.name} must have elements, got shape {list(info.shape)}")
            spec = WeightSpec.from_config(info.shape[0], info.shape[1], config.for_module(decision.module))
        jobs.append(Job(info, decision, spec))
    return jobs


def _run(
    plan: Plan, work: Work, writer: ShardWriter, progress: Callable[[Progress], None] | None
) -> tuple[list[Entry], dict[str, str]]:
    entries, digests = _finished_before(plan, work, writer)
    pending = [job for job in plan.jobs if job.info.name not in entries]
    sets: dict[str, list[Job]] = {}
    for job in plan.jobs:
        if job.spec is not None and job.decision is not None:
            sets.setdefault(job.decision.fusion_set, []).append(job)
    # The reader samples a set with the first of its members that is still to do.
    first = {_set_of(job): job for job in reversed(pending)}
    grids: dict[str, Tensor | None] = {}
    total = sum(job.info.nbytes for job in plan.jobs)
    before = done = total - sum(job.info.nbytes for job in pending)

    def read(job: Job) -> tuple[Tensor, list[Tensor]] | None:
        if job.spec is None or job.decision is None:
            return None
        fitted = first[_set_of(job)] is job and not plan.config.for_module(job.module).uniform
        members = sets[job.decision.fusion_set] if fitted else []
        samples = [_sample(member.info, max(1, SAMPLE // len(members))) for member in members]
        return _read_weight(job.info), samples

    def compute(job: Job, given: tuple[Tensor, list[Tensor]] | None) -> QTensor | None:
        nonlocal done
        q = None
        if given is None or job.decision is None:
            action, reason = what_is_copied(job)
            entries[job.info.name] = Entry(job.info.name, action, reason, job.info.shape, _dtype(job.info))
        else:
            w, samples = given
            _check_finite(job.info, w)
            settings, name = plan.config.for_module(job.module), job.decision.fusion_set
            if name not in grids:
                for member, sample in zip(sets[name], samples, strict=False):
                    if not bool(torch.isfinite(sample).all()):
                        _check_finite(member.info, _read_weight(member.info))
                grids[name] = fit_set_grid(samples, settings) if samples else None
                samples.clear()
            q = quantize_weight(w, settings, grids[name])
            entries[job.info.name] = entry(job.decision, settings, w, q, _dtype(job.info))
        done += job.info.nbytes
        if progress is not None:
            progress(Progress(job.info.name, len(entries), len(plan.jobs), done, total, before))
        return q

    def write(job: Job, q: QTensor | None) -> None:
        made = {}
        if q is None:
            digest = hashlib.sha256()
            writer.write_chunks(job.info.name, _digested(read_chunks(job.info), digest))
            made[job.info.name] = digest.hexdigest()
        else:
            for key, tensor in q.tensors.items():
                writer.write(f"{job.module}.{key}", tensor)
                made[f"{job.module}.{key}"] = sha256(tensor)
        digests[job.info.name] = made
        work.record({"tensor": job.info.name, "digests": made, "entry": entries[job.info.name].to_record()})

    pipeline.run(pending, read, compute, write, lambda job: job.memory, plan.memory_limit)
    # In the order of the plan, whatever an earlier run had finished.
    names = [job.info.name for job in plan.jobs]
    return [entries[n] for n in names], {key: value for n in names for key, value in digests[n].items()}


def _set_of(job: Job) -> str:
    return job.info.name if job.spec is None or job.decision is None else "set " + job.decision.fusion_set


def _digested(chunks: Iterable[memoryview], digest: Any) -> Iterator[memoryview]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _finished_before(plan: Plan, work: Work, writer: ShardWriter) -> tuple[dict[str, Entry], dict[str, dict[str, str]]]:
    """Tensors that an earlier run has finished: those whose bytes have the digests that it wrote down."""
    jobs = {job.info.name: job for job in plan.jobs}
    found: dict[str, Entry] = {}
    digests: dict[str, dict[str, str]] = {}
    for record in {record.get("tensor"): record for record in work.records}.values():
        job = jobs.get(str(record.get("tensor")))
        if job is None or set(record["digests"]) != set(job.outputs):
            continue
        if all(_has_digest(writer.info(name), digest) for name, digest in record["digests"].items()):
            found[job.info.name] = Entry.from_record(record["entry"])
            # In the order of the outputs: a report has the same bytes however often a run was interrupted.
            digests[job.info.name] = {name: record["digests"][name] for name in job.outputs}
            for name in job.outputs:
                writer.keep(name)
    return found, digests


def _has_digest(info: TensorInfo, expected: str) -> bool:
    digest = hashlib.sha256()
    try:
        for _ in _digested(read_chunks(info), digest):
            pass
    except OSError:  # cut short, or not there
        return False
    return digest.hexdigest() == expected


def what_is_copied(job: Job) -> tuple[str, str]:
    """Action and reason of a tensor that is not quantized."""
    if job.decision is not None:
        return "keep", job.decision.reason
    if is_expert(job.info.name):
        return "keep", EXPERTS_NOTE
    return "copy", "not a linear weight"


def _model_type(model_config: Mapping[str, Any]) -> str:
    return str(model_config.get("model_type") or "")


def entry(decision: Decision, settings: QuantizeConfig, w: Tensor, q: QTensor, dtype: str) -> Entry:
    """The report's line for a quantized weight."""
    return Entry(
        f"{decision.module}.weight",
        "quantize",
        decision.reason,
        (q.spec.N, q.spec.K),
        dtype,
        decision.fusion_set,
        {
            "bits": q.spec.bits,
            "group_size": q.spec.group_size,
            "c": q.spec.c,
            "grid": settings.grid,
            "trellis": q.spec.trellis,
        },
        measure(w, q),
    )


def _sample(info: TensorInfo, limit: int) -> Tensor:
    """``sample_rows`` of a weight of which only those rows are read."""
    N, K = info.shape
    rows = sample_rows(torch.arange(N)[:, None].expand(N, K), limit)[:, 0]
    w = read_rows(info, rows.tolist())
    return w.float() if w.dtype == torch.float64 else w


def _pieces(info: TensorInfo) -> Iterator[tuple[int, int]]:
    N, K = info.shape
    step = max(1, _ROWS_AT_ONCE // K)
    return ((begin, min(N, begin + step)) for begin in range(0, N, step))


def _read_weight(info: TensorInfo) -> Tensor:
    if info.dtype != torch.float64:
        return read_tensor(info)
    w = torch.empty(info.shape, dtype=torch.float32)
    for begin, end in _pieces(info):
        w[begin:end] = read_rows(info, range(begin, end))
    return w


def first_nonfinite(w: Tensor) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity of a matrix."""
    finite = torch.isfinite(w)
    if bool(finite.all()):
        return None
    n, k = (~finite).nonzero()[0].tolist()
    return n, k


def _check_finite(info: TensorInfo, w: Tensor) -> None:
    for begin, end in _pieces(info):
        found = first_nonfinite(w[begin:end])
        if found is not None:
            n, k = begin + found[0], found[1]
            raise CheckpointError(
                f"{info.file}: {info.name} must be finite, got {w[n, k].item()} at [{n}, {k}]; the model is damaged, "
                "or leave the tensor as it is with --skip-nonfinite or --exclude"
            )


def _nonfinite(jobs: Sequence[Job]) -> dict[str, str]:
    """Modules whose weight cannot be quantized -> why. Reads all of them once."""
    found = {}
    for job in jobs:
        if job.spec is None:
            continue
        for begin, end in _pieces(job.info):
            rows = read_rows(job.info, range(begin, end))
            place = first_nonfinite(rows)
            if place is not None:
                n, k = place
                found[job.module] = f"holds {rows[n, k].item()} at [{begin + n}, {k}]"
                break
    return found


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def load_lines(out: str) -> list[str]:
    """The three lines that load the result."""
    return [
        "import precal_ext",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(out, ensure_ascii=False)})",
    ]


def model_card(source: str, out: str, report: Report) -> str:
    """``OUT/README.md``: how to load it, settings, figures per layer."""
    c, s = report.config, report.summary()
    published = s["published_bits_per_weight"]
    settings = f"recipe {c.recipe}, {c.bits} bits, group size {c.group_size}, c = {c.c}, {c.grid} grid"
    if c.split:
        settings += f", alpha = {c.alpha}"
    lines = [
        f"# {source}, quantized by precal",
        "",
        "```python",
        *load_lines(out),
        "```",
        "",
        f"Settings: {settings}. No data was used.",
        "",
        f"{s['tensors_quantized']} of {s['tensors']} tensors are quantized, {report.weights:,} weights at "
        f"{report.bits_per_weight:.3f} bits each, everything counted"
        + (f" ({published:.3f} by the publication's count)" if published else "")
        + f": SQNR {report.sqnr_db:.2f} dB, KL {report.kl_nats:.4f} nats. Weight files: {s['bytes_before']:,} -> "
        f"{s['bytes_after']:,} bytes.",
        "",
        report.to_markdown(),
        "Without `import precal_ext`, transformers skips the quantization it does not know and gives wrong weights.",
        "",
    ]
    return "\n".join(lines)
