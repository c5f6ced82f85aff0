"""Loss of a model on a text, divergence from a reference model, and text it writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext.checkpoint import CheckpointError, read_config, read_index
from precal_ext.headers import check_settings

DEFAULT_WINDOW = 256
_BATCH = 8


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a text.

    Args:
        tokens: predicted tokens.  nll_nats: mean negative log likelihood, nats per token.  perplexity: exp of it.
        kld_nats: mean KL(reference || model) of the next-token distributions, nats per token; None without a reference.
        top1: share of tokens whose most likely next token is the reference's; None without a reference.
        delta_nll_nats: nll_nats minus the reference's on the same tokens; None without a reference.
        nll_stderr, kld_stderr, delta_nll_stderr: standard errors over windows of text, the last one of the paired
            differences; None with a single window.
    """

    tokens: int
    nll_nats: float
    perplexity: float
    nll_stderr: float | None
    kld_nats: float | None = None
    kld_stderr: float | None = None
    top1: float | None = None
    delta_nll_nats: float | None = None
    delta_nll_stderr: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a directory, quantized or not, in eval mode; ``dtype`` of what is not quantized (default: as
    stored)."""
    folder = Path(path)
    # A damaged file is named before transformers trips over it.
    check_settings(folder, read_config(folder), len(read_index(folder)))
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f"{folder}: running a model needs transformers; pip install 'precal[hf]'") from None
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    if dtype is not None:
        options["dtype"] = dtype
    model, info = _from_pretrained(transformers.AutoModelForCausalLM, "model", folder, options)
    if info["missing_keys"]:  # transformers fills them with noise
        names = ", ".join(sorted(map(str, info["missing_keys"]))[:4])
        raise CheckpointError(f"{folder}: every tensor of the model must be there, got none for {names}")
    return model.eval()


def load(path: str | Path) -> tuple[Any, Any]:
    """Model (eval mode) and tokenizer of a directory, quantized or not."""
    folder = Path(path)
    model = load_model(folder)
    import transformers

    return model, _from_pretrained(transformers.AutoTokenizer, "tokenizer", folder, {})


def _from_pretrained(loader: Any, what: str, folder: Path, options: dict[str, Any]) -> Any:
    try:
        # False and not the default, which asks on the terminal whether to run code of the model's directory.
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers raises for a directory that nobody has checked
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{folder}: must have a {what} that transformers knows, got one with code of its own, which this "
                "command does not run; if you trust it, load it in Python: load_quantized(DIR, trust_remote_code=True)"
            ) from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: must have a {what} that transformers can load, got: {lines[0]}") from error


def read_windows(tokenizer: Any, path: Path, window: int, limit: int | None = None) -> list[list[int]]:
    """Token windows of a text file; of a ``.jsonl`` file, one per line's "text" field, cut to ``window``.

    Raises:
        CheckpointError: the file cannot be read, or is too short for one window of 2 tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: must be a readable UTF-8 text file, got: {error}") from None
    if path.suffix == ".jsonl":
        try:
            documents = [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise CheckpointError(f'{path}: every line must be a JSON object with a "text" field') from None
        windows = [list(tokenizer(d)["input_ids"])[:window] for d in documents]
    else:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    windows = [w for w in windows if len(w) >= 2][:limit]
    if not windows:
        raise CheckpointError(f"{path}: must have at least 2 tokens of text, got fewer")
    return windows


def batches(windows: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded ids [B, T] and the mask of real tokens, longest windows together; padding is on the right."""
    ordered = sorted(windows, key=len)
    for first in range(0, len(ordered), _BATCH):
        part = ordered[first : first + _BATCH]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, window in enumerate(part):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = True
        yield ids, mask


@torch.no_grad()
def evaluate(model: Any, windows: Sequence[list[int]], reference: Any | None = None) -> Evaluation:
    """Mean loss over windows, each predicted from its own start, and divergence from a reference on the same tokens."""
    nll: list[float] = []
    kld: list[float] = []
    delta: list[float] = []
    counts: list[int] = []
    agreed = 0
    for ids, mask in batches(windows):
        logp = _log_probabilities(model, ids, mask)
        target = mask[:, 1:]
        nll += _window_nll(logp, ids, target)
        counts += target.sum(1).tolist()
        if reference is not None:
            expected = _log_probabilities(reference, ids, mask)
            kld += ((expected.exp() * (expected - logp)).sum(-1) * target).sum(1).tolist()
            expected_nll = _window_nll(expected, ids, target)
            delta += [a - b for a, b in zip(nll[-len(expected_nll) :], expected_nll, strict=True)]
            agreed += int(((expected.argmax(-1) == logp.argmax(-1)) & target).sum())
    total = sum(counts)
    mean = sum(nll) / total
    return Evaluation(
        tokens=total,
        nll_nats=mean,
        perplexity=math.exp(min(mean, 700.0)),
        nll_stderr=_stderr(nll, counts),
        kld_nats=sum(kld) / total if reference is not None else None,
        kld_stderr=_stderr(kld, counts) if reference is not None else None,
        top1=agreed / total if reference is not None else None,
        delta_nll_nats=sum(delta) / total if reference is not None else None,
        delta_nll_stderr=_stderr(delta, counts) if reference is not None else None,
    )


def _window_nll(logp: Tensor, ids: Tensor, target: Tensor) -> list[float]:
    """Summed negative log likelihood of every window."""
    return (-logp.gather(-1, ids[:, 1:, None])[..., 0] * target).sum(1).tolist()


def _log_probabilities(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float().log_softmax(-1)


def _stderr(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of a ratio of sums over windows (linearised)."""
    n, total = len(sums), sum(counts)
    if n < 2:
        return None
    mean = sum(sums) / total
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(squares * n / (n - 1)) / total


@dataclass(frozen=True)
class Generation:
    """Text written after a prompt, and how fast: new tokens per second, prompt included in the time."""

    text: str
    new_tokens: int
    tokens_per_second: float


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> Generation:
    """Continue a prompt, greedily at temperature 0, else by sampling with a seed."""
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise CheckpointError("generate: prompt must have at least one token, got an empty one")
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
        torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    started = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **sampling,
    )
    seconds = time.perf_counter() - started
    new = int(output.shape[1] - inputs["input_ids"].shape[1])
    return Generation(tokenizer.decode(output[0], skip_special_tokens=True), new, new / seconds)
