"""What a model's loss will be in a format: features of model and format, and the shipped predictor that reads them.

`bench/scaling_laws.py` measures models and formats, fits the predictor and writes predictor.npz. Definitions:
docs/scaling-laws.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
LEAST_TRACE = 1e-3  # nats: what is below is no bowl
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


@dataclass(frozen=True)
class Measured:
    """What features are made of.

    Args:
        bits, log2_group, power_of_two_scales, gptq: of the format; means over the weights where they have several.
        t2: relative squared error of the whole model.  theorem: sum a_l t_l^2, and all_sensitivities the sum of a_l.
        gain: what GPTQ leaves of the squared error of outputs, 1 without it.
        slope, curvature, diagonal: <gradient, d>, d'Hd / 2 and d'diag(H)d / 2 of the error d, nats.
        trace: second-order rise of noise of length t = 1 in every module, nats.
    """

    parameters: int
    nll_nats: float
    bits: float
    log2_group: float
    power_of_two_scales: bool
    gptq: bool
    sqnr_mean_db: float
    sqnr_min_db: float
    t2: float
    theorem: float
    all_sensitivities: float
    gain: float
    slope: float
    curvature: float
    diagonal: float
    trace: float
    shrinkage: float


def features_of(
    around: Surroundings, fmt: Format, weights: ls.Direction, curvature: float
) -> tuple[dict[str, float], dict[str, float]]:
    """``features_from`` a model in a format.

    Args:
        weights: W' of every module; of a format with ``+gptq``, by round-to-nearest.
        curvature: ``landscape.curvature_along`` their error.
    """
    sites, error = around.sites, ls.error_of(around.sites, weights)
    mean_db, least_db = ls.sqnr_figures(sites, error)
    plain, gained = ls.set_errors(sites, error), ls.set_errors(sites, error, around.gains if fmt.gptq else None)
    a = around.sensitivities
    theorem, weighted = (sum(a[s] * t2 for s, t2 in found.items()) for found in (plain, gained))
    measured = Measured(
        parameters=around.parameters,
        nll_nats=around.nll_nats,
        bits=float(fmt.bits),
        log2_group=math.log2(max(fmt.group, 1)),
        power_of_two_scales=isinstance(fmt.how, MXFormat),
        gptq=fmt.gptq,
        sqnr_mean_db=mean_db,
        sqnr_min_db=least_db,
        t2=ls.relative_error(sites, error),
        theorem=theorem,
        all_sensitivities=sum(a.values()),
        gain=weighted / theorem if theorem > 0 and weighted > 0 else 1.0,
        slope=ls.slope(around.gradient, error),
        curvature=curvature,
        diagonal=sum(ls.diagonal_rises(around.diagonal, error).values()),
        trace=around.trace_rise(),
        shrinkage=ls.shrinkage(sites, error),
    )
    return features_from(measured, lambda t: ls.read_profile(ls.RADII, around.profile, t))


def features_from(m: Measured, profile: Callable[[float], float]) -> tuple[dict[str, float], dict[str, float]]:
    """FEATURES of a model in a format.

    Args:
        profile: the rise at a length t, as ``landscape.read_profile`` reads it.
    Returns:
        The features by name, and the rises in nats that closed forms expect: ``radial_nats``, the radial profile at the
        length of the error; ``theorem_nats``, sum a_l t_l^2; ``weighted_nats``, ``shaped_nats`` and ``along_nats``, the
        profile where random noise does as much to second order as this error, by the a_l, by the Hessian's diagonal,
        or by the curvature along it, GPTQ's gain included; ``diagonal_nats``, slope and diagonal alone.
    """
    first = 0.0 if m.gptq else m.slope  # GPTQ's error is another one
    trace = max(m.trace, LEAST_TRACE)

    def at(squared_length: float) -> float:
        return profile(math.sqrt(max(squared_length, 0.0)))

    found = {
        "radial_nats": at(m.t2),
        "theorem_nats": m.theorem,
        "weighted_nats": at(m.theorem * m.gain / max(m.all_sensitivities, 1e-12)),
        "shaped_nats": at(m.diagonal * m.gain / trace) + first,
        "along_nats": at(m.curvature * m.gain / trace) + first,
        "diagonal_nats": m.slope + m.diagonal,
    }
    log = {name: log_rise(value) for name, value in found.items()}
    features = {
        "log10_parameters": math.log10(m.parameters),
        "nll_nats": m.nll_nats,
        "bits": m.bits,
        "log2_group": m.log2_group,
        "power_of_two_scales": float(m.power_of_two_scales),
        "gptq": float(m.gptq),
        "sqnr_mean_db": min(m.sqnr_mean_db, 200.0),
        "sqnr_min_db": min(m.sqnr_min_db, 200.0),
        "log_radial": log["radial_nats"],
        "log_theorem": log["theorem_nats"],
        "log_weighted": log["weighted_nats"],
        "log_shaped": log["shaped_nats"],
        "log_along": log["along_nats"],
        "radial_over_along": log["radial_nats"] - log["along_nats"],
        "shaped_over_along": log["shaped_nats"] - log["along_nats"],
        "log_diagonal": log["diagonal_nats"],
        "slope_nats": m.slope,
        "log_trace": math.log(trace),
        "shrinkage": m.shrinkage,
        "log_gptq_gain": math.log(m.gain),
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
