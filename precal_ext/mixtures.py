"""Mixtures of experts: a checkpoint has matrices for each expert, transformers 5 makes one tensor of them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight$")
# What transformers says of experts that compute down(act(gate(x)) * up(x)) with gate over up in one matrix.
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def is_expert(module: str) -> bool:
    """Whether a linear layer is of one of the experts of a mixture."""
    return _EXPERT.search(module) is not None


def block_of(module: str) -> str:
    """The experts that a linear layer belongs to: ``l.0.mlp.experts`` for ``l.0.mlp.experts.3.up_proj``."""
    found = _EXPERT.search(module)
    assert found is not None
    return module[: found.end()].rstrip(".").rpartition(".")[0]


def pooled(fusion_set: str) -> str:
    """The name of a fusion set with one name for all experts."""
    return _EXPERT.sub(r"\1experts.*.", fusion_set)


@dataclass(frozen=True)
class Experts:
    """Experts that are two tensors together, gate_up_proj [E, 2 I, H] and down_proj [E, H, I].

    Args:
        gate, up, down: what the matrices of one expert are called in a checkpoint.
    """

    count: int
    inner: int
    gate: str
    up: str
    down: str

    def parts(self) -> Iterator[tuple[int, str, str, slice]]:
        """Expert, name of a matrix of it, the tensor that it is in, its rows there."""
        for e in range(self.count):
            yield e, self.gate, "gate_up_proj", slice(0, self.inner)
            yield e, self.up, "gate_up_proj", slice(self.inner, None)
            yield e, self.down, "down_proj", slice(None)


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """The fused experts of a transformers model by the name of their module: those that are like Mixtral's, and whose
    checkpoints have a matrix for each."""
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    leaves = _leaves(model) if fused else None
    if leaves is None:
        return {}
    return {name: Experts(m.num_experts, m.down_proj.shape[2], *leaves) for name, m in fused.items()}


def _is_fused(module: Any) -> bool:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if set(parameters) != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
    if len(up) != 3 or len(down) != 3 or tuple(up) != (down[0], 2 * down[2], down[1]):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    arguments = list(inspect.signature(type(module).forward).parameters)
    return (
        all(getattr(module, key, value) == value for key, value in _PLAIN.items())
        and getattr(module, "num_experts", None) == down[0]
        and getattr(gate, "__module__", None) == "transformers.integrations.moe"
        and arguments == ["self", "hidden_states", "top_k_index", "top_k_weights"]
    )


def _leaves(model: nn.Module) -> tuple[str, str, str] | None:
    """What the matrices of an expert are called in checkpoints of a model, by transformers' table of conversions."""
    host = sys.modules.get("transformers.conversion_mapping")
    if host is None:
        return None
    found: dict[str, set[tuple[str, ...]]] = {"gate_up_proj": set(), "down_proj": set()}
    for conversion in host.get_model_conversion_mapping(model, add_legacy=False):
        steps = [(type(op).__name__, getattr(op, "dim", None)) for op in getattr(conversion, "operations", ())]
        sources = getattr(conversion, "_original_source_patterns", conversion.source_patterns)
        targets = getattr(conversion, "_original_target_patterns", conversion.target_patterns)
        names = [_SOURCE.search(source.replace("\\", "")) for source in sources]
        target = targets[0].rpartition("experts.")[2]
        wanted = [("MergeModulelist", 0), ("Concatenate", 1)][: len(sources)]
        if target in found and steps == wanted and all(names):
            found[target].add(tuple(name[1] for name in names if name))
    if len(found["gate_up_proj"]) != 1 or len(found["down_proj"]) != 1:
        return None
    both, one = found["gate_up_proj"].pop(), found["down_proj"].pop()
    return (*both, *one) if (len(both), len(one)) == (2, 1) else None  # type: ignore[return-value]
