"""The loss around a model's weights: how far it rises along random directions and along an error, slope, curvature.

w stands for the weights that are quantized, one matrix per module; a direction d has a matrix for each of them, and
L(w) is the mean negative log likelihood on windows of text, nats per token. The length of a direction is relative: t_l
= |d_l| / |w_l| in module l, and t with t^2 = sum |d_l|^2 / sum |w_l|^2 for the whole model. Which of these are of
arXiv 2410.12119, and which are ours: docs/scaling-laws.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from precal_ext.evaluate import batches, evaluate
from precal_ext.measure import sqnr_db, sum_squares
from precal_ext.select import fusion_set_of
from precal_ext.sites import Site

Sites = Mapping[str, Site]
Direction = Mapping[str, Tensor]  # module -> [N, K]
Windows = Sequence[list[int]]

RADII = (0.01, 0.02, 0.04, 0.08, 0.12, 0.18, 0.27, 0.4, 0.6, 0.9)
LEAST_RISE = 1e-6  # nats; what is below drowns in the rounding of float32 losses
NOISE_STEP = 0.1  # t of the noise that a_l is measured with: above rounding, below the step of the radial profile
CURVATURE_STEP = 0.03
DAMPING = 0.01  # of GPTQ's Hessian, as a share of its mean diagonal


def mean_nll(model: nn.Module, windows: Windows) -> float:
    """L at the weights that the model has."""
    return evaluate(model, windows).nll_nats


# ---- directions ------------------------------------------------------------------------------------------------------


def error_of(sites: Sites, quantized: Direction) -> dict[str, Tensor]:
    """W' - W of every module."""
    return {name: w - sites[name].weight().float() for name, w in quantized.items()}


def random_direction(sites: Sites, seed: int) -> dict[str, Tensor]:
    """Gaussian noise, in every module of the length of its weight: t_l = 1."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, site in sites.items():
        d = torch.randn(site.shape, generator=random)
        found[name] = d.mul_(math.sqrt(_power(site.weight()) / max(_power(d), 1e-300)))
    return found


@contextlib.contextmanager
def moved(sites: Sites, direction: Direction, step: float = 1.0) -> Iterator[None]:
    """The model at w + step * d; afterwards its weights are what they were, to the bit."""
    kept = {name: sites[name].weight().clone() for name in direction}
    try:
        for name, d in direction.items():
            sites[name].weight().add_(d, alpha=step)
        yield
    finally:
        for name, w in kept.items():
            sites[name].weight().copy_(w)


def _power(w: Tensor) -> float:
    return sum_squares(w.double())


# ---- of the error alone ----------------------------------------------------------------------------------------------


def relative_errors(sites: Sites, error: Direction) -> dict[str, float]:
    """t_l^2 of every module: |d_l|^2 / |w_l|^2; 0 for a weight of zeros."""
    return {name: _share(_power(d), _power(sites[name].weight())) for name, d in error.items()}


def set_errors(sites: Sites, error: Direction, factors: Mapping[str, float] | None = None) -> dict[str, float]:
    """t_l^2 of every fusion set, each module's |d_l|^2 times its factor, if there are any."""
    found = {}
    for name, members in fusion_sets(sites).items():
        noise = sum(_power(error[m]) * (1.0 if factors is None else factors[m]) for m in members)
        found[name] = _share(noise, sum(_power(sites[m].weight()) for m in members))
    return found


def relative_error(sites: Sites, error: Direction) -> float:
    """t^2 of the whole model."""
    return _share(sum(map(_power, error.values())), sum(_power(sites[name].weight()) for name in error))


def _share(noise: float, power: float) -> float:
    return noise / power if power else 0.0


def sqnr_figures(sites: Sites, error: Direction) -> tuple[float, float]:
    """SQNR in dB: the mean over modules by their numbers of weights, and the least."""
    shares = relative_errors(sites, error)
    dB = {name: sqnr_db(1.0, share) for name, share in shares.items()}
    count = {name: d.numel() for name, d in error.items()}
    return sum(dB[name] * n for name, n in count.items()) / sum(count.values()), min(dB.values())


def shrinkage(sites: Sites, error: Direction) -> float:
    """How much shorter W' is along W: -<d, w> / |w|^2 over all modules. Noise has 0; rounding small weights to zero, as
    2 bits do, has more than its error's length says."""
    along = power = 0.0
    for name, d in error.items():
        w = sites[name].weight().double()
        along += float((d.double() * w).sum())
        power += _power(w)
    return -along / power if power else 0.0


# ---- of the model alone ----------------------------------------------------------------------------------------------


def radial_profile(
    model: nn.Module, sites: Sites, windows: Windows, radii: Sequence[float] = RADII, seeds: Sequence[int] = (0, 1)
) -> list[float]:
    """L(w + t d) - L(w) in nats for every t of ``radii``: the mean over random directions and their opposites."""
    start = mean_nll(model, windows)
    rises = [0.0] * len(radii)
    for seed in seeds:
        d = random_direction(sites, seed)
        for i, t in enumerate(radii):
            for sign in (1, -1):
                with moved(sites, d, sign * t):
                    rises[i] += (mean_nll(model, windows) - start) / (2 * len(seeds))
    return rises


def read_profile(radii: Sequence[float], rises: Sequence[float], t: float) -> float:
    """The rise of a radial profile at t, nats: along straight lines in log t and log rise, and as t^2 outside, below as
    in a quadratic bowl; above the last radius the last rise, since a model that knows nothing gets no worse."""
    if t <= 0:
        return 0.0
    logs = [math.log(max(rise, LEAST_RISE)) for rise in rises]
    if t <= radii[0]:
        return math.exp(logs[0]) * (t / radii[0]) ** 2
    for i in range(1, len(radii)):
        if t <= radii[i]:
            share = math.log(t / radii[i - 1]) / math.log(radii[i] / radii[i - 1])
            return math.exp(logs[i - 1] + share * (logs[i] - logs[i - 1]))
    return math.exp(logs[-1])


def sensitivities(
    model: nn.Module, sites: Sites, windows: Windows, t: float = NOISE_STEP, seed: int = 7
) -> dict[str, float]:
    """a_l of the linearity theorem (arXiv 2411.17525), L(w + d) - L(w) = sum a_l t_l^2, in nats and not negative: by
    noise of length t in one fusion set after the other, and its opposite."""
    start, noise = mean_nll(model, windows), random_direction(sites, seed)
    found = {}
    for name, members in fusion_sets(sites).items():
        rise = 0.0
        for sign in (1, -1):
            with moved(sites, {member: noise[member] for member in members}, sign * t):
                rise += (mean_nll(model, windows) - start) / 2
        found[name] = max(rise, 0.0) / t**2
    return found


def fusion_sets(sites: Sites) -> dict[str, list[str]]:
    """Modules by their fusion set."""
    found: dict[str, list[str]] = {}
    for name in sites:
        found.setdefault(fusion_set_of(name), []).append(name)
    return found


def differentiable_nll(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Sum of the negative log likelihoods of a batch, with a graph behind it that can be differentiated twice."""
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(logp * mask[:, 1:]).sum()


def gradient(model: nn.Module, sites: Sites, windows: Windows) -> dict[str, Tensor]:
    """Of L, by module [N, K]."""
    return _derivatives(model, sites, windows, None)


def curvature_product(model: nn.Module, sites: Sites, windows: Windows, v: Direction) -> dict[str, Tensor]:
    """H v, the Hessian of L times a direction, by module [N, K]."""
    return _derivatives(model, sites, windows, v)


def _derivatives(model: nn.Module, sites: Sites, windows: Windows, v: Direction | None) -> dict[str, Tensor]:
    held = {id(site.held): site.held for site in sites.values()}
    wanted = {key: p.requires_grad for key, p in held.items()}
    total = {key: torch.zeros_like(p) for key, p in held.items()}
    tokens = sum(len(w) - 1 for w in windows)
    try:
        for p in held.values():
            p.requires_grad_(True)
        # torch's fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for ids, mask in batches(windows):
                nll = differentiable_nll(model, ids, mask) / tokens
                first = torch.autograd.grad(nll, list(held.values()), create_graph=v is not None)
                found: Sequence[Tensor] = first
                if v is not None:
                    by_key = dict(zip(held, first, strict=True))
                    dot = torch.stack([(_part(sites[n], by_key) * d).sum() for n, d in v.items()]).sum()
                    found = torch.autograd.grad(dot, list(held.values()))
                for key, g in zip(held, found, strict=True):
                    total[key] += g.detach()
    finally:
        for key, p in held.items():
            p.requires_grad_(wanted[key])
    return {name: site.weight(total[id(site.held)]) for name, site in sites.items()}


def _part(site: Site, gradients: Mapping[int, Tensor]) -> Tensor:
    """A site's share of its parameter's gradient, with its graph (``Site.weight`` cuts that off)."""
    g = gradients[id(site.held)]
    if site.part is not None:
        expert, _, rows = site.part
        g = g[expert][rows]
    return g.t() if site.conv1d else g


def hutchinson_traces(
    model: nn.Module, sites: Sites, windows: Windows, probes: int = 4, seed: int = 11
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Trace of every module's block of the Hessian of L, and its diagonal [N, K]: means of v_l * (H v)_l over random
    signs v. The trace of Gaussian noise of length t_l gives a rise of t_l^2 |w_l|^2 trace_l / (2 N K)."""
    random = torch.Generator().manual_seed(seed)
    diagonal = {name: torch.zeros(site.shape) for name, site in sites.items()}
    for _ in range(probes):
        v = {n: torch.randint(0, 2, s.shape, generator=random).mul_(2).sub_(1).float() for n, s in sites.items()}
        for name, hv in curvature_product(model, sites, windows, v).items():
            diagonal[name] += hv * v[name] / probes
    return {name: float(d.double().sum()) for name, d in diagonal.items()}, diagonal


# ---- of the model and the error --------------------------------------------------------------------------------------


def slope(gradient: Direction, error: Direction) -> float:
    """<gradient, d>: what L gains to first order, nats."""
    return sum(float((gradient[name].double() * d.double()).sum()) for name, d in error.items())


def diagonal_rises(diagonal: Direction, error: Direction) -> dict[str, float]:
    """Half of d' diag(H) d by module: the second order without what weights do to each other, nats."""
    return {name: float((diagonal[name].double() * d.double().square()).sum()) / 2 for name, d in error.items()}


def curvature_along(
    model: nn.Module, sites: Sites, windows: Windows, error: Direction, step: float = CURVATURE_STEP
) -> float:
    """d' H d / 2, the second order of the rise along an error, nats: by a difference of L at t = ``step`` on both
    sides, whatever the length of d, so that rounding of L does not drown that of a fine format."""
    t = math.sqrt(relative_error(sites, error))
    if t == 0:
        return 0.0
    rise = -2 * mean_nll(model, windows)
    for sign in (1, -1):
        with moved(sites, error, sign * step / t):
            rise += mean_nll(model, windows)
    return rise / 2 * (t / step) ** 2


# ---- what GPTQ can gain ----------------------------------------------------------------------------------------------


@torch.no_grad()
def input_moments(model: Any, sites: Sites, windows: Windows) -> dict[str, Tensor]:
    """X' X over the tokens of a text, float64 [K, K], for what comes into every module."""
    found = {name: torch.zeros(site.shape[1], site.shape[1], dtype=torch.float64) for name, site in sites.items()}
    kept: list[Tensor] = [torch.empty(0)]  # the mask of the batch that runs

    def keep(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1])[kept[0].flatten()].double()
            found[name] += x.t() @ x

        return hook

    hooks = [site.module.register_forward_pre_hook(keep(n)) for n, site in sites.items() if site.part is None]
    try:
        for ids, mask in batches(windows):
            kept[0] = mask
            model(input_ids=ids, attention_mask=mask.long())
    finally:
        for handle in hooks:
            handle.remove()
    return found


def damped(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian that GPTQ works with: a share of the mean of its diagonal is added to that. An input that is always
    zero gets 1."""
    diagonal = moments.diagonal()
    dead = diagonal == 0
    extra = damping * float(diagonal.mean()) + dead.double()
    return moments + torch.diag(extra if float(diagonal.mean()) else torch.ones_like(diagonal))


def gptq_gain(moments: Tensor, tokens: int) -> float:
    """What GPTQ leaves of the output's squared error after round-to-nearest, in theory: tr(D) / tr(H) with H = L D L'
    (arXiv 2307.13304 shows it for rounding without limits and errors that are even). 1 for inputs without correlation.

    D is seen on ``tokens`` inputs and used on others: a column that f columns explain looks 1 - f / tokens times as
    large as it is, and is explained as much worse elsewhere. f counts what damping leaves free: all together the trace
    of M (M + damping)^-1. A module that never ran (an expert) has 1.
    """
    if not bool(moments.any()):
        return 1.0
    H = damped(moments)
    # GPTQ goes through the columns from the first to the last, and what is left of column i is its variance given all
    # later ones: the squared diagonal of the Cholesky factor from the other end.
    factor = torch.linalg.cholesky(H.flip(0, 1))
    extra = (H - moments).diagonal().flip(0)
    free = len(H) - float((extra * torch.cholesky_inverse(factor).diagonal()).sum())
    seen = 1 - free / len(H) * torch.arange(len(H), dtype=torch.float64) / max(tokens, 1)
    left = factor.diagonal().square() / seen.clamp(min=0.05).square()
    return float(torch.minimum(left, H.diagonal().flip(0)).sum() / H.diagonal().sum())
