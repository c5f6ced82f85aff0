"""Quantized models in memory: swap modules for those of a checkpoint, save, load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from precal_ext.checkpoint import (
    MAX_SHARD_BYTES,
    CheckpointError,
    ShardWriter,
    TensorInfo,
    appearing_at_once,
    read_config,
    read_index,
    read_tensor,
)
from precal_ext.config import ModelFormat, same_experts, variants
from precal_ext.headers import check_settings
from precal_ext.linear import PrecalLinear
from precal_ext.mixtures import block_of, is_expert
from precal_ext.qtensor import WeightSpec
from precal_ext.sites import find_sites

FORMAT_ATTRIBUTE = "precal_format"

# Called with a model and its format once it is quantized or loaded here: adapters give it what their host wants.
attach_hooks: list[Callable[[nn.Module, ModelFormat], None]] = []


def attach_format(model: nn.Module, fmt: ModelFormat) -> None:
    """Remember how a model is quantized, where saving looks for it."""
    setattr(model, FORMAT_ATTRIBUTE, fmt)
    for hook in attach_hooks:
        hook(model, fmt)


def swap_linears(model: nn.Module, fmt: ModelFormat, stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Put an empty ``PrecalLinear`` in place of every linear that the format converts and the checkpoint holds.

    Headers are compared with what the format implies before anything is loaded: loaders fill what a checkpoint lacks
    with whatever the memory held.

    Args:
        stored: every tensor of the checkpoint. A linear without quantized tensors there stays dense (a new head).
    Returns:
        Names of the swapped modules -> their names in the checkpoint.
    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than it must.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    keys: dict[str, set[str]] = {}
    for name in stored:
        module_name, _, leaf = name.rpartition(".")
        keys.setdefault(module_name, set()).add(leaf)
    swapped: dict[str, str] = {}
    experts = {same_experts(name): name for name in keys if is_expert(name)}
    sites = find_sites(model)
    for name, site in sites.items():
        sources = variants(name, prefix)
        if is_expert(name):
            sources = tuple(experts.get(same_experts(v), v) for v in sources)
        source = next((v for v in sources if any(is_stored(k) for k in keys.get(v, ()))), None)
        if source is None:
            continue
        if not fmt.converts(name, prefix):  # the host would make up a dense weight
            file = stored[f"{source}.{next(iter(keys[source]))}"].file
            raise CheckpointError(
                f"{file}: {source} must be dense as modules_to_not_convert says, got a quantized weight"
            )
        spec = WeightSpec.from_config(*site.shape, fmt.for_module(name, prefix))
        _check_headers(source, keys[source], spec, stored)
        dtype = None if site.bias is None else site.bias.dtype
        if site.conv1d and not fmt.is_conv1d(name, prefix):  # a square one would load, and be another matrix
            file = stored[f"{source}.weight_shape"].file
            raise CheckpointError(f"{file}: conv1d_modules of config.json must name {name}, got a Conv1D it does not")
        site.put(model, PrecalLinear(spec, site.bias is not None, site.held.device, dtype))
        swapped[name] = source
    parts = {name for name in sites if is_expert(name)}
    blocks = {block_of(name) for name in parts & swapped.keys()}
    for name in sorted(parts - swapped.keys()):
        if block_of(name) in blocks:
            raise CheckpointError(f"{name}: must be quantized as other experts of its layer are, got no tensors of it")
    return swapped


def _check_headers(source: str, given: set[str], spec: WeightSpec, stored: Mapping[str, TensorInfo]) -> None:
    for problem in header_problems(source, given, spec, stored):
        raise CheckpointError(problem)


def header_problems(source: str, given: set[str], spec: WeightSpec, stored: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Where the headers of a quantized weight differ from what its settings imply.

    Args:
        source: the module's name in the checkpoint.  given: last parts of the names of its tensors, at least one.
    """
    some = stored[f"{source}.{next(iter(given))}"].file
    wanted = spec.tensors()
    for key, (dtype, shape) in wanted.items():
        if key not in given:
            yield f"{some}: {source}.{key} must be there, got nothing; the checkpoint is incomplete"
            continue
        info = stored[f"{source}.{key}"]
        if info.dtype != dtype or info.shape != shape:
            got = f"{info.dtype} {list(info.shape)}"
            yield f"{info.file}: {source}.{key} must be {dtype} {list(shape)}, got {got}"
    extra = sorted(k for k in given if k not in wanted and (is_stored(k) or k == "weight"))
    if extra:
        yield f"{some}: {source} must have the tensors of its settings, got also {', '.join(extra)}"


def is_stored(key: str) -> bool:
    """Whether the last part of a tensor's name is one of a quantized weight."""
    return key.startswith("weight_")


def save_quantized(
    model: nn.Module, out: str | Path, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a quantized model as a directory that ``load_quantized``, transformers and servers read.

    Safetensors (the same bytes as ``precal quantize`` writes for the same weights) and ``config.json``. Tied weights
    are written once. Tokenizers are not part of a model: save them beside it.

    Raises:
        ValueError: the model was not quantized by precal.  CheckpointError: ``out`` cannot be written.
    """
    fmt = getattr(model, FORMAT_ATTRIBUTE, None)
    if not isinstance(fmt, ModelFormat):
        raise ValueError(
            "save_quantized: model must be quantized by quantize_model or load_quantized, got one that is not"
        )
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor
    hf_config = getattr(model, "config", None)
    data: dict[str, Any] = hf_config.to_dict() if hf_config is not None and hasattr(hf_config, "to_dict") else {}
    with appearing_at_once(Path(out), overwrite) as staging:
        writer = ShardWriter(staging, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, max_shard_bytes)
        try:
            for name, tensor in tensors.items():
                writer.write(name, tensor.cpu())
            writer.finish()
        finally:
            writer.close()
        text = json.dumps({**data, "quantization_config": fmt.to_dict()}, indent=2, ensure_ascii=False)
        (staging / "config.json").write_text(text + "\n", encoding="utf-8")
        generation = getattr(model, "generation_config", None)
        if generation is not None and hasattr(generation, "save_pretrained"):
            generation.save_pretrained(staging)


def load_quantized(path: str | Path, model: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    """Load a directory written by ``precal quantize`` or ``save_quantized``.

    Args:
        model: a module of the right architecture whose linears are replaced and filled; None builds it with
            transformers (``AutoModelForCausalLM.from_pretrained``), to which ``kwargs`` go.
    Returns:
        The model, in eval mode, ready to run.
    Raises:
        CheckpointError: files are missing, damaged or do not fit the model.
    """
    folder = Path(path)
    fmt = read_format(folder)
    index = read_index(folder)
    if model is None:
        check_settings(folder, read_config(folder), len(index))
        return _load_with_transformers(folder, kwargs)
    if kwargs:
        raise TypeError(f"load_quantized: keyword arguments must go with model=None, got {', '.join(kwargs)}")
    swap_linears(model, fmt, index)
    expected = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    for name, info in index.items():
        if name not in expected:
            raise CheckpointError(f"{info.file}: {name} must belong to the model, got no such parameter or buffer")
        if info.shape != expected[name][1]:
            got = list(info.shape)
            raise CheckpointError(f"{info.file}: {name} must have shape {list(expected[name][1])}, got {got}")
    _fill(model, {name: read_tensor(info) for name, info in index.items()}, folder)
    attach_format(model, fmt)
    return model.eval()


def _load_with_transformers(folder: Path, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"{folder}: building the model needs transformers; pip install 'precal[hf]', or pass model="
        ) from None
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        # Code of the directory runs, and pickles are opened, only for who asks for it.
        safe = {"trust_remote_code": False, "use_safetensors": True}
        model, info = load(folder, **{**safe, **kwargs, "output_loading_info": True})
    except CheckpointError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    for kind, contract in (
        ("missing_keys", "every tensor must be there, got none for"),
        ("unexpected_keys", "tensors must belong to the model, got also"),
        ("mismatched_keys", "tensors must have the model's shapes, got others for"),
    ):
        names = sorted(map(str, info.get(kind) or ()))
        if names:
            raise CheckpointError(f"{folder}: {contract} {', '.join(names[:4])}")
    loaded: nn.Module = model
    return loaded


def _fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        missing, _ = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: tensors must fit the model, got: {error}") from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(parameters[name]) for name in tensors if name in parameters}
    absent = [name for name in missing if name not in parameters or id(parameters[name]) not in filled]
    if absent:
        raise CheckpointError(
            f"{folder}: every tensor of the model must be there, got none for {', '.join(absent[:4])}"
        )
    for name, module in model.named_modules():
        if isinstance(module, PrecalLinear) and not module.is_prepacked:
            raise CheckpointError(f"{folder}: {name} must have all of its tensors, got only a part of them")


def read_format(folder: Path) -> ModelFormat:
    """The ``quantization_config`` of a model directory, checked."""
    data = read_config(folder).get("quantization_config")
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{folder}: must be a model quantized by precal, got a config.json without quantization_config"
        )
    try:
        return ModelFormat.from_dict(data)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
