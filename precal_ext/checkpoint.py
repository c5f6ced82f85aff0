"""Reading and writing safetensors: sizes are known before memory is taken, and output appears whole or not at all.

Data is read with pread into memory of our own: pages of a mapped file would count as resident. Everything goes through
``os.preadv``, ``os.pwrite``, ``os.fsync`` and ``os.rename``, which is where the tests let the disk fail.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext.headers import (
    MAX_JSON_BYTES,
    MAX_JSON_ITEMS,
    check_inside,
    read_header,
    read_object,
    read_weight_map,
)
from precal_ext.headers import CheckpointError as CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 50_000_000_000  # transformers' default since version 5
MAX_TENSORS_IN_ALL = 2**20  # of a model
CHUNK = 8 << 20  # bytes of a copy that are in memory at once

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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it is, read from the header alone. ``offset`` counts from the file's first byte."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


def read_json(path: Path, most: int = MAX_JSON_BYTES, items: int = MAX_JSON_ITEMS) -> dict[str, Any]:
    """A JSON object of a model directory, of at most ``most`` bytes and ``items`` commas and brackets."""
    check_inside(path.parent, path)
    return read_object(path, most, items)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model directory."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: must be a Hugging Face model directory, got no config.json")
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, single or sharded.

    Raises:
        CheckpointError: none, a shard is missing, or only formats that run code when loaded.
    """
    if (folder / INDEX_NAME).exists():
        return _files_of(folder, _weight_map(folder))
    if (folder / WEIGHTS_NAME).exists():
        check_inside(folder, folder / WEIGHTS_NAME)
        return [folder / WEIGHTS_NAME]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: weights must be safetensors, got only pickled files, which may run code when opened; "
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW)"
        )
    raise CheckpointError(f"{folder}: must hold {WEIGHTS_NAME} or {INDEX_NAME}, got neither")


def _weight_map(folder: Path) -> dict[str, str]:
    check_inside(folder, folder / INDEX_NAME)
    return read_weight_map(folder / INDEX_NAME)


def _files_of(folder: Path, weight_map: Mapping[str, str]) -> list[Path]:
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise CheckpointError(f"{folder / INDEX_NAME}: files must lie in the directory itself, got {name!r}")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: must exist, the index names it; download the model again")
        check_inside(folder, folder / name)
    return [folder / name for name in names]


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Every tensor of some safetensors files by name, from their headers."""
    found: dict[str, TensorInfo] = {}
    for path in files:
        begin, claims = read_header(path, _ITEMSIZES)
        for name, claim in claims.items():
            if name in found:
                raise CheckpointError(f"{path}: {name} must occur once, got it also in {found[name].file.name}")
            found[name] = TensorInfo(name, path, _DTYPES[claim.dtype], claim.shape, begin + claim.begin)
        if len(found) > MAX_TENSORS_IN_ALL:
            raise CheckpointError(f"{path.parent}: must have at most {MAX_TENSORS_IN_ALL} tensors, got more")
    return found


def raw_header(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to its data."""
    with open(path, "rb") as file:
        size = file.read(8)
        return size + file.read(int.from_bytes(size, "little"))


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model directory by name, from the headers of its files."""
    if not (folder / INDEX_NAME).exists():
        return read_headers(weight_files(folder))
    weight_map = _weight_map(folder)
    found = read_headers(_files_of(folder, weight_map))
    for name in weight_map:
        if name not in found:
            raise CheckpointError(f"{folder / INDEX_NAME}: {name} must be in its shard, got no such tensor")
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _read_into(file: int, buffer: memoryview, offset: int, path: Path) -> None:
    while buffer:
        try:
            count = os.preadv(file, [buffer], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if count == 0:
            raise OSError(errno.EIO, "the file ended early, it changed while it was read", str(path))
        buffer, offset = buffer[count:], offset + count


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, in memory of its own.

    Raises:
        OSError: it cannot be read.
    """
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with _reading(info.file) as file:
        _read_into(file, bytes_of(tensor), info.offset, info.file)
    return tensor


def read_rows(info: TensorInfo, rows: Sequence[int]) -> Tensor:
    """Some rows of a matrix [N, K], in the order asked for; neighbours are read at once."""
    K = info.shape[1]
    tensor = torch.empty((len(rows), K), dtype=info.dtype)
    stride = K * info.dtype.itemsize
    with _reading(info.file) as file:
        begin = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or rows[end] != rows[end - 1] + 1:
                _read_into(file, bytes_of(tensor[begin:end]), info.offset + rows[begin] * stride, info.file)
                begin = end
    return tensor


def read_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of one tensor, a few at a time; each chunk is valid until the next is asked for."""
    buffer, done = memoryview(bytearray(min(CHUNK, info.nbytes))), 0
    with _reading(info.file) as file:
        while done < info.nbytes:
            part = buffer[: min(CHUNK, info.nbytes - done)]
            _read_into(file, part, info.offset + done, info.file)
            yield part
            done += len(part)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_file(path: Path, text: str) -> None:
    """A small text file; ``appearing_at_once`` and ``Work`` see that it reaches the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        # Half a character, which JSON can write as \\ud800, stays what it is there.
        _write_at(file, memoryview(text.encode("utf-8", "backslashreplace")), 0, path)
    finally:
        os.close(file)


def _write_at(file: int, data: memoryview, offset: int, path: Path) -> None:
    while data:
        try:
            count = os.pwrite(file, data, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        data, offset = data[count:], offset + count


def replace_tensor(info: TensorInfo, tensor: Tensor) -> None:
    """Put other data of the same dtype and shape in the place of a tensor of a file."""
    if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"replace_tensor: {info.name} must be {info.dtype} {info.shape}, got {got}")
    file = os.open(info.file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _write_at(file, bytes_of(tensor.contiguous()), info.offset, info.file)
    finally:
        os.close(file)


class ShardWriter:
    """Writes tensors of known dtype and shape, in any order, into one file or shards, with bounded memory.

    The header comes first in the format, so it is planned from the shapes; the data goes to its place as it arrives.
    The bytes are those of ``safetensors.torch.save_file(..., metadata={"format": "pt"})``; the division into shards and
    the index are those of transformers. Nothing is touched before the first ``write``; files that are there already are
    continued. One file is open at a time, and reaches the disk when the next one is opened.

    Args:
        parameters: weights of the whole model, for the index.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        max_bytes: int = MAX_SHARD_BYTES,
        parameters: int | None = None,
    ) -> None:
        infos = [TensorInfo(name, folder, dtype, shape) for name, (dtype, shape) in plan.items()]
        shards = _split(infos, max_bytes)
        names = [WEIGHTS_NAME] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
        ]  # fmt: skip
        self._folder = folder
        self._infos: dict[str, TensorInfo] = {}
        self._headers: dict[Path, bytes] = {}
        self._sizes: dict[Path, int] = {}
        self._parameters = parameters
        self._pending = set(plan)
        self._begun: set[Path] = set()
        self._open: tuple[Path, int] | None = None
        for file_name, members in zip(names, shards, strict=True):
            path = folder / file_name
            self._headers[path] = header = _header(members)
            at = len(header)
            for info in _sorted(members):
                self._infos[info.name] = TensorInfo(info.name, path, info.dtype, info.shape, at)
                at += info.nbytes
            self._sizes[path] = at

    @property
    def sizes(self) -> dict[str, int]:
        """File name -> bytes it will have."""
        return {path.name: size for path, size in self._sizes.items()}

    def info(self, name: str) -> TensorInfo:
        """Where a planned tensor is or will be."""
        return self._infos[name]

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one planned tensor in its place."""
        info = self._infos[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape or name not in self._pending:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"write: {name} must be {info.dtype} {info.shape} as planned, and come once; got {got}")
        self.write_chunks(name, [bytes_of(tensor.detach().contiguous())])

    def write_chunks(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Put the bytes of one planned tensor in their place."""
        info = self._infos[name]
        file, at = self._file(info.file), info.offset
        for chunk in chunks:
            _write_at(file, chunk, at, info.file)
            at += len(chunk)
        if at != info.offset + info.nbytes:
            raise ValueError(f"write: {name} must have {info.nbytes} bytes, got {at - info.offset}")
        self._pending.discard(name)

    def keep(self, name: str) -> None:
        """Take a tensor as written: an earlier run did it."""
        self._pending.discard(name)

    def _file(self, path: Path) -> int:
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        self.close()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._open = path, file
        if path not in self._begun:
            _write_at(file, memoryview(self._headers[path]), 0, path)
            self._begun.add(path)
        return file

    def finish(self) -> None:
        """Bring everything to the disk. Every planned tensor must have been written."""
        if self._pending:
            raise ValueError(f"finish: every planned tensor must be written, got none for {sorted(self._pending)[:3]}")
        for path, size in self._sizes.items():
            os.fsync(self._file(path))
            if path.stat().st_size != size:
                raise OSError(errno.EIO, f"must have {size} bytes, got {path.stat().st_size}", str(path))
        self.close()
        if len(self._sizes) > 1:
            total = sum(info.nbytes for info in self._infos.values())
            count = {} if self._parameters is None else {"total_parameters": self._parameters}
            index = {
                "metadata": {**count, "total_size": total},
                "weight_map": {name: info.file.name for name, info in self._infos.items()},
            }
            write_file(self._folder / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Bring the open file to the disk."""
        if self._open is not None:
            (path, file), self._open = self._open, None
            try:
                os.fsync(file)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
            finally:
                os.close(file)


def _split(infos: Iterable[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Shards as transformers cuts them: in order, a tensor beyond the limit alone."""
    shards: list[list[TensorInfo]] = []
    current: list[TensorInfo] = []
    size = 0
    for info in infos:
        if info.nbytes > max_bytes:
            shards.append([info])
            continue
        if size + info.nbytes > max_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(info)
        size += info.nbytes
    if current or not shards:
        shards.append(current)
    return shards


def _sorted(members: Iterable[TensorInfo]) -> list[TensorInfo]:
    return sorted(members, key=lambda info: (_RANK[_DTYPE_NAMES[info.dtype]], info.name))


def _header(members: Iterable[TensorInfo]) -> bytes:
    """The eight bytes of length, and the header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for info in _sorted(members):
        end = start + info.nbytes
        entries[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_target(out: Path, overwrite: bool) -> None:
    """Raises CheckpointError when ``out`` is something that a new directory must not replace."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out}: must be a directory or new, got something else")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out}: must be new or empty, got a directory with files; --overwrite replaces it")


@contextlib.contextmanager
def appearing_at_once(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside ``out`` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: ``out`` exists and ``overwrite`` is false, or its parent cannot be written.
    """
    out = out.absolute()
    check_target(out, overwrite)
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
            fsync(path)
        fsync(staging)
        if out.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent))
            os.rename(out, aside / "old")
        os.rename(staging, out)
        fsync(out.parent)
    except BaseException:
        if aside is not None and (aside / "old").exists() and not out.exists():
            os.rename(aside / "old", out)  # what was there stays there
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if aside is not None and (out.exists() or not (aside / "old").exists()):
            shutil.rmtree(aside, ignore_errors=True)


def fsync(path: Path) -> None:
    """Bring a file or the names in a directory to the disk."""
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
