"""Is a quantized directory whole, consistent, and the model it was made from?

Every problem is named, not only the first; what could not be checked is said. Nothing of the model is run.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from precal_ext import _C
from precal_ext.checkpoint import CheckpointError, TensorInfo, read_index, read_tensor
from precal_ext.config import same_experts, variants
from precal_ext.digest import sha256
from precal_ext.headers import impossible_settings
from precal_ext.measure import measure
from precal_ext.model import read_format
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.select import has_renames, tied_parameters
from precal_ext.shards import is_row_parallel, why_not
from precal_ext.sites import find_sites
from precal_ext.survey import KEYS, Original, Recorded, Stored, quantized_modules, read_recorded, take_rows

TP_SIZES = range(1, 65)
# Weights of a tensor that are dequantized and compared with the original.
SAMPLE = 1 << 18
# A sample may differ from the whole tensor by this; the whole tensor only by rounding.
SAMPLE_TOLERANCE_DB, WHOLE_TOLERANCE_DB = 6.0, 0.01
# Below this a weight is not its original: two unrelated weights of one size have -3 dB, 2 bits give 6 and more.
LOWEST_SQNR_DB = 3.0
LOAD_WARNING = (
    "transformers without `import precal_ext` skips the quantization it does not know and loads wrong weights "
    "without an error; servers need the same import"
)


@dataclass
class Check:
    """One kind of check: ``passed`` is None when there was nothing to hold against."""

    name: str
    passed: bool | None = None
    detail: str = ""


@dataclass
class Verification:
    """What was checked and found.

    Args:
        errors, warnings: (check, message).
        tensor_parallel: size -> "" when it fits, else the first weight it cuts through and why.
    """

    folder: Path
    checks: list[Check] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    tensor_parallel: dict[int, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        def messages(found: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
            return [{"check": check, "message": message} for check, message in found]

        return {
            "directory": str(self.folder),
            "sound": self.sound,
            "checks": [vars(check) for check in self.checks],
            "errors": messages(self.errors),
            "warnings": messages(self.warnings),
            "tensor_parallel": {
                "fits": [size for size, why in self.tensor_parallel.items() if not why],
                "does_not_fit": {str(size): why for size, why in self.tensor_parallel.items() if why},
            },
        }

    def check(self, name: str, done: str, found: Iterable[str]) -> bool:
        """Record a check by its errors; ``done`` says what was looked at."""
        problems = list(found)
        self.errors += [(name, problem) for problem in problems]
        self.checks.append(Check(name, not problems, f"{len(problems)} found" if problems else done))
        return not problems

    def skip(self, name: str, why: str) -> None:
        self.checks.append(Check(name, None, why))


def verify(folder: Path, original: Path | None = None) -> Verification:
    """Check a directory; one tensor at a time is in memory.

    Args:
        original: the model it was made from, to compare with.
    Returns:
        What was found; ``sound`` says whether it is good. Damage is not raised but listed.
    """
    result = Verification(folder)
    stored = _open(result)
    if stored is None:
        return result
    result.warnings.append(("load", LOAD_WARNING))
    specs = _check_shapes(result, stored)
    _check_contents(result, stored, specs, original)
    _check_model(result, stored, specs)
    result.tensor_parallel = tensor_parallel_sizes(specs)
    return result


T = TypeVar("T")


def _caught(call: Callable[..., T], *arguments: Any) -> tuple[T | None, list[str]]:
    try:
        return call(*arguments), []
    except CheckpointError as error:
        return None, [str(error)]
    except OSError as error:
        return None, [f"{error.filename}: must be readable, got {error.strerror}"]


def _open(result: Verification) -> Stored | None:
    """Config, headers and report, each named when it cannot be read."""
    folder = result.folder
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        result.check("config", "", [f"{folder}: must be a model directory, got {got}"])
        return None
    fmt, problems = _caught(read_format, folder)
    described = "" if fmt is None else f"format version {_C.FORMAT_VERSION}, recipe {fmt.config.recipe}"
    good = result.check("config", described, problems)
    index, problems = _caught(read_index, folder)
    if index is None:
        result.check("headers", "", problems)
        return None
    files = {info.file for info in index.values()}
    size = sum(info.nbytes for info in index.values())
    result.check("headers", f"{len(index)} tensors, {size / 1e6:.1f} MB in {len(files)} file(s)", _stray(folder, files))
    if good and not quantized_modules(index):
        result.check("shapes", "", [f"{folder}: must hold quantized weights, got none"])
        return None
    _, problems = _caught(read_recorded, folder)
    if problems:
        good = result.check("report", "", problems)
    return Stored.open(folder) if good else None


def _stray(folder: Path, files: set[Path]) -> list[str]:
    """Weight files that the index does not name: some loader may take them, and nobody checked them."""
    others = {p for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)} - files
    return [f"{path}: must be named by the index, got a weight file that belongs to nothing" for path in sorted(others)]


def _check_shapes(result: Verification, stored: Stored) -> dict[str, WeightSpec]:
    """Tensors, dtypes and shapes against config.json and the report; returns the weights that fit."""
    specs: dict[str, WeightSpec] = {}
    problems = []
    config = stored.folder / "config.json"
    for module in stored.modules:
        spec, found = _caught(stored.spec, module)
        if spec is not None:
            found += stored.problems(module, spec)
            if not found:
                specs[module] = spec
        problems += found
        if not stored.format.converts(module):
            problems.append(f"{config}: modules_to_not_convert must not name {module}, got quantized tensors of it")
    known = {same_experts(m) for m in stored.modules}
    for name in stored.format.module_overrides:
        n = same_experts(name)
        if n not in known and not any(m.endswith("." + n) or n.endswith("." + m) for m in known):
            problems.append(f"{config}: module_overrides must name quantized modules, got {name}, which is not here")
    if stored.recorded is not None:
        problems += _against_report(stored, stored.recorded, specs)
    result.check("shapes", f"{len(specs)} quantized weights as config.json says", problems)
    return specs


def _against_report(stored: Stored, recorded: Recorded, specs: Mapping[str, WeightSpec]) -> list[str]:
    """What is missing, surplus or of another shape by the report's list of tensors."""
    problems = []
    wanted = set(recorded.sha256)
    for name, shape in recorded.shapes.items():
        module = name.removesuffix(".weight")
        spec, info = specs.get(module), stored.index.get(name)
        got = (spec.N, spec.K) if spec is not None else info.shape if info is not None else shape
        if got != shape:
            problems.append(f"{stored.folder}: {name} must be {list(shape)} as the report says, got {list(got)}")
        if name in recorded.figures and module not in stored.modules:
            problems.append(f"{stored.folder}: {module} must be quantized as the report says, got no tensors of it")
        if not recorded.sha256:  # a report without digests lists what it was made from
            wanted |= {name} if name not in recorded.figures else {f"{module}.{key}" for key in KEYS}
    for name in sorted(wanted - stored.index.keys()):
        if name.rpartition(".")[2] not in KEYS:  # those of quantized weights are named by their module
            problems.append(f"{stored.folder}: {name} must be there as the report says, got nothing")
    for name in sorted(stored.index.keys() - wanted) if wanted else ():
        module = name.rpartition(".")[0]
        if module not in stored.modules or module in specs:
            problems.append(f"{stored.index[name].file}: {name} must be in the report, got a tensor that is not")
    return problems


def _check_contents(
    result: Verification, stored: Stored, specs: Mapping[str, WeightSpec], original: Path | None
) -> None:
    """Every tensor once: its values, its digest, and the original's."""
    digests = stored.recorded.sha256 if stored.recorded is not None else {}
    other, unreadable = (None, []) if original is None else _caught(Original, original)
    values: list[str] = []
    altered: list[str] = []
    differing: list[str] = list(unreadable)
    compared = 0

    def digest(info: TensorInfo, tensor: Tensor) -> None:
        wanted = digests.get(info.name)
        if wanted is not None and sha256(tensor) != wanted:
            altered.append(f"{info.file}: {info.name} must have the recorded digest, got other bytes")

    for module, spec in specs.items():
        q = QTensor(spec, {key: read_tensor(stored.info(module, key)) for key in spec.tensors()})
        for key, tensor in q.tensors.items():
            digest(stored.info(module, key), tensor)
        try:
            q.validate(module)
        except ValueError as error:
            values.append(f"{stored.info(module, 'weight_packed').file}: {error}")
            continue
        if other is not None:
            differing += _differs(stored, module, q, other)
            compared += 1
    seen = {f"{module}.{key}" for module, spec in specs.items() for key in spec.tensors()}
    for name, info in stored.index.items():
        if name in seen:
            continue
        tensor = read_tensor(info)
        digest(info, tensor)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not bool(torch.isfinite(tensor).all()):
            result.warnings.append(("values", f"{info.file}: {name} has NaN or infinity in it"))
        if other is not None and name.rpartition(".")[2] not in KEYS:
            differing += _copied_otherwise(info, tensor, other)
            compared += 1
    result.check("values", "scales, grids, outliers and padding are in range", values)
    if digests:
        result.check("digests", f"{len(digests)} tensors have the recorded SHA-256", altered)
    else:
        result.skip("digests", "none recorded beside this model")
    if original is None:
        result.skip("original", "not compared; give --original MODEL")
    else:
        result.check("original", f"{compared} weights compared with {original}", differing)


def _differs(stored: Stored, module: str, q: QTensor, original: Original) -> list[str]:
    """Dequantize a sample of rows and hold it against the original and the recorded SQNR."""
    w, problems = _caught(original.weight, module, q.spec, stored.is_conv1d(module))
    if w is None:
        return problems
    part, chosen = take_rows(q, SAMPLE)
    figures = measure(w[chosen].contiguous(), part)
    if figures.noise == 0:
        return []
    recorded = stored.recorded.figures.get(module + ".weight") if stored.recorded is not None else None
    whole = part.spec.N == q.spec.N
    if recorded is None or not math.isfinite(recorded.sqnr_db):
        low, high, why = LOWEST_SQNR_DB, math.inf, "a quantized weight"
    else:
        tolerance = WHOLE_TOLERANCE_DB if whole else SAMPLE_TOLERANCE_DB
        low, high, why = recorded.sqnr_db - tolerance, recorded.sqnr_db + tolerance, "the report"
    if low <= figures.sqnr_db <= high:
        return []
    share = "" if whole else f" on {part.spec.N} of {q.spec.N} rows"
    wanted = f"{recorded.sqnr_db:.2f} dB" if recorded is not None and high < math.inf else f"at least {low:g} dB"
    return [
        f"{original.folder}: {module} must have SQNR {wanted} against its original by {why}, "
        f"got {figures.sqnr_db:.2f} dB{share}; the weight is damaged or this is another model"
    ]


def _copied_otherwise(info: TensorInfo, tensor: Tensor, original: Original) -> list[str]:
    there = original.index.get(info.name)
    if there is None:
        return [f"{info.file}: {info.name} must be a tensor of {original.folder}, got none of this name there"]
    if there.dtype == info.dtype and there.shape == info.shape and sha256(read_tensor(there)) == sha256(tensor):
        return []
    return [f"{info.file}: {info.name} must be the original's unchanged, got other bytes than in {there.file}"]


# ---- the architecture -----------------------------------------------------------------------------------------------


def _check_model(result: Verification, stored: Stored, specs: Mapping[str, WeightSpec]) -> None:
    """Tensors against the model that transformers builds from config.json, without memory for its weights."""
    if importlib.util.find_spec("transformers") is None:
        result.skip("model", "not compared, transformers is not installed")
        return
    too_large = list(impossible_settings(stored.config, len(stored.index)))
    if too_large:
        result.check("model", "", [f"{stored.folder / 'config.json'}: {problem}" for problem in too_large])
        return
    try:
        model, converted = _empty_model(stored.folder)
    except Exception as error:  # whatever a model's own code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        result.skip("model", f"not compared, transformers cannot build it: {reason[:200]}")
        return
    if converted:
        result.skip("model", "not compared, transformers renames the tensors of this architecture when it loads them")
        return
    name = type(model).__name__
    result.check("model", f"{name} has these tensors and no others", _against_model(stored, specs, model))


def _empty_model(folder: Path) -> tuple[Any, bool]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model, has_renames(model)


def _against_model(stored: Stored, specs: Mapping[str, WeightSpec], model: Any) -> list[str]:
    prefix = str(getattr(model, "base_model_prefix", ""))
    config = stored.folder / "config.json"
    problems: list[str] = []
    known: set[str] = set()
    for name, site in find_sites(model).items():
        source = next((v for v in variants(name, prefix) if v in stored.modules), None)
        if source is None:
            if stored.format.converts(name, prefix) and any(
                f"{v}.weight" in stored.index for v in variants(name, prefix)
            ):
                problems.append(f"{config}: modules_to_not_convert must name {name}, its weight is not quantized")
            continue
        known |= {source, f"{name}.weight"}
        spec, shape = specs.get(source), list(site.shape)
        if spec is not None and shape != [spec.N, spec.K]:
            got = [spec.N, spec.K]
            problems.append(f"{stored.folder}: {source} must be {shape} for the model of config.json, got {got}")
        if stored.format.converts(source) and not stored.format.converts(name, prefix):
            problems.append(f"{config}: modules_to_not_convert must not name {name}, its weight is quantized")
    for source in stored.modules.keys() - known:
        problems.append(f"{stored.folder}: {source} must be a linear layer of the model, got quantized tensors of none")
    tied = set(tied_parameters(model))
    found = set()
    for name, tensor in model.state_dict().items():
        source = next((v for v in variants(name, prefix) if v in stored.index), None)
        if source is None:
            if name not in known and name not in tied:
                problems.append(f"{stored.folder}: {name} must be there for the model of config.json, got nothing")
            continue
        found.add(source)
        there, shape = list(stored.index[source].shape), list(tensor.shape)
        if there != shape:
            problems.append(f"{stored.folder}: {source} must be {shape} for the model of config.json, got {there}")
    # What a report lists came with the original: old checkpoints hold buffers that today's model computes.
    listed = stored.recorded.shapes.keys() if stored.recorded is not None else set()
    for extra in stored.index.keys() - found - listed:
        module, _, key = extra.rpartition(".")
        if not (key in KEYS and module in stored.modules):
            problems.append(f"{stored.index[extra].file}: {extra} must belong to the model, got no such tensor in it")
    return sorted(problems)


# ---- tensor parallelism ---------------------------------------------------------------------------------------------


def tensor_parallel_sizes(specs: Mapping[str, WeightSpec]) -> dict[int, str]:
    """Size from 1 to 64 -> "" when every weight can be cut so, else the first that cannot, and why.

    Weights that servers split by input (o_proj, down_proj and their like) are cut by columns, the others by rows.
    """
    sizes = {}
    distinct: dict[tuple[WeightSpec, bool], str] = {}
    for module, spec in specs.items():
        distinct.setdefault((spec, is_row_parallel(module)), module)
    for size in TP_SIZES:
        sizes[size] = ""
        for (spec, _), module in distinct.items():
            why = why_not(module, spec, size)
            if why:
                sizes[size] = f"{module}: {why}"
                break
    return sizes
