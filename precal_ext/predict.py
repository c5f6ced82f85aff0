"""What a model's loss will be in a format: features of model and format, and the shipped predictor that reads them.

`bench/scaling_laws.py` measures models and formats, fits the predictor and writes predictor.npz. Definitions:
docs/scaling-laws.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from precal_ext import landscape as ls
from precal_ext.forest import Forest, read_forest
from precal_ext.formats import Format, quantized_weights, weight_sites
from precal_ext.measure import sum_squares
from precal_ext.mx import MXFormat

PREDICTOR = Path(__file__).with_name("predictor.npz")
LEAST = 1e-3  # nats: the predictor works with log(rise + LEAST), so that rises far below it are all alike
FEATURES = (
    "log10_parameters",
    "nll_nats",
    "bits",
    "log2_group",
    "power_of_two_scales",
    "gptq",
    "sqnr_mean_db",
    "sqnr_min_db",
    "log_radial",
    "log_theorem",
    "log_weighted",
    "log_shaped",
    "log_along",
    "radial_over_along",
    "shaped_over_along",
    "log_diagonal",
    "slope_nats",
    "log_trace",
    "shrinkage",
    "log_gptq_gain",
)


@dataclass(frozen=True)
class Surroundings:
    """What is known of a model on a text before any format is looked at.

    Args:
        sites: the weights that are quantized.  parameters: of the model.  nll_nats: its loss.
        profile: rises at ``landscape.RADII``.  sensitivities: a_l by fusion set.
        gradient, diagonal: of the loss and of its Hessian, by module.  traces: of the Hessian, by module.
        gains: what GPTQ leaves of the squared error of outputs, by module.
    """

    sites: ls.Sites
    parameters: int
    nll_nats: float
    profile: Sequence[float]
    sensitivities: Mapping[str, float]
    gradient: ls.Direction
    diagonal: ls.Direction
    traces: Mapping[str, float]
    gains: Mapping[str, float]

    @classmethod
    def measure(cls, model: nn.Module, windows: ls.Windows) -> Surroundings:
        """About 45 runs over the windows and two for each fusion set, 5 with gradients; the model, in float32, is
        afterwards what it was."""
        sites = weight_sites(model)
        moments, tokens = ls.input_moments(model, sites, windows), sum(map(len, windows))
        traces, diagonal = ls.hutchinson_traces(model, sites, windows)
        return cls(
            sites,
            sum(p.numel() for p in model.parameters()),
            ls.mean_nll(model, windows),
            ls.radial_profile(model, sites, windows),
            ls.sensitivities(model, sites, windows),
            ls.gradient(model, sites, windows),
            diagonal,
            traces,
            {name: ls.gptq_gain(m, tokens) for name, m in moments.items()},
        )

    def trace_rise(self) -> float:
        """Second-order rise of noise of length t = 1 in every module, by the traces, nats."""
        rise = 0.0
        for name, trace in self.traces.items():
            w = self.sites[name].weight()
            rise += trace * sum_squares(w.double()) / (2 * w.numel())
        return rise


def features_of(
    around: Surroundings, fmt: Format, weights: ls.Direction, curvature: float
) -> tuple[dict[str, float], dict[str, float]]:
    """FEATURES of a model in a format.

    Args:
        weights: W' of every module; of a format with ``+gptq``, by round-to-nearest.
        curvature: ``landscape.curvature_along`` their error.
    Returns:
        The features by name, and the rises in nats that closed forms expect: ``radial_nats``, the radial profile at the
        length of the error; ``theorem_nats``, sum a_l t_l^2; ``weighted_nats``, ``shaped_nats`` and ``along_nats``, the
        profile where random noise does as much to second order as this error, by the a_l, by the Hessian's diagonal,
        or by the curvature along it, GPTQ's gain included; ``diagonal_nats``, slope and diagonal alone.
    """
    sites, error = around.sites, ls.error_of(around.sites, weights)
    mean_db, least_db = ls.sqnr_figures(sites, error)
    plain, gained = ls.set_errors(sites, error), ls.set_errors(sites, error, around.gains if fmt.gptq else None)
    a = around.sensitivities
    theorem, weighted = (sum(a[s] * t2 for s, t2 in found.items()) for found in (plain, gained))
    gain = weighted / theorem if theorem > 0 and weighted > 0 else 1.0
    slope = ls.slope(around.gradient, error)
    second = sum(ls.diagonal_rises(around.diagonal, error).values())
    first = 0.0 if fmt.gptq else slope  # GPTQ's error is another one
    trace = max(around.trace_rise(), 1e-3)  # what is below is no bowl

    def profile(squared_length: float) -> float:
        return ls.read_profile(ls.RADII, around.profile, math.sqrt(max(squared_length, 0.0)))

    found = {
        "radial_nats": profile(ls.relative_error(sites, error)),
        "theorem_nats": theorem,
        "weighted_nats": profile(weighted / max(sum(a.values()), 1e-12)),
        "shaped_nats": profile(second * gain / trace) + first,
        "along_nats": profile(curvature * gain / trace) + first,
        "diagonal_nats": slope + second,
    }
    log = {name: log_rise(value) for name, value in found.items()}
    features = {
        "log10_parameters": math.log10(around.parameters),
        "nll_nats": around.nll_nats,
        "bits": float(fmt.bits),
        "log2_group": math.log2(max(fmt.group, 1)),
        "power_of_two_scales": float(isinstance(fmt.how, MXFormat)),
        "gptq": float(fmt.gptq),
        "sqnr_mean_db": min(mean_db, 200.0),
        "sqnr_min_db": min(least_db, 200.0),
        "log_radial": log["radial_nats"],
        "log_theorem": log["theorem_nats"],
        "log_weighted": log["weighted_nats"],
        "log_shaped": log["shaped_nats"],
        "log_along": log["along_nats"],
        "radial_over_along": log["radial_nats"] - log["along_nats"],
        "shaped_over_along": log["shaped_nats"] - log["along_nats"],
        "log_diagonal": log["diagonal_nats"],
        "slope_nats": slope,
        "log_trace": math.log(trace),
        "shrinkage": ls.shrinkage(sites, error),
        "log_gptq_gain": math.log(gain),
    }
    return {name: features[name] for name in FEATURES}, found


def log_rise(rise: float) -> float:
    """log(rise + LEAST) of a rise in nats; falls count as no rise."""
    return math.log(max(rise, 0.0) + LEAST)


# ---- predicting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What is to be expected of a model in a format.

    Args:
        bits_per_weight: of the quantized weights.  size_bytes: of the whole model.
        sqnr_mean_db, sqnr_min_db: of round-to-nearest in the format.
        nll_nats, low_nats, high_nats: predicted loss and its interval; None without text.
        delta_nll_nats: the rise in it; None without text.
        outside: features beyond what the predictor was fitted on, each widening the interval.
        frontier: whether no other of the formats is at most as large and better, by predicted loss, or without text by
            mean SQNR.
    """

    format: str
    bits_per_weight: float
    size_bytes: int
    sqnr_mean_db: float
    sqnr_min_db: float
    nll_nats: float | None = None
    low_nats: float | None = None
    high_nats: float | None = None
    delta_nll_nats: float | None = None
    outside: tuple[str, ...] = ()
    frontier: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def predictor() -> Forest:
    """The shipped one."""
    return read_forest(PREDICTOR, FEATURES)


def predict(
    model: nn.Module, formats: Iterable[Format], windows: ls.Windows | None = None, forest: Forest | None = None
) -> list[Prediction]:
    """Size, SQNR and, with text, predicted loss of a model in every format.

    Args:
        model: a causal language model of transformers, on the CPU, not quantized. It is made float32; its weights are
            not changed otherwise.
        windows: token ids of the text, as ``evaluate.read_windows`` gives them.
        forest: None: the shipped predictor.
    """
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    before = {name: site.held.element_size() * site.weight().numel() for name, site in weight_sites(model).items()}
    if not before:
        raise ValueError("predict: the model must have dense linear layers to quantize, got none")
    model.float()
    with torch.no_grad():
        seen = None if windows is None else (Surroundings.measure(model, windows), windows)
        found = [_predict(model, fmt, seen, forest, stored - sum(before.values())) for fmt in formats]
    return mark_frontier(found)


def _predict(
    model: nn.Module,
    fmt: Format,
    seen: tuple[Surroundings, ls.Windows] | None,
    forest: Forest | None,
    rest_bytes: int,
) -> Prediction:
    sites = weight_sites(model)
    weights: dict[str, Tensor] = dict(quantized_weights(model, fmt))
    error = ls.error_of(sites, weights)
    mean_db, least_db = ls.sqnr_figures(sites, error)
    bits = sum(fmt.stored_bits(*site.shape) for site in sites.values())
    count = sum(w.numel() for w in weights.values())
    known = Prediction(fmt.name, bits / count, rest_bytes + math.ceil(bits / 8), mean_db, least_db)
    if seen is None:
        return known
    around, windows = seen
    features, _ = features_of(around, fmt, weights, ls.curvature_along(model, sites, windows, error))
    row = np.array([[features[name] for name in FEATURES]], dtype=np.float32)
    estimate = (forest or predictor()).predict(row)
    low, middle, high = (max(math.exp(float(v[0])) - LEAST, 0.0) for v in estimate[:3])
    start = around.nll_nats
    values: dict[str, Any] = {
        "nll_nats": start + middle,
        "low_nats": start + low,
        "high_nats": start + high,
        "delta_nll_nats": middle,
        "outside": tuple(FEATURES[i] for i in np.flatnonzero(estimate[3][0])),
    }
    return Prediction(**{**asdict(known), **values})


def mark_frontier(found: Sequence[Prediction]) -> list[Prediction]:
    """The same predictions, each knowing whether it is on the Pareto frontier of size and loss (or SQNR)."""

    def loss(p: Prediction) -> float:
        return -p.sqnr_mean_db if p.nll_nats is None else p.nll_nats

    def beaten(p: Prediction) -> bool:
        return any(
            q.size_bytes <= p.size_bytes and loss(q) <= loss(p) and (q.size_bytes < p.size_bytes or loss(q) < loss(p))
            for q in found
        )

    return [Prediction(**{**asdict(p), "outside": p.outside, "frontier": not beaten(p)}) for p in found]
