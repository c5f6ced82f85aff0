"""Quantizing a model in memory: its linears are replaced all at once, or as a loader hands their weights over."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from precal_ext.config import ModelFormat, QuantizeConfig
from precal_ext.convert import entry
from precal_ext.linear import PrecalLinear
from precal_ext.model import FORMAT_ATTRIBUTE, attach_format
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.quantize import SAMPLE, fit_set_grid, quantize_weight, sample_rows
from precal_ext.report import Entry, Report
from precal_ext.select import Decision, SelectionError, decide, keep_sets_of, model_format
from precal_ext.sites import (
    dense_module,
    find_sites,
    heads_of,
    modules_with_places,
    precal_modules,
    put,
    tied_of,
)
from precal_ext.weights import first_nonfinite


class Quantizing:
    """A model on its way to being quantized, a fusion set at a time, in any order.

    Args:
        model: nothing of it is changed here.
    Raises:
        SelectionError: nothing to quantize, or quantized already.
    """

    def __init__(self, model: nn.Module, config: QuantizeConfig) -> None:
        if next(precal_modules(model), None) is not None:
            raise SelectionError(
                "quantize_model: the model must not be quantized yet, got one with PrecalLinear modules"
            )
        self.config = config
        self.sites = find_sites(model)
        self.tied = tied_of(model, self.sites)
        model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        self._conv1d = {name for name, site in self.sites.items() if site.conv1d}
        self.decisions = decide(self.sites, config, heads_of(model, self.sites), self.tied, model_type, self._conv1d)
        if config.skip_nonfinite:
            weights = {d.module: self.sites[d.module].weight() for d in self.decisions if d.quantized}
            places = {name: first_nonfinite(w) for name, w in weights.items()}
            reasons = {m: f"holds {weights[m][at].item()} at {list(at)}" for m, at in places.items() if at}
            self.decisions = keep_sets_of(self.decisions, reasons)
        self._sets: dict[str, list[Decision]] = {}
        for d in self.decisions:
            if d.quantized:
                self._sets.setdefault(d.fusion_set, []).append(d)
        if not self._sets:
            raise SelectionError("quantize_model: the model must have linear layers to quantize, got none")
        self._pending: dict[str, list[Decision]] = {}
        for d in self.decisions:
            if d.quantized:
                self._pending.setdefault(self.sites[d.module].parameter, []).append(d)
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._entries: dict[str, Entry] = {}
        self._given: dict[str, tuple[torch.dtype, torch.device]] = {}
        self._bytes: dict[str, int] = {}

    @property
    def pending(self) -> list[str]:
        """Parameters that were not handed over yet."""
        return list(self._pending)

    def take(self, parameter: str, value: Tensor | None = None) -> dict[str, QTensor]:
        """Hand one parameter over, or take it from the model. The last weight of a fusion set gives all of them,
        quantized, by module.

        Raises:
            ValueError, TypeError: it cannot be quantized.
        """
        found: dict[str, QTensor] = {}
        for d in self._pending.pop(parameter):
            found |= self._take(d, self.sites[d.module].weight(value))
        return found

    def _take(self, d: Decision, w: Tensor) -> dict[str, QTensor]:
        self._given[d.module] = w.dtype, w.device
        waiting = self._waiting.setdefault(d.fusion_set, {})
        waiting[d.module] = _checked(d.module, w, d.module in self._conv1d)
        members = self._sets[d.fusion_set]
        if len(waiting) < len(members):
            return {}
        del self._waiting[d.fusion_set]
        share = max(1, SAMPLE // len(members))
        settings = d.settings(self.config)
        grid = fit_set_grid([sample_rows(waiting[m.module], share) for m in members], settings)
        found = {}
        for m in members:
            w = waiting.pop(m.module)
            dtype, device = self._given[m.module]
            q = quantize_weight(w, settings, grid)
            self._entries[m.module] = entry(m, settings, w, q, _name(dtype))
            self._bytes[m.module] = q.spec.stored_bits() // 8
            found[m.module] = QTensor(q.spec, {key: tensor.to(device) for key, tensor in q.tensors.items()})
        return found

    def stored_bits(self, parameter: str) -> int:
        """What a parameter that is pending will take."""
        found = [(self.sites[d.module].shape, d.settings(self.config)) for d in self._pending[parameter]]
        return sum(WeightSpec.from_config(*shape, settings).stored_bits() for shape, settings in found)

    def format(self) -> ModelFormat:
        """What ``config.json`` says of the result."""
        return model_format(self.decisions, self.config, conv1d=self._conv1d)

    def report(self) -> Report:
        """Every linear, what was done, why, with figures."""
        report = Report(self.config, notes=["linear layers found in the model"])
        for d in self.decisions:
            site = self.sites[d.module]
            dtype = self._given[d.module][0] if d.quantized else site.held.dtype
            before = site.shape[0] * site.shape[1] * dtype.itemsize
            # What a tied head takes is the embedding's, which stays.
            report.bytes_before += 0 if d.quantized and d.module in self.tied else before
            report.bytes_after += self._bytes.get(d.module, before)
            kept = Entry(f"{d.module}.weight", "keep", d.reason, site.shape, _name(dtype))
            report.entries.append(self._entries.get(d.module, kept))
        return report


def _checked(module: str, w: Tensor, conv1d: bool) -> Tensor:
    """The weight as the ops take it: contiguous, on the CPU, finite, at most 32 bits wide."""
    w = w.cpu().contiguous()
    w = w.float() if w.dtype == torch.float64 else w
    place = first_nonfinite(w)
    if place is not None:
        where = list(reversed(place) if conv1d else place)
        raise ValueError(f"quantize_model: {module}.weight must be finite, got {w[place].item()} at {where}")
    return w


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quantize_model(model: nn.Module, config: QuantizeConfig | None = None) -> Report:
    """Replace the linear layers of a model by ``PrecalLinear``, in place, all of them or none.

    The choice is that of ``precal quantize``: every ``nn.Linear``, ``Conv1D`` and expert but output heads, tied weights
    and routers, with ``lm_head``, ``include`` and ``exclude`` of the config; fusion sets share settings and grid. The
    result is the same, bit for bit.

    Args:
        model: any module on the CPU; a transformers model can be saved with ``save_pretrained`` afterwards.
    Returns:
        The report: every linear, what was done, why, with figures.
    Raises:
        SelectionError: nothing to quantize, or quantized already.
        ValueError, TypeError: a weight cannot be quantized; the message names its module, the model stays as it was.
    """
    started = time.monotonic()
    work = Quantizing(model, config or QuantizeConfig())
    made: dict[str, PrecalLinear] = {}
    for parameter in work.pending:
        for name, q in work.take(parameter).items():
            made[name] = PrecalLinear.from_qtensor(q, work.sites[name].bias)
    for name, module in made.items():
        work.sites[name].put(model, module)
    attach_format(model, work.format())
    report = work.report()
    report.seconds = time.monotonic() - started
    return report


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Replace every ``PrecalLinear`` of a model by an ``nn.Linear`` with the weight that it stands for.

    Args:
        dtype: of the weights and biases; None: that of the model's other parameters, float32 if there are none.
    Returns:
        How many were replaced.
    """
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    replaced = 0
    for module, places in list(modules_with_places(model)):
        if isinstance(module, PrecalLinear):
            put(model, places, dense_module(module, dtype))
            replaced += 1
    if hasattr(model, FORMAT_ATTRIBUTE):
        delattr(model, FORMAT_ATTRIBUTE)
    return replaced
