"""One of our model directories in, one that others load without us out: compressed-tensors, or dense."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext.checkpoint import MAX_SHARD_BYTES, CheckpointError, copy_other_files, write_file
from precal_ext.config import QuantizeConfig
from precal_ext.convert import Progress
from precal_ext.measure import Figures, row_parts, sqnr_db, sum_squares
from precal_ext.mixtures import is_expert
from precal_ext.packed import Loaded
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.report import REPORT_NAME, Entry, Report
from precal_ext.rewrite import Item, Rewritten, check_directories, copied, rewrite, to_json
from precal_ext.select import fusion_set_of
from precal_ext.survey import Original, Stored
from precal_ext.uniform import group_scales, is_uniform, quantize_uniform, uniform_spec
from precal_ext.weights import first_nonfinite

PACKED = "compressed-tensors"
DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS = (PACKED, *DENSE)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# vLLM's kernel for CPUs takes matrices whose sizes are multiples of this.
VLLM_CPU_MULTIPLE = 32
_ROWS_AT_ONCE = 1 << 18  # weights


def export_checkpoint(
    model: str | Path,
    out: str | Path,
    format: str = PACKED,
    *,
    original: str | Path | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write a quantized directory in a format that needs no precal to load.

    compressed-tensors (``pack-quantized``) has a uniform grid and no outliers. Uniform weights without outliers keep
    their codes. Others are quantized again, from the original's weights when they are given, with the bits and group
    size they have; the report has the loss of each. Written as ``quantize_checkpoint`` writes.

    Args:
        model: directory written by precal.
        format: "compressed-tensors", or a dense dtype: "bf16", "fp16", "fp32".
        original: the model it was made from; compressed-tensors only.
        group_size: another one, -1 for the whole row; compressed-tensors only.
        dtype: of the scales of compressed-tensors, "bfloat16", "float16" or "float32"; loaders turn them into the
            model's, which is the default.
    Returns:
        The report, also written to ``out/precal_report.json``: SQNR of every weight, against the original when it is
        given, else against the weights of ``model``.
    Raises:
        CheckpointError: the input or output cannot be used, or a weight has no form there; the message names it.
        ValueError: an argument breaks its contract.
    """
    started = time.monotonic()
    model, out = Path(model), Path(out)
    _check_arguments(format, original, group_size, dtype)
    check_directories("export", model, out)
    stored = Stored.open(model)
    other = None if original is None else Original(Path(original))
    if original is not None:
        check_directories("export", Path(original), out)
    scales = _model_dtype(stored) if dtype is None else DTYPES[dtype]
    items, entries, specs = [], {}, {}
    for module in stored.modules:
        spec = stored.spec(module)
        for problem in stored.problems(module, spec):
            raise CheckpointError(problem)
        if format in DENSE:
            items.append(_dense_item(stored, module, spec, DENSE[format]))
            continue
        if stored.is_conv1d(module):
            raise CheckpointError(
                f"{model}: {module} must be an nn.Linear of the model for compressed-tensors, got a Conv1D; export it "
                "as bf16, fp16 or fp32"
            )
        specs[module] = _spec_there(model, module, spec, group_size)
        items.append(_packed_item(stored, module, spec, specs[module], scales, other))
    if not items:
        raise CheckpointError(f"{model}: must hold quantized weights, got none")
    for info in stored.dense:
        item, entries[info.name] = copied(info, "copy", "not quantized")
        items.append(item)
    report = Report(stored.format.config if format in DENSE else _settings(specs), notes=[f"exported as {format}"])
    report.notes += _notes(format, specs, other, any(is_expert(info.name) for info in stored.dense))
    report.bytes_before = sum(item.nbytes for item in items)

    def finish(folder: Path, result: Rewritten) -> None:
        report.entries, report.digests, report.bytes_after = result.entries, result.digests, result.bytes_after
        config = {k: v for k, v in stored.config.items() if k != "quantization_config"}
        if format in DENSE:
            config["dtype" if "dtype" in config else "torch_dtype"] = str(DENSE[format]).removeprefix("torch.")
        else:
            config["quantization_config"] = compressed_tensors_config(specs, _not_quantized(stored))
        write_file(folder / "config.json", to_json(config))
        copy_other_files(model, folder)
        if not (model / "README.original.md").exists():  # ours was taken for the original's
            (folder / "README.original.md").unlink(missing_ok=True)
        write_file(folder / REPORT_NAME, report.to_json())
        write_file(folder / "README.md", _card(stored, out, report, format))

    rewrite(
        [model, *([] if other is None else [other.folder])],
        out,
        {"export": format, "group_size": group_size, "dtype": str(scales)},
        items,
        entries,
        finish,
        parameters=sum(_weights(stored.spec(m)) for m in stored.modules)
        + sum(math.prod(info.shape) for info in stored.dense),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
    report.seconds = time.monotonic() - started
    return report


def _check_arguments(format: str, original: object, group_size: int | None, dtype: str | None) -> None:
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"export: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if group_size is not None and not (group_size == -1 or 1 <= group_size <= 1 << 20):
        raise ValueError(f"export: group_size must be an integer from 1 to 2**20, or -1, got {group_size!r}")
    given = {"original": original, "group_size": group_size, "dtype": dtype}
    for name, value in given.items():
        if format in DENSE and value is not None:
            raise ValueError(f"export: {name} must be left out for format {format}, got {value}; it has no codes")


def _weights(spec: WeightSpec) -> int:
    return spec.N * spec.K


def _model_dtype(stored: Stored) -> torch.dtype:
    """What a loader makes of floating tensors when it is not told."""
    said = str(stored.config.get("dtype") or stored.config.get("torch_dtype") or "").removeprefix("torch.")
    if said in DTYPES:
        return DTYPES[said]
    floats = [info for info in stored.dense if info.dtype in DTYPES.values()]
    return max(floats, key=lambda info: info.nbytes).dtype if floats else torch.float16


def _notes(format: str, specs: Mapping[str, WeightSpec], other: Original | None, experts: bool) -> list[str]:
    if format in DENSE:
        return []
    notes = []
    if other is None:
        notes.append(
            "SQNR is against the quantized weights, and adds to what they had lost; --original MODEL quantizes the "
            "original's instead"
        )
    if experts:
        notes.append("experts stay dense, and transformers (5.23) cannot load a mixture of which only a part is packed")
    odd = [m for m, s in specs.items() if s.N % VLLM_CPU_MULTIPLE or s.K % VLLM_CPU_MULTIPLE]
    if odd:
        notes.append(
            f"{len(odd)} weights have sizes that are no multiples of {VLLM_CPU_MULTIPLE}, as vLLM's kernel for CPUs "
            f"wants them: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}"
        )
    return notes


# ---- a weight -------------------------------------------------------------------------------------------------------


def _figures(pairs: Iterable[tuple[Tensor, Tensor]], bits_per_weight: float) -> Figures:
    """SQNR alone, of rows before and after, a few at a time: the KL of the report needs a weight of ours."""
    power = noise = 0.0
    for before, after in pairs:
        power += sum_squares(before)
        noise += sum_squares(before.double() - after.double())
    return Figures(sqnr_db(power, noise), math.nan, bits_per_weight, 0.0, power, noise)


def _entry(module: str, spec: WeightSpec, reason: str, dtype: torch.dtype, figures: Figures, settings: Any) -> Entry:
    kind = str(dtype).removeprefix("torch.")
    shape = (spec.N, spec.K)
    return Entry(f"{module}.weight", "quantize", reason, shape, kind, fusion_set_of(module), settings, figures)


def _dense_item(stored: Stored, module: str, spec: WeightSpec, dtype: torch.dtype) -> Item:
    name = f"{module}.weight"

    conv1d = stored.is_conv1d(module)

    def make(q: QTensor) -> tuple[Mapping[str, Tensor], Entry]:
        held = torch.empty((spec.K, spec.N) if conv1d else (spec.N, spec.K), dtype=dtype)
        there = held.t() if conv1d else held

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for rows, part in row_parts(q):
                w = part.dequantize()
                there[rows] = w
                if not bool(torch.isfinite(there[rows]).all()):
                    most = float(w.abs().max())
                    raise CheckpointError(
                        f"{stored.folder}: {module} must fit in {dtype}, got {most}; use bf16 or fp32"
                    )
                yield w, there[rows]

        figures = _figures(pairs(), 8.0 * dtype.itemsize)
        return {name: held}, _entry(module, spec, "dequantized", dtype, figures, {"dtype": str(dtype)})

    nbytes, memory = spec.stored_bits() // 8, dtype.itemsize * _weights(spec) + spec.stored_bits() // 8
    outputs = {name: (dtype, (spec.K, spec.N) if conv1d else (spec.N, spec.K))}
    return Item(name, outputs, nbytes, memory, lambda: stored.read_valid(module), make)


def _spec_there(model: Path, module: str, spec: WeightSpec, group_size: int | None) -> WeightSpec:
    wanted = uniform_spec(spec.N, spec.K, spec.bits, spec.group_size if group_size is None else group_size)
    if wanted.group_size < wanted.K and wanted.K % wanted.group_size:
        raise CheckpointError(
            f"{model}: {module} must have columns that are a multiple of the group size for compressed-tensors, got "
            f"{wanted.K} and {wanted.group_size}; choose another with --group-size"
        )
    return wanted


def _packed_item(
    stored: Stored, module: str, here: WeightSpec, there: WeightSpec, dtype: torch.dtype, other: Original | None
) -> Item:
    groups = max(1, -(-there.K // there.group_size))
    outputs = {
        f"{module}.weight_packed": there.tensors()["weight_packed"],
        f"{module}.weight_scale": (dtype, (there.N, groups)),
        f"{module}.weight_shape": (torch.int64, (2,)),
    }
    rate = there.bits + 8 * dtype.itemsize * groups / max(1, there.K)

    def read() -> tuple[QTensor | None, Tensor | None]:
        if other is None:
            return stored.read_valid(module), None
        w = other.weight(module, here)
        at = first_nonfinite(w)
        if at is not None:
            raise CheckpointError(f"{other.folder}: {module}.weight must be finite, got {w[at].item()} at {list(at)}")
        return None, w

    def make(given: tuple[QTensor | None, Tensor | None]) -> tuple[Mapping[str, Tensor], Entry]:
        q, w = given
        reason = "quantized again"
        if w is None:
            assert q is not None
            w = q.dequantize()
        else:
            reason = "quantized from the original"
        if q is not None and is_uniform(q.spec) and _same_groups(q.spec, there):
            packed, scale, reason = q.tensors["weight_packed"], group_scales(q).to(dtype), "codes kept"
            if not bool(torch.isfinite(scale).all()):
                raise CheckpointError(f"{stored.folder}: {module} must have scales that fit in {dtype}; use --dtype")
        else:
            try:
                packed, scale = quantize_uniform(w, there.bits, there.group_size, dtype)
            except ValueError as problem:
                raise CheckpointError(f"{stored.folder}: {module} cannot be quantized: {problem}") from None

        def pairs(w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            step = max(1, _ROWS_AT_ONCE // max(1, there.K))
            for begin in range(0, there.N, step):
                rows = slice(begin, min(there.N, begin + step))
                part = dataclasses.replace(there, N=rows.stop - rows.start)
                yield w[rows], Loaded(packed[rows], scale[rows], None, None).dequantize(part)

        figures = _figures(pairs(w), rate)
        settings = {"bits": there.bits, "group_size": there.group_size, "c": 0, "grid": "uniform", "trellis": False}
        shape = torch.tensor([there.N, there.K], dtype=torch.int64)
        made = dict(zip(outputs, (packed, scale.contiguous(), shape), strict=True))
        return made, _entry(module, there, reason, dtype, figures, settings)

    source = 8 * _weights(there) if other is not None else here.stored_bits() // 8
    stored_bytes = sum(kind.itemsize * math.prod(shape) for kind, shape in outputs.values())
    return Item(f"{module}.weight", outputs, source, 7 * _weights(there) + source + stored_bytes, read, make)


def _same_groups(a: WeightSpec, b: WeightSpec) -> bool:
    return min(a.group_size, a.K) == min(b.group_size, b.K)


# ---- what is said of all of them ------------------------------------------------------------------------------------


def _group_size(spec: WeightSpec) -> int:
    return -1 if spec.group_size >= spec.K else spec.group_size


def _settings(specs: Mapping[str, WeightSpec]) -> QuantizeConfig:
    bits, group_size = Counter((s.bits, _group_size(s)) for s in specs.values()).most_common(1)[0][0]
    return QuantizeConfig(recipe="rtn", bits=bits, group_size=group_size)


def _not_quantized(stored: Stored) -> list[str]:
    """Linear layers that stay dense, experts by the name of each, since servers have a linear layer for it."""
    experts = [i.name.removesuffix(".weight") for i in stored.dense if is_expert(i.name) and len(i.shape) == 2]
    return list(dict.fromkeys([*stored.format.modules_to_not_convert, *experts]))


def compressed_tensors_config(specs: Mapping[str, WeightSpec], ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors.

    Args:
        specs: of every quantized module.  ignore: the other linear modules.
    """
    kinds: dict[tuple[int, int], list[str]] = {}
    for module, spec in specs.items():
        kinds.setdefault((spec.bits, _group_size(spec)), []).append(module)
    groups = {}
    for i, ((bits, group_size), modules) in enumerate(kinds.items()):
        size = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else modules,
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **size},
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": PACKED,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _card(stored: Stored, out: Path, report: Report, format: str) -> str:
    """``OUT/README.md``."""
    losses = [f"| `{e.tensor}` | {e.figures.sqnr_db:.2f} | {e.reason} |" for e in report.quantized if e.figures]
    lines = [
        f"# {stored.folder.name} as {format}, exported by precal",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(out.name, ensure_ascii=False)})",
        "```",
        "",
        f"{len(report.quantized)} of {len(report.entries)} tensors, {report.weights:,} weights at "
        f"{report.bits_per_weight:.3f} bits each: SQNR {report.sqnr_db:.2f} dB.",
        *(f"\n{note[0].upper()}{note[1:]}." for note in report.notes[1:]),
        "",
        "| tensor | SQNR dB | |",
        "|---|---|---|",
        *losses,
        "",
    ]
    return "\n".join(lines)
