"""A quantized model as a row of blocks: its loss on a text, from some block on, with other weights tried in it.

What comes before a block is computed once: while blocks are edited in their order, the outputs of the layer before are
kept for every batch of the text, and the layers up to there give them back instead of running.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from precal_ext.evaluate import batches
from precal_ext.linear import PrecalLinear
from precal_ext.sites import precal_modules

CRITERIA = ("kld", "perplexity")
Weights = Mapping[str, Tensor]  # module -> float32 [N, K]
Seen = Callable[[str, Tensor, Tensor], None]  # module, its input [..., K], its output [..., N]


@dataclass(frozen=True)
class Block:
    """Quantized modules that are edited together.

    Args:
        at: how many layers come before; None when that is not known, and the whole model must run.
    """

    name: str
    modules: Mapping[str, PrecalLinear]
    at: int | None


@dataclass(frozen=True)
class Blocks:
    """The layers of a model, and its quantized modules in the order in which they are edited."""

    layers: Sequence[nn.Module] = ()
    blocks: Sequence[Block] = field(default_factory=list)


def find_blocks(model: nn.Module) -> Blocks:
    """The layers are the members of the outermost ``nn.ModuleList`` with the most quantized modules. Quantized modules
    outside of it are a block each: an output head the last, others first, with nothing kept of what comes before.

    Raises:
        ValueError: nothing is quantized.
    """
    quantized = dict(precal_modules(model))
    if not quantized:
        raise ValueError("compensate: the model must hold quantized weights, got one without PrecalLinear modules")
    name, most = "", 0
    for candidate, module in model.named_modules():
        inside = sum(q.startswith(candidate + ".") for q in quantized)
        if isinstance(module, nn.ModuleList) and inside > most:
            name, most = candidate, inside
    layers = list(model.get_submodule(name).children()) if name else []
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    first: list[Block] = []
    middle: list[Block] = []
    last: list[Block] = []
    for i in range(len(layers)):
        prefix = f"{name}.{i}"
        own = {q: m for q, m in quantized.items() if q.startswith(prefix + ".")}
        if own:
            middle.append(Block(prefix, own, i))
    for q, m in quantized.items():
        if not name or not q.startswith(name + "."):
            (last if m is head else first).append(Block(q, {q: m}, len(layers) if m is head else None))
    return Blocks(layers, [*first, *middle, *last])


class _ReachedError(Exception):
    """The layer whose output is wanted has run."""


class Text:
    """Windows of a text going through a model whose blocks are edited in their order.

    Args:
        windows: of token ids, as ``evaluate.read_windows`` gives them.
        criterion: "kld", the mean KL divergence from the reference's next-token distributions, or "perplexity", of
            which the mean negative log likelihood is what is compared.
        reference: the model before quantization; only for "kld", and only while this is made.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        windows: Sequence[list[int]],
        criterion: str = "kld",
        reference: nn.Module | None = None,
    ) -> None:
        self._model, self._layers = model, layers
        self._options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        self._batches = list(batches(windows))
        self.tokens = sum(int(mask[:, 1:].sum()) for _, mask in self._batches)
        self._kept: list[Any] = [None] * len(self._batches)
        self._before = 0  # layers whose outputs are kept
        self._expected: list[tuple[Tensor, Tensor]] | None = None  # probabilities, their negative entropy by window
        if criterion == "kld":
            if reference is None:
                raise ValueError("compensate: reference must be given for criterion kld, got none")
            self._expected = [self._of_reference(reference, *batch) for batch in self._batches]
        self._seen: Seen | None = None
        self._inside = torch.ones(0, dtype=torch.bool)

    @torch.no_grad()
    def _of_reference(self, reference: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logp = _logits(reference(input_ids=ids, attention_mask=mask.long(), **self._options)).log_softmax(-1)
        p = logp.exp()
        return p, ((p * logp).sum(-1) * mask[:, 1:]).sum(1)

    # ---- the kept part ---------------------------------------------------------------------------------------------
    def advance(self, block: Block) -> None:
        """From now on run from this block on; the layers before must not change any more."""
        if block.at is None or block.at <= self._before:
            return
        last = self._layers[block.at - 1]
        found: list[Any] = []

        def take(module: nn.Module, arguments: Any, output: Any) -> None:
            found.append(output)
            raise _ReachedError

        handle = last.register_forward_hook(take)
        try:
            for i in range(len(self._batches)):
                with contextlib.suppress(_ReachedError), torch.no_grad():
                    self._run(i)
        finally:
            handle.remove()
        if len(found) != len(self._batches):
            raise ValueError("compensate: every layer of the model must run once a call, got one that did not")
        self._kept, self._before = found, block.at

    def _run(self, i: int) -> Tensor:
        ids, mask = self._batches[i]
        self._inside = mask
        given = self._layers[: self._before]

        def skip(*arguments: Any, **options: Any) -> Any:
            return self._kept[i]

        for layer in given:
            layer.forward = skip
        try:
            return _logits(self._model(input_ids=ids, attention_mask=mask.long(), **self._options))
        finally:
            for layer in given:
                del layer.forward

    # ---- other weights ---------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def trying(self, block: Block, weights: Weights) -> Iterator[None]:
        """Dense weights in place of the block's quantized ones."""
        for name, module in block.modules.items():
            module.forward = _Dense(self, name, weights[name], module.bias)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in block.modules.values():
                del module.forward

    def show(self, name: str, x: Tensor, y: Tensor) -> None:
        if self._seen is not None:
            self._seen(name, x, y)

    def real(self, x: Tensor) -> Tensor:
        """[tokens, K]: without the padding, where x still has windows."""
        inside = x.shape[:-1] == self._inside.shape
        return x[self._inside] if inside else x.reshape(-1, x.shape[-1])

    @contextlib.contextmanager
    def watched(self, seen: Seen) -> Iterator[None]:
        """``seen`` is called with inputs and outputs of the modules in ``trying``."""
        self._seen = seen
        try:
            yield
        finally:
            self._seen = None

    # ---- loss ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def moments(self, names: Iterable[str], block: Block) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and covariance of the inputs of modules in ``trying``."""
        sums: dict[str, list[Tensor]] = {}

        def seen(name: str, x: Tensor, y: Tensor) -> None:
            x = self.real(x)
            parts = [x.sum(0), x.t() @ x, torch.tensor(float(len(x)))]
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts

        def reached(module: nn.Module, arguments: Any, output: Any) -> None:
            raise _ReachedError

        last = None if block.at is None or block.at >= len(self._layers) else self._layers[block.at]
        handle = None if last is None else last.register_forward_hook(reached)
        try:
            with self.watched(seen):
                for i in range(len(self._batches)):
                    with contextlib.suppress(_ReachedError):
                        self._run(i)
        finally:
            if handle is not None:
                handle.remove()
        found = {}
        for name in names:
            if name in sums:  # else an expert that no token took
                mean, square = sums[name][0] / sums[name][2], sums[name][1] / sums[name][2]
                found[name] = mean, square - mean[:, None] * mean
        return found

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over the tokens, in nats."""
        return math.fsum(x for i in range(len(self._batches)) for x in self._sums(i).tolist()) / self.tokens

    def _sums(self, i: int) -> Tensor:
        """By window."""
        ids, mask = self._batches[i]
        logits = self._run(i)
        cost = logits.logsumexp(-1)
        if self._expected is None:
            return ((cost - logits.gather(-1, ids[:, 1:, None])[..., 0]) * mask[:, 1:]).sum(1)
        p, entropy = self._expected[i]
        return ((cost - (p * logits).sum(-1)) * mask[:, 1:]).sum(1) + entropy

    def gradients(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the loss in the weights of ``trying``, which must require them."""
        found = {name: torch.zeros_like(w) for name, w in weights.items()}
        for i in range(len(self._batches)):
            loss = self._sums(i).sum() / self.tokens
            parts = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, part in zip(found.values(), parts, strict=True):
                if part is not None:  # an expert that no token took
                    total += part
        return found

    def curvature(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Kronecker factors of the Fisher information of the weights in ``trying``: second moments, over tokens, of the
        gradient of the outputs for labels drawn from the model's own distribution [N, N], and of the inputs [K, K]."""
        found = {name: [w.new_zeros(2 * w.shape[:1]), w.new_zeros(2 * w.shape[1:])] for name, w in weights.items()}

        def seen(name: str, x: Tensor, y: Tensor) -> None:
            x = self.real(x.detach())
            found[name][1] += x.t() @ x

            def outer(g: Tensor) -> None:  # of padding it is 0: no real token sees it
                g = g.reshape(-1, g.shape[-1])
                found[name][0] += g.t() @ g

            y.register_hook(outer)

        with self.watched(seen):
            for i, (_, mask) in enumerate(self._batches):
                logits = self._run(i)
                p = logits.detach().softmax(-1)[mask[:, 1:]]
                random = torch.Generator().manual_seed(seed + i)
                label = torch.multinomial(p, 1, generator=random)
                loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:]], label[:, 0], reduction="sum")
                torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return {name: (g / self.tokens, a / self.tokens) for name, (g, a) in found.items()}


class _Dense:
    """What a quantized module does while other weights are tried in it."""

    def __init__(self, text: Text, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self._text, self._name, self._weight, self._bias = text, name, weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, self._weight.to(x.dtype), self._bias)
        self._text.show(self._name, x, y)
        return y


def _logits(output: Any) -> Tensor:
    found: Tensor = output.logits
    return found[:, :-1].float()
