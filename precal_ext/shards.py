"""Slices of a quantized weight for tensor parallelism: which there are, and what each is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from precal_ext import _C
from precal_ext.config import QuantizeConfig
from precal_ext.qtensor import QTensor, WeightSpec

# Linears whose input, not output, is split over devices: the second of each pair of matrices.
_ROW_PARALLEL = re.compile(
    r"(^|\.)(o_proj|out_proj|down_proj|c_proj|fc2|w2|wo|dense|dense_4h_to_h|proj_out|attention\.output)$"
)
MIN_GROUP = 16  # of those that ``fitting_groups`` chooses


def is_row_parallel(module: str) -> bool:
    """Whether servers cut a module's weight by columns; the others are cut by rows."""
    return _ROW_PARALLEL.search(module) is not None


def why_not(module: str, spec: WeightSpec, size: int) -> str:
    """Why a server cannot cut a module's weight into ``size`` slices; "" when it can."""
    return why_not_by_columns(spec, size) if is_row_parallel(module) else why_not_by_rows(spec, size)


def fitting_groups(shapes: Mapping[str, tuple[int, int]], config: QuantizeConfig, size: int) -> QuantizeConfig:
    """``config`` with smaller groups for the linears that ``size`` slices would cut inside a group.

    The group size is halved down to MIN_GROUP until it fits, for all modules of the same last name; where nothing fits
    it stays. An override that ``config`` has for a module comes first.

    Args:
        shapes: module -> N, K.
    """
    chosen: dict[str, int] = {}
    for module, (N, K) in shapes.items():
        settings = config.for_module(module)
        if not is_row_parallel(module) or not why_not_by_columns(WeightSpec.from_config(N, K, settings), size):
            continue
        group = WeightSpec.from_config(N, K, settings).group_size
        while group % 2 == 0 and group // 2 >= MIN_GROUP:
            group //= 2
            if not why_not_by_columns(WeightSpec.from_config(N, K, replace(settings, group_size=group)), size):
                leaf = module.rpartition(".")[2]
                chosen[leaf] = min(group, chosen.get(leaf, group))
                break
    added = {rf"(^|\.){re.escape(leaf)}$": {"group_size": group} for leaf, group in chosen.items()}
    return replace(config, overrides={**config.overrides, **added, **config.overrides}) if added else config


def why_not_by_columns(spec: WeightSpec, size: int) -> str:
    """Why a weight cannot be cut into ``size`` slices of columns (row-parallel); "" when it can."""
    part, rest = divmod(spec.K, size)
    if rest:
        return f"K = {spec.K} is no multiple of {size}"
    if size > 1 and part % spec.group_size:
        return f"a slice of {part} columns cuts a group of {spec.group_size}"
    if size > 1 and part * spec.bits % 32:
        return f"a slice of {part} codes of {spec.bits} bits ends inside an int32 word"
    if size > 1 and spec.split and part % 8:
        return f"a slice of {part} columns ends inside a byte of the mask"
    if spec.c or spec.trellis:
        begins = {begin for begin, _ in spec.blocks()}
        if any(part * i not in begins for i in range(1, size)):
            return f"a slice of {part} columns cuts a block of {_C.OUTLIER_BLOCK}"
    return ""


def why_not_by_rows(spec: WeightSpec, size: int) -> str:
    """Why a weight cannot be cut into ``size`` slices of rows (column-parallel); "" when it can."""
    return f"N = {spec.N} is no multiple of {size}" if spec.N % size else ""


def by_columns(spec: WeightSpec, size: int) -> WeightSpec:
    """What each of ``size`` slices of columns is. Its ``segment`` makes its blocks those of the whole weight.

    Raises:
        ValueError: such slices would cut a group, a block or a word.
    """
    why = why_not_by_columns(spec, size)
    if why:
        raise ValueError(
            f"by_columns: size must cut [{spec.N}, {spec.K}] into whole groups and blocks, got {size}: {why}"
        )
    if size == 1 or not (spec.c or spec.trellis):
        return replace(spec, K=spec.K // size)
    # Either blocks are 256 columns without exception, or the slice has whole segments.
    segment = _C.outlier_segment(spec.K, spec.segment)
    return replace(spec, K=spec.K // size, segment=_C.OUTLIER_BLOCK if segment % _C.OUTLIER_BLOCK == 0 else segment)


def slice_columns(q: QTensor, index: int, size: int) -> QTensor:
    """Slice ``index`` of ``size`` slices of columns: every tensor's own part of its last, or blocks', dimension."""
    spec = by_columns(q.spec, size)
    tensors = {}
    for key, tensor in q.tensors.items():
        if key in ("weight_row_scale", "weight_grid"):
            tensors[key] = tensor
        elif key == "weight_shape":
            tensors[key] = tensor.new_tensor([spec.N, spec.K])
        else:
            width = tensor.shape[1] // size
            tensors[key] = tensor.narrow(1, index * width, width).contiguous()
    return QTensor(spec, tensors)


def slice_rows(q: QTensor, index: int, size: int) -> QTensor:
    """Slice ``index`` of ``size`` slices of rows.

    Raises:
        ValueError: ``size`` does not divide N.
    """
    why = why_not_by_rows(q.spec, size)
    if why:
        raise ValueError(f"slice_rows: size must cut [{q.spec.N}, {q.spec.K}] into equal parts, got {size}: {why}")
    spec = replace(q.spec, N=q.spec.N // size)
    tensors = {}
    for key, tensor in q.tensors.items():
        if key == "weight_grid":
            tensors[key] = tensor
        elif key == "weight_shape":
            tensors[key] = tensor.new_tensor([spec.N, spec.K])
        else:
            tensors[key] = tensor.narrow(0, index * spec.N, spec.N).contiguous()
    return QTensor(spec, tensors)
