"""The weights of a model in memory that can become ``PrecalLinear``: where they are, and how to put others there."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precal_ext.experts import PrecalExperts
from precal_ext.linear import PrecalLinear
from precal_ext.mixtures import Experts, find_experts
from precal_ext.select import is_conv1d, is_linear


@dataclass(frozen=True)
class Site:
    """A linear weight [N, K] of a model.

    Args:
        module: what holds it.  places: every name under which the module is in the model.
        parameter: name of the parameter in the model.  conv1d: it is [K, N].
        part: of experts that are one parameter together, which of them, the name of its linear, its rows.
        experts: their layout.
    """

    module: nn.Module
    places: tuple[str, ...]
    parameter: str
    conv1d: bool = False
    part: tuple[int, str, slice] | None = None
    experts: Experts | None = None

    @property
    def held(self) -> Tensor:
        """The parameter itself."""
        found: Tensor = self.module.get_parameter(self.parameter.rpartition(".")[2])
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        N, K = self.weight().shape
        return int(N), int(K)

    @property
    def bias(self) -> Tensor | None:
        return self.module._parameters.get("bias")

    def weight(self, parameter: Tensor | None = None) -> Tensor:
        """The weight [N, K]: a view of ``parameter``, or of the one that the model holds."""
        w = (self.held if parameter is None else parameter).detach()
        if self.part is not None:
            expert, _, rows = self.part
            w = w[expert][rows]
        return w.t() if self.conv1d else w

    def put(self, model: nn.Module, module: PrecalLinear) -> None:
        """Replace what is there."""
        module.conv1d = self.conv1d
        if self.part is None or self.experts is None:
            put(model, self.places, module)
            return
        there = model.get_submodule(self.places[0])
        if not isinstance(there, PrecalExperts):
            there = PrecalExperts(self.experts, self.module.act_fn)
            put(model, self.places, there)
        there.set(*self.part[:2], module)


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every linear weight that can become ``PrecalLinear``, by the name of its module."""
    experts = find_experts(model)
    found = {}
    for module, places in modules_with_places(model):
        name = places[0]
        if is_linear(module) or is_conv1d(module):
            found[name] = Site(module, places, f"{name}.weight", is_conv1d(module))
        elif name in experts:
            for e, leaf, key, rows in experts[name].parts():
                part = e, leaf, rows
                found[f"{name}.{e}.{leaf}"] = Site(module, places, f"{name}.{key}", False, part, experts[name])
    return found


def modules_with_places(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every module once, with all of its names."""
    places: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), (module, []))[1].append(name)
    return ((module, tuple(names)) for module, names in places.values())


def put(model: nn.Module, places: Iterable[str], module: nn.Module) -> None:
    """Put a module in the place of another."""
    for name in places:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def heads_of(model: nn.Module, sites: Mapping[str, Site]) -> set[str]:
    """The output head, as transformers models name it."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return {name for name, site in sites.items() if site.module is head}


def tied_of(model: nn.Module, sites: Mapping[str, Site]) -> set[str]:
    """Those whose parameter is also one of another module, or will be: before its weights are loaded, a transformers
    model only says so."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    said = set(getattr(model, "all_tied_weights_keys", None) or {}) if _is_empty(model) else set()
    return {name for name, site in sites.items() if owners[id(site.held)] > 1 or site.parameter in said}


def _is_empty(model: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def precal_modules(model: nn.Module) -> Iterator[tuple[str, PrecalLinear]]:
    """The quantized modules of a model, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, PrecalLinear))


def dense_module(quantized: PrecalLinear, dtype: torch.dtype) -> nn.Module:
    """What a quantized module was before, with the weight that it stands for."""
    weight, K, N = quantized.dequantize().to(dtype), quantized.in_features, quantized.out_features
    dense: nn.Module
    if quantized.conv1d:
        with torch.device("meta"):
            dense = sys.modules["transformers.pytorch_utils"].Conv1D(N, K)
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(K, N, quantized.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight)
    if quantized.bias is not None:
        dense.bias = nn.Parameter(quantized.bias.detach().to(dtype))
    return dense
