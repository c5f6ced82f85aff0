"""Reading and writing safetensors: sizes are known before memory is taken, and output appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from precal_ext.headers import CheckpointError as CheckpointError
from precal_ext.headers import check_header, check_inside

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

# safetensors' names, in the order in which its writer sorts tensors (widest first), and what torch calls them.
_DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(_DTYPES)}
_ITEMSIZES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is, read from the header alone."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory."""
    check_inside(path.parent, path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: must be readable, got {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless numbers, nested without end
        raise CheckpointError(f"{path}: must be JSON, got {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model directory."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: must be a Hugging Face model directory, got no config.json")
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, single or sharded.

    Raises:
        CheckpointError: none, a shard is missing, or only formats that run code when loaded.
    """
    if (folder / INDEX_NAME).is_file():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_NAME}: must have a weight_map of tensor to file")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise CheckpointError(f"{folder / INDEX_NAME}: files must lie in the directory itself, got {name!r}")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: must exist, the index names it; download the model again")
            check_inside(folder, folder / name)
        return [folder / name for name in names]
    if (folder / WEIGHTS_NAME).is_file():
        check_inside(folder, folder / WEIGHTS_NAME)
        return [folder / WEIGHTS_NAME]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: weights must be safetensors, got only pickled files, which may run code when opened; "
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW)"
        )
    raise CheckpointError(f"{folder}: must hold {WEIGHTS_NAME} or {INDEX_NAME}, got neither")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: must be a whole safetensors file, got: {error}") from None


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Every tensor of some safetensors files by name, from their headers."""
    found: dict[str, TensorInfo] = {}
    for path in files:
        check_header(path, _ITEMSIZES)
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                part = file.get_slice(name)
                code = part.get_dtype()
                if code not in _DTYPES:
                    raise CheckpointError(f"{path}: {name} must have a dtype that torch knows, got {code}")
                if name in found:
                    raise CheckpointError(f"{path}: {name} must occur once, got it also in {found[name].file.name}")
                found[name] = TensorInfo(name, path, _DTYPES[code], tuple(part.get_shape()))
    return found


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model directory by name, from the headers of its files."""
    found = read_headers(weight_files(folder))
    if (folder / INDEX_NAME).is_file():
        for name in read_json(folder / INDEX_NAME)["weight_map"]:
            if name not in found:
                raise CheckpointError(f"{folder / INDEX_NAME}: {name} must be in its shard, got no such tensor")
    return found


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, in memory of its own."""
    with _opened(info.file) as file:
        return file.get_tensor(info.name).clone()


# ---- writing --------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes tensors of known dtype and shape, in any order, into one file or shards, with bounded memory.

    The header comes first in the format, so it is planned from the shapes; the data goes to its place as it arrives.
    The bytes are those of ``safetensors.torch.save_file(..., metadata={"format": "pt"})``.
    """

    def __init__(
        self, folder: Path, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._infos = {name: TensorInfo(name, folder, dtype, shape) for name, (dtype, shape) in plan.items()}
        shards = self._split(max_bytes)
        names = [WEIGHTS_NAME] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
        ]  # fmt: skip
        self._offsets: dict[str, tuple[str, int]] = {}
        self._pending = set(plan)
        self._files = {}
        for file_name, members in zip(names, shards, strict=True):
            file = open(folder / file_name, "wb")  # noqa: SIM115  closed in finish()
            self._files[file_name] = file
            header, start = self._header(members), 0
            file.write(len(header).to_bytes(8, "little") + header)
            base = 8 + len(header)
            for info in self._sorted(members):
                self._offsets[info.name] = (file_name, base + start)
                start += info.nbytes
            file.truncate(base + start)
        if len(shards) > 1:
            total = sum(info.nbytes for info in self._infos.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: self._offsets[name][0] for name in sorted(self._infos)},
            }
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _split(self, max_bytes: int) -> list[list[TensorInfo]]:
        shards: list[list[TensorInfo]] = [[]]
        size = 0
        for info in self._infos.values():
            if shards[-1] and size + info.nbytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(info)
            size += info.nbytes
        return shards

    @staticmethod
    def _sorted(members: list[TensorInfo]) -> list[TensorInfo]:
        return sorted(members, key=lambda info: (_RANK[_DTYPE_NAMES[info.dtype]], info.name))

    def _header(self, members: list[TensorInfo]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for info in self._sorted(members):
            end = start + info.nbytes
            entries[info.name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one planned tensor in its place."""
        info = self._infos[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape or name not in self._pending:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"write: {name} must be {info.dtype} {info.shape} as planned, and come once; got {got}")
        file_name, offset = self._offsets[name]
        file = self._files[file_name]
        file.seek(offset)
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._pending.discard(name)

    def finish(self) -> None:
        """Flush to disk. Every planned tensor must have been written."""
        if self._pending:
            raise ValueError(f"finish: every planned tensor must be written, got none for {sorted(self._pending)[:3]}")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@contextlib.contextmanager
def appearing_at_once(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside ``out`` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: ``out`` exists and ``overwrite`` is false, or its parent cannot be written.
    """
    out = out.absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out}: must be a directory or new, got something else")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out}: must be new or empty, got a directory with files; --overwrite replaces it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out}: must be writable, got {error.strerror} for {error.filename}") from None
    aside: Path | None = None
    try:
        staging.chmod(0o755)
        yield staging
        for path in staging.iterdir():
            _fsync(path)
        _fsync(staging)
        if out.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent))
            os.rename(out, aside / "old")
        os.rename(staging, out)
        _fsync(out.parent)
    except BaseException:
        if aside is not None and (aside / "old").exists() and not out.exists():
            os.rename(aside / "old", out)  # what was there stays there
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if aside is not None and (out.exists() or not (aside / "old").exists()):
            shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_other_files(source: Path, target: Path) -> list[str]:
    """Copy what is not weights or their index: tokenizer, generation settings, licence. Returns the names, sorted.

    A README goes to ``README.original.md``, since the quantized model has one of its own.
    """
    copied = []
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name == "config.json" or _is_weights(path.name):
            continue
        check_inside(source, path)
        name = "README.original.md" if path.name.lower() == "readme.md" else path.name
        shutil.copyfile(path, target / name)
        copied.append(name)
    return copied


def _is_weights(name: str) -> bool:
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
    return name.endswith(suffixes)
