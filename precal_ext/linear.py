"""PrecalLinear: buffers under the checkpoint's own names, one op call in forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from precal_ext import ops as _ops  # noqa: F401  registers torch.ops.precal
from precal_ext.qtensor import QTensor, WeightSpec

ACTIVATIONS = ("f32", "a16", "a8")

# Without gradients the op's autograd part, which is Python, is passed by: 6 us a call instead of 10. torch's own
# libraries use this guard; it has no public name.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def run_linear(x: Tensor, prepacked: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]) -> Tensor:
    """``ops.linear`` for a layer's forward; ``arguments`` are those after ``bias``."""
    # The op itself, not its wrapper: it is what torch.compile and export keep in the graph.
    op = torch.ops.precal.linear
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(x, prepacked, bias, *arguments)
    with _below_autograd():
        return op(x, prepacked, bias, *arguments)


class PrecalLinear(nn.Module):
    """A linear layer with a quantized weight: y = x @ W'.T + bias.

    Before ``prepack`` the module holds the tensors of a checkpoint under the checkpoint's names, so that any loader can
    fill them. ``prepack`` turns them into the device's tile order, in place of the originals: one copy stays resident.
    ``state_dict`` gives the checkpoint's tensors back, byte for byte, and ``load_state_dict`` prepacks again. None of
    the buffers changes its dtype under ``.half()``, ``.to(dtype)`` and the like: they are a storage format.

    Args:
        spec: shapes and format of the weight.
        bias: whether there is a bias (a Parameter in the model's dtype).
        dtype: of the bias; it, and the activations, may be float32, float16 or bfloat16.
    Attributes:
        activations: how far ``linear`` may round its input inside, "f32", "a16" (default) or "a8" (``ops.linear``).
        conv1d: whether it stands for transformers' ``Conv1D``, whose dense weight is [K, N].
    """

    activations: str = "a16"
    conv1d: bool = False

    def __init__(
        self,
        spec: WeightSpec,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.K, spec.N
        self._register_canonical(device)
        self.register_buffer("prepacked", None, persistent=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(spec.N, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def _register_canonical(self, device: torch.device | str | None) -> None:
        for key, (tensor_dtype, shape) in self.spec.tensors().items():
            self.register_buffer(key, torch.zeros(shape, dtype=tensor_dtype, device=device))

    @classmethod
    def unpacked(cls, q: QTensor, bias: Tensor | None = None) -> PrecalLinear:
        """A module that holds a quantized weight and is still to be prepacked; ``bias`` [N] is kept as it is."""
        module = cls(q.spec, bias=False, device="meta")
        for key, tensor in q.tensors.items():
            module._buffers[key] = tensor
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @classmethod
    def from_qtensor(cls, q: QTensor, bias: Tensor | None = None) -> PrecalLinear:
        """A ready module from a quantized weight."""
        return cls.unpacked(q, bias).prepack()

    prepacked: Tensor | None

    # ---- the two forms ---------------------------------------------------------------------------------------------
    @property
    def is_prepacked(self) -> bool:
        return self.prepacked is not None

    def prepack(self, check: bool = True) -> PrecalLinear:
        """Validate the checkpoint's tensors and replace them by the tile order. Nothing happens the second time.

        Raises:
            ValueError: a tensor is missing or its values break the format (``QTensor.validate``).
        """
        if self.is_prepacked:
            return self
        q = self.qtensor()
        if check:
            q.validate(type(self).__name__)
        self.prepacked = q.prepack()
        for key in self.spec.tensors():
            self._buffers[key] = None
        return self

    def qtensor(self) -> QTensor:
        """The weight in the checkpoint's form; a copy once the module is prepacked."""
        if self.is_prepacked:
            assert self.prepacked is not None
            return QTensor.from_prepacked(self.spec, self.prepacked)
        return QTensor(self.spec, {key: self.get_buffer(key) for key in self.spec.tensors()})

    def dequantize(self) -> Tensor:
        """W' as float32 [N, K]."""
        return self.qtensor().dequantize()

    @property
    def qweight(self) -> Tensor:
        """The tensor with the codes, whichever form they have: PEFT asks it for the weight's device."""
        return self.get_buffer("weight_packed") if self.prepacked is None else self.prepacked

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "PrecalLinear keeps no dense weight; .dequantize() gives a float32 copy, .qtensor() what is stored"
            )
        return super().__getattr__(name)

    # ---- use -------------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        # From the dicts: attributes that only nn.Module.__getattr__ finds cost 0.8 us each.
        prepacked, bias = self._buffers["prepacked"], self._parameters["bias"]
        if prepacked is None:
            raise RuntimeError("PrecalLinear: call .prepack() once after filling the buffers by hand")
        return run_linear(x, prepacked, bias, (*self.spec.op_arguments(), self.activations))

    def extra_repr(self) -> str:
        s = self.spec
        kind = "split" if s.split else "uniform" if s.uniform else "trellis" if s.trellis else "grid"
        return (
            f"in_features={s.K}, out_features={s.N}, bias={self.bias is not None}, bits={s.bits}, "
            f"group_size={s.group_size}, c={s.c}, {kind}, {s.scale_dtype}"
        )

    # ---- torch's plumbing ------------------------------------------------------------------------------------------
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrecalLinear:
        """Moves buffers between devices but never casts them. A change of device type goes through the checkpoint's
        form, because the tile order is the device's own."""
        stored = {key: buffer for key, buffer in self._buffers.items() if buffer is not None}
        again = False
        if self.prepacked is not None:
            target = fn(torch.empty(0, dtype=torch.uint8, device=self.prepacked.device)).device
            if target.type != self.prepacked.device.type:
                again = target.type != "meta"
                stored = dict(self.qtensor().tensors)
        moved = {key: _move(fn, tensor) for key, tensor in stored.items()}
        for key in self._buffers:
            self._buffers[key] = None
        super()._apply(fn, recurse)
        self._buffers.update(moved)
        return self.prepack(check=False) if again else self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_prepacked:
            for key, tensor in self.qtensor().tensors.items():
                destination[prefix + key] = tensor

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Fills fresh buffers and prepacks them; on any error the module keeps the weight it had."""
        before = dict(self._buffers)
        held = self.prepacked if self.prepacked is not None else self._buffers["weight_packed"]
        device = torch.device("cpu") if held is None else held.device
        self.prepacked = None
        self._register_canonical(device)
        missing, _, errors = rest[0], rest[1], rest[2]
        count = len(errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        complete = not any(prefix + key in missing for key in self.spec.tensors())
        if complete and len(errors) == count:
            if self.get_buffer("weight_packed").device.type == "meta":
                return
            try:
                self.prepack()
                return
            except ValueError as error:
                errors.append(f"{prefix.rstrip('.')}: {error}")
        self._buffers.update(before)


def set_activations(model: nn.Module, activations: str) -> int:
    """Set how far every ``PrecalLinear`` of a model may round its input; returns how many there are.

    Args:
        activations: "f32", "a16" or "a8" (``ops.linear``).
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"set_activations: activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    modules = [m for m in model.modules() if isinstance(m, PrecalLinear)]
    for module in modules:
        module.activations = activations
    return len(modules)


def _move(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn`` without its cast. Most casting functions leave integers alone, so floats go as an integer view; what comes
    back with another dtype all the same (``module.type``) is only moved."""
    before = tensor.view(torch.int16) if tensor.is_floating_point() else tensor
    after = fn(before)
    if after.dtype != before.dtype:
        after = before.to(after.device)
    return after.view(tensor.dtype)
