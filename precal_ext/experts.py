"""The experts of a mixture, quantized: a ``PrecalLinear`` for each of their matrices, named as in the checkpoint."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from precal_ext.mixtures import Experts


class PrecalExperts(nn.Module):
    """In place of transformers' fused experts: y = sum over the chosen e of p_e * down_e(act(gate_e(x)) * up_e(x)).

    An expert without tokens costs nothing. The children are the experts, "0", "1" and so on; theirs are the linears.

    Args:
        layout: how many, and what their matrices are called.  act_fn: between the matrices.
    """

    def __init__(self, layout: Experts, act_fn: Any) -> None:
        super().__init__()
        _keep_out_of_graphs()
        self.layout = layout
        self.act_fn = act_fn
        for e in range(layout.count):
            self.add_module(str(e), nn.Module())

    def set(self, expert: int, name: str, linear: nn.Module) -> None:
        """Put one of the matrices in its place."""
        self.get_submodule(str(expert)).add_module(name, linear)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, H]; top_k_index, top_k_weights [tokens, k]; an index beyond the experts is nobody."""
        y = torch.zeros_like(hidden_states)
        layout, modules = self.layout, self._modules
        for e in top_k_index.unique().tolist():
            if e >= layout.count:
                continue
            token, k = torch.where(top_k_index == e)
            expert: Any = modules[str(e)]
            x = hidden_states[token]
            gate, up, down = (expert._modules[name] for name in (layout.gate, layout.up, layout.down))
            part = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, k, None]
            y.index_add_(0, token, part.to(y.dtype))
        return y


@functools.cache
def _keep_out_of_graphs() -> None:
    """A graph with all experts in it would read and run all of them. Not a decorator: it would import torch._dynamo, 70
    MB, wherever precal_ext is imported."""
    why = "which experts run depends on the tokens"
    PrecalExperts.forward = torch.compiler.disable(PrecalExperts.forward, reason=why)  # type: ignore[method-assign]
