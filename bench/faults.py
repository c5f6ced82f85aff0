#!/usr/bin/env python3
"""Breaks `precal quantize` in every way a machine can, and sees that nothing is lost and nothing looks finished.

    python bench/faults.py --seed 0 [--size 2GB] [--kills 100] [--interrupts 20] [--folder DIR] [--out FILE]

Makes a synthetic checkpoint of the given size, quantizes it once undisturbed (peak memory is measured there), then:

    kill -9     at random moments, the same command again and again, each run continuing the one before; every run must
                begin behind all that was recorded
    signals     SIGINT and SIGTERM the same way: exit codes 130 and 143, no traceback
    writes      on a small model, every single write, sync and rename fails once with ENOSPC, and every write is cut
                short once, so that the rest of it fails
    reads       every single read fails once with EIO, and finds the end of the file once
    file size   RLIMIT_FSIZE at random sizes
    full disk   a tmpfs of random size, where the system lets us mount one (root)

After every fault OUT must be absent, or whole where it struck behind the last rename; the same command then ends with
the bytes of the undisturbed run. Faults of calls are made by wrapping those of `os` in a forked child; the others are
the system's own. Exits 1 at the first that fails. --every 10 breaks every tenth call only. Settings do not matter for
what is written when; with --settings="--recipe rtn" most of the time goes into reading and writing.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from recipes import facts  # noqa: E402

from precal_ext import convert, staging  # noqa: E402
from precal_ext.checkpoint import ShardWriter  # noqa: E402
from precal_ext.config import QuantizeConfig  # noqa: E402
from precal_ext.console import size_of  # noqa: E402
from precal_ext.plan import BYTES_PER_ELEMENT, plan_quantization  # noqa: E402

SETTINGS = {"bits": 4}
# A run is hit within this share of the whole work: some 13 interruptions in a row, then the model is finished.
SPAN = 0.15


def require(good: bool, what: str) -> None:
    if not good:
        sys.exit(f"faults: {what}")


# ---- a model --------------------------------------------------------------------------------------------------------


def make_model(folder: Path, size: int, seed: int) -> Path:
    """A Llama of about ``size`` bytes of bfloat16, layer shapes in the ratios of an 8B model, many layers."""
    hidden = 64
    while 24 * 13.5 * (2 * hidden) ** 2 * 2 <= size and hidden < 4096:
        hidden *= 2
    inner, vocab = hidden * 7 // 2, hidden * 8
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layer = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = max(1, round((size - 4 * vocab * hidden) / layer))
    plan = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        plan.update({f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()})
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    generator = torch.Generator().manual_seed(seed)
    writer = ShardWriter(folder, {name: (torch.bfloat16, shape) for name, shape in plan.items()}, max(size // 5, 1))
    noise = torch.randn(1 << 22, generator=generator).mul_(0.02).bfloat16()
    for name, shape in plan.items():
        count = torch.Size(shape).numel()
        # Every tensor has bytes of its own, at a fraction of the price of fresh noise for all.
        shift = int(torch.randint(noise.numel(), (1,), generator=generator))
        writer.write(name, noise.roll(shift).repeat(-(-count // noise.numel()))[:count].reshape(shape))
    writer.finish()
    return folder


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while data := file.read(1 << 24):
                digest.update(data)
        found[path.name] = digest.hexdigest()
    return found


# ---- processes ------------------------------------------------------------------------------------------------------


def command(model: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "precal_ext", "quantize", str(model), str(out), *options]


# What the command is given on the large model.
settings: list[str] = []


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def undisturbed(model: Path, out: Path) -> dict[str, float]:
    """Seconds and peak memory of one run of its own."""
    started = time.monotonic()
    run = [sys.executable, "-c", _MEASURED, *command(model, out, "--quiet", "--json", *settings)]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True)
    require(done.returncode == 0, f"the undisturbed run must end well, got exit code {done.returncode}")
    seconds, peak = time.monotonic() - started, int(done.stderr.splitlines()[-1]) * 1024
    return {"seconds": seconds, "seconds_at_work": json.loads(done.stdout)["seconds"], "rss_bytes": peak}


# The peak of a process starts with that of the one that forks it: a small one in between forgets ours.
_MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def recorded(out: Path) -> int:
    return len({record["tensor"] for record in staging.read_journal(out)[1]})


class Campaign:
    """Runs the same command until it ends well, and breaks it on the way."""

    def __init__(self, model: Path, folder: Path, figures: dict[str, float], chance: random.Random) -> None:
        self.model, self.folder, self.figures, self.chance = model, folder, figures, chance
        self.expected = digests(folder / "expected" / "out")
        self.out = folder / "broken" / "out"
        self.finished = 0

    def check_finished(self) -> None:
        require(digests(self.out) == self.expected, f"{self.out} must have the bytes of the undisturbed run")
        self.finished += 1
        shutil.rmtree(self.out)
        shutil.rmtree(staging.folder_of(self.out), ignore_errors=True)

    def attempt(self, number: signal.Signals, codes: set[int]) -> str:
        """One run, hit at a random moment. "early": it had not begun; "hit": it was at work; "late": it was done."""
        before = recorded(self.out)
        process = subprocess.Popen(
            command(self.model, self.out, *settings),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # One in four at any moment from the start, imports and checks included; the others once a tensor is done.
        assert process.stderr is not None
        anywhere = self.chance.random() < 0.25
        begun = "" if anywhere else process.stderr.readline()
        try:
            work = self.figures["seconds_at_work"]
            start = self.figures["seconds"] - work if anywhere else 0.0
            process.wait(self.chance.uniform(0, start + SPAN * work))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        err = begun + process.communicate(timeout=600)[1]
        first = next((line for line in err.splitlines() if " tensors, " in line), None)
        if first is not None:
            number_one = int(first.split("/")[0])
            require(
                number_one == before + 1, f"a run must begin with tensor {before + 1}, got {number_one}: work is lost"
            )
        if self.out.exists():
            # Done, or hit after OUT had got its name.
            self.check_finished()
            return "late"
        require(process.returncode != 0, "exit code 0 must mean that OUT is there")
        if first is None and recorded(self.out) == before:
            return "early"
        require(process.returncode in codes, f"the exit code must be in {codes}, got {process.returncode}: {err}")
        require("Traceback" not in err, f"a signal must not show a traceback, got {err}")
        require(recorded(self.out) >= before, "what was recorded must stay recorded")
        return "hit"

    def signals(self, number: signal.Signals, codes: set[int], count: int) -> dict[str, int]:
        """Until ``count`` runs were hit at work, then to the end."""
        seen = {"early": 0, "hit": 0, "late": 0}
        self.finished = 0
        while seen["hit"] < count:
            seen[self.attempt(number, codes)] += 1
            print(f"\r{number.name}: {seen}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        undisturbed(self.model, self.out)
        self.check_finished()
        return {**seen, "finished_with_the_same_bytes": self.finished}


# ---- calls that fail ------------------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """Exit code of ``work`` in a child of its own: 0, 3 for an OSError, 4 for a refusal, 5 for anything else."""
    child = os.fork()
    if child == 0:
        code = 5
        try:
            work()
            code = 0
        except OSError:
            code = 3
        except ValueError as error:
            print(error)
            code = 4
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Fault:
    """Wraps a function of ``os``; the call with this number, counted from 0, goes wrong."""

    def __init__(self, wrong: Callable[..., Any], at: int) -> None:
        self.wrong, self.at, self.calls = wrong, at, 0

    def wrap(self, name: str, owner: Any = os) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.at:
                return self.wrong(real, *arguments, **named)
            return real(*arguments, **named)

        setattr(owner, name, call)


def fails(number: int) -> Callable[..., NoReturn]:
    def wrong(real: Callable[..., Any], *arguments: Any, **named: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return wrong


def cut_short(real: Callable[..., Any], file: int, data: Any, *rest: Any) -> Any:
    """Half of the bytes arrive, and nothing after them: a disk that is full now."""

    def full(*arguments: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = os.write = full  # type: ignore[assignment]
    return real(file, bytes(data)[: len(data) // 2], *rest)


def ends(real: Callable[..., Any], *arguments: Any) -> int:
    return 0


WRITES = [(os, "pwrite"), (os, "write"), (os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "copyfile")]
# What is wrapped, and what its call does instead.
CALLS: dict[str, tuple[list[tuple[Any, str]], Callable[..., Any]]] = {
    "a write, sync or rename fails": (WRITES, fails(errno.ENOSPC)),
    "a write is cut short": (WRITES[:2], cut_short),
    "a read fails": ([(os, "preadv")], fails(errno.EIO)),
    "a read finds the end": ([(os, "preadv")], ends),
}


class Calls:
    """Faults on a small model, a forked child each."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.out = model, folder / "calls" / "out"
        self.config = QuantizeConfig(**SETTINGS)
        self.max_shard_bytes = 1 + sum(p.stat().st_size for p in model.glob("*.safetensors")) // 10
        # With transformers in the parent no child has to start another process to ask it.
        import transformers  # noqa: F401

        plan_quantization(model, self.out)
        require(forked(self.quantize) == 0, "the undisturbed run must end well")
        self.expected = digests(self.out)
        shutil.rmtree(self.out.parent)

    def quantize(self) -> None:
        convert.quantize_checkpoint(self.model, self.out, self.config, max_shard_bytes=self.max_shard_bytes)

    def count(self, targets: list[tuple[Any, str]]) -> int:
        """How many calls an undisturbed run makes."""
        seen = self.out.parent.parent / "count"

        def work() -> None:
            fault = Fault(fails(errno.EIO), -1)
            for owner, name in targets:
                fault.wrap(name, owner)
            self.quantize()
            with open(seen, "w") as file:
                file.write(str(fault.calls))

        require(forked(work) == 0, "the run that is counted must end well")
        shutil.rmtree(self.out.parent)
        return int(seen.read_text())

    def break_and_continue(self, arrange: Callable[[], None], what: str) -> bool:
        """Whether the fault struck; raises when something was lost."""

        def work() -> None:
            arrange()
            self.quantize()

        code = forked(work)
        struck = code != 0
        if struck:
            # A refusal happens before anything is begun: OUT must be writable.
            require(code in (3, 4), f"{what}: must end as an OSError or a refusal, got code {code}")
        if not self.out.exists():
            require(forked(self.quantize) == 0, f"{what}: the same call must end well afterwards")
        require(digests(self.out) == self.expected, f"{what}: must end with the same bytes")
        require(not staging.folder_of(self.out).exists(), f"{what}: nothing must be left beside OUT")
        shutil.rmtree(self.out.parent)
        return struck

    def every_call(self, kind: str, step: int) -> dict[str, int]:
        targets, wrong = CALLS[kind]
        numbers, struck = range(0, self.count(targets), step), 0
        for at in numbers:

            def arrange(at: int = at) -> None:
                fault = Fault(wrong, at)
                for owner, name in targets:
                    fault.wrap(name, owner)

            struck += self.break_and_continue(arrange, f"{kind}, call {at}")
        return {"calls": len(numbers), "struck": struck}

    def file_sizes(self, count: int, chance: random.Random) -> dict[str, int]:
        struck = 0
        for _ in range(count):
            limit = chance.randrange(self.max_shard_bytes)

            def arrange(limit: int = limit) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            struck += self.break_and_continue(arrange, f"RLIMIT_FSIZE {limit}")
        return {"limits": count, "struck": struck}

    def full_disks(self, count: int, chance: random.Random, needed: int) -> dict[str, int] | None:
        """On a tmpfs that is too small, then grows. None where mounting is not allowed."""
        disk = self.out.parent.parent / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "precal-faults", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode != 0:
            disk.rmdir()
            return None
        before, self.out = self.out, disk / "calls" / "out"

        def resize(size: int) -> None:
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)

        def unaware(*arguments: object) -> None:
            """precal refuses when there is no room; here the room goes while it works."""

        def work() -> None:
            convert._check_room = unaware  # type: ignore[assignment]
            self.quantize()

        struck = 0
        try:
            for _ in range(count):
                resize(max(1 << 16, int(needed * chance.uniform(0.05, 1))))
                code = forked(work)
                require(code in (0, 3, 4), f"a full disk must end as an OSError or a refusal, got code {code}")
                struck += code != 0
                resize(4 * needed)
                if not self.out.exists():
                    require(forked(self.quantize) == 0, "with room again the same call must end well")
                require(digests(self.out) == self.expected, "a full disk: must end with the same bytes")
                shutil.rmtree(self.out.parent)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
            self.out = before
        return {"disks": count, "struck": struck}


# ---- the campaign ---------------------------------------------------------------------------------------------------


def campaign(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)  # a forked child has no other threads to wait for
    small = Calls(make_model(folder / "small", 400_000, arguments.seed), folder)
    for kind in CALLS:
        yield kind, small.every_call(kind, arguments.every)
    yield "RLIMIT_FSIZE", small.file_sizes(arguments.interrupts, chance)
    needed = sum(plan_quantization(small.model, small.out, small.config).writer(small.out).sizes.values())
    yield "full tmpfs", small.full_disks(arguments.interrupts, chance, needed)

    model = make_model(folder / "model", arguments.size, arguments.seed)
    figures = undisturbed(model, folder / "expected" / "out")
    largest = max(job.info.nbytes // job.info.dtype.itemsize for job in plan_quantization(model, folder / "x").jobs)
    bound = BYTES_PER_ELEMENT * largest + 400_000_000
    size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    yield "undisturbed", {**figures, "model_bytes": size, "largest_tensor": largest, "bound_bytes": bound}
    require(
        figures["rss_bytes"] <= bound, f"peak memory must be at most {bound:,} bytes, got {figures['rss_bytes']:,.0f}"
    )
    broken = Campaign(model, folder, figures, chance)
    yield "kill -9", broken.signals(signal.SIGKILL, {-signal.SIGKILL}, arguments.kills)
    yield "SIGINT", broken.signals(signal.SIGINT, {130}, arguments.interrupts)
    yield "SIGTERM", broken.signals(signal.SIGTERM, {143}, arguments.interrupts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=size_of, default=2_000_000_000, help="bytes of the synthetic model (default 2GB)"
    )
    parser.add_argument("--kills", type=int, default=100, help="kill -9 at work (default 100)")
    parser.add_argument("--interrupts", type=int, default=20, help="of every other kind that is random (default 20)")
    parser.add_argument("--every", type=int, default=1, help="of the calls that fail one by one (default 1: all)")
    parser.add_argument(
        "--settings", type=str.split, default=[], help='of the large model: --settings="--recipe rtn" (default: none)'
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where to work; needs three times the size (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="append the figures to this file, a line of JSON for each kind")
    arguments = parser.parse_args()
    # A shell that starts this in the background lets it ignore Ctrl-C, and so would the processes it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.extend(arguments.settings)
    options = {key: getattr(arguments, key) for key in ("size", "kills", "interrupts", "every", "seed", "settings")}
    # Where it worked is nobody's business.
    said = re.sub(r" --(folder|out)[ =]\S+", "", shlex.join(["python", "bench/faults.py", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="precal-faults-", dir=arguments.folder) as folder:
        for name, result in campaign(Path(folder), arguments):
            print(f"{name}: {json.dumps(result)}", flush=True)
            if arguments.out is not None:
                with open(arguments.out, "a") as file:
                    row = {**facts("bench/faults.py"), "command": said, **options, "fault": name, "result": result}
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
