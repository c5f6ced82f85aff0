"""The loss that a plan leads to, before anything is written: the predictor of ``precal predict`` beside the linearity
theorem, whichever is more certain. docs/planning.md says what it costs and how certain both are.

What the predictor asks of model and error comes of the loss alone, without gradients, by runs over the text with other
weights. These are made anew from the files every time, so that no copy of the model is held: in memory are the model in
float32, the plan's codes, one weight, and the activations of a batch of windows.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from precal_ext import landscape as ls
from precal_ext.budget import BitPlan, plan_as_chosen
from precal_ext.checkpoint import CheckpointError
from precal_ext.distortion import planned_sets, weights_of
from precal_ext.evaluate import DEFAULT_WINDOW, load, read_windows
from precal_ext.forecast import Figure, Forecast
from precal_ext.forest import Forest
from precal_ext.measure import row_parts, sqnr_db, sum_squares
from precal_ext.plan import Job
from precal_ext.planner import WINDOWS
from precal_ext.predict import FEATURES, LEAST, Measured, features_from, log_rise, predictor
from precal_ext.qtensor import QTensor
from precal_ext.quantize import SAMPLE, fit_set_grid, quantize_weight
from precal_ext.sensitivity import MIN_TOKENS
from precal_ext.sites import Site, find_sites
from precal_ext.weights import read_sample, read_weight

# Where the trace of the Hessian is read off the radial profile: still a bowl, and well above the rounding of the loss.
TRACE_RADIUS = 0.04
DIRECTIONS = 2  # random ones, as the radial profile of the study has
PROBES = 4  # of the Hessian's diagonal, as there
FIXED_RUNS = 1 + 2 + 2 * PROBES + 2 * DIRECTIONS  # and as many as the last for every other radius that is asked for
_USUAL_RUNS = FIXED_RUNS + 3 * 2 * DIRECTIONS

Progress = Callable[[str, int, int], None]
Change = Callable[[str, Tensor], Tensor]  # (module, W) -> what is to be there; may take the memory of W


@dataclass
class _Errors:
    """What the quantized weights are, and sums over modules of what they miss."""

    quantized: dict[str, QTensor] = dataclasses.field(default_factory=dict)
    power: dict[str, float] = dataclasses.field(default_factory=dict)
    noise: dict[str, float] = dataclasses.field(default_factory=dict)
    along: float = 0.0  # <d, w>
    bits: float = 0.0  # times weights
    log2_group: float = 0.0  # times weights

    def add(self, module: str, w: Tensor, q: QTensor) -> None:
        power = noise = 0.0
        for rows, part in row_parts(q):
            original = w[rows].double()
            d = part.dequantize().double() - original
            power += sum_squares(original)
            noise += sum_squares(d)
            self.along += float((d * original).sum())
        self.quantized[module], self.power[module], self.noise[module] = q, power, noise

    def share(self, modules: Sequence[str]) -> float:
        """t^2 of some modules together."""
        power = math.fsum(self.power[m] for m in modules)
        return math.fsum(self.noise[m] for m in modules) / power if power else 0.0


class _Runs:
    """The loss on the text with other weights in the model's place."""

    def __init__(
        self,
        model: nn.Module,
        windows: ls.Windows,
        jobs: Sequence[Job],
        sites: Mapping[str, Site],
        told: Progress | None,
    ) -> None:
        self.done = 0
        self._model, self._windows, self._jobs, self._sites, self._told = model, windows, jobs, sites, told

    def loss(self, change: Change | None = None) -> float:
        for job in self._jobs if change else ():
            w = read_weight(job.info, job.conv1d).float()
            self._sites[job.module].weight().copy_(change(job.module, w) if change else w)
        found = ls.mean_nll(self._model, self._windows)
        if not math.isfinite(found):
            raise CheckpointError(f"plan: the loss on the text must be finite, got {found}")
        self.done += 1
        if self._told is not None:
            self._told("forecast", self.done, max(self.done + 1, _USUAL_RUNS))
        return found


def forecast_plan(
    model: str | Path,
    plan: BitPlan,
    *,
    text: str | Path,
    windows: int = WINDOWS,
    forest: Forest | None = None,
    progress: Progress | None = None,
) -> BitPlan:
    """The plan with a forecast of the loss on a text.

    Quantizes the model once, in memory, and needs some 30 runs over the text; the results may depend on the number of
    threads in a last digit, and belong to no checkpoint.

    Args:
        plan: for this model, made with a text; it may have been edited.
        windows: of 256 tokens, or documents of a .jsonl file, at most.
        forest: None: the shipped predictor.
        progress: called with what is being done, and how much of how much.
    Raises:
        CheckpointError: the model or the text cannot be used, or the plan is not for it.
        ValueError: the plan was made without a text, so that its sensitivities are no loss.
    """
    if not plan.with_text:
        raise ValueError("forecast: plan must be made with a text, got one without, whose sensitivities are no loss")
    chosen = plan_as_chosen(model, os.devnull, plan)
    sets = planned_sets(chosen)
    loaded, tokenizer = load(model)
    loaded = loaded.to(torch.float32)
    parts = read_windows(tokenizer, Path(text), DEFAULT_WINDOW, windows)
    tokens = sum(len(w) - 1 for w in parts)
    if tokens < MIN_TOKENS:
        raise CheckpointError(f"plan: the text must have at least {MIN_TOKENS} tokens to predict, got {tokens}")
    sites = _places(loaded, sets, chosen.found.model_names)
    errors = _quantized(plan, sets)
    runs = _Runs(loaded, parts, [job for jobs in sets.values() for job in jobs], sites, progress)
    with torch.no_grad():
        features, theorem, start = _features(plan, sets, loaded, errors, runs)
    if progress is not None:
        progress("forecast", runs.done, runs.done)
    forest = forest or predictor()
    row = np.array([[features[name] for name in FEATURES]], dtype=np.float32)
    estimate = forest.predict(row)
    low, middle, high = (float(v[0]) for v in estimate[:3])
    first, last, beyond = forest.of_rival(log_rise(theorem))
    found = Forecast(
        text=Path(text).name,
        tokens=tokens,
        nll_nats=_digits(start),
        runs=runs.done,
        used="predictor" if high - low <= last - first else "theorem",
        predictor=_figure(middle, low, high, tuple(FEATURES[i] for i in np.flatnonzero(estimate[3][0]))),
        theorem=_figure(log_rise(theorem), first, last, ("log_theorem",) if beyond else ()),
    )
    return dataclasses.replace(plan, forecast=found)


def _digits(value: float) -> float:
    """Those that do not depend on the number of threads, nearly always."""
    return float(f"{value:.5g}")


def _figure(middle: float, low: float, high: float, outside: tuple[str, ...]) -> Figure:
    """Of logarithms of rise + LEAST."""
    rise, low, high = (_digits(max(math.exp(min(v, 50.0)) - LEAST, 0.0)) for v in (middle, low, high))
    return Figure(rise, low, high, outside)


def _places(model: nn.Module, sets: Mapping[str, Sequence[Job]], names: Mapping[str, str]) -> dict[str, Site]:
    """Where the weights of a plan are in the model in memory; none of them is tied to another."""
    sites = find_sites(model)
    found = {}
    for job in (job for jobs in sets.values() for job in jobs):
        name = names.get(job.module, job.module)
        if name not in sites:
            raise CheckpointError(f"plan: {name} must be a linear layer of the model in memory, got none of that name")
        found[job.module] = sites[name]
    return found


def _quantized(plan: BitPlan, sets: Mapping[str, Sequence[Job]]) -> _Errors:
    """Every set as the quantizer makes it."""
    errors = _Errors()
    for s in plan.sets:
        members = sets[s.name]
        config = s.choice.config(plan.settings._with({}))
        grid = fit_set_grid([read_sample(j.info, max(1, SAMPLE // len(members)), j.conv1d) for j in members], config)
        for job in members:
            w = read_weight(job.info, job.conv1d)
            errors.add(job.module, w, quantize_weight(w, config, grid))
            group = s.choice.group_size if s.choice.group_size > 0 else w.shape[1]
            errors.log2_group += w.numel() * math.log2(group)
        errors.bits += weights_of(members) * s.choice.bits
    return errors


def _features(
    plan: BitPlan, sets: Mapping[str, Sequence[Job]], model: nn.Module, errors: _Errors, runs: _Runs
) -> tuple[dict[str, float], float, float]:
    """FEATURES of the predictor, the theorem's rise, and the loss of the model as it is, nats.

    Slope and curvature are differences of the loss along the error, half of d'diag(H)d the mean curvature along the
    error under random signs, and the trace's rise that of random noise: what the study has from gradients, up to its
    luck. Bits and group are means over the weights.
    """
    modules = {name: [job.module for job in jobs] for name, jobs in sets.items()}
    a = plan.sensitivities
    theorem = math.fsum(a[name] * errors.share(names) for name, names in modules.items())
    sizes = {job.module: weights_of([job]) for jobs in sets.values() for job in jobs}
    weights, power = sum(sizes.values()), math.fsum(errors.power.values())
    t2 = errors.share(list(sizes))
    start = runs.loss()

    def moved(step: float, probe: int | None = None) -> float:
        def change(module: str, w: Tensor) -> Tensor:
            d = errors.quantized[module].dequantize() - w
            if probe is not None:
                d *= _signs(d.shape, f"sign {probe} {module}")
            return w.add_(d, alpha=step)

        return runs.loss(change)

    def differences(probe: int | None = None) -> tuple[float, float]:
        """Slope and half the curvature of the whole error."""
        if t2 == 0:
            return 0.0, 0.0
        step = ls.CURVATURE_STEP / math.sqrt(t2)
        up, down = moved(step, probe), moved(-step, probe)
        return (up - down) / (2 * step), (up + down - 2 * start) / (2 * step**2)

    def noisy(step: float, seed: int) -> float:
        def change(module: str, w: Tensor) -> Tensor:
            d = torch.randn(w.shape, generator=_generator(f"noise {seed} {module}"))
            length = math.sqrt(errors.power[module] / max(sum_squares(d.double()), 1e-300))
            return w.add_(d, alpha=step * length)

        return runs.loss(change)

    @functools.cache
    def rise(t: float) -> float:
        """The radial profile at one of its radii."""
        rises = [noisy(sign * t, seed) - start for seed in range(DIRECTIONS) for sign in (1, -1)]
        return math.fsum(rises) / len(rises)

    def profile(t: float) -> float:
        """Read between the radii around ``t``, the only ones that are run."""
        i = bisect.bisect_left(ls.RADII, t)
        near = ls.RADII[max(0, i - 1) : i + 1]
        return ls.read_profile(near, [rise(r) for r in near], t)

    slope, curvature = differences()
    diagonal = math.fsum(differences(probe)[1] for probe in range(PROBES)) / PROBES
    decibels = {m: sqnr_db(1.0, errors.share([m])) for m in sizes}
    measured = Measured(
        parameters=sum(p.numel() for p in model.parameters()),
        nll_nats=start,
        bits=errors.bits / weights,
        log2_group=errors.log2_group / weights,
        power_of_two_scales=False,
        gptq=False,
        sqnr_mean_db=math.fsum(min(decibels[m], 200.0) * n for m, n in sizes.items()) / weights,
        sqnr_min_db=min(decibels.values()),
        t2=t2,
        theorem=theorem,
        all_sensitivities=math.fsum(a.values()),
        gain=1.0,
        slope=slope,
        curvature=curvature,
        diagonal=diagonal,
        trace=rise(TRACE_RADIUS) / TRACE_RADIUS**2,
        shrinkage=-errors.along / power if power else 0.0,
    )
    return features_from(measured, profile)[0], theorem, start


def _signs(shape: torch.Size, name: str) -> Tensor:
    return torch.randint(0, 2, shape, generator=_generator(name), dtype=torch.int8) * 2 - 1


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))
