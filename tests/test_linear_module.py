"""PrecalLinear: what is stored survives all that torch does to modules, one copy is resident, errors do no harm."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import reference
import torch
from models import assert_same_tensors, same_bytes
from shapes import generator, student_t
from test_qtensor import quantize
from torch import Tensor, nn

from precal_ext import PrecalLinear, QTensor, QuantizeConfig, WeightSpec, load_quantized, ops

pytest_plugins = ["package_fixtures"]

CONFIGS = {
    "precal": QuantizeConfig(bits=3, c=2),
    "paper": QuantizeConfig(recipe="paper"),
    "rtn": QuantizeConfig(recipe="rtn"),
}
N, K = 20, 300


def qtensor(recipe: str = "precal") -> QTensor:
    return quantize(student_t(N, K), CONFIGS[recipe])


def make(recipe: str = "precal", dtype: torch.dtype = torch.float32) -> PrecalLinear:
    return PrecalLinear.from_qtensor(qtensor(recipe), torch.randn(N, generator=generator(1)).to(dtype))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, K, generator=generator(2)).to(dtype)


def stored(module: PrecalLinear) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in module.state_dict().items() if key != "bias"}


@pytest.fixture(params=sorted(CONFIGS))
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_the_linear_of_the_dequantized_weight(recipe: str, dtype: torch.dtype) -> None:
    module, x = make(recipe, dtype), inputs(dtype)
    y = module(x)
    expected = reference.linear(x, module.dequantize(), module.bias)
    assert y.dtype == dtype
    assert y.shape == (2, 3, N)
    error = (y.double() - expected).norm() / expected.norm()
    assert error <= (1e-4 if dtype == torch.float32 else 4e-3)


def test_with_and_without_gradients_the_bits_are_the_same(recipe: str) -> None:
    """Without them the call goes below autograd, on a path of its own."""
    module, x = make(recipe), inputs()
    with_gradients = module(x.clone().requires_grad_())
    with torch.no_grad():
        without = module(x)
    with torch.inference_mode():
        inference = module(x)
    assert with_gradients.requires_grad and not without.requires_grad
    assert same_bytes(with_gradients.detach(), without) and same_bytes(without, inference.clone())
    leaf = without.requires_grad_()  # an ordinary tensor that can be trained on
    leaf.sum().backward()
    assert leaf.grad is not None


def test_the_activation_mode_is_the_modules_own(recipe: str) -> None:
    module, x = make(recipe), inputs()
    for mode in ("f32", "a16", "a8"):
        module.activations = mode
        expected = ops.linear(x, module.prepacked, module.bias, *module.spec.op_arguments(), mode)
        for copied in (module, copy.deepcopy(module)):
            with torch.no_grad():
                assert same_bytes(copied(x), expected)
            assert same_bytes(copied(x.clone().requires_grad_()).detach(), expected)
    module.activations = "int8"
    with pytest.raises(RuntimeError, match="linear: activations must be f32, a16 or a8, got int8"), torch.no_grad():
        module(x)


def test_before_prepack_nothing_runs(recipe: str) -> None:
    q = qtensor(recipe)
    module = PrecalLinear(q.spec)
    with pytest.raises(RuntimeError, match=r"PrecalLinear: call .prepack\(\) once"):
        module(inputs())
    for key, tensor in q.tensors.items():
        getattr(module, key).copy_(tensor)
    module.prepack()
    assert torch.equal(module(inputs()), PrecalLinear.from_qtensor(q)(inputs()))


def test_prepack_refuses_what_was_never_filled(recipe: str) -> None:
    module = PrecalLinear(qtensor(recipe).spec)
    with pytest.raises(ValueError, match="the checkpoint is damaged or was not written by precal"):
        module.prepack()
    assert not module.is_prepacked


def test_there_is_no_dense_weight_and_the_error_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"\.dequantize\(\) .*\.qtensor\(\)"):
        _ = make().weight
    assert not hasattr(make(), "weight")


def test_repr_names_the_format(recipe: str) -> None:
    text = repr(make(recipe))
    assert f"in_features={K}, out_features={N}, bias=True" in text
    assert {"precal": "bits=3", "paper": "split", "rtn": "uniform"}[recipe] in text


def test_gradients_reach_the_activations_and_the_bias(recipe: str) -> None:
    module, x = make(recipe), inputs().requires_grad_()
    module.bias.requires_grad_()
    g = torch.randn(2, 3, N, generator=generator(3))
    (module(x) * g).sum().backward()
    expected = g.double() @ module.dequantize().double()
    assert x.grad is not None
    assert (x.grad - expected).norm() <= 1e-5 * expected.norm()
    assert module.bias.grad is not None
    assert torch.allclose(module.bias.grad, g.sum((0, 1)), atol=1e-5)
    assert [name for name, p in module.named_parameters()] == ["bias"]  # adapters train, the weight does not


# ---- one copy --------------------------------------------------------------------------------------------------------


def test_one_copy_is_resident(recipe: str) -> None:
    q = quantize(student_t(256, 2048), CONFIGS[recipe])
    module = PrecalLinear.from_qtensor(q)
    assert {key for key, buffer in module._buffers.items() if buffer is not None} == {"prepacked"}
    resident = sum(buffer.nbytes for buffer in module.buffers())
    # Whole tiles of 16 rows, so only section padding is added: a few cache lines a tile.
    assert q.spec.stored_bits() / 8 <= resident + 128 <= 1.02 * q.spec.stored_bits() / 8
    assert torch.equal(module.dequantize(), q.dequantize())
    assert {key for key, buffer in module._buffers.items() if buffer is not None} == {"prepacked"}


# ---- what torch does to modules --------------------------------------------------------------------------------------


def pickled(module: PrecalLinear) -> PrecalLinear:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_pickled_state(module: PrecalLinear) -> PrecalLinear:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = PrecalLinear(module.spec, bias=True, dtype=module.bias.dtype)
    fresh.load_state_dict(torch.load(file))
    return fresh


def in_autocast(module: PrecalLinear) -> PrecalLinear:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(inputs())
    return module


CHANGES: dict[str, tuple[Callable[[PrecalLinear], PrecalLinear], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to float64": (lambda m: m.to(torch.float64), torch.float64),
    "double": (lambda m: m.double(), torch.float64),
    "there and back": (lambda m: m.half().double().to(torch.bfloat16).float(), torch.float32),
    "to cpu": (lambda m: m.to("cpu"), torch.float32),
    "autocast": (in_autocast, torch.float32),
    "deepcopy": (copy.deepcopy, torch.float32),
    "pickle": (pickled, torch.float32),
    "state dict": (from_pickled_state, torch.float32),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_what_is_stored_survives(recipe: str, name: str) -> None:
    change, dtype = CHANGES[name]
    module = make(recipe)
    before = {key: tensor.clone() for key, tensor in stored(module).items()}
    changed = change(module)
    assert_same_tensors(stored(changed), before)
    assert changed.bias.dtype == dtype
    assert changed.is_prepacked


@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"autocast", "state dict"}))  # these need a module that runs
def test_what_is_stored_survives_before_prepack(recipe: str, name: str) -> None:
    change, dtype = CHANGES[name]
    q = qtensor(recipe)
    module = PrecalLinear(q.spec, bias=True)
    for key, tensor in q.tensors.items():
        getattr(module, key).copy_(tensor)
    changed = change(module)
    assert_same_tensors(stored(changed), dict(q.tensors))
    assert changed.bias.dtype == dtype
    assert not changed.is_prepacked


def test_type_casts_no_buffer_either() -> None:
    """Unlike .to(dtype), .type(dtype) casts integers too."""
    module = make()
    before = stored(module)
    assert_same_tensors(stored(module.type(torch.float16)), before)


def test_half_changes_what_goes_in_and_out_alone(recipe: str) -> None:
    module = make(recipe)
    y = module(inputs())
    halved = module.half()(inputs(torch.float16))
    assert halved.dtype == torch.float16
    assert (halved - y).norm() <= 4e-3 * y.norm()


def test_a_deepcopy_shares_nothing(recipe: str) -> None:
    module = make(recipe)
    twin = copy.deepcopy(module)
    assert twin.prepacked is not None
    assert module.prepacked is not None
    assert twin.prepacked.data_ptr() != module.prepacked.data_ptr()
    assert torch.equal(twin(inputs()), module(inputs()))


def test_inside_a_model_half_and_deepcopy_reach_it() -> None:
    model = nn.Sequential(nn.Linear(K, K), make())
    before = stored(model[1])
    model = copy.deepcopy(model.half())
    assert model[0].weight.dtype == torch.float16
    assert_same_tensors(stored(model[1]), before)


# ---- state dicts -----------------------------------------------------------------------------------------------------


def test_a_state_dict_is_the_checkpoint(recipe: str) -> None:
    q, module = qtensor(recipe), make(recipe)
    assert_same_tensors(stored(module), dict(q.tensors))
    assert sorted(module.state_dict()) == sorted([*q.spec.tensors(), "bias"])
    assert sorted(module.state_dict(prefix="a.b.")) == sorted(f"a.b.{key}" for key in [*q.spec.tensors(), "bias"])


@pytest.mark.parametrize("assign", [False, True])
def test_meta_then_load(recipe: str, assign: bool) -> None:
    state = make(recipe).state_dict()
    device = "meta" if assign else "cpu"
    module = PrecalLinear(qtensor(recipe).spec, bias=True, device=device)
    assert {b.device.type for b in module.buffers()} == {device}
    module.load_state_dict(state, assign=assign)
    assert module.is_prepacked
    assert_same_tensors(stored(module), {k: t for k, t in state.items() if k != "bias"})
    assert torch.equal(module(inputs()), make(recipe)(inputs()))


def test_meta_filled_by_hand_and_prepacked() -> None:
    """What transformers does: buffers are replaced one by one, prepack comes at the end."""
    q = qtensor()
    module = PrecalLinear(q.spec, device="meta")
    for key, tensor in q.tensors.items():
        setattr(module, key, tensor)
    assert torch.equal(module.prepack()(inputs()), PrecalLinear.from_qtensor(q)(inputs()))


def test_to_meta_gives_the_checkpoints_shapes(recipe: str) -> None:
    module = make(recipe).to("meta")
    assert not module.is_prepacked
    expected = WeightSpec.from_config(N, K, CONFIGS[recipe]).tensors()
    assert {k: (t.dtype, tuple(t.shape)) for k, t in module._buffers.items() if t is not None} == expected


def other(recipe: str) -> dict[str, Tensor]:
    """The state of another weight, so that a load that takes place would show."""
    q = quantize(student_t(N, K, 7), CONFIGS[recipe])
    return PrecalLinear.from_qtensor(q, torch.zeros(N)).state_dict()


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.__delitem__(key)


def put(key: str, make_value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key: make_value(state[key])})


BAD_STATES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (drop("weight_scale"), "Missing key.*weight_scale"),
    "all missing": (lambda s: [s.pop(k) for k in list(s) if k != "bias"], "Missing key.*weight_packed"),
    "unexpected": (lambda s: s.update(weight=torch.zeros(N, K)), "Unexpected key.*weight"),
    "wrong shape": (put("weight_scale", lambda t: t[:, :1]), "size mismatch for weight_scale"),
    "damaged": (put("weight_scale", lambda t: t.fill_(0x7F)), "weight_scale: must hold no NaN or infinity"),
    "shape lies": (put("weight_shape", lambda t: t + 1), r"weight_shape: must be \[20, 300\]"),
}


@pytest.mark.parametrize("name", sorted(BAD_STATES))
def test_a_load_that_fails_leaves_the_weight_as_it_was(name: str) -> None:
    change, message = BAD_STATES[name]
    module, state = make("precal"), other("precal")
    weight = {key: tensor.clone() for key, tensor in stored(module).items()}
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        module.load_state_dict(state)
    assert module.is_prepacked
    if name != "unexpected":  # torch loads what it knows before it complains of the rest, here as everywhere
        assert_same_tensors(stored(module), weight)


def test_a_partial_state_without_strict_leaves_the_weight_as_it_was(recipe: str) -> None:
    module, state = make(recipe), other(recipe)
    weight = stored(module)
    del state["weight_row_scale"]
    result = module.load_state_dict(state, strict=False)
    assert result.missing_keys == ["weight_row_scale"]
    assert_same_tensors(stored(module), weight)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_keeps_one_graph(backend: str) -> None:
    q = quantize(student_t(K, K), CONFIGS["precal"])
    model = nn.Sequential(PrecalLinear.from_qtensor(q), nn.GELU(), make())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = inputs().requires_grad_()
    assert same_bytes(compiled(x).detach(), model(x).detach())
    compiled(x).sum().backward()
    assert x.grad is not None


def test_compile_a_whole_model(tiny_quantized) -> None:
    model = load_quantized(tiny_quantized)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(
            compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
        )
