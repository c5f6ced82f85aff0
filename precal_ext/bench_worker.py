"""One model of ``precal bench`` in a process of its own: it loads the model, takes its turns, and says where the time
of a turn goes.

Commands come as JSON lines on stdin and answers go to stdout; between commands the process sleeps.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from precal_ext.evaluate import load_model
from precal_ext.linear import PrecalLinear, set_activations
from precal_ext.select import is_conv1d

SEED = 7
# Where the time of a turn goes. "linear": the layers that are quantized, or their originals; "other": embedding, rotary
# table, residual sums, choosing the next token, and the Python of the blocks around them.
PARTS = ("linear", "lm_head", "attention", "norms", "other")
LOGITS = 4096  # of the prompt's last token, evenly spaced: enough to see whether two models are one


class Clock:
    """Own time of modules by part: what a module takes without those inside it, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._inner: list[float] = []

    @contextmanager
    def on(self, parts: dict[nn.Module, str]) -> Iterator[Clock]:
        """Time these modules while the block runs."""
        own = {module: module.__dict__.get("forward") for module in parts}
        for module, part in parts.items():
            module.forward = self._timed(module.forward, part)
        try:
            yield self
        finally:
            for module, forward in own.items():
                del module.forward  # the class's comes back
                if forward is not None:
                    module.forward = forward

    def _timed(self, forward: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed


class CountOps(TorchDispatchMode):
    """Counts the torch ops that run outside some modules."""

    def __init__(self, apart: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.count = self._inside = 0
        self._hooks = [m.register_forward_pre_hook(lambda *_: self._enter(1)) for m in apart]
        self._hooks += [m.register_forward_hook(lambda *_: self._enter(-1)) for m in apart]

    def _enter(self, step: int) -> None:
        self._inside += step

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not self._inside
        return func(*args, **(kwargs or {}))


def parts_of(model: nn.Module) -> dict[nn.Module, str]:
    """Every module of a model -> the part that its own time belongs to."""
    head = head_of(model)
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        kind = type(module).__name__
        if module is head:
            found[module] = "lm_head"
        elif isinstance(module, (PrecalLinear, nn.Linear)) or is_conv1d(module):
            found[module] = "linear"
        elif "Norm" in kind:
            found[module] = "norms"
        else:
            found[module] = "attention" if "Attention" in kind else "other"
    return found


def head_of(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def describe(model: Any) -> dict[str, Any]:
    """What a turn must read, and the limits that a turn must keep."""
    parts = parts_of(model)

    def size(part: str) -> int:
        tensors = [t for m, p in parts.items() if p == part for t in (*m.parameters(), *m.buffers())]
        return sum(t.nbytes for t in tensors)

    head = head_of(model)
    text: Any = model.config.get_text_config()
    unique = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {
        "weight_bytes": sum(unique.values()),
        "linear_bytes": size("linear"),
        "lm_head_bytes": size("lm_head"),
        "lm_head_bits": head.spec.bits if isinstance(head, PrecalLinear) else None,
        "quantized": sum(isinstance(m, PrecalLinear) for m in parts),
        "linears": sum(p == "linear" for p in parts.values()),
        "vocabulary": int(text.vocab_size),
        "positions": getattr(text, "max_position_embeddings", None),
    }


class Turns:
    """Runs a model: a prompt of random tokens at once, then tokens one by one, each the likeliest after the last."""

    def __init__(self, model: Any, vocabulary: int, prompt_length: int) -> None:
        self.model = model
        random = torch.Generator().manual_seed(SEED)
        self.prompt = torch.randint(vocabulary, (1, prompt_length), generator=random)
        known = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def prefill(self, length: int | None = None) -> Any:
        return self.model(input_ids=self.prompt[:, :length], use_cache=True, **self.last_only)

    def decode(self, output: Any, tokens: int) -> Any:
        cache = output.past_key_values
        for _ in range(tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self.model(input_ids=token, past_key_values=cache, use_cache=True)
        return output

    def turn(self, tokens: int) -> dict[str, float]:
        """Seconds of the prompt and of the tokens after it, and of CPU that other processes took meanwhile."""
        busy, own = busy_seconds(), time.process_time()
        started = time.perf_counter()
        output = self.prefill()
        begun = time.perf_counter()
        self.decode(output, tokens)
        ended = time.perf_counter()
        foreign = max(0.0, busy_seconds() - busy - (time.process_time() - own))
        return {"prefill": begun - started, "decode": ended - begun, "foreign": foreign}

    def split(self, tokens: int) -> dict[str, dict[str, float]]:
        """Seconds by part, of the prompt and of the tokens. Timing costs about a microsecond a module."""
        parts, found = parts_of(self.model), {}
        output = None
        for phase in ("prefill", "decode"):
            with Clock().on(parts) as clock:
                started = time.perf_counter()
                output = self.prefill() if output is None else self.decode(output, tokens)
                total = time.perf_counter() - started
            own = {part: clock.seconds[part] for part in PARTS}
            own["other"] += total - sum(own.values())
            found[phase] = own
        return found

    def ops_outside(self) -> int:
        """torch ops of one token outside the linear layers and the head."""
        output = self.prefill(1)
        with CountOps([m for m, part in parts_of(self.model).items() if part in ("linear", "lm_head")]) as ops:
            self.decode(output, 1)
        return ops.count

    def logits(self) -> list[float]:
        """Some of the logits after the prompt; it warms up, too."""
        last: Tensor = self.prefill().logits[0, -1].float()
        return last[torch.arange(min(LOGITS, len(last))) * len(last) // min(LOGITS, len(last))].tolist()


class Worker:
    def __init__(self) -> None:
        self.turns: Turns | None = None

    def load(self, model: str, dtype: str, threads: int, activations: str, prompt_length: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        loaded = load_model(Path(model), getattr(torch, dtype))
        set_activations(loaded, activations)
        facts = describe(loaded)
        self.turns = Turns(loaded, facts["vocabulary"], prompt_length)
        return facts

    def answer(self, do: str, **arguments: Any) -> Any:
        if do == "load":
            return self.load(**arguments)
        return memory() if do == "memory" else getattr(self.turns, do)(**arguments)


def busy_seconds() -> float:
    """CPU time of everybody on this machine so far; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, *interrupts = (int(field) for field in stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, int | None]:
    """Bytes of this process in memory: at most so far, and now (where the system says)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None
    return {"peak_bytes": peak, "resident_bytes": now}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stdin ends. Whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    with torch.no_grad():  # as generate does
        for line in sys.stdin:
            try:
                answer = {"answer": worker.answer(**json.loads(line))}
            except Exception as error:  # told to the process that asked
                answer = {"failed": f"{error}", "kind": type(error).__name__}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
