"""A transformers model that is never whole: its decoder layers are filled from the checkpoint one at a time.

The modules are transformers' own, built without weights. What goes into the first decoder layer, and what else each
layer is called with, is seen by running the model up to its layers once per window of text; then the layers run alone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from precal_ext.checkpoint import CheckpointError, TensorInfo, bytes_of, read_config, read_tensor
from precal_ext.config import same_experts
from precal_ext.experts import PrecalExperts
from precal_ext.headers import check_settings
from precal_ext.mixtures import find_experts, is_expert
from precal_ext.sites import Site, put


class _WithoutWeights(TorchFunctionMode):
    """``torch.empty`` takes no memory: so modules make their weights, and nothing that they compute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _InputsKnownError(Exception):
    """All layers were called: the rest of the model need not run."""


class Skeleton:
    """The modules of a model directory, empty, and where their tensors are in the checkpoint.

    Args:
        index: every tensor of the checkpoint.
        modules: linear modules of the checkpoint that are wanted; those of one decoder layer or another decide which
            list of modules has the layers.
    Raises:
        CheckpointError: transformers cannot build it, or it has no plain stack of decoder layers.
    """

    def __init__(self, folder: Path, index: Mapping[str, TensorInfo], modules: Collection[str]) -> None:
        self.folder = folder
        check_settings(folder, read_config(folder), len(index))
        self.model = _build(folder)
        self._names = _names_of(self.model, index)
        found = {info.name: name for name, info in self._names.items()}
        # By name in the checkpoint.
        self.linears = {m: found[f"{m}.weight"].removesuffix(".weight") for m in modules if f"{m}.weight" in found}
        lists = [name for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList)]
        lists = [name for name in lists if any(_inside(linear, name) for linear in self.linears.values())]
        outer = [name for name in lists if not any(_inside(name, other) for other in lists)]
        if len(outer) != 1:
            got = ", ".join(outer) or "none"
            raise CheckpointError(f"{folder}: must have its decoder layers in one list of modules, got {got}")
        self.stack = outer[0]
        self.layers: list[nn.Module] = list(self.model.get_submodule(self.stack).children())
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @property
    def positions(self) -> int | None:
        """Tokens of the longest text that the model takes, as far as its settings say."""
        text = self.model.config.get_text_config()
        found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        return found if isinstance(found, int) else None

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def layer_of(self, module: str) -> int | None:
        """Which decoder layer a linear module of the checkpoint is in."""
        name = self.linears.get(module, "")
        return int(name[len(self.stack) + 1 :].split(".")[0]) if _inside(name, self.stack) else None

    def linear(self, module: str) -> nn.Module:
        return self.model.get_submodule(self.linears[module])

    def info(self, layer: int) -> list[TensorInfo]:
        """The tensors of a layer."""
        return [info for name, info in self._names.items() if _inside(name, f"{self.stack}.{layer}")]

    def outside(self) -> list[TensorInfo]:
        """The tensors that the model needs before its first layer, and a few more."""
        return [self._names[name] for name in self._wanted_outside() if name in self._names]

    def _wanted_outside(self) -> list[str]:
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        unwanted = {name for name, m in self.model.named_modules() if m is head and m is not embeddings}
        names = [name for name in self.model.state_dict() if not _inside(name, self.stack)]
        return [name for name in names if name.rpartition(".")[0] not in unwanted]

    @contextlib.contextmanager
    def filled(self, names: Sequence[str]) -> Iterator[None]:
        """Weights in float32 where they belong, empty again afterwards."""
        missing = [name for name in names if name not in self._names]
        if missing:
            raise CheckpointError(
                f"{self.folder}: every tensor of the model must be in its files as it is, got none for "
                f"{', '.join(missing[:3])}; calibration does not know how transformers makes it"
            )
        try:
            for name in names:
                info, there = self._names[name], self._held(name)
                if tuple(there.shape) != info.shape:
                    raise CheckpointError(
                        f"{info.file}: {info.name} must have shape {list(there.shape)}, got {list(info.shape)}"
                    )
                value = read_tensor(info)
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise CheckpointError(
                        f"{info.file}: {info.name} must be finite, got NaN or an infinity; the model is damaged, and "
                        "cannot be run on a text"
                    )
                self._set(name, value.float() if there.is_floating_point() else value)
            yield
        finally:
            for name in names:
                self._set(name, torch.empty_like(self._held(name), device="meta"))

    def layer_filled(self, layer: int) -> contextlib.AbstractContextManager[None]:
        return self.filled([name for name in self.model.state_dict() if _inside(name, f"{self.stack}.{layer}")])

    def set_weight(self, module: str, weight: Tensor, conv1d: bool) -> None:
        """Another weight [N, K] for a linear of the layer that is filled."""
        self._set(f"{self.linears[module]}.weight", weight.t().contiguous() if conv1d else weight)

    def _held(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        held: Tensor = getattr(self.model.get_submodule(module), leaf)
        return held

    def _set(self, name: str, value: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(module)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value

    @torch.no_grad()
    def first_inputs(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """What each window is when it enters the first layer, float32 [1, T, D].

        Raises:
            CheckpointError: layers are not called one after another, or with something that depends on the text.
        """
        with self.filled(self._wanted_outside()), self._recording():
            before: list[Any] = []
            for window in windows:
                self._calls.clear()
                hidden: list[Tensor] = []
                self._entered = hidden
                try:
                    self.model(input_ids=torch.tensor([list(window)]), use_cache=False)
                except _InputsKnownError:
                    pass
                except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                    if isinstance(error, CheckpointError):
                        raise
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise self._refused(f"a model that cannot be run up to its layers: {reason}") from error
                if len(self._calls) != len(self.layers):
                    raise self._refused(f"{len(self._calls)} calls of {len(self.layers)} layers")
                if before and not _same(before, self._calls):
                    raise self._refused("layers whose other arguments depend on the text")
                before = list(self._calls) if len(before) == 0 else before
                yield hidden[0].float()
            self._calls[:] = before

    def _refused(self, got: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: calibration must find decoder layers that follow one another and nothing else, got {got}"
        )

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        def record(number: int) -> Callable[..., Any]:
            def forward(hidden: Any = None, *args: Any, **kwargs: Any) -> Any:
                # What the layer before returned is a tuple to some models, and passed on whole by the others.
                hidden = kwargs.pop("hidden_states", hidden)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                if number != len(self._calls) or not isinstance(hidden, Tensor):
                    raise self._refused(f"layer {number} called as number {len(self._calls)}")
                if number and not torch.equal(hidden, self._entered[0]):
                    raise self._refused(f"something between layers {number - 1} and {number}")
                if not number:
                    self._entered.append(hidden)
                self._calls.append((args, kwargs))
                if len(self._calls) == len(self.layers):
                    raise _InputsKnownError
                return (hidden,)

            return forward

        for number, layer in enumerate(self.layers):
            layer.forward = record(number)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """One layer, which is filled, on one window."""
        args, kwargs = self._calls[layer]
        with torch.no_grad():
            output = self.layers[layer](hidden, *args, **kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    @contextlib.contextmanager
    def watching(self, modules: Sequence[str]) -> Iterator[Callable[[], dict[str, list[Tensor]]]]:
        """The inputs of some linears; what it gives returns those of this thread's last calls, and forgets them."""
        local = threading.local()

        def watch(module: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                local.__dict__.setdefault("seen", {}).setdefault(module, []).append((x, x._version))

            return hook

        def taken() -> dict[str, list[Tensor]]:
            seen = local.__dict__.pop("seen", {})
            changed = [module for module, inputs in seen.items() if any(x._version != then for x, then in inputs)]
            if changed:
                raise self._refused(f"a layer that changes the input of {changed[0]} in place")
            return {module: [x for x, _ in inputs] for module, inputs in seen.items()}

        handles = [self.linear(module).register_forward_pre_hook(watch(module), with_kwargs=True) for module in modules]
        try:
            yield taken
        finally:
            for handle in handles:
                handle.remove()


def _build(folder: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f"{folder}: calibration needs transformers; pip install 'precal[hf]'") from None
    try:
        # False and not the default, which asks on the terminal whether to run code of the model's directory.
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with _WithoutWeights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # whatever a model's own code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: must be a model that transformers can build, got: {reason}") from None
    for name, layout in find_experts(model).items():
        fused = model.get_submodule(name)
        apart = PrecalExperts(layout, fused.act_fn)
        for e, leaf, key, rows in layout.parts():
            N, K = Site(fused, (name,), f"{name}.{key}", False, (e, leaf, rows), layout).shape
            apart.set(e, leaf, nn.Linear(K, N, bias=False, device="meta"))
        put(model, (name,), apart)
    return model.eval()


def _names_of(model: Any, index: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Name of a tensor in the model -> the tensor of the checkpoint."""
    known = {same_experts(name) if is_expert(name) else name: name for name in model.state_dict()}
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = {}
    renamed = _renaming(model)
    for name, info in index.items():
        new = renamed(name)
        for candidate in (new, f"{prefix}.{new}", new.removeprefix(prefix + "."), name):
            key = same_experts(candidate) if is_expert(candidate) else candidate
            if key in known:
                found[known[key]] = info
                break
    return found


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers 5 renames tensors to while it loads them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return lambda name: str(rename_source_key(name, renamings, [])[0])


def _inside(name: str, module: str) -> bool:
    return name.startswith(module + ".")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or bool(a == b)


class HiddenStates:
    """Windows on their way through the layers, float32 [count, T, D], in a file that has no name."""

    def __init__(self, folder: Path, length: int, width: int) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by close()
        self._shape = (1, length, width)

    def read(self, window: int) -> Tensor:
        found = torch.empty(self._shape)
        buffer, at = bytes_of(found), window * found.nbytes
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], at)
            if count == 0:
                raise OSError(5, "the file ended early", "hidden states")
            buffer, at = buffer[count:], at + count
        return found

    def write(self, window: int, hidden: Tensor) -> None:
        data, at = bytes_of(hidden.contiguous()), window * hidden.nbytes
        while data:
            count = os.pwrite(self._file.fileno(), data, at)
            data, at = data[count:], at + count

    def close(self) -> None:
        self._file.close()
