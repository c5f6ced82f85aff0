"""Model directory in, quantized model directory out, one tensor at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext.checkpoint import (
    MAX_SHARD_BYTES,
    CheckpointError,
    ShardWriter,
    TensorInfo,
    appearing_at_once,
    copy_other_files,
    read_config,
    read_index,
    read_tensor,
)
from precal_ext.config import QuantizeConfig
from precal_ext.digest import sha256
from precal_ext.foreign import quantized_by
from precal_ext.measure import measure
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.quantize import SAMPLE, fit_set_grid, quantize_weight, sample_rows
from precal_ext.report import REPORT_NAME, Entry, Report
from precal_ext.select import Decision, decide, find_linears, is_expert, model_format

EXPERTS_NOTE = "expert weight, not quantized yet"
QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Progress:
    """One finished tensor: how many of how many, and bytes of input so far and in all."""

    tensor: str
    tensors_done: int
    tensors: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class _Job:
    info: TensorInfo
    decision: Decision | None  # None: not a linear weight
    spec: WeightSpec | None  # None: copied

    @property
    def module(self) -> str:
        return self.info.name.removesuffix(".weight")


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

    Tensors are read, quantized and written one at a time. ``out`` appears complete or not at all; the same input and
    settings give the same bytes.

    Args:
        model: directory with config.json and safetensors, single or sharded.
        out: a new or empty directory; ``overwrite`` replaces one with files.
        progress: called after every tensor.
    Returns:
        The report, also written to ``out/precal_report.json`` and, in short, to ``out/README.md``.
    Raises:
        CheckpointError: the input or output cannot be used.  SelectionError: it is unclear what to quantize.
        ValueError: a weight is not finite, or a setting does not fit.
    """
    config = config or QuantizeConfig()
    model, out = Path(model), Path(out)
    started = time.monotonic()
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
    found = find_linears(model, model_config, {n: i.shape for n, i in index.items()}, config)
    decisions = {d.module: d for d in decide(found.names, config, found.heads, found.tied, _model_type(model_config))}
    jobs = _plan(index, decisions, config)
    if not any(job.spec for job in jobs):
        raise CheckpointError(
            f"{model}: must have linear layers to quantize, found none by {found.source}; see --include"
        )

    report = Report(config, notes=[f"linear layers found by {found.source}"])
    experts = sum(is_expert(job.info.name) for job in jobs)
    if experts:
        report.notes.append(f"{experts} {EXPERTS_NOTE.replace('weight', 'weights')}: most of this model stays as it is")
    report.bytes_before = sum(job.info.nbytes for job in jobs)
    with appearing_at_once(out, overwrite) as staging:
        writer = ShardWriter(staging, _outputs(jobs), max_shard_bytes)
        try:
            _run(jobs, config, writer, report, progress)
            writer.finish()
        finally:
            writer.close()
        fmt = model_format(list(decisions.values()), config, found.absent, found.model_names)
        _write_json(staging / "config.json", {**model_config, "quantization_config": fmt.to_dict()})
        copy_other_files(model, staging)
        report.bytes_after = sum(p.stat().st_size for p in staging.glob("*.safetensors"))
        (staging / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
        (staging / "README.md").write_text(model_card(model.name, out.name, report), encoding="utf-8")
    report.seconds = time.monotonic() - started
    return report


def _plan(index: Mapping[str, TensorInfo], decisions: Mapping[str, Decision], config: QuantizeConfig) -> list[_Job]:
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
        jobs.append(_Job(info, decision, spec))
    return jobs


def _outputs(jobs: Sequence[_Job]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    plan = {}
    for job in jobs:
        if job.spec is None:
            plan[job.info.name] = (job.info.dtype, job.info.shape)
        else:
            plan.update({f"{job.module}.{key}": value for key, value in job.spec.tensors().items()})
    return plan


def _run(
    jobs: Sequence[_Job],
    config: QuantizeConfig,
    writer: ShardWriter,
    report: Report,
    progress: Callable[[Progress], None] | None,
) -> None:
    sets: dict[str, list[_Job]] = {}
    for job in jobs:
        if job.spec is not None and job.decision is not None:
            sets.setdefault(job.decision.fusion_set, []).append(job)
    grids: dict[str, Tensor | None] = {}
    total, done = sum(job.info.nbytes for job in jobs), 0
    for count, job in enumerate(jobs, 1):
        if job.spec is None or job.decision is None:
            copied = read_tensor(job.info)
            writer.write(job.info.name, copied)
            report.digests[job.info.name] = sha256(copied)
            action, reason = _why_copied(job)
            report.entries.append(Entry(job.info.name, action, reason, job.info.shape, _dtype(job.info)))
        else:
            name = job.decision.fusion_set
            settings = config.for_module(job.module)
            if name not in grids:
                grids[name] = _fit(sets[name], settings)
            w = _read_weight(job.info)
            q = quantize_weight(w, settings, grids[name])
            for key, tensor in q.tensors.items():
                writer.write(f"{job.module}.{key}", tensor)
                report.digests[f"{job.module}.{key}"] = sha256(tensor)
            report.entries.append(entry(job.decision, settings, w, q, _dtype(job.info)))
        done += job.info.nbytes
        if progress is not None:
            progress(Progress(job.info.name, count, len(jobs), done, total))


def _why_copied(job: _Job) -> tuple[str, str]:
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


def _fit(members: Sequence[_Job], settings: QuantizeConfig) -> Tensor | None:
    if settings.uniform:
        return None
    share = max(1, SAMPLE // len(members))
    return fit_set_grid([sample_rows(_read_weight(job.info), share) for job in members], settings)


def _read_weight(info: TensorInfo) -> Tensor:
    w = read_tensor(info)
    if w.dtype == torch.float64:
        w = w.float()
    try:
        finite = bool(torch.isfinite(w).all())
    except RuntimeError:
        finite = True
    if not finite:
        n, k = (~torch.isfinite(w)).nonzero()[0].tolist()
        raise CheckpointError(
            f"{info.file}: {info.name} must be finite, got {w[n, k].item()} at [{n}, {k}]; the model is damaged, "
            "or leave the tensor out with --exclude"
        )
    return w


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
