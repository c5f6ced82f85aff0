"""Headers of safetensors files: valid ones, ones with changed bytes, and structured lies.

    python tests/fuzz_headers.py --headers 1000000 --seed 1
    python tests/fuzz_headers.py --seed 1 --first 4711 --cases 1      # one case again
    python tests/fuzz_headers.py --atheris 1000000                    # coverage-guided; pip install atheris

``headers.judge_header`` ends in a verdict, whatever the bytes. What it accepts and safetensors' own reader accepts too
is the same tensors for both. Every hundredth file is written and read: ``checkpoint.read_headers`` and ``read_tensor``
end in tensors or in CheckpointError. Workers may take at most ADDRESS_SPACE_MB; case i of a seed is always the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import campaign
from campaign import Finding
from safetensors import SafetensorError, deserialize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from precal_ext import checkpoint
from precal_ext.headers import CheckpointError, judge_header

ADDRESS_SPACE_MB = 8192  # torch maps 5 GB and touches few of them
ITEMSIZES = checkpoint._ITEMSIZES
NUMBERS: list[Any] = [0, 1, -1, 2, 3, 4, 8, 16, 255, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**40]
NUMBERS += [-(2**63), 1.0, 0.5, 1e308, True, False, None, "4", [], {}, [4], float("nan"), float("inf")]
NAMES = ["w", "a", "b", "", "model.layers.0.mlp.up_proj.weight", "é", "\ud800", "\U0001f600", "\x1b[2J", "\0"]
NAMES += ["__metadata__", "x" * 300]
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"1e999", b"-0"]
TOKENS += [b"NaN", b"\xff", b"\x00", b" ", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000]
TOKENS += [b'"__metadata__":{},', b'"dtype":"U8",']


def valid_entries(r: random.Random) -> tuple[dict[str, Any], int]:
    """The entries of a header that is true of so many bytes of data."""
    entries: dict[str, Any] = {}
    if r.random() < 0.5:
        entries["__metadata__"] = {"format": "pt"}
    at = 0
    for i in range(r.choice([0, 1, 1, 2, 3, 8])):
        dtype = r.choice(list(ITEMSIZES))
        shape = [r.choice([0, 1, 1, 2, 3, 8]) for _ in range(r.choice([0, 1, 2, 2, 3, 5]))]
        size = ITEMSIZES[dtype]
        for n in shape:
            size *= n
        entries[f"t{i}" if r.random() < 0.8 else f"{r.choice(NAMES[:6])}{i}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    return entries, at


def anything(r: random.Random) -> Any:
    return copy.deepcopy(r.choice(NUMBERS))


def lie(r: random.Random, entries: dict[str, Any]) -> None:
    """Change one claim."""
    names = [name for name in entries if name != "__metadata__"]
    kind = r.randrange(8)
    if kind == 0 or not names:
        entries[r.choice(NAMES)] = r.choice([anything(r), {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}])
        return
    entry = entries[r.choice(names)]
    if not isinstance(entry, dict):
        return
    if kind == 1:
        entry[r.choice(["dtype", "shape", "data_offsets", "more"])] = r.choice(
            [anything(r), "F32", "F4", "C64", [0, 0]]
        )
    elif kind == 2:
        entry.pop(r.choice(["dtype", "shape", "data_offsets"]), None)
    elif kind in (3, 4, 5) and isinstance(numbers := entry.get("data_offsets" if kind == 5 else "shape"), list):
        at = r.randrange(len(numbers) + 1)
        numbers[at : at + (kind > 3)] = [anything(r)]
    elif kind == 6:
        entry["shape"] = [r.choice([1, 2**62, 2**63 - 1, 0])] * r.choice([1, 2, 70, 3000])
    else:
        entry["dtype"] = r.choice([*ITEMSIZES, "F8_E8M0", "F6_E2M3", "", "\x1b", "f32", "Q" * 500])


def mutate(r: random.Random, text: bytes) -> bytes:
    """Change bytes."""
    data = bytearray(text)
    for _ in range(r.choice([1, 1, 2, 5])):
        at = r.randrange(len(data) + 1)
        kind = r.randrange(6)
        if kind == 0 and at < len(data):
            data[at] = r.randrange(256)
        elif kind == 1:
            data[at : at + r.choice([1, 2, 8, 40])] = b""
        elif kind == 2:
            data[at:at] = r.choice(TOKENS)
        elif kind == 3:
            begin = r.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + r.choice([1, 8, 60])]
        elif kind == 4 and at < len(data):
            data[at] ^= 1 << r.randrange(8)
        else:
            data[at : at + 1] = str(r.choice(NUMBERS)).encode()
    return bytes(data)


def make(seed: int, index: int) -> tuple[bytes, int, bool]:
    """The text of a header, the bytes of data after it, and whether it is valid."""
    r = random.Random(seed * 1_000_003 + index)
    entries, size = valid_entries(r)
    kind = r.randrange(10)
    if kind >= 5:
        for _ in range(r.choice([1, 1, 2, 4])):
            lie(r, entries)
    text = json.dumps(entries, ensure_ascii=r.random() < 0.5, separators=r.choice([(",", ":"), None]))
    header = text.encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    if 1 <= kind < 5:
        header = mutate(r, header)
    if kind in (4, 9) and r.random() < 0.5:
        size = max(0, size + r.choice([-8, -1, 1, 8, 4096]))
    return header, size, kind == 0


def tensors_of(header: bytes, size: int) -> dict[str, tuple[str, list[int], int]] | None:
    """What safetensors' own reader finds: dtype, shape, bytes; None: it refuses."""
    try:
        found = deserialize(len(header).to_bytes(8, "little") + header + bytes(size))
    except (SafetensorError, UnicodeError):
        return None
    return {name: (t["dtype"], t["shape"], len(t["data"])) for name, t in found}


def check(header: bytes, size: int, valid: bool, folder: Path | None) -> str:
    """The outcome; with a folder, of the file too."""
    reason = judge_header(header, size, ITEMSIZES)
    theirs = tensors_of(header, size)
    if reason:
        if valid:
            raise Finding(f"a valid header is refused: {reason}")
        if len(reason) > 1000:
            raise Finding(f"a message of {len(reason)} characters")
        reason.encode("utf-8")
    elif theirs is not None:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        ours = {k: (e["dtype"], e["shape"], e["data_offsets"][1] - e["data_offsets"][0]) for k, e in entries.items()}
        if ours != theirs:
            raise Finding(f"we read {ours}, safetensors reads {theirs}")
    if folder is not None:
        read(header, size, bool(reason), folder)
    verdict = f"{'refused' if reason else 'accepted'}, {'refused' if theirs is None else 'accepted'} by safetensors"
    return verdict + (", read as a file" if folder else "")


def read(header: bytes, size: int, bad: bool, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    try:
        for info in checkpoint.read_headers([path]).values():
            tensor = checkpoint.read_tensor(info)
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise Finding(f"{info.name}: must be {info.dtype} {info.shape}, got {tensor.dtype} {tensor.shape}")
    except CheckpointError as error:
        if not str(error).startswith(str(path)):
            raise Finding(f"a message must begin with the file, got {error}") from error
        return
    if bad:
        raise Finding("a bad file is read")


def work(first: int, cases: int, options: argparse.Namespace, progress: campaign.Progress) -> Counter[str]:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_MB << 20, ADDRESS_SPACE_MB << 20))
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(first, first + cases):
            progress.at(index)
            done[check(*make(options.seed, index), Path(folder) if index % 100 == 0 else None)] += 1
    return done


def coverage_guided(runs: int, seed: int) -> None:
    """Atheris (libFuzzer) on the same judgement, from valid headers, guided by the branches of ``headers``."""
    import atheris

    atheris.instrument_func(judge_header)
    module = sys.modules["precal_ext.headers"]
    for name in ("claims_of", "_entries", "_read_metadata", "_judge", "_loads", "_without_duplicates", "_short"):
        setattr(module, name, atheris.instrument_func(getattr(module, name)))
    for name in ("next", "take", "members", "string", "value", "end"):
        setattr(module._Walk, name, atheris.instrument_func(getattr(module._Walk, name)))

    def one(data: bytes) -> None:
        check(data[2:], int.from_bytes(data[:2], "little") % 4096, False, None)

    with tempfile.TemporaryDirectory() as folder:
        for index in range(200):
            header, size, _ = make(seed, index)
            Path(folder, str(index)).write_bytes(min(size, 4095).to_bytes(2, "little") + header)
        arguments = [
            f"-runs={runs}",
            f"-seed={seed}",
            "-max_len=600",
            "-rss_limit_mb=2048",
            "-timeout=10",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *arguments, folder], one)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=int, default=1_000_000, help="stop after so many")
    parser.add_argument("--atheris", type=int, metavar="RUNS", help="coverage-guided instead, in this process")
    campaign.add_options(parser)
    options = parser.parse_args()
    if options.atheris is not None:
        coverage_guided(options.atheris, options.seed)
        return 0
    return campaign.main(Path(__file__), options, work, options.headers, 50_000)


if __name__ == "__main__":
    sys.exit(main())
