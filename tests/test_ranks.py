"""One model quantized by several processes: the same bytes, one writer, and how all of them end when one does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from crew import appears, broken, hold_at, impatient, job, small_files
from models import Run, altered, digests, environment, save_tiny

from precal_ext import CheckpointError, quantize_checkpoint
from precal_ext.plan import plan_quantization, shares
from precal_ext.staging import Work, folder_of, read_journal

pytest_plugins = ["package_fixtures"]

SHARD = ["--max-shard-size", "8KB"]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of what one process makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(tiny, out, max_shard_bytes=8000)
    return digests(out)


def one_error(err: str) -> str:
    """The only thing that precal has said on stderr, besides progress and torchrun's own words."""
    said = [line for line in err.splitlines() if line.startswith("precal: ") and "what is finished lies in" not in line]
    assert len(said) == 1, err
    return said[0]


def own_of(model: Path, count: int, rank: int) -> list[str]:
    plan = plan_quantization(model, model.parent / "unused")
    return [job.info.name for job in shares(plan.jobs, count)[rank]]


# ---- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_shares_are_whole_balanced_and_keep_sets_together(tmp_path: Path, count: int) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=8)
    plan = plan_quantization(model, tmp_path / "out")
    parts = shares(plan.jobs, count)
    assert len(parts) == count
    place = {job.info.name: i for i, job in enumerate(plan.jobs)}
    order = [[place[job.info.name] for job in part] for part in parts]
    assert sorted(i for part in order for i in part) == list(range(len(plan.jobs)))
    assert all(part == sorted(part) for part in order)
    owners: dict[str, set[int]] = {}
    for rank, part in enumerate(parts):
        for one in part:
            if one.spec is None:
                assert rank == 0
            else:
                owners.setdefault(one.decision.fusion_set, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in owners.values())
    loads = [sum(one.info.nbytes for one in part if one.spec) for part in parts]
    largest = max(sum(j.info.nbytes for j in plan.jobs if j.spec and j.decision.fusion_set == s) for s in owners)
    assert max(loads) - min(loads) <= largest


# ---- with torchrun ---------------------------------------------------------------------------------------------------


def torchrun(processes: int, *command: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *command]
    return subprocess.Popen(
        [str(word) for word in words],
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_write_the_bytes_of_one(tiny: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    process = torchrun(2, "-m", "precal_ext.cli", "quantize", tiny, out, *SHARD)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert digests(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Estimate, report and progress come once, from the one that counts for all.
    assert said.count("memory at most") == said.count(" in each of 2 processes, ") == 1
    assert said.count("tensors quantized in") == said.count("load it with:") == 1
    progress = re.findall(r"^(\d+)/29 tensors", err, re.MULTILINE)
    assert progress == sorted(progress, key=int)
    assert progress[-1] == "29"


# torchrun runs this file; RANK that it holds, and the file that says so, come before the command.
HELD = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from crew import hold_at
from precal_ext.cli import main
if os.environ["RANK"] == sys.argv[1]:
    hold_at(1, Path(sys.argv[2]))
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def held(tmp_path: Path) -> Path:
    path = tmp_path / "held.py"
    path.write_text(HELD.format(tests=str(Path(__file__).parent)))
    return path


def begun(model: Path, folder: Path, after: int = 5) -> Path:
    """OUT of a run by one process that was terminated: what continues it need not ask which modules are linear."""
    out = folder / "made" / "out"
    command = ["quantize", model, out, *SHARD, "--quiet"]
    with job(folder / "begun", [command], {0: (hold_at, after, folder / "begun.pid")}) as running:
        appears(folder / "begun.pid")
        running.kill(0, signal.SIGTERM)
        assert running.wait() == [143]
    return out


def test_a_killed_rank_is_named_and_two_processes_continue_what_three_began(
    tiny: Path, tmp_path: Path, whole: dict[str, str], held: Path
) -> None:
    out = begun(tiny, tmp_path)
    before = len(read_journal(out)[1])
    process = torchrun(3, held, 2, tmp_path / "pid", "quantize", tiny, out, *SHARD, "--quiet")
    pid = int(appears(tmp_path / "pid"))
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    found = re.search(r"rank 2 \(\S+, pid (\d+)\) ended without a word: kill -9", one_error(err))
    assert found is not None
    assert int(found[1]) == pid
    assert f"what is finished lies in {folder_of(out)}; the same command continues" in err
    assert not out.exists()
    recorded = len(read_journal(out)[1])
    assert before < recorded < 29
    with job(tmp_path / "crew", [["quantize", tiny, out, *SHARD]] * 2) as running:
        assert running.wait() == [0, 0]
        assert running.err.startswith(f"{recorded + 1}/29 tensors")
    assert digests(out) == whole


def test_an_interruption_ends_all_and_one_process_continues(
    run: Run, tiny: Path, tmp_path: Path, whole: dict[str, str], held: Path
) -> None:
    out = begun(tiny, tmp_path)
    process = torchrun(2, held, 1, tmp_path / "pid", "quantize", tiny, out, *SHARD, "--quiet")
    pid = int(appears(tmp_path / "pid"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert one_error(err) == "precal: interrupted; OUT was not touched"
    assert err.count("the same command continues") == 1
    assert not out.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert run("quantize", tiny, out, *SHARD, "--quiet")[0] == 0
    assert digests(out) == whole


# ---- two hosts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts() -> Iterator[list[list[str]]]:
    """Commands before a command that run it on either of two hosts: network namespaces with a cable between them."""
    names = [f"precal-{os.getpid()}-{side}" for side in "ab"]
    cable = [f"pc{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str, check: bool = True) -> bool:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        return done.returncode == 0 or (check and pytest.skip(f"needs network namespaces, got {done.stderr.strip()}"))

    missing = [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for i, (name, end) in enumerate(zip(names, cable, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        own_name = 'hostname "$0" && exec "$@"'
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", own_name, f"host-{side}",
             "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end, side in zip(names, cable, "ab", strict=True)
        ]  # fmt: skip
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


@pytest.mark.parametrize("killed", [False, True])
def test_two_hosts(
    run: Run, tiny: Path, tmp_path: Path, whole: dict[str, str], held: Path, two_hosts: list[list[str]], killed: bool
) -> None:
    out = begun(tiny, tmp_path)
    variables = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    processes = [
        subprocess.Popen(
            [*there, sys.executable, str(held), "1" if killed else "-", str(tmp_path / "pid"), "quantize", str(tiny),
             str(out), *SHARD, "--quiet"],
            env=environment(**variables, RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, there in enumerate(two_hosts)
    ]  # fmt: skip
    if killed:
        os.kill(int(appears(tmp_path / "pid")), signal.SIGKILL)
    err = [process.communicate(timeout=120)[1] for process in processes]
    if killed:
        assert [process.returncode for process in processes] == [3, -signal.SIGKILL], err
        assert re.match(r"precal: rank 1 \(host-b, pid \d+\) ended without a word", one_error(err[0]))
        assert run("quantize", tiny, out, *SHARD, "--quiet")[0] == 0
    else:
        assert [process.returncode for process in processes] == [0, 0], err
    assert digests(out) == whole


# ---- without it: what every rank is told can differ ------------------------------------------------------------------


def test_more_processes_than_tensors_and_the_command_line_of_rank_0_counts(
    tiny: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    out = tmp_path / "out"
    commands = [["quantize", tiny, out, *SHARD], *([["quantize", tiny, tmp_path / "elsewhere", "--bits", 3]] * 11)]
    with job(tmp_path / "crew", commands) as running:
        assert running.wait() == [0] * 12
    assert digests(out) == whole
    assert not (tmp_path / "elsewhere").exists()


def test_rank_0_is_named_when_it_is_killed(run: Run, tiny: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "made" / "out"
    command = ["quantize", tiny, out, *SHARD, "--quiet"]
    with job(tmp_path / "crew", [command] * 3, {0: (hold_at, 3, tmp_path / "pid")}) as running:
        pid = int(appears(tmp_path / "pid"))
        running.kill(0)
        assert running.wait() == [-signal.SIGKILL, 3, 3]
        assert f"rank 0 ({os.uname().nodename}, pid {pid}) ended without a word" in one_error(running.err)
    assert not out.exists()
    assert run(*command)[0] == 0
    assert digests(out) == whole


@pytest.mark.parametrize("targets", [(0, 1, 2), (1,)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_or_one_ends_all_and_what_is_finished_stays(
    tiny: Path, tmp_path: Path, whole: dict[str, str], targets: tuple[int, ...], number: signal.Signals, code: int
) -> None:
    out = tmp_path / "made" / "out"
    command = ["quantize", tiny, out, *SHARD]
    with job(tmp_path / "crew", [command] * 3, {1: (hold_at, 1, tmp_path / "pid")}) as running:
        appears(tmp_path / "pid")
        for rank in targets:
            running.kill(rank, number)
        assert running.wait() == [code] * 3
        assert running.err.count("the same command continues") == 1
        assert "ended without a word" not in running.err
        assert "Traceback" not in running.err
    recorded = len(read_journal(out)[1])
    assert 0 < recorded < 29
    with job(tmp_path / "again", [command] * 2) as running:
        assert running.wait() == [0, 0]
        assert running.err.startswith(f"{recorded + 1}/29 tensors")
    assert digests(out) == whole


def test_a_rank_that_hangs_does_not_keep_the_others(
    run: Run, tiny: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    command = ["quantize", tiny, tmp_path / "out", *SHARD, "--quiet"]
    arranged = {rank: (impatient, 2.0) for rank in range(3)}
    with job(tmp_path / "crew", [command] * 3, {**arranged, 1: (hold_at, 1, tmp_path / "pid")}) as running:
        pid = int(appears(tmp_path / "pid"))
        running.kill(1, signal.SIGSTOP)
        time.sleep(1)  # pings wait in the line to the one that does not take them
        running.kill(0, signal.SIGINT)
        running.ranks[0].join(60)
        running.ranks[2].join(60)
        assert [running.ranks[rank].exitcode for rank in (0, 2)] == [3, 3]
        assert f"pid {pid}) ended without a word" in one_error(running.err)
    assert run(*command)[0] == 0
    assert digests(tmp_path / "out") == whole


def spoil(tiny: Path, target: Path) -> tuple[Path, str]:
    name = own_of(tiny, 2, 1)[-1]

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][-1, -1] = float("inf")

    return altered(tiny, target, damage), name


def test_a_weight_that_one_rank_refuses_ends_all_with_one_error(tiny: Path, tmp_path: Path) -> None:
    model, name = spoil(tiny, tmp_path / "model")
    out = tmp_path / "made" / "out"
    with job(tmp_path / "crew", [["quantize", model, out, "--quiet"]] * 2) as running:
        assert running.wait() == [3, 3]
        said = one_error(running.err)
        assert re.match(rf"precal: rank 1 \(.*\): .*{re.escape(name)} must be finite, got inf", said)
    assert list(out.parent.iterdir()) == []  # the same command would be refused again


def test_weights_that_are_left_out_are_found_once(tiny: Path, tmp_path: Path) -> None:
    model, name = spoil(tiny, tmp_path / "model")
    options = ["quantize", model, tmp_path / "out", "--skip-nonfinite"]
    with job(tmp_path / "crew", [options] * 2) as running:
        assert running.wait() == [0, 0]
        assert running.out.count(f"{name.removesuffix('.weight')} (holds inf at") == 1


def change_time(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


def lose(model: Path) -> None:
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_time, "must be the model of rank 0, with the same times of change"),
        (lose, "must hold model.safetensors"),
    ],
)
def test_another_model_on_another_machine_is_refused(
    tiny: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    other, out = tmp_path / "other", tmp_path / "made" / "out"
    shutil.copytree(tiny, other)
    change(other)
    commands = [["quantize", tiny, out, "--quiet"], ["quantize", other, out, "--quiet"]]
    with job(tmp_path / "crew", commands) as running:
        assert running.wait() == [3, 3]
        said = one_error(running.err)
    assert said.startswith("precal: rank 1 (")
    assert message in said
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("limit", [1000, 5000])
def test_a_disk_that_is_full_ends_all_and_the_job_continues(
    tiny: Path, tmp_path: Path, whole: dict[str, str], limit: int
) -> None:
    out = tmp_path / "made" / "out"
    command = ["quantize", tiny, out, *SHARD, "--quiet"]
    with job(tmp_path / "full", [command] * 2, {0: (small_files, limit)}) as running:
        assert running.wait() == [3, 3]
        assert "File too large" in one_error(running.err)
    assert not out.exists()
    with job(tmp_path / "crew", [command] * 2) as running:
        assert running.wait() == [0, 0]
    assert digests(out) == whole


def test_a_second_job_on_the_same_out_is_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    work = Work(out, {"model": {}})
    try:
        before = digests(out.parent)
        with job(tmp_path / "crew", [["quantize", tiny, out]] * 2) as running:
            assert running.wait() == [3, 3]
            assert one_error(running.err).endswith("one process at a time, got another at work on it")
        assert digests(out.parent) == before
    finally:
        work.discard()


def test_a_bug_in_one_rank_shows_its_traceback_once(tiny: Path, tmp_path: Path) -> None:
    with job(tmp_path / "crew", [["quantize", tiny, tmp_path / "out", "--quiet"]] * 2, {1: (broken,)}) as running:
        assert running.wait() == [1, 1]
        assert running.err.count("RuntimeError: a bug") == 1
        assert re.search(r"RuntimeError: rank 1 \(.*\) failed:", running.err)


def test_a_dry_run_is_shown_once(tiny: Path, tmp_path: Path) -> None:
    with job(tmp_path / "crew", [["quantize", tiny, tmp_path / "out", "--dry-run"]] * 2) as running:
        assert running.wait() == [0, 0]
        assert running.out.count("lm_head.weight") == 1
        assert running.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["crew"]


def test_another_precal_is_not_mixed_in(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from precal_ext.plan import plan_as_told

    told = plan_quantization(tiny, tmp_path / "out").to_tell()
    assert plan_as_told(tiny, told).jobs == plan_quantization(tiny, tmp_path / "out").jobs
    monkeypatch.setattr("precal_ext.plan.__version__", "9.9")
    with pytest.raises(CheckpointError, match=r"version must be that of rank 0, .* got 9\.9"):
        plan_as_told(tiny, told)
