"""Interrupted and continued: what stays, what is believed, what is refused, and that the bytes are the same."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import Interruption, Run, altered, digests, environment, stop_after

from precal_ext import CheckpointError, QuantizeConfig, pipeline, quantize_checkpoint
from precal_ext.convert import Progress, plan_quantization
from precal_ext.staging import folder_of, read_journal

pytest_plugins = ["package_fixtures"]

CONFIG = QuantizeConfig(bits=3)


def interrupted(model: Path, out: Path, after: int = 20, **options: Any) -> int:
    """An interrupted run; how many tensors it recorded (a few that were computed may not have been written)."""
    with pytest.raises(Interruption):
        quantize_checkpoint(model, out, CONFIG, progress=stop_after(after), **options)
    recorded = len(read_journal(out)[1])
    assert after - 2 * pipeline.DEPTH <= recorded <= after
    return recorded


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of an undisturbed run."""
    parent = tmp_path_factory.mktemp("whole")
    quantize_checkpoint(tiny, parent / "out", CONFIG)
    return digests(parent / "out")


def continued(model: Path, out: Path) -> list[Progress]:
    seen: list[Progress] = []
    quantize_checkpoint(model, out, CONFIG, progress=seen.append)
    return seen


# ---- continuing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [5, 14, 28])
def test_the_same_call_continues_and_the_bytes_are_the_same(
    tiny: Path, tmp_path: Path, whole: dict[str, str], after: int
) -> None:
    recorded = interrupted(tiny, tmp_path / "out", after)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    seen = continued(tiny, tmp_path / "out")
    assert [p.tensors_done for p in seen] == list(range(recorded + 1, 30))
    assert seen[0].bytes_before == seen[-1].bytes_before > 0
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert digests(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interruption_before_the_first_tensor_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise Interruption

    monkeypatch.setattr(pipeline, "run", interrupt)
    with pytest.raises(Interruption):
        quantize_checkpoint(tiny, tmp_path / "out", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_refused_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = float("inf")

    model = altered(tiny, tmp_path / "model", damage)
    with pytest.raises(CheckpointError, match=r"up_proj.weight must be finite, got inf at \[47, 31\]"):
        quantize_checkpoint(model, tmp_path / "out", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def damage_data(folder: Path) -> None:
    path = folder / "new" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def lose_data(folder: Path) -> None:
    (folder / "new" / "model.safetensors").unlink()


def tear_line(folder: Path) -> None:
    path = folder / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def garble_line(folder: Path) -> None:
    lines = (folder / "journal.jsonl").read_bytes().split(b"\n")
    lines[5] = b"\0" * len(lines[5])
    (folder / "journal.jsonl").write_bytes(b"\n".join(lines))


def lose_journal(folder: Path) -> None:
    (folder / "journal.jsonl").unlink()


def tear_first_line(folder: Path) -> None:
    (folder / "journal.jsonl").write_bytes(b'{"version": ')


@pytest.mark.parametrize(
    "damage", [damage_data, lose_data, tear_line, garble_line, lose_journal, tear_first_line], ids=lambda f: f.__name__
)
def test_what_a_power_cut_damaged_is_made_again(
    tiny: Path, tmp_path: Path, whole: dict[str, str], damage: Callable[[Path], None]
) -> None:
    recorded = interrupted(tiny, tmp_path / "out")
    damage(folder_of(tmp_path / "out"))
    seen = continued(tiny, tmp_path / "out")
    assert len(seen) > 29 - recorded
    assert digests(tmp_path / "out") == whole


def test_two_interruptions(tiny: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    first = interrupted(tiny, tmp_path / "out", 8)
    assert interrupted(tiny, tmp_path / "out", 16) > first
    assert len(continued(tiny, tmp_path / "out")) < 29 - first
    assert digests(tmp_path / "out") == whole


def test_a_continued_run_does_not_ask_for_the_linears_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tiny, tmp_path / "out")
    expected = plan_quantization(tiny, tmp_path / "other", CONFIG)

    def never(*arguments: object) -> None:
        pytest.fail("asked again")

    monkeypatch.setattr("precal_ext.plan.find_linears", never)
    plan = plan_quantization(tiny, tmp_path / "out", CONFIG)
    assert (plan.found, plan.jobs) == (expected.found, expected.jobs)


# ---- what is not the same --------------------------------------------------------------------------------------------


def change_time(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


def change_config(model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text + "\n")


@pytest.mark.parametrize("change", [change_time, change_config])
def test_another_model_is_not_mixed_in(tiny: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    interrupted(model, tmp_path / "out")
    change(model)
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be continued with the same model.*--overwrite starts anew"):
        quantize_checkpoint(model, tmp_path / "out", CONFIG)
    assert digests(tmp_path) == before
    quantize_checkpoint(model, tmp_path / "out", CONFIG, overwrite=True)


def test_other_settings_are_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tiny, tmp_path / "out")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="the same settings bits, got 4 after 3; --overwrite"):
        quantize_checkpoint(tiny, tmp_path / "out")
    with pytest.raises(CheckpointError, match="the same max_shard_size, got 4096 after 50000000000"):
        quantize_checkpoint(tiny, tmp_path / "out", CONFIG, max_shard_bytes=4096)
    with monkeypatch.context() as patched:
        patched.setattr("precal_ext.plan.__version__", "9.9")
        with pytest.raises(CheckpointError, match=r"the same version, got '9\.9'"):
            quantize_checkpoint(tiny, tmp_path / "out", CONFIG)
    assert digests(tmp_path) == before


def test_a_model_that_changes_meanwhile_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    with pytest.raises(CheckpointError, match="must stay as it is while it is quantized"):
        quantize_checkpoint(model, tmp_path / "out", CONFIG, progress=lambda p: change_time(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- OUT -------------------------------------------------------------------------------------------------------------


def test_overwrite_starts_anew(tiny: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    interrupted(tiny, tmp_path / "out")
    seen: list[Progress] = []
    quantize_checkpoint(tiny, tmp_path / "out", CONFIG, overwrite=True, progress=seen.append)
    assert len(seen) == 29
    assert digests(tmp_path / "out") == whole


def test_an_interrupted_replacement_keeps_the_old_and_is_continued_without_overwrite(
    tiny: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("precious")
    recorded = interrupted(tiny, out, overwrite=True)
    assert digests(out).keys() == {"file"}
    assert len(continued(tiny, out)) == 29 - recorded
    assert digests(out) == whole


def test_a_directory_that_came_meanwhile_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(tiny, out)
    out.mkdir()
    (out / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="must be new or empty"):
        quantize_checkpoint(tiny, out, CONFIG)
    assert (out / "file").read_text() == "precious"
    assert read_journal(out)[1]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_between_the_renames(
    tiny: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The old directory goes aside, the new one takes its name: killed before, between and after."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("precious")
    script = f"""
import os, sys
from precal_ext import QuantizeConfig, quantize_checkpoint
rename, calls = os.rename, 0
def killed(*arguments):
    global calls
    if calls == {at}:
        os.kill(os.getpid(), 9)
    calls += 1
    rename(*arguments)
    if calls == {at} == 2:
        os.kill(os.getpid(), 9)
os.rename = killed
quantize_checkpoint({str(tiny)!r}, {str(out)!r}, QuantizeConfig(bits=3), overwrite=True)
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    if at == 2:
        assert digests(out) == whole
        with pytest.raises(CheckpointError, match="must be new or empty"):
            quantize_checkpoint(tiny, out, CONFIG)
    else:
        seen = continued(tiny, out)
        assert seen == []  # everything was recorded
    assert digests(out) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time(tiny: Path, tmp_path: Path, whole: dict[str, str], run: Run) -> None:
    out = tmp_path / "out"
    begun, go = threading.Event(), threading.Event()

    def wait(p: Progress) -> None:
        begun.set()
        assert go.wait(60)

    thread = threading.Thread(target=quantize_checkpoint, args=(tiny, out, CONFIG), kwargs={"progress": wait})
    thread.start()
    assert begun.wait(60)
    try:
        for options in ([], ["--overwrite"]):
            code, _, err = run("quantize", tiny, out, "--bits", 3, "--quiet", *options)
            assert code == 3
            assert "must be written by one process at a time, got another at work on it" in err
    finally:
        go.set()
        thread.join()
    assert digests(out) == whole


def test_a_lock_left_by_a_killed_process_is_no_lock(tiny: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    interrupted(tiny, tmp_path / "out")
    assert (folder_of(tmp_path / "out") / "lock").exists()
    continued(tiny, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


def test_a_file_system_without_locks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    quantize_checkpoint(tiny, tmp_path / "out", CONFIG)
    assert "has no locks" in caplog.text


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder where not even root may write")
def test_out_that_is_not_writable(tiny: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"out: must be writable, got (Operation not permitted|Permission denied)"
    ):
        quantize_checkpoint(tiny, "/sys/kernel/out", CONFIG)


# ---- disks that fail -------------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"out: must have room for [\d,]+ bytes, got 1,000"):
        quantize_checkpoint(tiny, tmp_path / "out", CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 100, 20_000, 30_000])
def test_a_file_that_must_not_grow_further(
    run: Run, tiny: Path, tmp_path: Path, whole: dict[str, str], limit: int
) -> None:
    """The system's own refusal of a write, at a size that the quantized model of 37 kB passes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code, out, err = run("quantize", tiny, tmp_path / "out", "--bits", 3, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out) == (3, "")
    assert "File too large" in err
    assert not (tmp_path / "out").exists()
    assert run("quantize", tiny, tmp_path / "out", "--bits", 3, "--quiet")[0] == 0
    assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize("at", [0, 7, 31])
def test_a_read_error_names_the_file_and_costs_nothing(
    run: Run, tiny: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real, calls = os.preadv, 0

    def preadv(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", preadv)
        code, _, err = run("quantize", tiny, tmp_path / "out", "--bits", 3, "--quiet")
    assert code == 3
    assert err.splitlines()[-1] == f"precal: {tiny / 'model.safetensors'}: Input/output error"
    assert not (tmp_path / "out").exists()
    assert run("quantize", tiny, tmp_path / "out", "--bits", 3, "--quiet")[0] == 0
    assert digests(tmp_path / "out") == whole


def test_everything_is_on_the_disk_before_it_has_its_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of every file, of the directory, rename, fsync of the parent: in this order."""
    events: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def synced(file: int) -> None:
        events.append(("fsync", os.fstat(file).st_ino))
        fsync(file)

    def renamed(source: Path, target: Path) -> None:
        events.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    out = tmp_path / "out"
    quantize_checkpoint(tiny, out, CONFIG)
    at = events.index(("rename", out.stat().st_ino))
    before, after = events[:at], events[at + 1 :]
    assert {inode for _, inode in before} >= {p.stat().st_ino for p in out.iterdir()}
    assert before[-1] == ("fsync", out.stat().st_ino)
    assert after == [("fsync", tmp_path.stat().st_ino)]


# ---- the campaign ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_campaign(tmp_path: Path) -> None:
    command = ["bench/faults.py", "--size", "4MB", "--kills", "1", "--interrupts", "0", "--every", "100"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "results")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = map(json.loads, (tmp_path / "results").read_text().splitlines())
    results = {row["fault"]: row["result"] for row in rows}
    assert results["kill -9"]["hit"] == 1
    assert results["a write, sync or rename fails"]["struck"] > 1


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def test_the_parts_of_the_pipeline_overlap_in_order_within_the_limit() -> None:
    under_way, most, written = 0, 0, []
    lock = threading.Lock()

    def read(item: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 10
            most = max(most, under_way)
        return item * 2

    def write(item: int, value: int) -> None:
        nonlocal under_way
        time.sleep(0.001)
        written.append((item, value))
        with lock:
            under_way -= 10

    pipeline.run(range(50), read, lambda item, value: value + 1, write, lambda item: 10, 30)
    assert written == [(i, 2 * i + 1) for i in range(50)]
    assert 10 < most <= 30


def test_one_item_beyond_the_limit_is_still_done() -> None:
    written: list[int] = []
    pipeline.run([1, 2, 3], lambda i: i, lambda i, v: v, lambda i, v: written.append(v), lambda item: 100, 1)
    assert written == [1, 2, 3]


@pytest.mark.parametrize("part", ["read", "compute", "write"])
@pytest.mark.parametrize("at", [0, 5, 19])
def test_an_error_of_any_part_ends_the_others(part: str, at: int) -> None:
    def step(name: str) -> Callable[..., int]:
        def work(item: int, value: int = 0) -> int:
            if name == part and item == at:
                raise Interruption(part)
            return item

        return work

    threads = threading.active_count()
    with pytest.raises(Interruption, match=part):
        pipeline.run(range(20), step("read"), step("compute"), step("write"), lambda item: 1, 3)
    assert threading.active_count() == threads
