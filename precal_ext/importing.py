"""A model directory of GPTQ, AWQ or compressed-tensors in, one of ours out: the same codes, our kernels."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from precal_ext.checkpoint import MAX_SHARD_BYTES, CheckpointError, copy_other_files, read_tensor, write_file
from precal_ext.config import ModelFormat, QuantizeConfig
from precal_ext.convert import Progress, load_lines
from precal_ext.headers import check_settings
from precal_ext.measure import Figures, measure
from precal_ext.mixtures import block_of, is_expert
from precal_ext.packed import WIDE_BITS, Loaded, PackedModel, PackedWeight, read_packed
from precal_ext.plan import check_complete
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.report import REPORT_NAME, Entry, Report
from precal_ext.rewrite import Item, Rewritten, check_directories, copied, rewrite, to_json
from precal_ext.select import LinearModules, SelectionError, find_linears, fusion_set_of
from precal_ext.uniform import quantize_uniform, split_scales, uniform_qtensor

KEPT, WIDENED = "codes kept", "kept exactly with 8 bits"
# Settings of the other method, which nobody must find beside weights that are not its any more.
_OTHERS_FILES = ("quantize_config.json", "quant_config.json")


def import_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    widen: bool = False,
    requantize: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Turn a checkpoint of GPTQ, AWQ or compressed-tensors (pack-quantized) into one that our kernels run.

    Symmetric weights are kept exactly: the same codes, and scales whose product is the same number. Written as
    ``quantize_checkpoint`` writes: a few weights in memory, whole or not at all, continued after an interruption.

    Args:
        model: directory with config.json and safetensors.
        out: a new or empty directory; ``overwrite`` replaces one with files, and forgets an unfinished run.
        widen: give asymmetric weights of up to 7 bits, and what is fused with them, codes of 8 bits, which hold them
            exactly.
        requantize: quantize weights again that have no exact form here (asymmetric, columns reordered by desc_act,
            float32 scales), instead of refusing the model; the report has the loss of each.
        progress: called after every weight.
    Returns:
        The report, also written to ``out/precal_report.json``. Its figures are those of weights quantized again,
        against what they were; of others nothing is known without the original.
    Raises:
        CheckpointError: the input or output cannot be used, or a weight has no exact form; the message names it.
    """
    started = time.monotonic()
    model, out = Path(model), Path(out)
    check_directories("import", model, out)
    packed = read_packed(model)
    found = _linears(packed)
    wide = _widened_sets(packed.weights) if widen else set()
    specs = {w.module: _wider(w.spec) if fusion_set_of(w.module) in wide else w.spec for w in packed.weights}
    config, overrides = _settings(specs)
    specs = {module: _spec(module, spec, config, overrides) for module, spec in specs.items()}
    weights = packed.weights
    names = {w.module: found.model_names.get(w.module, w.module) for w in weights}
    kept = [found.model_names.get(n, n) for n in found.names if n not in names]
    kept = [block_of(name) if is_expert(name) else name for name in kept]
    kept += sorted(found.absent - set(names.values()))
    turned = tuple(name for module, name in names.items() if module in found.conv1d)
    own = {names[m]: fields for m, fields in overrides.items()}
    fmt = ModelFormat(config, tuple(dict.fromkeys(kept)), own, turned)
    items, entries = [_item(w, specs[w.module], requantize) for w in weights], {}
    report = Report(config, notes=[f"imported from {packed.method}", f"linear layers found by {found.source}"])
    surplus = _zero_biases(packed, found)
    if surplus:
        report.notes.append(f"biases left out that are zero, of layers that have none in the model: {len(surplus)}")
    for info in packed.dense:
        if info.name not in surplus:
            item, entries[info.name] = copied(info)
            items.append(item)
    report.bytes_before = sum(item.nbytes for item in items)
    untied = any(w.module in found.tied or w.module in found.shared for w in weights)

    def finish(folder: Path, result: Rewritten) -> None:
        report.entries, report.digests, report.bytes_after = result.entries, result.digests, result.bytes_after
        tying = {"tie_word_embeddings": False} if untied else {}
        write_file(folder / "config.json", to_json({**packed.config, **tying, "quantization_config": fmt.to_dict()}))
        copy_other_files(model, folder)
        for name in _OTHERS_FILES:
            (folder / name).unlink(missing_ok=True)
        write_file(folder / REPORT_NAME, report.to_json())
        write_file(folder / "README.md", _card(packed, out, report))

    rewrite(
        [model],
        out,
        {"import": packed.method, "widen": widen, "requantize": requantize},
        items,
        entries,
        finish,
        parameters=sum(w.spec.N * w.spec.K for w in weights) + sum(math.prod(i.shape) for i in packed.dense),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
    report.seconds = time.monotonic() - started
    return report


def requantized(report: Report) -> list[Entry]:
    """The weights of an import that are not what they were."""
    return [e for e in report.quantized if e.reason not in (KEPT, WIDENED)]


def _linears(packed: PackedModel) -> LinearModules:
    """The linear modules of the model; those that are packed must be among them."""
    shapes = {info.name: info.shape for info in packed.dense}
    shapes.update({f"{w.module}.weight": (w.spec.N, w.spec.K) for w in packed.weights})
    here = [w.module for w in packed.weights]
    check_settings(packed.folder, packed.config, len(shapes))
    try:
        found = find_linears(packed.folder, packed.config, shapes, QuantizeConfig())
    except SelectionError:  # an architecture that nobody here knows
        found = LinearModules(tuple(here), frozenset(), frozenset(), frozenset(), {}, "the names of packed weights")
    if found.complete:
        files = {w.module: next(iter(w.tensors.values())).file for w in packed.weights}
        strange = next((m for m in here if m not in found.names), None)
        if strange is not None:
            kind = "an expert of a kind that cannot be loaded" if is_expert(strange) else "none of them"
            raise CheckpointError(f"{files[strange]}: {strange} must be a linear layer of the model, got {kind}")
        # In memory the experts of a layer are one module: all of them are packed, or none is.
        blocks = {block_of(m): m for m in here if is_expert(m)}
        part = next((n for n in found.names if n not in files and is_expert(n) and block_of(n) in blocks), None)
        if part is not None:
            other = blocks[block_of(part)]
            raise CheckpointError(f"{files[other]}: {part} must be quantized as {other} is, got a dense weight")
    check_complete(packed.folder, found)
    return found


def _zero_biases(packed: PackedModel, found: LinearModules) -> set[str]:
    """Biases of packed layers that have none in the model: early versions of AutoGPTQ gave one to all of them."""
    wanted = {f"{w.module}.bias" for w in packed.weights if w.module in found.unbiased}
    names = set()
    for info in packed.dense:
        if info.name in wanted:
            if bool(read_tensor(info).any()):
                raise CheckpointError(f"{info.file}: {info.name} must be zero, the model has no bias there, got others")
            names.add(info.name)
    return names


def _widened_sets(weights: Sequence[PackedWeight]) -> set[str]:
    """Fusion sets with an asymmetric weight that 8 bits can hold: their members must have one width."""
    return {fusion_set_of(w.module) for w in weights if w.spec.bits < WIDE_BITS and w.is_asymmetric()}


def _wider(spec: WeightSpec) -> WeightSpec:
    return dataclasses.replace(spec, bits=max(spec.bits, WIDE_BITS))


def _settings(specs: Mapping[str, WeightSpec]) -> tuple[QuantizeConfig, dict[str, dict[str, int]]]:
    """Settings of most of the weights, and what differs in the others. A scale for the whole row is group size -1."""

    def group_size(spec: WeightSpec) -> int:
        return -1 if spec.group_size >= spec.K else spec.group_size

    counts = Counter((spec.bits, group_size(spec)) for spec in specs.values())
    bits, most = counts.most_common(1)[0][0]
    overrides: dict[str, dict[str, int]] = {}
    for module, spec in specs.items():
        fields = {} if spec.bits == bits else {"bits": spec.bits}
        own = group_size(spec)
        if own != most and not (own == -1 and most >= spec.K):
            fields["group_size"] = own
        if fields:
            overrides[module] = fields
    return QuantizeConfig(recipe="rtn", bits=bits, group_size=most), overrides


def _spec(
    module: str, spec: WeightSpec, config: QuantizeConfig, overrides: Mapping[str, Mapping[str, int]]
) -> WeightSpec:
    """As a reader of the settings will find it."""
    return WeightSpec.from_config(spec.N, spec.K, ModelFormat(config, (), overrides).for_module(module))


def _item(w: PackedWeight, spec: WeightSpec, requantize: bool) -> Item:
    """``spec``: of the weight that it becomes."""
    outputs = {f"{w.module}.{key}": value for key, value in spec.tensors().items()}
    elements, stored = spec.N * spec.K, spec.stored_bits() // 8
    memory = w.nbytes + stored + elements * (7 if requantize else 2 if w.method == "awq" else 0)

    def make(loaded: Loaded) -> tuple[Mapping[str, Tensor], Entry]:
        q, reason, figures = _converted(w, spec, loaded, requantize)
        entry = Entry(
            f"{w.module}.weight",
            "quantize",
            reason,
            (spec.N, spec.K),
            str(loaded.scale.dtype).removeprefix("torch."),
            fusion_set_of(w.module),
            {"bits": spec.bits, "group_size": spec.group_size, "c": 0, "grid": "uniform", "trellis": False},
            figures,
        )
        return {f"{w.module}.{key}": tensor for key, tensor in q.tensors.items()}, entry

    return Item(f"{w.module}.weight", outputs, w.nbytes, memory, w.load, make)


def _converted(w: PackedWeight, spec: WeightSpec, loaded: Loaded, requantize: bool) -> tuple[QTensor, str, Figures]:
    exact, its = w, loaded
    if spec.bits != w.spec.bits and loaded.group is None:
        exact, its = w.widened(loaded)
    misfit = exact.misfit(its)
    if misfit is None:
        q = dataclasses.replace(exact, spec=spec).exactly(its)
        # Of the original nothing is known: null in the report, and "-" in tables.
        unknown = Figures(math.nan, math.nan, spec.bits_per_weight(), 0.0, math.nan, math.nan)
        return q, KEPT if exact is w else WIDENED, unknown
    why, error = misfit
    if not requantize:
        raise error
    dense = loaded.dequantize(w.spec)
    try:
        packed, scale = quantize_uniform(dense, spec.bits, spec.group_size, loaded.scale.dtype)
    except ValueError as problem:
        raise CheckpointError(f"{w.module} cannot be quantized again: {problem}") from None
    parts = split_scales(scale)
    if parts is None:
        raise CheckpointError(f"{w.module} cannot be quantized again: its scales span more than float16 does")
    q = uniform_qtensor(packed, *parts, spec)
    return q, f"quantized again: {why}", measure(dense, q)


def _card(packed: PackedModel, out: Path, report: Report) -> str:
    """``OUT/README.md``."""
    again = requantized(report)
    lines = [
        f"# {packed.folder.name}, imported by precal",
        "",
        "```python",
        *load_lines(out.name),
        "```",
        "",
        f"{len(report.quantized)} of {len(report.entries)} tensors were quantized by {packed.method}, "
        f"{report.weights:,} weights at {report.bits_per_weight:.3f} bits each, everything counted. Its settings: "
        f"`{json.dumps(packed.settings, ensure_ascii=False)[:1000]}`.",
        "",
        f"{len(report.quantized) - len(again)} weights are exactly what they were."
        + (" The others were quantized again; SQNR against what they were:" if again else ""),
        "",
        *(f"- `{e.tensor}`: {e.figures.sqnr_db:.2f} dB ({e.reason})" for e in again if e.figures),
        *([""] if again else []),
        "Without `import precal_ext`, transformers skips the quantization it does not know and gives wrong weights.",
        "",
    ]
    return "\n".join(lines)
