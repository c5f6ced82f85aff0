"""Compensating a quantized directory: a copy of it with other codes, whole or not at all, and resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from precal_ext._version import __version__
from precal_ext.checkpoint import (
    CheckpointError,
    TensorInfo,
    read_json,
    read_tensor,
    replace_tensor,
    weight_files,
    write_file,
)
from precal_ext.compensate import (
    BlockResult,
    CompensateConfig,
    Compensation,
    Progress,
    Search,
    Work,
    choose_windows,
    set_weight,
)
from precal_ext.config import same_experts, variants
from precal_ext.convert import has_digest
from precal_ext.digest import sha256
from precal_ext.evaluate import load, load_model, read_windows
from precal_ext.headers import check_inside
from precal_ext.measure import Figures, measure, sqnr_db
from precal_ext.qtensor import QTensor
from precal_ext.report import REPORT_NAME
from precal_ext.rewrite import check_directories
from precal_ext.sites import precal_modules
from precal_ext.staging import Work as Staging
from precal_ext.staging import check_apart, fingerprint, read_journal
from precal_ext.survey import MAX_REPORT_BYTES, MAX_REPORT_ITEMS, Original, Stored, take_rows
from precal_ext.verify import LOWEST_SQNR_DB

SAMPLE = 1 << 16  # weights of a tensor that tell whether the reference is the model it was made from
CARD_BEFORE, CARD_AFTER = (
    "No data was used.",
    "No data was used to quantize; codes were then changed on a text, see below.",
)


def compensate_checkpoint(
    model: str | Path,
    out: str | Path | None,
    text: str | Path,
    config: CompensateConfig | None = None,
    *,
    reference: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Compensation:
    """Search other codes for a quantized directory (``compensate.Search``), and write a directory that has them.

    Every tensor but the ``weight_packed`` of changed weights is the same, byte for byte. ``out`` appears complete or
    not at all; what an interrupted call has finished lies in ``.OUT.partial`` beside it, and the same call continues
    there, to the same result.

    Args:
        model: directory written by precal.
        out: a new or empty directory; ``overwrite`` replaces one with files, and forgets an unfinished run. None:
            ``model`` itself is replaced.
        text: UTF-8 text, or ``.jsonl`` with a "text" field.
        reference: directory of the model before quantization; None: a directory of the name in the README of
            ``model``, beside it or in the working directory.
        progress: called after every block.
    Returns:
        What was changed, also in ``out/precal_report.json``.
    Raises:
        CheckpointError: the input or output cannot be used, or the reference is not the model it was made from.
        ValueError: the text is too short, or a setting breaks its contract.
    """
    config, folder, text = config or CompensateConfig(), Path(model), Path(text)
    target = folder if out is None else Path(out)
    if out is None:
        if not folder.is_dir():
            raise CheckpointError(f"compensate: must be given a model directory, got nothing there at {folder}")
    else:
        check_directories("compensate", folder, target)
    if not text.is_file():
        raise CheckpointError(f"{text}: must be a readable UTF-8 text file, got none there")
    stored = Stored.open(folder)
    if not stored.modules:
        raise CheckpointError(f"{folder}: must hold quantized weights, got none")
    source = find_reference(folder) if reference is None else Path(reference)
    check_apart(source, target)
    original = Original(source)
    _check_reference(stored, original)
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    known = [fingerprint(folder, weight_files(folder)), fingerprint(source, weight_files(source))]
    header = {
        "version": __version__,
        "settings": {"compensate": True, **config.to_dict()},
        "text": digest,
        "model": {str(i): k for i, k in enumerate(known)},
    }
    quantized, tokenizer = load(folder, torch.float32)
    searched, held_out = choose_windows(read_windows(tokenizer, text, config.window), config)
    begun = unfinished(target)
    staging = Staging(target, header, overwrite or (out is None and not begun))
    try:
        run = _Run(stored, original, quantized, staging)
        finished = run.begin()
        dense: nn.Module | None = load_model(source, torch.float32) if config.criterion == "kld" else None
        search = Search(quantized, run.weight_of, searched, held_out, config, dense)
        del dense
        if finished:
            search.result.before, search.result.held_out_before = run.losses
        else:
            search.measure()
            run.losses = search.result.before, search.result.held_out_before
            staging.record({"losses": run.losses})
        result = search.run(finished, run.done, progress)
        if fingerprint(folder, weight_files(folder)) != known[0]:
            raise CheckpointError(f"{folder}: must stay as it is while it is read, got changed files")
        run.finish(result, text.name)
        staging.publish()
    except (ValueError, TypeError):
        staging.discard()
        raise
    except BaseException:
        staging.keep()
        raise
    return result


def unfinished(out: Path) -> bool:
    """Whether an interrupted call can be continued."""
    header = read_journal(out)[0]
    settings = None if header is None else header.get("settings")
    return isinstance(settings, dict) and "compensate" in settings


def find_reference(folder: Path) -> Path:
    """The model that a directory was made from, by the name in its README, beside it or in the working directory.

    Raises:
        CheckpointError: there is none.
    """
    card, name = folder / "README.md", ""
    if card.is_file():
        check_inside(folder, card)
        with card.open(encoding="utf-8", errors="replace") as file:
            found = re.fullmatch(r"# ([^/\0]+), quantized by precal", file.readline(4096).rstrip("\n"))
        name = found[1] if found else ""
    for place in (folder.absolute().parent / name, Path(name)):
        if name not in ("", ".", "..") and (place / "config.json").is_file():
            return place
    said = f"; {name!r}, which its README names, is not beside it" if name else ""
    raise CheckpointError(f"{folder}: the model it was made from must be given with --reference MODEL, got none{said}")


def _check_reference(stored: Stored, original: Original) -> None:
    """Raises CheckpointError: a weight has another shape, or a sample of it is another weight."""
    for module in stored.modules:
        q = stored.read(module)
        w = original.weight(module, q.spec, stored.is_conv1d(module))
        part, chosen = take_rows(q, SAMPLE)
        rows = w[chosen].double()
        power = float(rows.square().sum())
        ratio = sqnr_db(power, float((rows - part.dequantize()).square().sum()))
        if power and not ratio >= LOWEST_SQNR_DB:
            raise CheckpointError(
                f"{original.folder}: must be the model that {stored.folder} was made from, got {module} with SQNR "
                f"{ratio:.2f} dB against it; a quantized weight has at least {LOWEST_SQNR_DB:g} dB"
            )


class _Run:
    """The copy under way: its files, what is finished of it, and names of modules here and there."""

    def __init__(self, stored: Stored, original: Original, model: Any, staging: Staging) -> None:
        self._stored, self._original, self._staging = stored, original, staging
        self._modules = dict(precal_modules(model))
        prefix = str(getattr(model, "base_model_prefix", ""))
        known = {same_experts(module): module for module in stored.modules}
        self._names = {
            name: next(known[v] for v in map(same_experts, variants(name, prefix)) if v in known)
            for name in self._modules
        }
        self.losses: tuple[float, float | None] = (math.nan, None)
        self._figures: dict[str, Figures] = {}
        self._digests: dict[str, str] = {}

    def weight_of(self, name: str) -> Tensor:
        module = self._names[name]
        return self._original.weight(module, self._modules[name].spec, self._stored.is_conv1d(module))

    def _place(self, name: str) -> TensorInfo:
        """Where a module's codes are in the copy."""
        info = self._stored.info(self._names[name], "weight_packed")
        return dataclasses.replace(info, file=self._staging.new / info.file.name)

    def begin(self) -> dict[str, BlockResult]:
        """Copy everything, or take over what an earlier run finished; its codes go into the model."""
        staging, folder = self._staging, self._stored.folder
        files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
        for path in files:
            check_inside(folder, path)
        staging.check_room(sum(path.stat().st_size for path in files))
        records = staging.records
        if not (records and records[0].get("copied")):
            for path in files:
                shutil.copyfile(path, staging.new / path.name)
            staging.record({"copied": True})
            return {}
        finished: dict[str, BlockResult] = {}
        for record in records[1:]:
            if "losses" in record:
                self.losses = record["losses"][0], record["losses"][1]
                continue
            places = {name: self._place(name) for name in record["codes"]}
            if not all(has_digest(info, record["codes"][name]) for name, info in places.items()):
                break  # what came after it was searched with other weights
            for name, info in places.items():
                tensors = {**self._modules[name].qtensor().tensors, "weight_packed": read_tensor(info)}
                set_weight(self._modules[name], QTensor(self._modules[name].spec, tensors))
            finished[record["result"]["block"]] = BlockResult.from_record(record["result"])
            self._remember(record["codes"], {n: Figures(**f) for n, f in record["figures"].items()})
        for name in self._modules:
            if f"{self._names[name]}.weight" not in self._figures:  # half of what was not recorded may be there
                replace_tensor(self._place(name), read_tensor(self._stored.info(self._names[name], "weight_packed")))
        return finished

    def _remember(self, codes: Mapping[str, str], figures: Mapping[str, Figures]) -> None:
        for name, digest in codes.items():
            self._digests[f"{self._names[name]}.weight_packed"] = digest
            self._figures[f"{self._names[name]}.weight"] = figures[name]

    def done(self, found: BlockResult, work: Work) -> None:
        """Write a block's codes, then remember them."""
        codes, figures = {}, {}
        for name, q in work.now.items() if found.changes else ():
            packed = q.tensors["weight_packed"]
            replace_tensor(self._place(name), packed)
            codes[name] = sha256(packed)
            figures[name] = measure(work.original[name], q)
        self._remember(codes, figures)
        plain = {name: dataclasses.asdict(f) for name, f in figures.items()}
        self._staging.record({"result": dataclasses.asdict(found), "codes": codes, "figures": plain})

    def finish(self, result: Compensation, text: str) -> None:
        """The report and the card say what the weights are now."""
        new = self._staging.new
        if (new / REPORT_NAME).is_file():
            data = read_json(new / REPORT_NAME, MAX_REPORT_BYTES, MAX_REPORT_ITEMS)
            self._update(data)
        else:
            data = {"precal_version": __version__}
        earlier = data.get("compensations")
        data["compensations"] = [*(earlier if isinstance(earlier, list) else []), {"text": text, **result.to_dict()}]
        write_file(new / REPORT_NAME, json.dumps(data, indent=1) + "\n")
        card = new / "README.md"
        before = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        write_file(card, before.replace(CARD_BEFORE, CARD_AFTER).rstrip("\n") + "\n" + _section(result, text))

    def _update(self, data: dict[str, Any]) -> None:
        """Figures and digests of the changed weights; ``Stored.open`` has checked what is read here."""
        entries = data.get("tensors", [])
        for item in entries:
            figures = self._figures.get(item["tensor"])
            if figures is not None and "figures" in item:
                item["figures"] = {k: v if math.isfinite(v) else None for k, v in figures.to_dict().items()}
        if isinstance(data.get("sha256"), dict):
            data["sha256"].update({n: d for n, d in self._digests.items() if n in data["sha256"]})
        summary, found = data.get("summary"), [(i["figures"], math.prod(i["shape"])) for i in entries if "figures" in i]
        if isinstance(summary, dict) and found:
            weights = sum(count for _, count in found)
            ratio = sqnr_db(*(sum(f[key] or 0.0 for f, _ in found) for key in ("power", "noise")))
            kl = sum((f["kl_nats"] or 0.0) * count for f, count in found) / max(1, weights)
            summary.update(sqnr_db=ratio if math.isfinite(ratio) else None, kl_nats=kl)


def _section(result: Compensation, text: str) -> str:
    """What the card says of it."""
    c, kind = result.config, "KLD" if result.config.criterion == "kld" else "NLL"
    held = ""
    if result.held_out_before is not None:
        held = (
            f"; on {result.held_out_tokens} held-out ones {result.held_out_before:.5f} -> {result.held_out_after:.5f}"
        )
    lines = [
        "",
        "## Compensated",
        "",
        f"Codes were changed by discarded-weight recycling (space {c.space}) on {result.tokens} tokens of `{text}`: "
        f"{kind} {result.before:.5f} -> {result.after:.5f} nats per token there{held}. {len(result.changes)} changes "
        f"in {sum(bool(b.changes) for b in result.blocks)} of {len(result.blocks)} blocks; `{REPORT_NAME}` has them, "
        "and the figures of the tensors as they are now (above: before).",
        "",
    ]
    return "\n".join(lines)
