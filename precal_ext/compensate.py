"""Discarded-weight recycling: other codes for a quantized model, kept where its loss on a text falls.

What quantization discards is D = W - W'. Candidates are W' requantized, on its own levels, scales and outliers, towards
W' + gain * D_k, where D_k is the part of D in a space of k dimensions; or towards W' less a step along the gradient of
the loss. Only codes change: a compensated checkpoint has the size and speed that it had. docs/compensation.md says what
is published, what is inferred and what is ours.
"""

from __future__ import annotations

import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from precal_ext import ops
from precal_ext.chain import CRITERIA, Block, Text, find_blocks
from precal_ext.qtensor import QTensor
from precal_ext.requantize import requantize
from precal_ext.sites import find_sites

SPACES = ("gradient", "svd", "random", "afm")
GAINS = {"gradient": (1.0, 0.5, 0.2, 0.1)}
DEFAULT_GAINS = (1.0, 2.0, 4.0)
ROUNDS = {"gradient": 4}
FAR = 0.05  # of the codes; data-free ones are the nearest but for a few, as they were found together with the scales
STRIDE = 4.0
DAMPING = 10.0  # of the mean eigenvalue of a factor of the curvature
LEAST = 1e-6  # nats: differences below it are rounding


@dataclass(frozen=True)
class CompensateConfig:
    """Settings of a search.

    Args:
        space: "svd", "random" or "afm": D_k = U_k U_k' D with the left singular vectors of D, random orthogonal ones,
            or the principal components of the layer's output error D x on the text; "gradient" (default): steps
            against the gradient.
        criterion: "kld" (default): mean KL divergence from the original; "perplexity".
        interval: k are its multiples; None: an eighth of the most that k can be.
        gains: factors of D_k (default 1, 2, 4), or of the step (1, 0.5, 0.2, 0.1).
        rounds: times that a block is searched, each from what the last one found; ends with the first that finds
            nothing (1, "gradient" 4).
        samples: windows of text to search on.  window: tokens of each.
        held_out: windows that are not searched on; None: a quarter of ``samples``. A change that raises the loss there
            is not kept.
        skip_blocks: blocks at the beginning that stay as they are.
        patience: blocks in a row whose change is not kept for that reason, after which the search stops.
        seed: of the random space, and of labels drawn for the curvature.
    Raises:
        ValueError: a field breaks its contract.
    """

    space: str = "gradient"
    criterion: str = "kld"
    interval: int | None = None
    gains: tuple[float, ...] | None = None
    rounds: int | None = None
    samples: int = 32
    window: int = 256
    held_out: int | None = None
    skip_blocks: int = 0
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        _check("space", self.space, self.space in SPACES, f"one of {', '.join(SPACES)}")
        _check("criterion", self.criterion, self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}")
        if self.gains is None:
            settle("gains", GAINS.get(self.space, DEFAULT_GAINS))
        settle("gains", tuple(self.gains or ()))
        good = bool(self.gains) and all(isinstance(g, (int, float)) and 0 < g <= 1e6 for g in self.gains or ())
        _check("gains", self.gains, good, "positive numbers, at least one")
        settle("gains", tuple(float(g) for g in self.gains or ()))
        if self.rounds is None:
            settle("rounds", ROUNDS.get(self.space, 1))
        if self.held_out is None:
            settle("held_out", max(1, self.samples // 4) if isinstance(self.samples, int) else 1)
        least = {"rounds": 1, "samples": 1, "window": 2, "held_out": 0, "skip_blocks": 0, "patience": 1, "seed": 0}
        if self.interval is not None:
            least["interval"] = 1
        for name, low in least.items():
            value = getattr(self, name)
            good = isinstance(value, int) and not isinstance(value, bool) and low <= value < 1 << 31
            _check(name, value, good, f"an integer, at least {low}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gains": list(self.gains or ())}


def _check(field_name: str, value: Any, good: bool, contract: str) -> None:
    if not good:
        raise ValueError(f"compensate: {field_name} must be {contract}, got {value!r}")


@dataclass(frozen=True)
class Change:
    """Codes of one block that were kept: what was tried, the loss before and after, and how many codes are others."""

    block: str
    round: int
    k: int | None
    gain: float
    before: float
    after: float
    held_out_before: float | None
    held_out_after: float | None
    codes: int


@dataclass(frozen=True)
class BlockResult:
    """What became of a block: changes, and whether a last one was not kept because of the held-out text."""

    block: str
    changes: list[Change] = field(default_factory=list)
    refused: bool = False

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> BlockResult:
        """From ``dataclasses.asdict``."""
        return cls(**{**data, "changes": [Change(**change) for change in data["changes"]]})


@dataclass(frozen=True)
class Progress:
    """A block is done: how many of how many, and seconds so far."""

    result: BlockResult
    done: int
    blocks: int
    seconds: float


@dataclass
class Compensation:
    """The result of a search; losses in nats per token.

    Args:
        before, after: on the text that was searched on.  held_out_before, held_out_after: None without such a text.
        stopped: the block after which held-out text called for an end, or None.
    """

    config: CompensateConfig
    tokens: int = 0
    held_out_tokens: int = 0
    before: float = math.nan
    after: float = math.nan
    held_out_before: float | None = None
    held_out_after: float | None = None
    blocks: list[BlockResult] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0

    @property
    def changes(self) -> list[Change]:
        return [c for b in self.blocks for c in b.changes]

    def to_dict(self) -> dict[str, Any]:
        """Without times: the same input gives the same bytes."""
        data = asdict(self)
        del data["seconds"]
        return {**data, "config": self.config.to_dict()}


def choose_windows(windows: Sequence[list[int]], config: CompensateConfig) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to search on and windows held out, spread evenly over the text.

    Raises:
        ValueError: the text has too few.
    """
    assert config.held_out is not None
    wanted = config.samples + config.held_out
    if len(windows) < 1 + bool(config.held_out):
        raise ValueError(f"compensate: text must have at least 2 windows of {config.window} tokens, got {len(windows)}")
    if len(windows) > wanted:
        windows = [windows[i * len(windows) // wanted] for i in range(wanted)]
    held = max(1, len(windows) * config.held_out // wanted) if config.held_out else 0
    chosen = {(2 * i + 1) * len(windows) // (2 * held) for i in range(held)}
    searched = [w for i, w in enumerate(windows) if i not in chosen]
    return searched, [windows[i] for i in sorted(chosen)]


# ---- spaces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Other weights of a block's modules; ``targets`` are what the next round goes on from."""

    k: int | None
    gain: float
    weights: dict[str, QTensor]
    targets: dict[str, Tensor] | None = None


@dataclass
class Work:
    """A block under way: W, W' as it is now, and for steps against the gradient where they have led and the curvature.

    ``dense`` are the values of ``now``, ``strides`` what gains are multiplied by.
    """

    block: Block
    original: dict[str, Tensor]
    now: dict[str, QTensor]
    dense: dict[str, Tensor]
    targets: dict[str, Tensor]
    strides: dict[str, float]
    curvature: dict[str, tuple[Tensor, Tensor]] | None = None


def _bases(config: CompensateConfig, text: Text, work: Work) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> U [N, r] with orthonormal columns, the first of which matter most, and U' D."""
    found = {}
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    if config.space == "afm":
        with text.trying(work.block, work.dense):
            moments = text.moments(work.now, work.block)
    for name, w in work.original.items():
        d = w - work.dense[name]
        if config.space == "svd":
            u, s, v = torch.linalg.svd(d, full_matrices=False)
            found[name] = u, s[:, None] * v
        elif config.space == "random":
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ config.seed)
            u = torch.linalg.qr(torch.randn(d.shape[0], d.shape[0], generator=random))[0]
            found[name] = u, u.t() @ d
        elif name in moments:  # else an expert that no token took
            u = torch.linalg.eigh(d @ moments[name][1] @ d.t())[1].flip(1)[:, : min(d.shape)]
            found[name] = u, u.t() @ d
    return found


def _low_rank(config: CompensateConfig, text: Text, work: Work) -> Iterator[Candidate]:
    """Every k with every gain; one k for all modules of a block, cut to what each has."""
    bases = _bases(config, text, work)
    most = max((u.shape[1] for u, _ in bases.values()), default=0)
    interval = config.interval or max(1, -(-most // 8))
    for k in range(interval, most + interval, interval):
        parts = {name: u[:, :k] @ p[:k] for name, (u, p) in bases.items()}
        for gain in config.gains or ():
            weights = {
                name: requantize(q, work.dense[name] + gain * parts[name]) if name in parts else q
                for name, q in work.now.items()
            }
            yield Candidate(min(k, most), gain, weights)


def _steps(config: CompensateConfig, text: Text, work: Work) -> Iterator[Candidate]:
    """Against the gradient, each weight by its curvature; the targets keep what rounding has not shown yet."""
    live = {name: w.clone().requires_grad_() for name, w in work.dense.items()}
    with text.trying(work.block, live):
        if work.curvature is None:
            work.curvature = text.curvature(live, config.seed)
        gradients = text.gradients(live)
    steps = {}
    for name, g in gradients.items():
        left, right = (_damped(m) for m in work.curvature[name])
        steps[name] = torch.cholesky_solve(torch.cholesky_solve(g, left).t().contiguous(), right).t()
    for gain in config.gains or ():
        targets = {name: t - gain * work.strides[name] * steps[name] for name, t in work.targets.items()}
        yield Candidate(None, gain, {name: requantize(q, targets[name]) for name, q in work.now.items()}, targets)


def _damped(m: Tensor) -> Tensor:
    """Cholesky factor of a matrix of second moments with a share of its mean eigenvalue on the diagonal."""
    mean = float(m.diagonal().mean())
    return torch.linalg.cholesky(m + torch.eye(len(m)) * (DAMPING * mean if mean > 0 else 1.0))


# ---- search ----------------------------------------------------------------------------------------------------------


class Search:
    """Goes through the blocks of a model in their order and changes their codes in place.

    Args:
        model: quantized, in memory, in eval mode.
        weight_of: module -> W [N, K] float32, of the model before quantization.
        reference: the model before quantization; for criterion "kld".
    Raises:
        ValueError: the model holds nothing quantized or is not on the CPU, or ``weight_of`` gives other shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_of: Callable[[str], Tensor],
        searched: Sequence[list[int]],
        held_out: Sequence[list[int]],
        config: CompensateConfig,
        reference: nn.Module | None = None,
    ) -> None:
        found = find_blocks(model)
        for block in found.blocks:
            for name, module in block.modules.items():
                if module.qweight.device.type != "cpu":
                    raise ValueError(f"compensate: the model must be on the CPU, got {name} on {module.qweight.device}")
        self.config, self.blocks, self._weight_of = config, list(found.blocks), weight_of
        arguments = (config.criterion, reference)
        self._text = Text(model, found.layers, searched, *arguments)
        self._held = Text(model, found.layers, held_out, *arguments) if held_out else None
        self._texts = [text for text in (self._text, self._held) if text is not None]
        self._last: float | None = None  # loss after the block before
        self.result = Compensation(config, self._text.tokens, self._held.tokens if self._held is not None else 0)

    def run(
        self,
        finished: Mapping[str, BlockResult] | None = None,
        done: Callable[[BlockResult, Work], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Compensation:
        """Search every block that is not finished.

        Args:
            finished: what an earlier run found, whose codes are in the model already.
            done: called after every block.
            progress: called after every block.
        """
        started, result, finished = time.monotonic(), self.result, finished or {}
        if math.isnan(result.before):
            self.measure()
        searched = self.blocks[self.config.skip_blocks :]
        for number, block in enumerate(searched):
            for text in self._texts:
                text.advance(block)
            if block.name in finished:
                found = finished[block.name]
                self._last = found.changes[-1].after if found.changes else self._last
            else:
                work = self._begin(block)
                found = self._search(work)
                for name, module in block.modules.items():
                    set_weight(module, work.now[name])
                if done is not None:
                    done(found, work)
            result.blocks.append(found)
            if progress is not None:
                progress(Progress(found, number + 1, len(searched), time.monotonic() - started))
            recent = result.blocks[-self.config.patience :]
            if len(recent) == self.config.patience and all(b.refused and not b.changes for b in recent):
                result.stopped = block.name
                break
        result.after, result.held_out_after = self._losses()
        result.seconds = time.monotonic() - started
        return result

    def measure(self) -> None:
        """The losses before anything is changed; an earlier run may have measured them."""
        self.result.before, self.result.held_out_before = self._losses()

    def _losses(self) -> tuple[float, float | None]:
        found = [text.loss() for text in self._texts]
        return found[0], found[1] if len(found) > 1 else None

    def _begin(self, block: Block) -> Work:
        now = {name: module.qtensor() for name, module in block.modules.items()}
        original = {}
        for name, q in now.items():
            w = self._weight_of(name).float()
            if tuple(w.shape) != (q.spec.N, q.spec.K):
                want = [q.spec.N, q.spec.K]
                raise ValueError(f"compensate: the original's {name} must be {want}, got {list(w.shape)}")
            original[name] = w
        dense = {name: q.dequantize() for name, q in now.items()}
        begun = {n: start(w, now[n], dense[n]) for n, w in original.items()} if self.config.space == "gradient" else {}
        targets, strides = {n: t for n, (t, _) in begun.items()}, {n: stride for n, (_, stride) in begun.items()}
        return Work(block, original, now, dense, targets, strides)

    def _search(self, work: Work) -> BlockResult:
        found = BlockResult(work.block.name)
        propose = _steps if self.config.space == "gradient" else _low_rank
        # Measured again, in dense weights as the candidates are: the kernels of the others round otherwise.
        now, held = (self._loss(text, work.block, work.now) for text in (self._text, self._held))
        if now is None or not math.isfinite(now):
            raise ValueError(f"compensate: the model's loss on the text must be finite, got {now}")
        if self._last is not None and abs(now - self._last) > 1e-3 + 0.02 * abs(self._last):
            raise ValueError(
                f"compensate: layers must hand on all they do in their outputs; from {work.block.name} on the loss is "
                f"{now:.5f}, of the whole model {self._last:.5f}"
            )
        for round_ in range(self.config.rounds or 1):
            best, least = None, now - LEAST
            for candidate in propose(self.config, self._text, work):
                if all(_same(candidate.weights[name], q) for name, q in work.now.items()):
                    continue
                loss = self._loss(self._text, work.block, candidate.weights)
                if loss is not None and loss < least:
                    best, least = candidate, loss
            if best is None:
                break
            after = self._loss(self._held, work.block, best.weights)
            if after is not None and held is not None and after > held:
                found = dataclasses.replace(found, refused=True)
                break
            codes = sum(_different(best.weights[name], q) for name, q in work.now.items())
            found.changes.append(Change(found.block, round_, best.k, best.gain, now, least, held, after, codes))
            work.now = best.weights
            work.dense = {name: q.dequantize() for name, q in best.weights.items()}
            work.targets = best.targets or work.targets
            now, held = least, after
        self._last = now
        return found

    @staticmethod
    def _loss(text: Text | None, block: Block, weights: Mapping[str, QTensor]) -> float | None:
        if text is None:
            return None
        with text.trying(block, {name: q.dequantize() for name, q in weights.items()}):
            return text.loss()


def set_weight(module: Any, q: QTensor) -> None:
    """Another weight of the same format for a ``PrecalLinear``."""
    module.prepacked = q.prepack()


def _packed(q: QTensor) -> Tensor:
    return q.tensors["weight_packed"]


def start(w: Tensor, q: QTensor, dense: Tensor) -> tuple[Tensor, float]:
    """Where steps against the gradient begin, and how long they are: at W [N, K], to which the codes of W', ``dense``,
    are the nearest. Where more than ``FAR`` are not, as after GPTQ, which chose them for what inputs make of them, half
    way from W' to W. The codes are the nearest to that, and none is nearly a tie: shorter steps change nothing."""
    nearest, there = (ops.unpack(x.tensors["weight_packed"], q.spec.bits, q.spec.K) for x in (requantize(q, w), q))
    return (w, 1.0) if int((nearest != there).sum()) <= FAR * w.numel() else ((w + dense) / 2, STRIDE)


def _same(a: QTensor, b: QTensor) -> bool:
    return torch.equal(_packed(a), _packed(b))


def _different(a: QTensor, b: QTensor) -> int:
    """Codes."""
    K = a.spec.K
    return int((ops.unpack(_packed(a), a.spec.bits, K) != ops.unpack(_packed(b), b.spec.bits, K)).sum())


def compensate_model(
    model: nn.Module,
    reference: nn.Module,
    windows: Sequence[list[int]],
    config: CompensateConfig | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Compensation:
    """Change codes of a quantized model in memory, in place.

    Args:
        model: with ``PrecalLinear`` modules, called as transformers' models are: ``input_ids``, ``attention_mask``,
            ``.logits`` of the output.  reference: the same before quantization.
        windows: of token ids; ``choose_windows`` says which are searched on and which held out.
    Returns:
        What was changed, with the losses.
    Raises:
        ValueError: nothing is quantized, the reference is of another shape, or the text is too short.
    """
    config = config or CompensateConfig()
    sites = find_sites(reference)

    def weight_of(name: str) -> Tensor:
        if name not in sites:
            raise ValueError(f"compensate: reference must have a linear layer {name}, got none of this name")
        return sites[name].weight()

    searched, held_out = choose_windows(windows, config)
    return Search(model, weight_of, searched, held_out, config, reference).run(progress=progress)
