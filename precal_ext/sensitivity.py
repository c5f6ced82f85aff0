"""How much a model minds errors in each fusion set: a_l of KLD = sum a_l t_l^2, fitted on a text.

KLD is the mean divergence of the next-token distribution from the undisturbed model's, in nats per token; t_l^2 the
relative squared error of the set's weights. KLD and not the change of the loss: that has a first-order term in every
error, which a short text does not average out.

Two ways. ``fit`` adds noise of a known size to one set after another and measures. ``by_gradients`` computes what that
comes to on average for small noise: half of its variance times the diagonal of the Fisher information, which is the
mean square of the gradient of log p of tokens that the model itself draws. It takes a few passes for all sets together.
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
from precal_ext.sites import Site, find_sites

# Where the errors of 4 and 3 bits lie, and one below and above: t^2 from 25 to 16 dB. KLD is quadratic in the error
# there; at ten times as much it no longer is.
LEVELS = (0.003, 0.006, 0.012, 0.025)
GROUP = 64  # columns whose noise is equally large
SAMPLES = 2  # tokens drawn at every place, each a pass backwards
MIN_TOKENS = 256

# (weight [N, K] float32, t^2, generator) -> the weight with an error of that relative size
Disturb = Callable[[Tensor, float, torch.Generator], Tensor]
Told = Callable[[int, int], None]
Sets = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Sensitivities:
    """What was fitted.

    Args:
        a: set -> nats per token and unit of relative squared error; stderr: standard error of its mean, over the
            levels or the windows.
        kld: set -> KLD at each level, nats per token; empty from gradients.
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
    rms = _group_means(w).sqrt().float().repeat_interleave(GROUP, 1)[:, : w.shape[1]]
    noise = torch.randn(w.shape, generator=generator) * rms
    power = sum_squares(noise.double())
    return w + noise * math.sqrt(level * sum_squares(w.double()) / power) if power else w


def _group_sums(w: Tensor) -> Tensor:
    """float64 [N, ceil(K / GROUP)]: sums of squares."""
    return nn.functional.pad(w.double().square(), (0, -w.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).sum(2)


def _group_means(w: Tensor) -> Tensor:
    """float64 [N, ceil(K / GROUP)]: mean squares."""
    begins = torch.arange(0, w.shape[1], GROUP)
    return _group_sums(w) / (w.shape[1] - begins).clamp(max=GROUP)


def passes(sets: int, levels: Sequence[float] = LEVELS) -> int:
    """How often the text goes through the model in ``fit``."""
    return 1 + sets * len(levels)


def _checked(model: Any, windows: Sequence[list[int]], sets: Sets) -> tuple[dict[str, Site], int]:
    """The model's linear weights, and how many tokens there are to predict."""
    tokens = sum(len(w) - 1 for w in windows)
    if tokens < MIN_TOKENS:
        raise CheckpointError(f"plan: the text must have at least {MIN_TOKENS} tokens to predict, got {tokens}")
    sites = find_sites(model)
    for module in (m for modules in sets.values() for m in modules):
        if module not in sites:
            raise CheckpointError(
                f"plan: {module} must be a linear layer of the model in memory, got none of that name"
            )
    return sites, tokens


@torch.no_grad()
def fit(
    model: Any,
    windows: Sequence[list[int]],
    sets: Sets,
    *,
    levels: Sequence[float] = LEVELS,
    disturb: Disturb = like_quantization,
    seed: int = 0,
    progress: Told | None = None,
) -> Sensitivities:
    """Fit a_l for every set, by noise.

    In memory are the model, a copy of one set's weights, and the distributions of a batch of windows. The model is left
    as it was.

    Args:
        model: float32, in eval mode.
        sets: name -> its modules' names in the model.
        progress: called with passes of a batch done and in all.
    Raises:
        CheckpointError: fewer than MIN_TOKENS tokens to predict, or a loss that is not finite.
    """
    sites, tokens = _checked(model, windows, sets)
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
    # The luck of a noise moves KLD by a share of itself: ratios have equal weight.
    means = {name: _mean(name, [v / t for v, t in zip(values, levels, strict=True)]) for name, values in kld.items()}
    a, stderr = {name: max(0.0, m) for name, (m, _) in means.items()}, {name: e for name, (_, e) in means.items()}
    return Sensitivities(a, stderr, kld, tuple(levels), tokens)


def by_gradients(
    model: Any,
    windows: Sequence[list[int]],
    sets: Sets,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Told | None = None,
) -> Sensitivities:
    """Fit a_l for every set, by gradients; arguments and errors as ``fit``.

    Tokens are drawn independently, so gradients of different places are uncorrelated, and the square of a window's
    gradient is the sum of theirs on average. In memory are the model, the activations of a window, and the gradient of
    one weight.
    """
    sites, tokens = _checked(model, windows, sets)
    owners: dict[int, list[tuple[str, Site, Tensor]]] = {}
    held: dict[int, nn.Parameter] = {}
    for name, modules in sets.items():
        for site in (sites[module] for module in modules):
            held[id(site.held)] = site.held  # type: ignore[assignment]
            owners.setdefault(id(site.held), []).append((name, site, _group_means(site.weight())))
    now = dict.fromkeys(sets, 0.0)

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for name, site, means in owners[id(parameter)]:
            now[name] += 0.5 * math.fsum((_group_sums(site.weight(parameter.grad)) * means).sum(1).tolist())
        parameter.grad = None

    before = [(p, p.requires_grad) for p in model.parameters()]
    every: list[dict[str, float]] = []
    generator = _generator(seed, "", 0)
    hooks = []
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in owners)
        hooks = [p.register_post_accumulate_grad_hook(take) for p in held.values()]
        for n, window in enumerate(windows):
            ids = torch.tensor([window])
            with torch.enable_grad():
                logp = log_probabilities(model, ids, torch.ones_like(ids, dtype=torch.bool))[0]
            if not bool(torch.isfinite(logp.logsumexp(-1)).all()):
                raise CheckpointError("plan: the loss on the text must be finite, got nan")
            for i in range(samples):
                drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
                logp.gather(1, drawn).sum().backward(retain_graph=i + 1 < samples)
            every.append({name: value / samples / (len(window) - 1) for name, value in now.items()})
            now.update(dict.fromkeys(sets, 0.0))
            if progress is not None:
                progress(n + 1, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
        for p, wanted in before:
            p.requires_grad_(wanted)
    sizes = [(len(w) - 1) / tokens for w in windows]
    a = {name: math.fsum(s * e[name] for s, e in zip(sizes, every, strict=True)) for name in sets}
    stderr = {name: _mean(name, [e[name] for e in every])[1] for name in sets}
    return Sensitivities(a, stderr, {}, (), tokens)


def _mean(name: str, values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = math.fsum(values) / len(values)
    if not math.isfinite(mean):
        raise CheckpointError(f"plan: the loss on the text must be finite, got {mean} with errors in {name}")
    squares = math.fsum((v - mean) ** 2 for v in values)
    return mean, math.sqrt(squares / max(1, len(values) - 1) / len(values))


def _generator(seed: int, module: str, level: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {module} {level}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
