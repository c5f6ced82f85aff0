#!/usr/bin/env python3
"""What docs/method.md says of the trellis, of its cost and of what else was tried, measured again. JSON lines.

    python bench/tried.py                       # all of it, on one thread
    python bench/tried.py --only linear         # the parts and variants that match; the other rows of the file stay
    python bench/tried.py --only '^(states|restart)' --missing

Parts: trellis, states, restart, scale choice, scales, outlier values, capacity, threshold, importance, columns, grids
of rows, linear, cost. Models, texts and the GPT-2 sample are those of ../shared; where it is absent, its rows are not
made, and a line says so. Times are of one thread, by its own CPU clock, plain and trellis by turns, in a process per
instruction set. `bench/report.py` makes the tables of docs/method.md from the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from recipes import ROOT, SHARED, cases, commit, facts
from rows import Results, Row, add_arguments
from torch import Tensor
from tried_coder import PROXIES, Choice, quantize
from tried_times import CELLS, ISAS, measured

from precal_ext import _C, ops
from precal_ext.config import QuantizeConfig
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.grids import constant_grid
from precal_ext.measure import measure, outlier_mask
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.quantize import fit_set_grid, quantize_weight

# W' and bits per weight of a named weight.
Quantizer = Callable[[str, Tensor], tuple[Tensor, float]]


@dataclass(frozen=True)
class Cell:
    """One row: ``part: variant`` on a matrix or model at a width, and what measures it."""

    name: str
    on: str
    bits: int
    measure: Callable[[], Row]


def decibel(power: float, noise: float) -> float:
    return 10 * math.log10(power / noise)


# ---- what is quantized ----------------------------------------------------------------------------------------------


def gaussian(rows: int, columns: int = 2048) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@functools.cache
def gpt2() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: w.float() for name, w in load_file(SHARED / "models" / "gpt2-attention-sample.safetensors").items()}


class Remembered:
    """A model that computes the logits of a batch once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: dict[bytes, Tensor] = {}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        key = input_ids.numpy().tobytes() + attention_mask.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=self.known[key])


class Model:
    """A development model whose linear layers are quantized one by one; the head is left as it is."""

    def __init__(self, folder: Path, texts: list[Path], limit: int) -> None:
        self.reference = Remembered(load(folder)[0].float())
        self.model, tokenizer = load(folder)
        self.model.float()
        head = self.model.get_output_embeddings()
        modules = self.model.named_modules()
        self.linears = {n: m for n, m in modules if isinstance(m, torch.nn.Linear) and m is not head}
        self.weights = {n: m.weight.data.clone() for n, m in self.linears.items()}
        self.windows = {text.name: read_windows(tokenizer, text, 256, limit) for text in texts}

    def run(self, quantizer: Quantizer) -> Row:
        bits = power = noise = 0.0
        for name, w in self.weights.items():
            restored, b = quantizer(name, w)
            self.linears[name].weight.data = restored.contiguous()
            bits += b * w.numel()
            power += float(w.double().square().sum())
            noise += float((w - restored).double().square().sum())
        results = {text: evaluate(self.model, part, self.reference) for text, part in self.windows.items()}
        return {
            "bits_per_weight": bits / sum(w.numel() for w in self.weights.values()),
            "sqnr_db": decibel(power, noise),
            "kld_nats": {text: r.kld_nats for text, r in results.items()},
            "kld_stderr": {text: r.kld_stderr for text, r in results.items()},
        }


def on_matrices(weights: dict[str, Tensor], quantizer: Quantizer) -> Row:
    done = {name: quantizer(name, w) for name, w in weights.items()}
    count = sum(w.numel() for w in weights.values())
    power = sum(float(w.double().square().sum()) for w in weights.values())
    noise = sum(float((w - done[name][0]).double().square().sum()) for name, w in weights.items())
    bits = sum(b * weights[name].numel() for name, (_, b) in done.items()) / count
    return {"bits_per_weight": bits, "sqnr_db": decibel(power, noise)}


class Bench:
    """What the parts measure on."""

    def __init__(self, limit: int, rows: int) -> None:
        self.limit, self.rows = limit, rows
        self.models: dict[str, Model] = {}

    def model(self, name: str) -> Model:
        if name not in self.models:
            ((_, folder, texts),) = cases([name])
            self.models[name] = Model(folder, texts, self.limit)
        return self.models[name]

    def cell(self, name: str, on: str, bits: int, quantizer: Quantizer) -> Cell:
        def measured() -> Row:
            if on == "Gaussian":
                return on_matrices({on: gaussian(self.rows)}, quantizer)
            if on == "GPT-2":
                return on_matrices(gpt2(), quantizer)
            return self.model(on).run(quantizer)

        return Cell(name, on, bits, measured)


# ---- quantizers ------------------------------------------------------------------------------------------------------


def precal(**settings: Any) -> Quantizer:
    """The package's own, with a grid per weight."""
    config = QuantizeConfig(**settings)

    def quantizer(_: str, w: Tensor) -> tuple[Tensor, float]:
        q = quantize_weight(w, config, fit_set_grid([w], config))
        return q.dequantize(), q.spec.bits_per_weight()

    return quantizer


def coded(choice: Choice) -> Quantizer:
    """The plain torch one; e4m3 scales are counted, whatever the scales are."""
    return lambda _, w: (quantize(w, choice), choice.bits + 8 / choice.group_size + 16 / w.shape[1])


# ---- parts -----------------------------------------------------------------------------------------------------------


def trellis(bench: Bench) -> Iterator[Cell]:
    for kind, settings in (("plain", {"trellis": False}), ("trellis", {"trellis": True})):
        for bits in (2, 3, 4, 5, 6):
            for g in (16, 64, 128):
                q = precal(bits=bits, group_size=g, c=0, **settings)
                yield bench.cell(f"trellis: {kind}, g{g}", "Gaussian", bits, q)
        for on in ("llama-6m", "TinyStories-656K"):
            for bits in (4, 3):
                yield bench.cell(f"trellis: {kind}, g64", on, bits, precal(bits=bits, **settings))


def states(bench: Bench) -> Iterator[Cell]:
    for bits in (4, 3):
        for count in (1, 4, 8, 16):
            yield bench.cell(f"states: {count}", "Gaussian", bits, coded(Choice(bits, states=count)))


def restart(bench: Bench) -> Iterator[Cell]:
    for columns in (128, 256, 512, 2048):
        yield bench.cell(f"restart: {columns}", "Gaussian", 4, coded(Choice(4, restart=columns)))


def scale_choice(bench: Bench) -> Iterator[Cell]:
    for bits in (4, 3):
        for how in ("trellis", *PROXIES):
            yield bench.cell(f"scale choice: {how}", "Gaussian", bits, coded(Choice(bits, scale_by=how)))


def scales(bench: Bench) -> Iterator[Cell]:
    variants: dict[str, dict[str, Any]] = {
        "signed e4m3": {},
        "unsigned e4m3": {"signed": False},
        "signed, 4 steps an octave": {"steps": 4},
        "signed, 2 steps an octave": {"steps": 2},
    }
    for bits in (4, 3):
        for name, fields in variants.items():
            yield bench.cell(f"scales: {name}", "Gaussian", bits, coded(Choice(bits, **fields)))


def outlier_values(bench: Bench) -> Iterator[Cell]:
    """Entries with a value of 8 bits, as they are, and of 16: float16 in units of the row scale."""

    def wide(config: QuantizeConfig) -> Quantizer:
        def quantizer(_: str, w: Tensor) -> tuple[Tensor, float]:
            q = quantize_weight(w, config, fit_set_grid([w], config))
            mask = outlier_mask(q)
            assert mask is not None
            none = {**q.tensors, "weight_outlier_value": torch.zeros_like(q.tensors["weight_outlier_value"])}
            none["weight_outlier_index"] = torch.zeros_like(q.tensors["weight_outlier_index"])
            dense, unit = QTensor(q.spec, none).dequantize(), q.tensors["weight_row_scale"].float()[:, None]
            value = ((w - dense) / unit / 128).half().float() * unit * 128
            blocks = _C.num_outlier_blocks(w.shape[1])
            return torch.where(mask, dense + value, dense), q.spec.bits_per_weight() + 8 * q.spec.c * blocks / w.shape[
                1
            ]

        return quantizer

    for bits in (4, 3):
        config = QuantizeConfig(bits=bits)
        yield bench.cell("outlier values: 8 bits", "llama-6m", bits, precal(bits=bits))
        yield bench.cell("outlier values: 16 bits", "llama-6m", bits, wide(config))


def capacity(bench: Bench) -> Iterator[Cell]:
    for on in ("llama-6m", "TinyStories-656K"):
        for c in (0, 1, 2, 4):
            yield bench.cell(f"capacity: c = {c}", on, 4, precal(c=c))


def threshold(bench: Bench) -> Iterator[Cell]:
    """A soft threshold lam that leaves entries unused: from the composite objective, or at a share of a larger c.

    All with the constant grid, so that no variant has a grid fitted to another. A larger c of which a share is used is
    an allocation over the whole weight, which a rectangular format cannot store: its bits are without any count.
    """

    def with_lam(w: Tensor, config: QuantizeConfig, lam: float) -> QTensor:
        assert config.group_size is not None and config.c is not None
        grid = constant_grid(config.bits, config.group_size, True)
        spec = WeightSpec.from_config(w.shape[0], w.shape[1], config)
        codes, scale, row_scale, index, value = ops.quantize_groups(
            w, grid, config.bits, config.group_size, config.c, lam
        )
        tensors = {"scale": scale, "row_scale": row_scale, "outlier_index": index, "outlier_value": value}
        tensors |= {"packed": ops.pack(codes, config.bits), "grid": grid, "shape": torch.tensor(list(w.shape))}
        return QTensor(spec, {f"weight_{key}": t for key, t in tensors.items()})

    def lam_at(w: Tensor, c: int, share: float) -> float:
        """The threshold that a share of the c largest weights of every block survives."""
        if share == 1:
            return 0.0
        blocks = [w[:, begin:end].abs() for begin, end in _C.outlier_blocks(w.shape[1])]
        largest = torch.cat([b.topk(min(c, b.shape[1])).values.flatten() for b in blocks]).sort(descending=True).values
        return float(largest[round(share * len(largest))].double()) ** 2

    def used(q: QTensor) -> float:
        return float((q.tensors["weight_outlier_value"] & 0x7F != 0).float().mean())

    def best(config: QuantizeConfig, shares: list[float], ragged: bool, log: list[tuple[float, int]]) -> Quantizer:
        """The share with the least |W - W'|^2 / |W|^2 + mu * KL of each weight; ``ragged`` counts no unused entry."""

        def quantizer(_: str, w: Tensor) -> tuple[Tensor, float]:
            assert config.c is not None
            found = []
            for share in shares:
                q = with_lam(w, config, lam_at(w, config.c, share))
                figures = measure(w, q)
                found.append((figures.noise / figures.power + config.mu * figures.kl_nats, share, q))
            _, share, q = min(found, key=lambda f: f[:2])
            entries = 16 * config.c * _C.num_outlier_blocks(w.shape[1]) / w.shape[1]
            log.append((used(q), w.numel()))
            return q.dequantize(), q.spec.bits_per_weight() - (entries * (1 - used(q)) if ragged else 0)

        return quantizer

    def cell(name: str, on: str, config: QuantizeConfig, shares: list[float], ragged: bool = False) -> Cell:
        log: list[tuple[float, int]] = []
        plain = bench.cell(name, on, config.bits, best(config, shares, ragged, log))

        def measured() -> Row:
            log.clear()
            row = plain.measure()
            return {**row, "entries_used": sum(u * n for u, n in log) / sum(n for _, n in log)}

        return Cell(name, on, config.bits, measured)

    tried = [0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0]
    for on, bits in (("llama-6m", 4), ("llama-6m", 3), ("TinyStories-656K", 4)):
        one, two, four = (QuantizeConfig(bits=bits, c=c) for c in (1, 2, 4))
        yield cell("threshold: c = 1, all entries", on, one, [1.0])
        yield cell("threshold: c = 1, least objective", on, one, tried)
        yield cell("threshold: c = 1, least objective, mu = 1", on, dataclasses.replace(one, mu=1.0), tried)
        yield cell("threshold: c = 4, a quarter, used ones counted", on, four, [0.25], ragged=True)
        yield cell("threshold: c = 2, all entries", on, two, [1.0])
        yield cell("threshold: c = 2, least objective", on, two, tried)
        yield cell("threshold: c = 4, half, used ones counted", on, four, [0.5], ragged=True)


def importance(bench: Bench) -> Iterator[Cell]:
    """Columns count by what the model's own weights say of their inputs (llama architecture)."""

    def inputs(name: str) -> Tensor:
        model = bench.model("llama-6m")
        layer, block, projection = name.rsplit(".", 2)
        first = model.model.get_submodule(f"{layer}.input_layernorm").weight
        second = model.model.get_submodule(f"{layer}.post_attention_layernorm").weight
        if projection == "o_proj":
            rows = (model.weights[f"{layer}.{block}.v_proj"] * first).square().sum(1)
            size = model.model.config.head_dim
            repeats = model.weights[name].shape[1] // len(rows)
            return rows.view(-1, 1, size).expand(-1, repeats, size).reshape(-1)
        if projection == "down_proj":
            pair = [model.weights[f"{layer}.{block}.{p}"] * second for p in ("up_proj", "gate_proj")]
            return pair[0].square().sum(1) * pair[1].square().sum(1)
        return (first if block == "self_attn" else second).square()

    def weighted(power: float) -> Quantizer:
        choice = Choice(4)

        def quantizer(name: str, w: Tensor) -> tuple[Tensor, float]:
            bits = choice.bits + 8 / choice.group_size + 16 / w.shape[1]
            return quantize(w, choice, inputs(name).pow(power) if power else None), bits

        return quantizer

    for variant, power in (("none", 0.0), ("squares", 1.0), ("their roots", 0.5)):
        yield bench.cell(f"importance: {variant}", "llama-6m", 4, weighted(power))


def columns(bench: Bench) -> Iterator[Cell]:
    """Scales of columns in 16 bits, and a rotation, around the package's quantizer."""

    def scaled(inner: Quantizer, scale_of: Callable[[Tensor], Tensor]) -> Quantizer:
        def quantizer(name: str, w: Tensor) -> tuple[Tensor, float]:
            scale = scale_of(w).half().float()
            restored, bits = inner(name, (w / scale).contiguous())
            return restored * scale, bits + 16 / w.shape[0]

        return quantizer

    def norms(power: float) -> Callable[[Tensor], Tensor]:
        def scale_of(w: Tensor) -> Tensor:
            norm = w.square().mean(0, keepdim=True).sqrt().clamp(min=1e-8)
            return (norm / norm.mean()).pow(power)

        return scale_of

    def sinkhorn(w: Tensor) -> Tensor:
        """Rows and columns by turns towards the smallest standard deviation; the least unequal state is kept."""
        x, row, column = w, torch.ones(w.shape[0], 1), torch.ones(1, w.shape[1])
        target = torch.minimum(w.std(0).min(), w.std(1).min()).clamp(min=1e-8)
        least, kept = torch.inf, column
        for _ in range(17):
            of_columns, of_rows = x.std(0), x.std(1)
            both = torch.cat([of_columns, of_rows])
            if float(both.max() / both.min()) < least:
                least, kept = float(both.max() / both.min()), column
            column = column * (of_columns[None] / target).clamp(0.7, 2)
            row = row * (of_rows[:, None] / target).clamp(0.7, 2)
            x = w / row / column
        return kept / kept.mean()

    def rotated(inner: Quantizer) -> Quantizer:
        def quantizer(name: str, w: Tensor) -> tuple[Tensor, float]:
            size, H = math.gcd(w.shape[1], 128), torch.ones(1, 1)
            while len(H) < size:
                H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / math.sqrt(2)
            sign = torch.randint(0, 2, (w.shape[1],), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
            restored, bits = inner(name, ((w * sign).view(-1, size) @ H).view(w.shape).contiguous())
            return (restored.view(-1, size) @ H.T).view(w.shape) * sign, bits

        return quantizer

    for on, bits in (("llama-6m", 3), ("llama-6m", 4), ("TinyStories-656K", 3), ("TinyStories-656K", 4)):
        plain = precal(bits=bits)
        variants = {
            "none": plain,
            "Sinkhorn": scaled(plain, sinkhorn),
            "norms": scaled(plain, norms(1.0)),
            "roots of norms": scaled(plain, norms(0.5)),
            "Hadamard": rotated(plain),
        }
        for variant, q in variants.items():
            yield bench.cell(f"columns: {variant}", on, bits, q)


def row_grids(bench: Bench) -> Iterator[Cell]:
    def per_block(config: QuantizeConfig, rows: int | None) -> Quantizer:
        def quantizer(_: str, w: Tensor) -> tuple[Tensor, float]:
            parts, bits = [], 0.0
            for part in w.split(rows or w.shape[0]):
                q = quantize_weight(part.contiguous(), config, fit_set_grid([part.contiguous()], config))
                parts.append(q.dequantize())
                bits += q.spec.bits_per_weight() * part.numel()
            return torch.cat(parts), bits / w.numel()

        return quantizer

    for on in ("GPT-2", "llama-6m"):
        for bits in (4, 3):
            for rows in (None, 256, 64, 32):
                yield bench.cell(
                    f"grids of rows: {rows or 'all'}", on, bits, per_block(QuantizeConfig(bits=bits), rows)
                )


# ---- all of it -------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], Iterator[Cell]]] = {
    "trellis": trellis,
    "states": states,
    "restart": restart,
    "scale choice": scale_choice,
    "scales": scales,
    "outlier values": outlier_values,
    "capacity": capacity,
    "threshold": threshold,
    "importance": importance,
    "columns": columns,
    "grids of rows": row_grids,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=60, help="windows of 256 tokens per text")
    parser.add_argument("--rows", type=int, default=128, help="of the Gaussian matrix, which has 2048 columns")
    parser.add_argument("--quick", action="store_true", help="times of few calls on small shapes: a test, no figures")
    add_arguments(parser, ROOT / "bench" / "results" / "tried.jsonl")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    made_at = commit()  # before the first row is written
    results = Results(args, ("format", "on", "bits"))

    def key_of(name: str, on: str, bits: int) -> Row:
        return {"format": name, "source": "precal", "on": on, "bits": bits}

    def put(key: Row, row: Row) -> None:
        results.put({**key, **facts("bench/tried.py"), "commit": made_at, **row})
        figures = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
        klds = " ".join(f"{v:.5f}" for v in row.get("kld_nats", {}).values())
        print(f"{key['format']:48}{key['on']:18}{key['bits']} bits  {', '.join(figures)} {klds}", flush=True)

    bench = Bench(args.limit, args.rows)
    absent = not (SHARED / "models").is_dir()
    for part in PARTS.values():
        for cell in part(bench):
            key = key_of(cell.name, cell.on, cell.bits)
            if not results.wants(key):
                continue
            if absent and cell.on != "Gaussian":
                print(f"{cell.name}: needs {cell.on} of ../shared, which is absent", file=sys.stderr)
                continue
            put(key, cell.measure())
    supported = _C.build_info()["supported_isas"].split(",")
    for isa in ISAS:
        for bits in (4, 3):
            for job, cells in CELLS.items():
                name = f"{job}: {isa}"
                keys = [key_of(name, cell, bits) for cell in cells]
                if not results.wants(*keys):
                    continue
                if isa not in supported:
                    print(f"{name}: this machine does not have {isa}", file=sys.stderr)
                    continue
                for key, row in zip(keys, measured(isa, job, bits, args.quick), strict=True):
                    put(key, row)


if __name__ == "__main__":
    main()
