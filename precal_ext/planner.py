"""Bits where they count: measure what every setting of a fusion set loses, and spend a budget of bits on the least."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from precal_ext import estimate, sensitivity
from precal_ext.allocation import allocate, best_step, undominated
from precal_ext.budget import BitPlan, Option, PlannedSet, model_digest, plan_as_chosen, rounded
from precal_ext.checkpoint import CheckpointError
from precal_ext.config import QuantizeConfig
from precal_ext.distortion import (
    Point,
    Setting,
    candidates,
    fits,
    measure_points,
    planned_sets,
    stored_bits,
    weights_of,
)
from precal_ext.evaluate import DEFAULT_WINDOW, load, read_windows
from precal_ext.plan import Job, Plan, plan_quantization
from precal_ext.staging import read_journal

FAST_WIDTHS = (3, 4)  # those with fast kernels
# Tried where these cannot reach the budget.
NARROWER, WIDER = (2,), (5, 6, 8)
GROUP_SIZES = (32, 64, 128, 256)
CAPACITIES = (0, 1, 2, 4)
MIN_SQNR_DB = 9.0  # below it a matrix is noise: "catastrophic" in MINT's words
WINDOWS = 16  # of the text
FITS = ("gradients", "noise")  # how a_l is fitted on it

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Candidates:
    """What a set may get. ``widths`` None: 3 and 4, and what lies beyond where these cannot reach the budget."""

    widths: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] = GROUP_SIZES
    capacities: tuple[int, ...] = CAPACITIES
    min_sqnr_db: float = MIN_SQNR_DB

    def __post_init__(self) -> None:
        for name in ("widths", "group_sizes", "capacities"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(values))
                if not values:
                    raise ValueError(f"plan: {name} must not be empty")
        if not (isinstance(self.min_sqnr_db, (int, float)) and math.isfinite(self.min_sqnr_db)):
            raise ValueError(f"plan: min_sqnr_db must be a finite number, got {self.min_sqnr_db!r}")


def request_of(
    target_bits: float, text: str | Path | None, windows: int, fit: str, within: Candidates, tensor_parallel: int
) -> dict[str, Any]:
    """The question that a plan answers, in JSON."""
    file = None
    if text is not None:
        try:
            data = Path(text).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{text}: must be a readable text file, got: {error.strerror}") from None
        file = {"name": Path(text).name, "sha256": hashlib.sha256(data).hexdigest(), "windows": windows, "fit": fit}
    ways: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(within).items()}
    return {"target_bits": target_bits, "text": file, "tensor_parallel": tensor_parallel, **ways}


def plan_bits(
    model: str | Path,
    target_bits: float,
    config: QuantizeConfig | None = None,
    *,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    fit: str = FITS[0],
    fitted: Mapping[str, float] | None = None,
    within: Candidates | None = None,
    tensor_parallel: int = 1,
    progress: Progress | None = None,
) -> BitPlan:
    """Choose bits, group size and outliers for every fusion set of a model directory.

    Least sum of a_l t_l^2 over the sets, t_l^2 the relative squared error of really quantizing a sample of the set's
    weights, at no more than ``target_bits`` stored bits per weight, everything counted. Without a text a_l is the set's
    number of weights; with one it is fitted (``sensitivity``), which needs the model in memory, in float32.

    Args:
        target_bits: per weight of the planned sets together. An output head that ``lm_head`` names is none of them.
        config: recipe precal; its bits, group_size and c do not count.
        windows: of 256 tokens, or documents of a .jsonl file, at most, that a_l is fitted on.
        fit: "gradients", or "noise", which takes many times as long and comes to the same (docs/planning.md).
        fitted: a_l by set, of another plan for this model and text (``BitPlan.sensitivities``), not to fit it again.
        within: what a set may get.
        progress: called with what is being done, and how much of how much.
    Raises:
        CheckpointError: the model or the text cannot be used, or no choice fits the budget.
        ValueError: a setting cannot be planned with.
    """
    config, within = config or QuantizeConfig(), within or Candidates()
    _check(target_bits, config, fit)
    request = request_of(float(target_bits), text, windows, fit, within, tensor_parallel)
    plan = plan_quantization(model, os.devnull, config)
    sets = planned_sets(plan)
    weights = {name: weights_of(members) for name, members in sets.items()}
    settings = _settings(sets, config, within, target_bits, tensor_parallel)
    points = {}
    for n, (name, members) in enumerate(sets.items()):
        found = measure_points(members, settings[name])
        points[name] = _good(name, found, within.min_sqnr_db)
        if progress is not None:
            progress("measured", n + 1, len(sets))
    budget = int(target_bits * sum(weights.values()) * (1 + 1e-12))
    _check_reach(points, weights, target_bits, within)
    if text is None:
        whole = sum(weights.values())
        a = {name: n / whole for name, n in weights.items()}
    else:
        a = dict(fitted or _fitted(plan, sets, Path(text), windows, fit, progress))
    if a.keys() != sets.keys() or not all(0 <= value < math.inf for value in a.values()):
        raise ValueError(f"plan: fitted must have a number >= 0 for each of {len(sets)} sets, got {a}")
    a = {name: rounded(a[name]) for name in sets}
    options = {name: _options(points[name], weights[name], a[name]) for name in sets}
    items = [[(point.stored_bits, option.loss) for point, option in options[name]] for name in sets]
    chosen = allocate(items, budget)
    planned = _planned(sets, weights, a, options, items, chosen, text is not None)
    made = BitPlan(
        Path(model).name, model_digest(model), float(target_bits), _plain(config), tensor_parallel, request, planned
    )
    cost = estimate.estimate(plan_as_chosen(model, os.devnull, made))
    total = sum(point.stored_bits for name, i in zip(sets, chosen, strict=True) for point, _ in [options[name][i]])
    figures = {
        "bits_per_weight": rounded(total / sum(weights.values())),
        "sqnr_db": round(-10 * math.log10(made.error), 3) if made.error else 0.0,
        "disk_bytes": cost.disk_bytes,
        "memory_bytes": cost.memory_bytes,
        "seconds": rounded(cost.seconds),
    }
    return dataclasses.replace(made, estimate=figures)


def plan_begun(
    out: str | Path, model: str | Path, config: QuantizeConfig, request: Mapping[str, Any]
) -> BitPlan | None:
    """The plan of an unfinished run of ``out`` that answers the same question about the same model, if there is one:
    the answer may depend on the number of threads in a last digit, and asking again takes time."""
    document = (read_journal(Path(out))[0] or {}).get("planned")
    if not isinstance(document, dict) or document.get("request") != request:
        return None
    plan = BitPlan.from_dict(document, f"the unfinished run of {out}")
    return plan if plan.settings == _plain(config) and plan.digest == model_digest(model) else None


def _check(target_bits: Any, config: QuantizeConfig, fit: str) -> None:
    good = isinstance(target_bits, (int, float)) and not isinstance(target_bits, bool)
    if not good or not 0 < target_bits < math.inf:
        raise ValueError(f"plan: target_bits must be a finite number > 0, got {target_bits!r}")
    if fit not in FITS:
        raise ValueError(f"plan: fit must be one of {', '.join(FITS)}, got {fit!r}")
    if config.recipe != "precal":
        raise ValueError(f"plan: recipe must be precal, the others have nothing to choose, got {config.recipe}")
    if config.overrides:
        raise ValueError(f"plan: overrides must be empty, the plan makes them, got {list(config.overrides)}")


def _plain(config: QuantizeConfig) -> QuantizeConfig:
    """Without what every set chooses."""
    data = config.to_dict()
    for name in ("bits", "group_size", "c"):
        del data[name]
    return QuantizeConfig.from_dict(data)


def _settings(
    sets: Mapping[str, Sequence[Job]],
    config: QuantizeConfig,
    within: Candidates,
    target_bits: float,
    tensor_parallel: int,
) -> dict[str, dict[Setting, QuantizeConfig]]:
    """What each set may get, cut into slices as told."""

    def of(widths: Sequence[int]) -> dict[str, dict[Setting, QuantizeConfig]]:
        every = candidates(config, widths, within.group_sizes, within.capacities)
        found = {}
        for name, members in sets.items():
            whys = {setting: fits(members, own, tensor_parallel) for setting, own in every.items()}
            found[name] = {setting: every[setting] for setting, why in whys.items() if not why}
            if not found[name]:
                raise CheckpointError(
                    f"plan: {name} must be cut into {tensor_parallel} slices with one of the candidates, got: "
                    f"{next(iter(whys.values()))}; leave it out with --exclude, or try --no-trellis"
                )
        return found

    if within.widths is not None:
        return of(within.widths)
    widths = FAST_WIDTHS
    found = of(widths)
    least, most = _reach(sets, found)
    if target_bits < least:
        return of((*NARROWER, *widths))
    return of((*widths, *WIDER)) if target_bits > most else found


def _reach(
    sets: Mapping[str, Sequence[Job]], settings: Mapping[str, Mapping[Setting, QuantizeConfig]]
) -> tuple[float, float]:
    """The fewest and the most bits per weight."""
    costs = [[stored_bits(members, own) for own in settings[name].values()] for name, members in sets.items()]
    weights = sum(weights_of(members) for members in sets.values())
    return sum(map(min, costs)) / weights, sum(map(max, costs)) / weights


def _good(name: str, found: Sequence[Point], least: float) -> list[Point]:
    """Those above the veto that no other beats in bits and error."""
    good = [p for p in found if p.lowest_sqnr_db >= least]
    if not good:
        best = max(found, key=lambda p: p.lowest_sqnr_db)
        raise CheckpointError(
            f"plan: {name} must keep {least:g} dB SQNR in every matrix with one of the candidates, got "
            f"{best.lowest_sqnr_db:.2f} dB at best ({best.setting}); --widths adds wider ones, --min-sqnr allows less"
        )
    return [good[i] for i in undominated([(p.stored_bits, p.error) for p in good])]


def _check_reach(
    points: Mapping[str, Sequence[Point]], weights: Mapping[str, int], target_bits: float, within: Candidates
) -> None:
    count = sum(weights.values())
    least = sum(found[0].stored_bits for found in points.values()) / count
    most = sum(found[-1].stored_bits for found in points.values()) / count
    widths = sorted({p.setting.bits for found in points.values() for p in found})
    if least <= target_bits <= most * 1.005:
        return
    low = math.ceil(least * 1e3) / 1e3
    high = max(low, math.floor(most * 1e3) / 1e3)
    raise CheckpointError(
        f"plan: target_bits must lie in [{low:.3f}, {high:.3f}], what {', '.join(map(str, widths))} bits reach with at "
        f"least {within.min_sqnr_db:g} dB in every matrix, got {target_bits:g}; the nearest is "
        f"{low if target_bits < least else high:.3f}, and --widths adds other widths"
    )


def _fitted(
    plan: Plan,
    sets: Mapping[str, Sequence[Job]],
    text: Path,
    windows: int,
    fit: str,
    progress: Progress | None,
) -> Mapping[str, float]:
    model, tokenizer = load(plan.model)
    model = model.to(torch.float32)
    parts = read_windows(tokenizer, text, DEFAULT_WINDOW, windows)
    names = plan.found.model_names
    modules = {name: [names.get(job.module, job.module) for job in members] for name, members in sets.items()}
    told = None if progress is None else lambda done, total: progress("fitted", done, total)
    way = sensitivity.fit if fit == "noise" else sensitivity.by_gradients
    return way(model, parts, modules, progress=told).a


def _options(found: Sequence[Point], weights: int, a: float) -> list[tuple[Point, Option]]:
    """The points with the figures that the file will have: what is read again gives the same plan."""
    made = []
    for p in found:
        error = rounded(p.error)
        bits = round(p.stored_bits / weights, 6)
        made.append((p, Option(p.setting, bits, error, rounded(p.worst), a * error)))
    return made


def _planned(
    sets: Mapping[str, Sequence[Job]],
    weights: Mapping[str, int],
    a: Mapping[str, float],
    options: Mapping[str, Sequence[tuple[Point, Option]]],
    items: Sequence[Sequence[tuple[int, float]]],
    chosen: Sequence[int],
    with_text: bool,
) -> tuple[PlannedSet, ...]:
    """The sets with their choices, and why: sensitivity, and what the next step up would save."""
    steps = [best_step(item, i) for item, i in zip(items, chosen, strict=True)]
    price = max(steps, default=0.0)
    mean = sum(a.values()) / sum(weights.values())
    planned = []
    for n, (name, members) in enumerate(sets.items()):
        option = options[name][chosen[n]][1]
        relative = a[name] / weights[name] / mean if mean else 1.0
        reason = f"minds errors {relative:.2f} x the mean weight" if with_text else "all weights count the same"
        if steps[n] == 0:
            reason += "; nothing better among the candidates"
        else:
            reason += f"; a step up would save {steps[n] / price:.2f} per bit of what the best step left does"
        modules = tuple(job.module for job in members)
        alternatives = tuple(o for _, o in options[name])
        planned.append(PlannedSet(name, modules, weights[name], a[name], option.setting, reason, alternatives))
    return tuple(planned)
