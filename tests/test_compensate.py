"""Discarded-weight recycling in memory: the row of blocks, gradients, the spaces, and what a search keeps."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import forced_threads
from models import ARCHITECTURES, DEMO, Source, same_bytes, tiny_model
from torch import Tensor, nn

import precal_ext
from precal_ext import CompensateConfig, QuantizeConfig, compensate_model, ops, quantize_model
from precal_ext.chain import Text, find_blocks
from precal_ext.compensate import SPACES, STRIDE, Change, choose_windows, start
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.quantize import fit_set_grid, quantize_weight
from precal_ext.requantize import requantize
from precal_ext.sites import precal_modules

pytest_plugins = ["package_fixtures"]


def random_windows(count: int, length: int = 12, seed: int = 0) -> list[list[int]]:
    ids = torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    found: list[list[int]] = ids.tolist()
    return [w[: length - i % 3] for i, w in enumerate(found)]  # some end early, so that there is padding


def pair(architecture: str = "Llama", bits: int = 3, **setting: Any) -> tuple[nn.Module, nn.Module]:
    """Quantized, and as it was; with weights large enough for distributions that are not nearly uniform."""
    reference = tiny_model(architecture, initializer_range=0.2)
    model = copy.deepcopy(reference)
    quantize_model(model, QuantizeConfig(bits=bits, **setting))
    return model, reference


def packed(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.qtensor().tensors["weight_packed"] for name, m in precal_modules(model)}


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loss_from_any_block_on_is_the_loss(architecture: str) -> None:
    model, reference = pair(architecture)
    found, windows = find_blocks(model), random_windows(11)
    assert [m for block in found.blocks for m in block.modules] == [name for name, _ in precal_modules(model)]
    assert len(found.layers) == len(found.blocks) == 2
    text = Text(model, found.layers, windows, "kld", reference)
    whole = evaluate(model, windows, reference)
    assert whole.kld_nats is not None
    for block in found.blocks:
        text.advance(block)
        assert math.isclose(text.loss(), whole.kld_nats, rel_tol=1e-3, abs_tol=1e-6)
        # Nothing before the block runs any more: without weights there the loss is the same.
        for earlier in found.layers[: block.at]:
            hidden = [m for m in earlier.modules() if isinstance(m, precal_ext.PrecalLinear)]
            kept = [m.prepacked for m in hidden]
            for m in hidden:
                m.prepacked = None
            assert math.isclose(text.loss(), whole.kld_nats, rel_tol=1e-3, abs_tol=1e-6)
            for m, prepacked in zip(hidden, kept, strict=True):
                m.prepacked = prepacked
    nll = Text(model, found.layers, windows, "perplexity")
    assert math.isclose(nll.loss(), whole.nll_nats, rel_tol=1e-5)
    assert nll.tokens == whole.tokens == sum(map(len, windows)) - len(windows)


def test_a_quantized_head_is_the_last_block_and_other_modules_need_the_whole_model() -> None:
    model, reference = pair(include=("lm_head",))
    names = [(b.name, b.at) for b in find_blocks(model).blocks]
    assert names == [("model.layers.0", 0), ("model.layers.1", 1), ("lm_head", 2)]
    model.aside = model.lm_head
    model.lm_head = nn.Linear(32, 64)
    first = find_blocks(model).blocks[0]
    assert (first.name, first.at) == ("aside", None)
    with pytest.raises(ValueError, match="must hold quantized weights, got one without PrecalLinear"):
        find_blocks(reference)


def test_layers_that_do_not_all_run_are_refused() -> None:
    model, reference = pair()
    model.model.layers[0].forward = lambda x, *a, **k: x  # type: ignore[method-assign,assignment]
    found = find_blocks(model)
    model.model.layers = nn.ModuleList(list(found.layers)[1:])
    text = Text(model, found.layers, random_windows(3), "kld", reference)
    with pytest.raises(ValueError, match="every layer of the model must run once a call"):
        text.advance(found.blocks[1])


class Plain(nn.Module):
    """Not of transformers: layers that look back one token. ``gossip``: the second also hears what the first did."""

    def __init__(self, gossip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(64, 32), nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)) for _ in range(2))
        self.told: Tensor | None = None
        if gossip:
            self.layers[0][1].register_forward_hook(
                lambda module, given, y: setattr(self, "told", y[..., :32].detach())
            )
            self.layers[1].register_forward_hook(lambda module, given, y: y if self.told is None else y + self.told)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.told = None
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x + nn.functional.pad(x, (0, 0, 1, -1)))
        return SimpleNamespace(logits=x @ self.head.weight.t())


def test_any_module_that_gives_logits() -> None:
    reference = Plain()
    model = copy.deepcopy(reference)
    quantize_model(model, QuantizeConfig(bits=3))
    result = compensate_model(model, reference, random_windows(30, 48), CompensateConfig(samples=24))
    assert {b.block for b in result.blocks} == {"layers.0", "layers.1"}
    assert result.after < 0.97 * result.before


def test_layers_that_tell_each_other_more_than_their_outputs_are_refused() -> None:
    """As where a layer uses the keys of an earlier one: what is skipped is missed."""
    reference = Plain(gossip=True)
    model = Plain(gossip=True)
    quantize_model(model, QuantizeConfig(bits=3))
    with pytest.raises(
        ValueError, match=r"layers must hand on all they do in their outputs; from layers.1 on the loss"
    ):
        compensate_model(model, reference, random_windows(5), CompensateConfig(samples=4))


# ---- where steps begin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_steps_begin_at_w_or_where_the_codes_are_those_that_are_there(bits: int) -> None:
    w = torch.randn(48, 512, generator=torch.Generator().manual_seed(bits))
    config = QuantizeConfig(bits=bits)
    q = quantize_weight(w, config, fit_set_grid([w], config))
    assert start(w, q, q.dequantize()) == (w, 1.0)
    # Codes of another weight, about as far away as rounding is, as GPTQ's are.
    error = (w - q.dequantize()).std()
    moved = requantize(q, w + error * torch.randn(w.shape, generator=torch.Generator().manual_seed(9)))
    target, stride = start(w, moved, moved.dequantize())
    assert stride == STRIDE

    def others(x: Tensor) -> float:
        again = requantize(moved, x).tensors["weight_packed"]
        codes = [ops.unpack(packed, bits, 512) for packed in (again, moved.tensors["weight_packed"])]
        return float((codes[0] != codes[1]).float().mean())

    assert others(w) > 0.2
    assert others(target) < 0.05


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["kld", "perplexity"])
@pytest.mark.parametrize("at", [0, 1])
def test_gradients_are_those_of_the_loss(criterion: str, at: int) -> None:
    model, reference = pair()
    found = find_blocks(model)
    text = Text(model, found.layers, random_windows(9), criterion, reference)
    block = found.blocks[at]
    text.advance(block)
    dense = {name: m.dequantize() for name, m in block.modules.items()}
    live = {name: w.clone().requires_grad_() for name, w in dense.items()}
    with text.trying(block, live):
        gradients = text.gradients(live)
    random = torch.Generator().manual_seed(1)
    for name in dense:
        direction = torch.randn(dense[name].shape, generator=random)
        slope = float((gradients[name] * direction).sum())
        losses = []
        for step in (2e-3, -2e-3):
            with text.trying(block, {**dense, name: dense[name] + step * direction}):
                losses.append(text.loss())
        assert math.isclose((losses[0] - losses[1]) / 4e-3, slope, rel_tol=0.05, abs_tol=1e-3)
    assert not any("forward" in vars(m) for m in block.modules.values())


def test_curvature_is_of_inputs_and_of_gradients_of_labels() -> None:
    """Of an output head both are known: the inputs, and the covariance of a label around its probabilities."""
    model, reference = pair(include=("lm_head",))
    found = find_blocks(model)
    windows = random_windows(600)
    text = Text(model, found.layers, windows, "kld", reference)
    block = found.blocks[-1]
    text.advance(block)
    live = {name: m.dequantize().requires_grad_() for name, m in block.modules.items()}
    with text.trying(block, live):
        left, right = text.curvature(live, 0)["lm_head"]
        mean, covariance = text.moments(["lm_head"], block)["lm_head"]
    inputs, labels = [], []
    for window in windows:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([window]), output_hidden_states=True)
        inputs.append(out.hidden_states[-1][0])
        p = out.logits[0, :-1].softmax(-1)
        labels.append(torch.diag(p.sum(0)) - p.t() @ p)
    x = torch.cat(inputs)
    assert torch.allclose(right, x.t() @ x / text.tokens, rtol=1e-3, atol=1e-3)
    assert torch.allclose(mean, x.mean(0), atol=1e-3)
    assert torch.allclose(covariance, x.t() @ x / len(x) - x.mean(0)[:, None] * x.mean(0), atol=1e-3)
    expected = sum(labels) / text.tokens
    assert torch.allclose(left.diagonal(), expected.diagonal(), rtol=0.5, atol=1e-3)
    assert float((left - expected).norm() / expected.norm()) < 0.35


# ---- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("setting", [{"bits": 3}, {"bits": 3, "recipe": "paper"}, {"bits": 3, "c": 2}], ids=str)
def test_a_search_changes_codes_alone_and_never_for_the_worse(space: str, setting: dict[str, Any]) -> None:
    model, reference = pair(**setting)
    before = {name: dict(m.qtensor().tensors) for name, m in precal_modules(model)}
    config = CompensateConfig(space=space, samples=24, rounds=2)
    windows = random_windows(30, 48)
    seen = []
    result = compensate_model(model, reference, windows, config, seen.append)
    assert result.after <= result.before
    assert result.held_out_after is not None and result.held_out_before is not None
    assert result.held_out_after <= result.held_out_before + 1e-6
    searched, held = choose_windows(windows, config)
    for part, loss in ((searched, result.after), (held, result.held_out_after)):
        figure = evaluate(model, part, reference).kld_nats
        assert figure is not None and math.isclose(figure, loss, rel_tol=1e-3, abs_tol=1e-6)
    changed = 0
    for name, m in precal_modules(model):
        q = m.qtensor()
        q.validate(name)
        assert m.is_prepacked
        different = [key for key in q.tensors if not same_bytes(q.tensors[key], before[name][key])]
        assert different in ([], ["weight_packed"])
        changed += bool(different)
    assert bool(changed) == bool(result.changes)
    assert [p.result for p in seen] == result.blocks
    for b in result.blocks:
        for c in b.changes:
            assert c.after < c.before and c.codes > 0 and (c.k is None) == (space == "gradient")
        for c, d in zip(b.changes, b.changes[1:], strict=False):
            assert (c.after, c.held_out_after) == (d.before, d.held_out_before)
    if space == "gradient":
        assert result.after < 0.97 * result.before


def test_the_same_call_gives_the_same_codes_on_any_number_of_threads() -> None:
    found, config = [], CompensateConfig(space="svd", samples=12, gains=(2,), interval=12)
    for threads in (1, 1, 2):
        model, reference = pair()
        with forced_threads(threads):
            compensate_model(model, reference, random_windows(15, 24), config)
        found.append(packed(model))
    assert all(same_bytes(found[0][name], other[name]) for other in found[1:] for name in other)


def test_perplexity_needs_no_distributions_of_the_reference() -> None:
    model, reference = pair()
    config = CompensateConfig(criterion="perplexity", samples=16, held_out=0)
    result = compensate_model(model, reference, random_windows(16, 48), config)
    assert result.after < result.before and result.held_out_before is None
    nll = evaluate(model, random_windows(16, 48)).nll_nats
    assert math.isclose(nll, result.after, rel_tol=1e-4)


def test_skipped_blocks_stay() -> None:
    model, reference = pair()
    before = packed(model)
    config = CompensateConfig(samples=24, skip_blocks=1)
    result = compensate_model(model, reference, random_windows(30, 48), config)
    assert {c.block for c in result.changes} == {"model.layers.1"}
    after = packed(model)
    assert {name.split(".")[2] for name in after if not same_bytes(before[name], after[name])} == {"1"}


def test_a_text_whose_other_part_gets_worse_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out windows are of another kind of text: what helps the first does harm there."""
    model, reference = pair()
    before = packed(model)
    real = precal_ext.compensate.Search._loss

    def worse(text: Any, block: Any, weights: Any) -> float | None:
        loss = real(text, block, weights)
        changed = not all(same_bytes(before[n], q.tensors["weight_packed"]) for n, q in weights.items())
        return loss + 1.0 if loss is not None and text is held and changed else loss

    held: Any = None
    build = precal_ext.compensate.Search.__init__

    def built(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal held
        build(self, *arguments, **options)
        held = self._held

    monkeypatch.setattr(precal_ext.compensate.Search, "__init__", built)
    monkeypatch.setattr(precal_ext.compensate.Search, "_loss", staticmethod(worse))
    config = CompensateConfig(samples=24, patience=1)
    result = compensate_model(model, reference, random_windows(30, 48), config)
    assert result.stopped == "model.layers.0"
    assert [b.refused for b in result.blocks] == [True]
    assert result.after == result.before and not result.changes
    assert all(same_bytes(before[name], codes) for name, codes in packed(model).items())


def test_on_a_trained_model_the_loss_falls_on_other_text(source: Source) -> None:
    """Two layers of the embedded model at 3 bits: the first half of a text is searched on, the other only measured."""
    reference, tokenizer = load(source("llama-6m"), torch.float32)
    windows = read_windows(tokenizer, DEMO.parent / "text.txt", 128)
    half = len(windows) // 2
    model = copy.deepcopy(reference)
    quantize_model(model, QuantizeConfig(bits=3))
    other = windows[half:]
    before = evaluate(model, other, reference).kld_nats
    result = compensate_model(model, reference, windows[:half], CompensateConfig(rounds=2))
    after = evaluate(model, other, reference).kld_nats
    assert before is not None and after is not None
    assert after < 0.95 * before
    assert result.after < 0.9 * result.before


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": "pca"}, "space must be one of gradient, svd, random, afm, got 'pca'"),
        ({"criterion": "loss"}, "criterion must be one of kld, perplexity"),
        ({"gains": ()}, "gains must be positive numbers, at least one"),
        ({"gains": (1, -1)}, "gains must be positive numbers"),
        ({"samples": 0}, "samples must be an integer, at least 1, got 0"),
        ({"interval": 0}, "interval must be an integer, at least 1"),
        ({"patience": True}, "patience must be an integer, at least 1"),
        ({"held_out": -1}, "held_out must be an integer, at least 0"),
    ],
)
def test_settings_that_break_their_contract(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="compensate: " + message):
        CompensateConfig(**fields)


def test_windows_are_spread_and_held_out_ones_apart() -> None:
    windows = [[i, i] for i in range(100)]
    searched, held = choose_windows(windows, CompensateConfig(samples=12, held_out=4))
    assert (len(searched), len(held)) == (12, 4)
    both = sorted(w[0] for w in searched + held)
    assert len(set(both)) == 16 and both[0] < 7 and both[-1] > 90
    assert not {w[0] for w in searched} & {w[0] for w in held}
    searched, held = choose_windows(windows[:3], CompensateConfig())
    assert (len(searched), len(held)) == (2, 1)
    assert choose_windows(windows[:2], CompensateConfig(held_out=0)) == (windows[:2], [])
    with pytest.raises(ValueError, match=r"text must have at least 2 windows of 256 tokens, got 1"):
        choose_windows(windows[:1], CompensateConfig())


def test_a_reference_that_is_another_model() -> None:
    model, _ = pair()
    with pytest.raises(ValueError, match=r"original's model.layers.0.mlp.\w+ must be \[.*\], got"):
        compensate_model(model, tiny_model(intermediate_size=64), random_windows(10))
    with pytest.raises(ValueError, match=r"reference must have a linear layer model.layers.1"):
        compensate_model(model, tiny_model(num_hidden_layers=1), random_windows(10))
    with pytest.raises(ValueError, match="reference must be given for criterion kld"):
        Text(model, (), random_windows(3), "kld")


def test_a_block_result_survives_json() -> None:
    change = Change("b", 0, None, 0.5, 1.0, 0.9, None, None, 7)
    result = precal_ext.compensate.BlockResult("b", [change], True)
    import dataclasses
    import json

    assert precal_ext.compensate.BlockResult.from_record(json.loads(json.dumps(dataclasses.asdict(result)))) == result
