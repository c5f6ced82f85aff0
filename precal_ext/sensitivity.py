"""How much a model minds errors in each fusion set: a_l of KLD = sum a_l t_l^2, fitted on a text.

Noise of a known relative size t^2 is added to the weights of one set, and the mean KL divergence of the next-token
distribution from the undisturbed model's is measured; a_l is its mean ratio to t^2 over a few sizes. KLD and not the
change of the loss: that has a first-order term in every error, which a short text does not average out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precal_ext.checkpoint import CheckpointError
from precal_ext.evaluate import batches, log_probabilities
from precal_ext.measure import sum_squares
from precal_ext.sites import find_sites

# Where the errors of 4 and 3 bits lie, and one below and above: t^2 from 25 to 16 dB. KLD is quadratic in the error
# there; at ten times as much it no longer is.
LEVELS = (0.003, 0.006, 0.012, 0.025)
GROUP = 64  # columns whose noise is equally large
MIN_TOKENS = 256

# (weight [N, K] float32, t^2, generator) -> the weight with an error of that relative size
Disturb = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Sensitivities:
    """Args:
    a: set -> nats per token and unit of relative squared error; stderr: standard error of its mean over the levels.
    kld: set -> KLD at each level, nats per token.
    tokens: predicted tokens it was fitted on.
    """

    a: Mapping[str, float]
    stderr: Mapping[str, float]
    kld: Mapping[str, Sequence[float]]
    levels: Sequence[float]
    tokens: int


def like_quantization(w: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """``w`` with Gaussian noise whose squared norm is ``level`` times that of ``w``, exactly.

    As errors of quantization are, it is as large as the weights around it, in groups of GROUP columns.
    """
    squares = nn.functional.pad(w.double().square(), (0, -w.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    rms = squares.sum(2).sqrt().float().repeat_interleave(GROUP, 1)[:, : w.shape[1]]
    noise = torch.randn(w.shape, generator=generator) * rms
    power = _squares(noise)
    return w + noise * math.sqrt(level * _squares(w) / power) if power else w


def _squares(x: Tensor) -> float:
    return sum_squares(x.double())


def passes(sets: int, levels: Sequence[float] = LEVELS) -> int:
    """How often the text goes through the model."""
    return 1 + sets * len(levels)


@torch.no_grad()
def fit(
    model: Any,
    windows: Sequence[list[int]],
    sets: Mapping[str, Sequence[str]],
    *,
    levels: Sequence[float] = LEVELS,
    disturb: Disturb = like_quantization,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivities:
    """Fit a_l for every set.

    In memory are the model, a copy of one set's weights, and the distributions of a batch of windows. The model is left
    as it was.

    Args:
        model: float32, in eval mode.
        sets: name -> its modules' names in the model.
        progress: called with passes of a batch done and in all.
    Raises:
        CheckpointError: fewer than MIN_TOKENS tokens to predict, or a loss that is not finite.
    """
    tokens = sum(len(w) - 1 for w in windows)
    if tokens < MIN_TOKENS:
        raise CheckpointError(f"plan: the text must have at least {MIN_TOKENS} tokens to predict, got {tokens}")
    sites = find_sites(model)
    for module in (m for modules in sets.values() for m in modules):
        if module not in sites:
            raise CheckpointError(
                f"plan: {module} must be a linear layer of the model in memory, got none of that name"
            )
    sums = {name: [0.0] * len(levels) for name in sets}
    parts = list(batches(windows))
    done, total = 0, len(parts) * passes(len(sets), levels)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for ids, mask in parts:
        expected = log_probabilities(model, ids, mask)
        step()
        target = mask[:, 1:]
        for name, modules in sets.items():
            places = [sites[module].weight() for module in modules]
            kept = [place.clone() for place in places]
            for i, level in enumerate(levels):
                try:
                    for module, place, w in zip(modules, places, kept, strict=True):
                        place.copy_(disturb(w, level, _generator(seed, module, i)))
                    found = log_probabilities(model, ids, mask)
                finally:
                    for place, w in zip(places, kept, strict=True):
                        place.copy_(w)
                divergence = (expected.exp() * (expected - found)).sum(-1) * target
                sums[name][i] += float(divergence.double().sum())
                step()
    kld = {name: [s / tokens for s in values] for name, values in sums.items()}
    a, stderr = {}, {}
    for name, values in kld.items():
        # The luck of a noise moves KLD by a share of itself: ratios have equal weight.
        ratios = [value / level for value, level in zip(values, levels, strict=True)]
        mean = math.fsum(ratios) / len(ratios)
        if not math.isfinite(mean):
            raise CheckpointError(f"plan: the loss on the text must be finite, got {mean} with noise in {name}")
        a[name] = max(0.0, mean)
        squares = math.fsum((r - mean) ** 2 for r in ratios)
        stderr[name] = math.sqrt(squares / max(1, len(ratios) - 1) / len(ratios))
    return Sensitivities(a, stderr, kld, tuple(levels), tokens)


def _generator(seed: int, module: str, level: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {module} {level}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
