"""Reading and writing directories: the bytes of safetensors' own writer, all or nothing, untrusted input refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_same_tensors, digests, same_bytes, stored_tensors
from safetensors.torch import save_file
from shapes import generator
from torch import Tensor

from precal_ext import CheckpointError
from precal_ext.checkpoint import (
    INDEX_NAME,
    ShardWriter,
    appearing_at_once,
    copy_other_files,
    read_chunks,
    read_config,
    read_index,
    read_rows,
    read_tensor,
    weight_files,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool,
]  # fmt: skip


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits; 0 and 1 for bool."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator(seed))
    return data.view(dtype).reshape(shape)


def write(folder: Path, tensors: dict[str, Tensor], order: list[str], max_bytes: int = 1 << 40) -> None:
    writer = ShardWriter(folder, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, max_bytes)
    for name in order:
        writer.write(name, tensors[name])
    writer.finish()


MIXED = {
    f"layer.{i}.{str(dtype).removeprefix('torch.')}": random_tensor(dtype, shape, i)
    for i, (dtype, shape) in enumerate(zip(DTYPES, [(3, 5), (), (0,), (7,), (2, 0, 3), (1, 1)] * 3, strict=False))
}


# ---- writing ---------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
tensor_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), tensor_shapes), max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_bytes_are_those_of_save_file(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[torch.dtype, tuple[int, ...]]], random
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    tensors = {name: random_tensor(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(plan.items())}
    order = list(tensors)
    random.shuffle(order)
    write(folder, tensors, order)
    save_file(tensors, folder / "expected", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (folder / "expected").read_bytes()


@pytest.mark.parametrize("max_bytes", [1, 40, 200])
def test_shards_hold_what_was_written_and_the_index_lists_it(tmp_path: Path, max_bytes: int) -> None:
    write(tmp_path, MIXED, sorted(MIXED), max_bytes)
    assert_same_tensors(stored_tensors(tmp_path), MIXED)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert sorted(index["weight_map"]) == sorted(MIXED)
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in MIXED.values())
    for name, info in read_index(tmp_path).items():
        assert info.file.name == index["weight_map"][name]
        assert (info.dtype, info.shape, info.nbytes) == (MIXED[name].dtype, MIXED[name].shape, MIXED[name].nbytes)
        assert same_bytes(read_tensor(info), MIXED[name])
    for path in tmp_path.glob("*.safetensors"):
        size = sum(i.nbytes for i in read_index(tmp_path).values() if i.file == path)
        assert size <= max(max_bytes, max(t.nbytes for t in MIXED.values()))


def test_what_is_not_contiguous_is_written_in_order(tmp_path: Path) -> None:
    w = torch.arange(12.0).reshape(3, 4)
    write(tmp_path, {"w": w.T}, ["w"])
    assert torch.equal(stored_tensors(tmp_path)["w"], w.T)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(2, dtype=torch.float16), torch.zeros(2, 1)], ids=["size", "dtype", "rank"]
)
def test_a_tensor_that_was_not_planned_is_refused(tmp_path: Path, tensor: Tensor) -> None:
    writer = ShardWriter(tmp_path, {"w": (torch.float32, (2,))})
    with pytest.raises(ValueError, match=r"write: w must be torch.float32 \(2,\) as planned"):
        writer.write("w", tensor)
    writer.write("w", torch.zeros(2))
    with pytest.raises(ValueError, match="come once"):
        writer.write("w", torch.zeros(2))
    writer.close()


def test_a_file_with_holes_is_not_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))})
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match=r"finish: every planned tensor must be written, got none for \['b'\]"):
        writer.finish()
    writer.close()


# ---- all or nothing --------------------------------------------------------------------------------------------------


def fill(folder: Path, text: str = "new") -> None:
    (folder / "file").write_text(text)


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with appearing_at_once(tmp_path / "a" / "out") as staging:
        fill(staging)
        assert not (tmp_path / "a" / "out").exists()
        assert staging.parent == tmp_path / "a"  # a rename is atomic on one file system only
    assert digests(tmp_path).keys() == {"a/out/file"}
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there_before", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException], there_before: bool) -> None:
    out = tmp_path / "out"
    if there_before:
        out.mkdir()
        fill(out, "old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error), appearing_at_once(out, overwrite=True) as staging:
        fill(staging)
        raise error
    assert sorted(tmp_path.rglob("*")) == before
    if there_before:
        assert (out / "file").read_text() == "old"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_replacement_that_fails_half_way_keeps_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The old directory moves away before the new one takes its name; what fails in between must bring it back."""
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    rename, calls = os.rename, 0

    def fails_once(source: os.PathLike, target: os.PathLike) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OSError, match="No space"), appearing_at_once(out, overwrite=True) as staging:
        fill(staging)
    assert (out / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_directory_is_refused_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with appearing_at_once(out) as staging:  # an empty one is as good as none
        fill(staging, "first")
    with (
        pytest.raises(CheckpointError, match=r"must be new or empty, .*; --overwrite replaces it"),
        appearing_at_once(out),
    ):
        pytest.fail("entered")
    (out / "stale").touch()
    with appearing_at_once(out, overwrite=True) as staging:
        fill(staging, "second")
    assert (out / "file").read_text() == "second"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_not_a_directory_is_never_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        (tmp_path / "precious").mkdir()
        out.symlink_to("precious", target_is_directory=True)
    with pytest.raises(CheckpointError, match="must be a directory or new"), appearing_at_once(out, overwrite=True):
        pytest.fail("entered")
    assert out.exists()


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="must be writable, got"), appearing_at_once(tmp_path / "file" / "out"):
        pytest.fail("entered")


# ---- untrusted input -------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    folder.mkdir()
    write(folder, MIXED, list(MIXED), 100)
    return folder


def edit_map(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / INDEX_NAME).read_text())
        change(data["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(data))

    return damage


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])


def duplicate(folder: Path) -> None:
    """A tensor of the first shard also in the second."""
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name = next(n for n, info in read_index(folder).items() if info.file == first)
    save_file({name: MIXED[name]}, second)


FIRST = "model-00001-of-"
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: next(f.glob(FIRST + "*")).unlink(), "must exist, the index names it; download the model again"),
    (
        edit_map(lambda m: m.update(w="../x.safetensors")),
        "files must lie in the directory itself, got '../x.safetensors'",
    ),
    (edit_map(lambda m: m.update(w="/etc/passwd")), "files must lie in the directory itself, got '/etc/passwd'"),
    (edit_map(lambda m: m.update(w="..")), "files must lie in the directory itself, got '..'"),
    (edit_map(lambda m: m.update(w="")), "files must lie in the directory itself, got ''"),
    (edit_map(lambda m: m.update(w=next(iter(m.values())))), "w must be in its shard, got no such tensor"),
    (edit_map(lambda m: m.clear()), "must have a weight_map of tensor to file"),
    (lambda f: (f / INDEX_NAME).write_text("[]"), "must hold a JSON object, got list"),
    (lambda f: (f / INDEX_NAME).write_text('{"weight_map": 3}'), "must have a weight_map of tensor to file"),
    (lambda f: (f / INDEX_NAME).write_text("{"), "must be JSON, got"),
    (lambda f: (f / INDEX_NAME).write_bytes(b"\xff\xfe{"), "must be JSON, got"),
    (truncate, "must be a whole safetensors file, got:"),
    (lambda f: next(f.glob(FIRST + "*")).write_bytes(b"\xff" * 64), "must be a whole safetensors file, got:"),
    (
        lambda f: next(f.glob(FIRST + "*")).write_bytes(b"\x02" + bytes(7) + b"[]"),
        "must be a whole safetensors file, got:",
    ),
    (lambda f: next(f.glob(FIRST + "*")).write_bytes(b""), "must be a whole safetensors file, got:"),
    (duplicate, "must occur once, got it also in model-00001-of-"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_directory_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = sharded(tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_index(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        CheckpointError, match=r"must be safetensors, .*from_pretrained\(MODEL\).save_pretrained\(NEW\)"
    ):
        weight_files(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold model.safetensors or model.*index.json, got neither"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_config_json_that_is_no_object(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"must be (JSON|a Hugging Face model directory)|must hold a JSON object"):
        read_config(tmp_path)


def test_everything_but_weights_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt"]
    weights = [
        "a.safetensors",
        "b.bin",
        "c.gguf",
        "d.h5",
        "e.pth",
        INDEX_NAME,
        "pytorch_model.bin.index.json",
        "f.onnx",
    ]
    for name in [*kept, *weights, "config.json", "README.md", ".hidden"]:
        (source / name).write_text(name)
    assert copy_other_files(source, target) == sorted([*kept, "README.original.md"])
    assert (target / "README.original.md").read_text() == "README.md"
    assert sorted(p.name for p in target.iterdir()) == sorted([*kept, "README.original.md"])


# ---- rows ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), max_size=12))
def test_rows_come_in_the_order_asked_for(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    w = random_tensor(torch.int16, (7, 3), 0)
    save_file({"before": random_tensor(torch.uint8, (5,), 1), "w": w}, folder / "model.safetensors")
    assert torch.equal(read_rows(read_index(folder)["w"], rows), w[rows])


def test_chunks_are_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precal_ext.checkpoint.CHUNK", 7)
    write(tmp_path, MIXED, list(MIXED))
    for name, info in read_index(tmp_path).items():
        assert (
            b"".join(bytes(c) for c in read_chunks(info)) == MIXED[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        )
