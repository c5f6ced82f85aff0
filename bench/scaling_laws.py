#!/usr/bin/env python3
"""The study behind `precal predict`: loss of quantized models against what is known before they are quantized.

    python bench/scaling_laws.py [--models DIR] [--share 1.0] [--only REGEX] [--windows 12] [--out FILE] [--missing]
    python bench/scaling_laws.py --fit      # fit alone, to the rows that are there

Trains the families of `bench/small_models.py` (what is there stays), then measures every model in every format by
round-to-nearest, by precal, and after GPTQ: the true rise of NLL on its text, and the features of
`precal_ext/predict.py`. The models of ../shared (stories260K, TinyStories-656K, llama-6m) are held out from every fit;
each is measured on its own domain. Rows are JSON lines; a run goes on after a stop with --missing. `bench/laws_fit.py`
fits, validates and writes precal_ext/predictor.npz; `bench/report.py` makes docs/scaling-laws.md. The whole study is
meant for two cores in under two hours.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gptq_mx import gptq
from recipes import ROOT, SHARED, TEXTS, facts
from rows import Results, Row
from small_models import cache_folder, held_out_windows, make, small_models

from precal_ext import landscape as ls
from precal_ext.evaluate import load, read_windows
from precal_ext.formats import GPTQ, Format, parse_format, quantized_weights, weight_sites
from precal_ext.mx import MXFormat
from precal_ext.predict import Surroundings, features_of

RESULTS = ROOT / "bench" / "results"
INTEGERS = [f"mxint{bits}_{block}" for bits in (2, 3, 4, 6, 8) for block in (16, 32, 64, 128)]
AFTER_GPTQ = [f"mxint{bits}_{block}+gptq" for bits in (2, 3, 4, 6) for block in (16, 32, 128)]
OURS = ["precal2_g64", "precal3_g64", "precal4_g64", "precal6_g64", "precal3_g16", "precal4_g128", "precal3_g128_c0"]
ROUNDED = ["rtn3_g32", "rtn3_g128", "rtn4_g32", "rtn4_g128", "rtn6_g128"]
FORMATS = [*INTEGERS, "mxfp4", *AFTER_GPTQ, *OURS, *ROUNDED]


@dataclass(frozen=True)
class Case:
    """A model with the text that it is judged on, and the one that GPTQ sees."""

    name: str
    family: str
    folder: Path
    held_out: bool

    def windows(self, tokenizer: Any, count: int) -> tuple[list[list[int]], list[list[int]]]:
        if not self.held_out:
            texts = held_out_windows(tokenizer, -(-count // 3))
            texts.pop("library") if len(texts) > 1 else None
            judged = [w for part in texts.values() for w in part][:count]
            paths = [SHARED / "data" / name for name in ("books_calib.txt", "python_calib.txt", "stories_calib.jsonl")]
        else:
            names = TEXTS[self.name]
            judged = []
            for text in names:
                judged += read_windows(tokenizer, SHARED / "data" / text, 256)[: -(-count // len(names))]
            paths = [SHARED / "data" / text.replace("_eval", "_calib") for text in names]
        seen = [w for path in paths for w in read_windows(tokenizer, path, 256, 2 * count // len(paths))]
        return judged, seen


def cases(root: Path, share: float, only: str) -> Iterator[Case]:
    for name in TEXTS:
        if re.search(only, name):
            yield Case(name, "held out", SHARED / "models" / name, True)
    for small in small_models(share):
        if re.search(only, small.name):
            yield Case(small.name, small.family, make(small, root), False)


def measure_case(case: Case, results: Results, count: int) -> None:
    wanted = [name for name in FORMATS if results.wants({"model": case.name, "format": name})]
    if not wanted:
        return
    started = time.monotonic()
    model, tokenizer = load(case.folder)
    model = model.float()
    judged, seen = case.windows(tokenizer, count)
    sites = weight_sites(model)
    around = Surroundings.measure(model, judged)
    moments = ls.input_moments(model, sites, seen)
    shared = {"model": case.name, "family": case.family, "held_out": case.held_out, "parameters": around.parameters}
    shared |= {"nll_nats": around.nll_nats, "tokens": sum(len(w) - 1 for w in judged)}
    shared |= {"radii": list(ls.RADII), "profile": around.profile, "trace": sum(around.traces.values())}
    print(f"{case.name}: NLL {around.nll_nats:.4f}, surroundings {time.monotonic() - started:.1f} s", flush=True)
    curvature: dict[str, float] = {}
    for name in wanted:
        fmt, plain = parse_format(name), name.removesuffix(GPTQ)
        rounded = dict(quantized_weights(model, fmt))
        if plain not in curvature:
            curvature[plain] = ls.curvature_along(model, sites, judged, ls.error_of(sites, rounded))
        found, beside = features_of(around, fmt, rounded, curvature[plain])
        delta = rise(model, sites, judged, final(fmt, sites, rounded, moments), around.nll_nats)
        row: Row = {**shared, "format": name, "source": "precal", "features": found, **beside}
        row["curvature_along_nats"] = curvature[plain]
        row["delta_nll_nats"] = delta
        row["bits_per_weight"] = sum(fmt.stored_bits(*s.shape) for s in sites.values()) / sum(
            s.shape[0] * s.shape[1] for s in sites.values()
        )
        results.put({**row, **facts("bench/scaling_laws.py")})
        shown = "  ".join(f"{key.removesuffix('_nats')} {value:8.4f}" for key, value in beside.items())
        print(f"  {name:22}{delta:9.4f}   {shown}", flush=True)
    print(f"{case.name}: {time.monotonic() - started:.1f} s", flush=True)


def final(fmt: Format, sites: ls.Sites, rounded: dict[str, torch.Tensor], moments: ls.Direction) -> ls.Direction:
    """The weights that the format ends with: after GPTQ where its name says so."""
    if not fmt.gptq:
        return rounded
    assert isinstance(fmt.how, MXFormat)
    return {name: gptq(site.weight(), moments[name], fmt.how) for name, site in sites.items()}


def rise(model: Any, sites: ls.Sites, windows: ls.Windows, weights: ls.Direction, start: float) -> float:
    """L(W') - L(W), nats."""
    with ls.moved(sites, ls.error_of(sites, weights)):
        return ls.mean_nll(model, windows) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="DIR", type=Path, default=cache_folder(), help="of the small models")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps that the small models are trained for")
    parser.add_argument("--only", metavar="REGEX", default="", help="models by name; the other rows stay; no fit")
    parser.add_argument("--windows", type=int, default=12, help="of 256 tokens that a model is judged on (default 12)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="only rows that the file does not have yet")
    parser.add_argument("--fit", action="store_true", help="fit the predictor to the rows; measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_laws.jsonl")
    args = parser.parse_args()
    if not SHARED.is_dir():
        parser.error("the texts and held-out models of ../shared must be there")
    if not args.fit:
        torch.set_num_threads(args.threads)
        torch.set_grad_enabled(False)
        filters = argparse.Namespace(out=args.out, only="", missing=args.missing)
        results = Results(filters, ("model", "format"))
        for case in cases(args.models, args.share, args.only):
            measure_case(case, results, args.windows)
    if args.only:
        return
    from laws_fit import fit_all

    fit_all(args.out, RESULTS / "scaling_fit.jsonl", ROOT / "precal_ext" / "predictor.npz")


if __name__ == "__main__":
    main()
