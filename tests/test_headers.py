"""Files that lie: what a header claims, and links that lead out of the directory."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Run, altered, digests, run_python
from safetensors import safe_open
from safetensors.torch import save_file

from precal_ext import CheckpointError, quantize_checkpoint
from precal_ext.checkpoint import read_config, read_index
from precal_ext.foreign import quantized_by
from precal_ext.headers import MAX_HEADER_BYTES, judge_header, read_object

pytest_plugins = ["package_fixtures"]


def raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    return folder


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES: list[tuple[str, Any, int, str]] = [
    ("past the end", {"w": entry([4], [0, 16])}, 8, "w with data_offsets [0, 16] in 8 bytes of data"),
    ("overlap", {"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, 8, "b at byte 4, inside a (8)"),
    ("same place", {"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, 8, "b at byte 0, inside a (8)"),
    ("hole", {"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, 12, "b at byte 8, beyond the end of a (4)"),
    ("data of nobody", {"w": entry([2], [0, 8])}, 16, "16 bytes of data, of which tensors take 8"),
    ("negative shape", {"w": entry([-2], [0, 8])}, 8, "w with shape [-2]"),
    ("huge shape", {"w": entry([2**62, 8], [0, 8])}, 8, "more elements than there can be"),
    ("huge shape of nothing", {"w": entry([2, 0, 2**63 - 1], [0, 0])}, 0, "more elements than there can be"),
    ("beyond int64", {"w": entry([2**70, 0], [0, 0])}, 0, "w with shape [1180591620717411303424, 0]"),
    ("fraction", {"w": entry([2.0], [0, 8])}, 8, "w with shape [2.0]"),
    ("bool", {"w": entry([True], [0, 4])}, 4, "w with shape [True]"),
    ("no list", {"w": entry("2", [0, 8])}, 8, "w with shape 2"),
    ("size", {"w": entry([3], [0, 8])}, 8, "w with 8 bytes for F32 [3], which takes 12"),
    ("negative offset", {"w": entry([2], [-8, 0])}, 8, "w with data_offsets [-8, 0]"),
    ("backwards", {"w": entry([2], [8, 0])}, 8, "w with data_offsets [8, 0]"),
    ("three offsets", {"w": entry([2], [0, 4, 8])}, 8, "w with data_offsets [0, 4, 8]"),
    ("no dtype", {"w": {"shape": [2], "data_offsets": [0, 8]}}, 8, "w with an entry without dtype"),
    ("no entry", {"w": [1]}, 8, "w with an entry without dtype"),
    ("a list", [1], 8, "a header that cannot be read: '{' must be at byte 0, got '['"),
    ("unknown dtype", {"w": entry([2], [0, 8], "F4")}, 8, "w with dtype F4, which torch does not have"),
]


@pytest.mark.parametrize(("header", "size", "message"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_lying_header_is_refused_with_the_tensor(tmp_path: Path, header: Any, size: int, message: str) -> None:
    folder = raw(tmp_path / "model", json.dumps(header).encode(), bytes(size))
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    assert str(caught.value).startswith(f"{folder / 'model.safetensors'}: must be a whole safetensors file, got: ")
    assert message in str(caught.value)


TWICE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (TWICE, None, "'w' twice"),
        (b'{"w":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}', None, "'shape' twice"),
        (b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None, "invalid start byte"),
        (b"[" * 200_000, None, "a header that cannot be read"),
        (b'{"w":' + b"9" * 5000 + b"}", None, "a header that cannot be read"),
        (b"{", None, "a header that cannot be read"),
        (b'{"__metadata__":{},"__metadata__":{}}', None, "'__metadata__' twice"),
        (b'{"__metadata__":{"a":"","a":""}}', None, "'a' twice"),
        (b"{}{}", None, "more than an object, from byte 2"),
        (b"{" + b" " * 100_000_000, None, "a header of 100000001 bytes, more than 20000000; save the model in smaller"),
        (b"{}", 2**64 - 1, f"a header of {2**64 - 1} bytes"),
        (b"{}", 99_000_000, "a header of 99000000 bytes in a file of"),
    ],
    ids=[
        "key",
        "field",
        "utf8",
        "deep",
        "digits",
        "cut",
        "metadata",
        "metadata key",
        "two",
        "100 MB",
        "2**64",
        "longer than the file",
    ],
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, header: bytes, length: int | None, message: str) -> None:
    with pytest.raises(CheckpointError, match="must be a whole safetensors file, got: ") as caught:
        read_index(raw(tmp_path / "model", header, bytes(8), length))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"got: {size} bytes, too few for the length of a header"):
        read_index(tmp_path)


def entry_text(name: str, more: str = "") -> str:
    return f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]{more}}}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{" + ",".join(f'"{i}":0' for i in range(500_000)) + ',"7":0}', "0 with an entry without dtype: 0"),
        ("{" + ",".join(map(entry_text, map(str, range(130_000)))) + "," + entry_text("7") + "}", "'7' twice"),
        ('{"w":{"dtype":"U8","shape":[' + f"{2**62}," * 150 + '0],"data_offsets":[0,0]}}', "more elements than"),
        ('{"w":{"dtype":"U8","shape":[' + "0," * 2**20 + '0],"data_offsets":[0,0]}}', "a value of more than 4096"),
        ("{" + ",".join(map(entry_text, map(str, range(2**17 + 1)))) + "}", "more than 131072 tensors; save"),
        ('{"__metadata__":{"a":"' + "\U0001f600" * 2**20 + '"}}', "a value of more than 1048576 bytes"),
        ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(5000)) + "}}", "more than 4096 metadata"),
        ("{" + entry_text("w" * 10**6) + "}", "a value of more than 65536 bytes"),
        ("{" + entry_text("w" * 10**4, ',"shape":[1]') + "}", "'shape' twice"),
        ('{"' + "w" * 10**4 + '":1}', "with an entry without dtype: 1"),
        ('{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,' + "9" * 4000 + "]}}", "in 0 bytes of data"),
        ('{"__metadata__":{"a":1}}', "__metadata__ that is no object of strings: a: 1"),
        ("{" + entry_text("w", ',"more":NaN') + "}", "NaN, which is no JSON"),
        ('{"a\\u001b[2J":1}', "a\N{REPLACEMENT CHARACTER}[2J with"),
        ('{"a\\ud800":1}', "surrogates not allowed"),
    ],
    ids=[
        "numbers", "twice", "product", "sizes", "tensors", "long", "much metadata", "long name", "name twice", "name",
        "digits", "metadata", "NaN", "terminal", "half a character",
    ],
)  # fmt: skip
def test_a_header_that_wants_time_or_memory(header: str, message: str) -> None:
    """Refused at once; without the limits the first two would take about an hour, others gigabytes."""
    reason = judge_header(header.encode(), 0, {"U8": 1})
    assert message in reason
    assert len(reason) < 1000


def test_nesting_of_any_depth_is_refused() -> None:
    """Around the depth at which Python gives up, whoever meets it first: the parser or the message."""
    for depth in [*range(1, 60), *range(900, 1010)]:
        for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            header = f'{{"w":{{"dtype":{value}}}}}'
            assert re.match(
                r"w with an entry without dtype|a header that cannot be read", judge_header(header.encode(), 0, {})
            )


FACE = "\U0001f600"  # four bytes for every character of a string that holds it


def named(i: int, length: int) -> str:
    return f'"{FACE}{i}{"n" * length}":{{"dtype":"U8","shape":[1,1,1,1],"data_offsets":[{i},{i + 1}]}}'


# The most tensors that are accepted; the longest names; the longest strings.
WORST: dict[str, Callable[[], str]] = {
    "tensors": lambda: "{" + ",".join(named(i, 75) for i in range(2**17)) + "}",
    "names": lambda: "{" + ",".join(named(i, 65_000) for i in range(307)) + "}",
    "metadata": lambda: '{"__metadata__":{' + ",".join(f'"{i}":"{FACE + "m" * 10**6}"' for i in range(19)) + "}}",
}
READ = """
import sys
from pathlib import Path
import torch
from precal_ext.checkpoint import read_index
found = read_index(Path(sys.argv[1]))
# Not ru_maxrss: that starts with the peak of the process that forked this one.
print(len(found), next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("kind", WORST)
def test_the_memory_of_a_header_is_bounded(tmp_path: Path, kind: str) -> None:
    """In a process of its own, with torch, which alone takes some 230 MB."""
    header = WORST[kind]().encode()
    assert 0.8 * MAX_HEADER_BYTES < len(header) <= MAX_HEADER_BYTES
    count = header.count(b"dtype")
    raw(tmp_path, header, bytes(count))
    done = run_python("-c", READ, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tensors, peak = map(int, done.stdout.split())
    assert tensors == count
    assert peak < 390_000  # kB: the 400 MB of docs/reliability.md


def test_a_header_with_much_padding_is_read(tmp_path: Path) -> None:
    header = json.dumps({"w": entry([2], [0, 8])}).encode()
    folder = raw(tmp_path / "model", header.ljust(MAX_HEADER_BYTES), bytes(8))
    assert read_index(folder)["w"].shape == (2,)


TENSORS = {"a": torch.zeros(3, 5), "b.é": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3))
def test_what_is_accepted_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Any bytes of a header changed: refused by name of the file, or the same tensors as by safetensors' reader."""
    folder = tmp_path_factory.mktemp("bytes")
    path = folder / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at % (len(data) - 60)] = value
    path.write_bytes(data)
    try:
        found = read_index(folder)
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        return
    with safe_open(path, framework="pt") as file:
        assert {name: list(info.shape) for name, info in found.items()} == {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118
        }


# ---- links -----------------------------------------------------------------------------------------------------------


def moved(folder: Path, name: str, target: Path) -> None:
    """A file of the directory becomes a link to itself elsewhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / name, target)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_directory_is_refused(tmp_path: Path, tiny: Path, run: Run, name: str) -> None:
    """tokenizer.json is copied: quantizing a stranger's model must not put a private file into the result."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    moved(folder, name, tmp_path / "private" / "file")
    code, _, err = run("quantize", folder, tmp_path / "out", "--quiet")
    assert code == 3
    assert f"{folder / name}: must lie in the directory itself, got a link to {tmp_path / 'private' / 'file'}" in err
    assert not (tmp_path / "out").exists()


def test_links_inside_the_directory_and_of_the_hub_cache_are_followed(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "cache" / "snapshots" / "abc")
    moved(folder, "model.safetensors", tmp_path / "cache" / "blobs" / "123")
    moved(folder, "config.json", folder / "elsewhere.json")
    quantize_checkpoint(folder, tmp_path / "a" / "out")
    quantize_checkpoint(tiny, tmp_path / "b" / "out")
    assert (tmp_path / "a/out/model.safetensors").read_bytes() == (tmp_path / "b/out/model.safetensors").read_bytes()


def test_a_link_from_a_snapshot_to_elsewhere_is_refused(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "cache" / "snapshots" / "abc")
    moved(folder, "model.safetensors", tmp_path / "cache" / "other" / "123")
    with pytest.raises(CheckpointError, match="must lie in the directory itself"):
        read_index(folder)


# ---- JSON beside the weights -----------------------------------------------------------------------------------------

JSON: dict[str, tuple[bytes, str]] = {
    "deep": (b"[" * 100_000, "must be JSON, got"),
    "deep objects": (b'{"a":' * 100_000, "must be JSON, got"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON, got"),
    "twice": (b'{"a": {"hidden_size": 1, "hidden_size": 2}}', "must be JSON, got 'hidden_size' twice"),
    "NaN": (b'{"a": NaN}', "must be JSON, got NaN, which is no JSON"),
    "infinity": (b'{"a": -Infinity}', "must be JSON, got -Infinity, which is no JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "must be JSON, got"),
    "no UTF-8": (b'{"a": "\xff"}', "must be JSON, got"),
    "escape": (b'{"\\u001b[2J": 1, "\\u001b[2J": 1}', "got '\N{REPLACEMENT CHARACTER}[2J' twice"),
    "cut": (b'{"a": ', "must be JSON, got"),
    "empty": (b"", "must be JSON, got"),
    "list": (b"[1]", "must hold a JSON object, got list"),
    "items": (b'{"a":[' + b"0," * 2**20 + b"0]}", "must have at most 1,048,576 commas and brackets, got 1,048,578"),
    "long": (b'{"a":"' + b"x" * 8_000_000 + b'"}', "must have at most 8,000,000 bytes, got 8,000,008; that is no file"),
}


@pytest.mark.parametrize("kind", JSON)
def test_a_config_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    text, message = JSON[kind]
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: must ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def not_a_file(path: Path, kind: str) -> None:
    if kind == "a directory":
        path.mkdir()
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["a directory", "a pipe"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "shard"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, tiny: Path, run: Run, name: str, kind: str) -> None:
    """And not waited for: nobody writes into the pipe."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    if name == "shard":
        weights = {key: name for key in read_index(folder)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    not_a_file(folder / name, kind)
    for command in (["quantize", folder, tmp_path / "out"], ["verify", folder], ["eval", folder, "--text", "t"]):
        code, out, err = run(*command)
        assert code == 3
        assert f"{folder / name}: must be a plain file, got {kind}" in out + err
    assert not (tmp_path / "out").exists()


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^/dev/zero: must be a plain file, got a device$"):
        read_object(Path("/dev/zero"))


def test_an_endless_config_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file of 10 GB."""
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10_000_000_000)
    with pytest.raises(CheckpointError, match=r"must have at most 8,000,000 bytes, got 10,000,000,000;"):
        read_config(tmp_path)


INDEX: dict[str, tuple[str, str]] = {
    "twice": ('{"weight_map": {"w": "a", "w": "b"}}', "must be JSON, got 'w' twice"),
    "two maps": ('{"weight_map": {"w": "a"}, "weight_map": {"w": "b"}}', "must be JSON, got 'weight_map' twice"),
    "no text": ('{"weight_map": {"w": 3}}', "must be JSON, got a string must begin at byte 21"),
    "after": ('{"weight_map": {"w": "a"}} {}', "must be JSON, got more than an object, from byte 27"),
    "metadata": ('{"metadata": ' + "[" * 2000 + ', "weight_map": {"w": "a"}}', "must be JSON, got"),
    "nul": ('{"weight_map": {"w": "a\\u0000b"}}', r"files must lie in the directory itself, got 'a\x00b'"),
    "long": ('{"weight_map": {"w": "' + "a" * 70_000 + '"}}', "must be JSON, got a value of more than 65536 bytes"),
}


@pytest.mark.parametrize("kind", INDEX)
def test_an_index_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    text, message = INDEX[kind]
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'model.safetensors.index.json'}: {message}")


def test_what_an_index_says_besides_is_ignored(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = {key: "model.safetensors" for key in read_index(folder)}
    index = {"metadata": {"total_size": 1, "more": [{"a": None}]}, "weight_map": weights, "version": 1.5}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_index(folder).keys() == weights.keys()


# ---- quantized by somebody else --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["m.q_proj.qweight", "m.q_proj.qzeros", "m.q_proj.scales"], "GPTQ or AWQ"),
        (["m.q_proj.weight", "m.q_proj.weight.absmax", "m.q_proj.weight.quant_map"], "bitsandbytes"),
        (["m.q_proj.weight", "m.q_proj.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["m.q_proj.weight", "m.q_proj.SCB"], "bitsandbytes"),
        (["m.q_proj.weight_packed", "m.q_proj.weight_shape"], "compressed-tensors or precal"),
        (["m.q_proj.weight_packed", "m.q_proj.weight_row_scale"], "precal"),
        (["m.q_proj.weight", "m.q_proj.bias", "m.norm.weight", "m.rope.inv_freq"], None),
    ],
)
def test_who_has_quantized_a_model_shows_in_its_tensors(names: list[str], method: str | None) -> None:
    found = quantized_by(names)
    assert (found and found[0]) == method
    assert found is None or found[1] in names


QUANTIZED: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = [
    ("qweight", lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)})),
    ("absmax", lambda t: t.update({"model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(4)})),
    ("weight_row_scale", lambda t: t.update({"model.layers.0.mlp.up_proj.weight_row_scale": torch.zeros(4)})),
]


@pytest.mark.parametrize(("leaf", "change"), QUANTIZED, ids=["GPTQ", "bitsandbytes", "precal"])
def test_a_quantized_model_without_a_word_in_its_config_is_refused(
    tmp_path: Path, tiny: Path, run: Run, leaf: str, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    folder = altered(tiny, tmp_path / "model", change)
    before = digests(tmp_path)
    code, _, err = run("quantize", folder, tmp_path / "out", "--quiet")
    assert code == 3
    assert f"{folder}: must not be quantized yet, got model.layers.0.mlp.up_proj" in err
    assert leaf in err
    assert digests(tmp_path) == before
