#!/usr/bin/env python3
"""Families of small language models, trained here: Llama-, GPT-2- and OPT-like, of several widths and depths.

    python bench/small_models.py [DIR] [--only REGEX] [--share 1.0] [--steps N] [--list]

DIR, or else the variable PRECAL_SMALL_MODELS, or else a folder beside the system's temporary files, gets one directory
per model as transformers writes it (safetensors, tokenizer), and in it training.json: settings, tokens, seconds, loss
on held-out text. What is there already is not made again, so a run goes on after a stop. The budget is in steps, of
2048 tokens each: --share takes a part of every model's steps, --steps sets them; it is part of a model's name. A model
with all of its steps takes 1 to 4 minutes of one core.

Text: the calibration files of ../shared/data and modules of Python's standard library; where ../shared is absent, the
embedded text instead of the former. Held out: the evaluation files, and every tenth module. Each vocabulary has a
byte-level BPE tokenizer, made from the same text. The same versions of Python, torch and tokenizers and the same number
of threads (one by default) give the same weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from recipes import ROOT, SHARED

WINDOW, BATCH = 256, 8  # tokens of a window, windows of a step
LIBRARY_BYTES = 2_500_000  # of the standard library
SEPARATOR = "<|endoftext|>"
CALIBRATION = ("books_calib.txt", "python_calib.txt", "stories_calib.jsonl")
HELD_OUT = ("books_eval.txt", "python_eval.txt", "stories_eval.jsonl")
HELD_OUT_WINDOWS = 16  # of each text
FAMILIES = ("llama", "gpt2", "opt")
# Width, layers, heads, vocabulary, steps.
SIZES = (
    (48, 2, 2, 512, 1600),
    (64, 3, 4, 1024, 1200),
    (96, 2, 3, 512, 1000),
    (96, 4, 3, 2048, 600),
    (128, 4, 4, 1024, 600),
    (192, 6, 6, 1024, 300),
)


@dataclass(frozen=True)
class Small:
    """One model: what it looks like and how long it is trained."""

    family: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.family}-d{self.width}-l{self.layers}-v{self.vocabulary}-s{self.steps}"

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


def small_models(share: float = 1.0, steps: int | None = None) -> list[Small]:
    """All of them, the small sizes of every family first."""
    return [
        Small(family, width, layers, heads, vocabulary, steps or max(1, round(full * share)))
        for width, layers, heads, vocabulary, full in SIZES
        for family in FAMILIES
    ]


def cache_folder() -> Path:
    """Where models are kept when nobody says where."""
    return Path(os.environ.get("PRECAL_SMALL_MODELS") or Path(tempfile.gettempdir()) / "precal-small-models")


# ---- text ------------------------------------------------------------------------------------------------------------


def library(held_out: bool) -> list[str]:
    """Modules of the standard library, in the order of their names: every tenth, or all others."""
    found, size = [], 0
    for i, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        if size > LIBRARY_BYTES:
            break
        if (i % 10 == 0) == held_out:
            found.append(text)
    return found


def read_documents(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.splitlines()] if path.suffix == ".jsonl" else [text]


@functools.cache
def training_text() -> tuple[str, ...]:
    """Documents to train on."""
    data = SHARED / "data"
    paths = [data / name for name in CALIBRATION] if data.is_dir() else [ROOT / "demo" / "text.txt"]
    return tuple(document for path in paths for document in read_documents(path)) + tuple(library(held_out=False))


def held_out_windows(tokenizer: Any, limit: int = HELD_OUT_WINDOWS) -> dict[str, list[list[int]]]:
    """Windows of every held-out text, by its name, evenly spaced."""
    data = SHARED / "data"
    texts = {name: read_documents(data / name) for name in HELD_OUT} if data.is_dir() else {}
    found = {}
    for name, documents in {**texts, "library": library(held_out=True)}.items():
        ids = joined_ids(tokenizer, tuple(documents))
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
        found[name] = [windows[i * len(windows) // limit] for i in range(min(limit, len(windows)))]
    return found


def joined_ids(tokenizer: Any, documents: tuple[str, ...]) -> list[int]:
    """Ids of the documents, the separator behind each."""
    end = tokenizer.convert_tokens_to_ids(SEPARATOR)
    ids: list[int] = []
    for encoded in tokenizer(list(documents), verbose=False)["input_ids"]:
        ids += [*encoded, end]
    return ids


@functools.cache
def tokenizer_of(vocabulary: int) -> Any:
    """A byte-level BPE tokenizer made from the training text; it has a token for every byte."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[SEPARATOR], initial_alphabet=sorted(alphabet), show_progress=False
    )
    model.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=SEPARATOR, eos_token=SEPARATOR)


# ---- models ----------------------------------------------------------------------------------------------------------


def build(small: Small) -> Any:
    """The model with its first weights; heads share the embedding."""
    import transformers

    d, common = small.width, {"vocab_size": small.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if small.family == "llama":
        config: Any = transformers.LlamaConfig(
            **common,
            hidden_size=d,
            intermediate_size=8 * d // 3 // 16 * 16,
            num_hidden_layers=small.layers,
            num_attention_heads=small.heads,
            num_key_value_heads=small.heads if small.heads % 2 else small.heads // 2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
        )
    elif small.family == "gpt2":
        config = transformers.GPT2Config(
            **common,
            n_embd=d,
            n_layer=small.layers,
            n_head=small.heads,
            n_positions=WINDOW,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    elif small.family == "opt":
        config = transformers.OPTConfig(
            **common,
            pad_token_id=None,
            hidden_size=d,
            word_embed_proj_dim=d,
            ffn_dim=4 * d,
            num_hidden_layers=small.layers,
            num_attention_heads=small.heads,
            max_position_embeddings=WINDOW,
            dropout=0.0,
            attention_dropout=0.0,
            tie_word_embeddings=True,
        )
    else:
        raise ValueError(f"build: family must be one of {', '.join(FAMILIES)}, got {small.family!r}")
    torch.manual_seed(small.seed)
    return transformers.AutoModelForCausalLM.from_config(config)


def rate(step: int, steps: int, width: int) -> float:
    """Learning rate: a short rise, then half a cosine down to a twentieth. Wider models want a lower one."""
    highest, rise = 4e-3 * math.sqrt(64 / width), max(1, steps // 20)
    if step < rise:
        return highest * (step + 1) / rise
    return highest * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))


@torch.enable_grad()
def train(small: Small) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what training.json says."""
    from precal_ext.evaluate import evaluate

    started = time.monotonic()
    tokenizer = tokenizer_of(small.vocabulary)
    ids = torch.tensor(joined_ids(tokenizer, training_text()))
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    model = build(small)
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    shuffle, order, losses = torch.Generator().manual_seed(small.seed), torch.empty(0, dtype=torch.long), []
    for step in range(small.steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(windows), generator=shuffle)])
        batch, order = windows[order[:BATCH]], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, small.steps, small.width)
        logits = model(input_ids=batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    held_out = {name: evaluate(model, part).nll_nats for name, part in held_out_windows(tokenizer).items()}
    return (
        model,
        tokenizer,
        {
            **asdict(small),
            "name": small.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": small.steps * WINDOW * BATCH,
            "training_tokens": len(ids),
            "last_losses_nats": sum(losses[-20:]) / len(losses[-20:]),
            "held_out_nll_nats": held_out,
            "seconds": time.monotonic() - started,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
    )


def make(small: Small, root: Path) -> Path:
    """The directory of a trained model; trains it where that is not there. It appears whole or not at all."""
    folder = root / small.name
    if (folder / "training.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{small.name}-", dir=root))
    try:
        model, tokenizer, facts = train(small)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        part.chmod(0o755)
        if not folder.exists():  # another process may have been faster; its weights are the same
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def describe(folder: Path) -> str:
    """One line on a model that is there."""
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    loss = "  ".join(f"{name.split('_')[0]} {nll:.3f}" for name, nll in facts["held_out_nll_nats"].items())
    return f"{facts['name']:28}{facts['parameters']:>10,} parameters{facts['seconds']:7.0f} s   held-out NLL: {loss}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=cache_folder())
    parser.add_argument("--only", metavar="REGEX", default="", help="models by name")
    parser.add_argument("--share", type=float, default=1.0, help="of every model's steps (default 1)")
    parser.add_argument("--steps", type=int, help="of every model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="names of the models, and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for small in small_models(args.share, args.steps):
        if not re.search(args.only, small.name):
            continue
        print(small.name if args.list else describe(make(small, args.folder)), flush=True)


if __name__ == "__main__":
    main()
