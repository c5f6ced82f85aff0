"""Every op through both bindings: registration, the same bytes from ``_C``, and what ``_C`` accepts and refuses."""

from __future__ import annotations

import inspect
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fuzz_arguments
import numpy as np
import pytest
import shapes
import torch
from conftest import ISAS, LINEAR_ISAS, ROOT, forced_isa, forced_threads
from torch import Tensor

from precal_ext import _C, ops

EXAMPLES = shapes.op_examples()


def to_numpy(value: Any) -> Any:
    """bfloat16 becomes its uint16 bits."""
    if not isinstance(value, Tensor):
        return value
    return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


def as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def torch_op(name: str) -> Any:
    return getattr(torch.ops.precal, name)


# ---- registration ----------------------------------------------------------------------------------------------------


def test_every_registered_op_has_an_example_a_wrapper_and_a_binding() -> None:
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "precal::" in name
    }
    assert registered == set(EXAMPLES)
    for name in registered:
        assert callable(getattr(ops, name)) and callable(getattr(_C, name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_opcheck(name: str) -> None:
    """Schema, fake kernel, autograd registration, and tracing with dynamic shapes."""
    torch.library.opcheck(torch_op(name).default, EXAMPLES[name])


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_of_linear_with_gradients(with_bias: bool) -> None:
    x, prepacked, bias, *numbers = EXAMPLES["linear"]
    x = x.clone().requires_grad_()
    bias = bias.clone().requires_grad_() if with_bias else None
    torch.library.opcheck(torch.ops.precal.linear.default, (x, prepacked, bias, *numbers))


@pytest.mark.parametrize("name", EXAMPLES)
def test_wrapper_and_op_take_the_same_arguments(name: str) -> None:
    schema = torch_op(name).default._schema
    wrapper = inspect.signature(getattr(ops, name)).parameters.values()
    for argument, parameter in zip(schema.arguments, wrapper, strict=True):
        assert argument.name == parameter.name
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        assert argument.default_value == default


@pytest.mark.parametrize("name", EXAMPLES)
def test_inputs_are_left_alone(name: str) -> None:
    before = [a.clone() if isinstance(a, Tensor) else a for a in EXAMPLES[name]]
    torch_op(name)(*EXAMPLES[name])
    for a, b in zip(EXAMPLES[name], before, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


def test_the_op_itself_raises_runtime_errors_with_the_same_message() -> None:
    w = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^soft_threshold: w must have dtype float32 or float16 or bfloat16"):
        torch.ops.precal.soft_threshold(w, 0.0)
    with pytest.raises(RuntimeError, match=r"^soft_threshold: lam must be finite and >= 0, got -1"):
        torch.ops.precal.soft_threshold(w.float(), -1.0)


def test_force_isa_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=re.escape(f"force_isa: must be one of {','.join(LINEAR_ISAS)}, got neon")):
        ops.force_isa("neon")
    for name in LINEAR_ISAS:
        with forced_isa(name):
            assert _C.cpu_isa() == name
    assert _C.cpu_isa() == LINEAR_ISAS[0]  # the best comes first


# ---- _C --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", ["numpy", "dlpack"])
def test_c_gives_the_bytes_of_the_op(isa: str, name: str, kind: str) -> None:
    arguments = EXAMPLES[name]
    want = as_tuple(torch_op(name)(*arguments))
    got = as_tuple(getattr(_C, name)(*(to_numpy(a) if kind == "numpy" else a for a in arguments)))
    for a, b in zip(got, map(to_numpy, want), strict=True):
        assert isinstance(a, np.ndarray)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


W300 = shapes.student_t(300, 1000)  # cut into pieces by every op: more elements than the coarsest grain, 19 tiles
W_TRELLIS = shapes.random_weight(0, 300, 1000, 4, 50, c=1, trellis=True)
TRELLIS = torch.tensor([shapes.TRELLIS_4], dtype=torch.int8)
THREADED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "soft_threshold": ("soft_threshold", (W300, 1e-4)),
    "salience_threshold of the tensor": ("salience_threshold", (W300, 0.01)),
    "salience_threshold of groups": ("salience_threshold", (W300, 0.01, "group", 64, "row")),
    "salience_mask": ("salience_mask", (W300, torch.tensor([1e-3], dtype=torch.float64), "tensor", 64, "group")),
    "histogram": ("histogram", (W300, 1000, -0.1, 0.1)),
    "histogram by label": ("histogram", (W300, 50, -0.1, 0.1, None, None, 64, (W300 > 0).byte(), 2)),
    "quantize_groups": ("quantize_groups", (W300, None, 4, 50, 1)),
    "quantize_groups with a trellis": ("quantize_groups", (W300, TRELLIS, 4, 50, 1)),
    "quantize_split": ("quantize_split", (W300, W300.abs() > 0.05, 4, 50)),
    "quantize_salient": ("quantize_salient", (W300, torch.tensor([1e-3], dtype=torch.float64), 4, 50)),
    "pack": ("pack", ((W300 * 100).byte() % 8, 3)),
    "unpack": ("unpack", (W_TRELLIS.packed, 4, 1000)),
    "dequantize": ("dequantize", tuple(W_TRELLIS)),
    "measure": ("measure", shapes.measure_arguments(W_TRELLIS, 512, 256.0)),
    "prepack": ("prepack", tuple(W_TRELLIS)),
    "unprepack": ("unprepack", (ops.prepack(*W_TRELLIS), *W_TRELLIS.numbers)),
    "linear": ("linear", (W300[:70], ops.prepack(*W_TRELLIS), None, *W_TRELLIS.numbers)),
}


@pytest.mark.parametrize("case", THREADED)
def test_threads_of_c_change_no_byte(case: str) -> None:
    name, arguments = THREADED[case]
    results = []
    for count in range(1, 9):
        with forced_threads(count):
            assert _C.get_num_threads() == count
            results.append([a.tobytes() for a in as_tuple(getattr(_C, name)(*map(to_numpy, arguments)))])
    assert all(result == results[0] for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_has_threads_of_its_own() -> None:
    w = to_numpy(W300)
    with forced_threads(3):
        want = _C.soft_threshold(w, 1e-4).tobytes()
        child = os.fork()
        if child == 0:
            os._exit(0 if _C.soft_threshold(w, 1e-4).tobytes() == want else 1)
        end = time.monotonic() + 60
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.01)
        if done == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert done == (child, 0)


def test_calls_from_several_threads_at_once() -> None:
    w = to_numpy(W300)
    with forced_threads(3):
        want = _C.soft_threshold(w, 1e-4).tobytes()
        with ThreadPoolExecutor(4) as callers:
            assert set(callers.map(lambda _: _C.soft_threshold(w, 1e-4).tobytes(), range(200))) == {want}


def test_numpy_arrays_need_no_alignment() -> None:
    w = shapes.student_t(3, 50).numpy()
    buffer = np.zeros(w.nbytes + 1, np.uint8)
    crooked = buffer[1:].view(np.float32).reshape(3, 50)
    crooked[:] = w
    assert not crooked.flags.aligned
    for isa in ISAS:
        with forced_isa(isa):
            for a, b in zip(_C.quantize_groups(crooked, None, 4, 16), _C.quantize_groups(w, None, 4, 16), strict=True):
                assert a.tobytes() == b.tobytes()


def test_a_prepacked_weight_at_an_odd_address() -> None:
    """The kernel reads int32 words out of it: _C copies, torch.ops.precal refuses."""
    weight = shapes.random_weight(0, 17, 300, 3, 50, c=1)
    prepacked, x = ops.prepack(*weight), shapes.gaussian(5, 300)
    crooked = torch.cat([prepacked[:1], prepacked])[1:]
    for isa in ISAS:
        with forced_isa(isa):
            want = ops.linear(x, prepacked, None, *weight.numbers).numpy()
            assert _C.linear(x.numpy(), crooked.numpy(), None, *weight.numbers).tobytes() == want.tobytes()
    with pytest.raises(ValueError, match=r"^linear: prepacked must be aligned to 4 bytes"):
        ops.linear(x, crooked, None, *weight.numbers)


def test_a_torch_tensor_at_an_odd_address_is_refused() -> None:
    w = torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=10)
    with pytest.raises(
        ValueError, match=r"^soft_threshold: w must be aligned to 4 bytes, got an odd address; call .clone\(\)"
    ):
        ops.soft_threshold(w, 0.0)


# ---- both bindings refuse alike --------------------------------------------------------------------------------------


def spoilt(argument: Any) -> dict[str, Any]:
    """What no op takes in the place of an argument."""
    if isinstance(argument, Tensor):
        changed = {str(d)[6:]: argument.to(d) for d in (torch.int16, torch.complex64, torch.float8_e4m3fn)}
        changed["float64 or int32"] = argument.to(torch.int32 if argument.dtype == torch.float64 else torch.float64)
        changed["9 dimensions"] = argument.reshape((1,) * 9 + argument.shape)
        changed["another shape"] = argument.reshape(-1)[1:].clone()
        if argument.dim() > 1 and min(argument.shape) > 1:
            changed["strided"] = argument.transpose(0, 1).contiguous().transpose(0, 1)
        return changed
    if isinstance(argument, str):
        return {"text": "no such word", "escape": "\x1b[2J"}
    if isinstance(argument, int) and not isinstance(argument, bool):
        return {"minus one": -1, "huge": 2**62}
    return {"not a number": math.nan} if isinstance(argument, float) else {}


def refusal(call: Any, arguments: list[Any]) -> tuple[type, str] | None:
    try:
        call(*arguments)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("name", EXAMPLES)
def test_both_bindings_refuse_with_the_same_words(name: str) -> None:
    refused = 0
    for i, argument in enumerate(EXAMPLES[name]):
        for kind, value in spoilt(argument).items():
            if name == "linear" and i == 0 and kind == "strided":
                continue  # torch.ops.precal copies a strided x
            arguments = [*EXAMPLES[name]]
            arguments[i] = value
            of_torch, of_c = refusal(getattr(ops, name), arguments), refusal(getattr(_C, name), arguments)
            assert of_torch == of_c, (i, kind)
            if of_torch is not None:
                assert of_torch[0] in (TypeError, ValueError), (i, kind, of_torch)
                assert of_torch[1].startswith(f"{name}: "), (i, kind)
                refused += 1
    assert refused > len([a for a in EXAMPLES[name] if isinstance(a, Tensor)]) * 4


@pytest.mark.parametrize("name", [name for name, a in EXAMPLES.items() if sum(isinstance(x, Tensor) for x in a) > 1])
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    """A meta tensor sends the call to the fake, whose outputs would be memory as it was left."""
    tensors = [i for i, a in enumerate(EXAMPLES[name]) if isinstance(a, Tensor)]
    for i in tensors:
        arguments = [*EXAMPLES[name]]
        arguments[i] = arguments[i].to("meta")
        with pytest.raises(
            ValueError, match=rf"^{name}: \w+ must be on the device of \w+, (meta|cpu), got (meta|cpu)$"
        ):
            getattr(ops, name)(*arguments)


@pytest.mark.parametrize("name", EXAMPLES)
def test_tensors_that_no_kernel_takes_are_refused(name: str) -> None:
    arguments = [*EXAMPLES[name]]
    arguments[0] = arguments[0].to_sparse()
    with pytest.raises(ValueError, match=rf"^{name}: tensors must be dense and on a device .*, got backend SparseCPU$"):
        getattr(ops, name)(*arguments)


def test_an_output_without_room_is_the_same_error_too() -> None:
    weight = shapes.random_weight(0, 5, 0, 4, 64)
    x, rest = torch.empty(2**40, 0), (ops.prepack(*weight), None, *weight.numbers)
    message = r"^linear: an output of \[1099511627776, 5\] float32 must fit in memory$"
    for call in (ops.linear, _C.linear):
        with pytest.raises(MemoryError, match=message):
            call(x, *rest)


TALL, LONG = np.empty((2**40, 0), np.float32), np.empty((0, 2**40), np.float32)


def test_tensors_without_elements_take_no_time() -> None:
    """However many rows they have: 2**40 turns of an empty loop are half an hour."""
    assert _C.pack(TALL.astype(np.uint8), 4).shape == _C.unpack(TALL.astype(np.int32), 4, 0).shape == TALL.shape
    assert _C.histogram(TALL, 3, 0.0, 1.0)[0].tolist() == [0, 0, 0]
    assert _C.soft_threshold(TALL, 0.0).shape == TALL.shape
    assert _C.salience_threshold(TALL, 0.1, "group", 8).shape == TALL.shape
    assert _C.salience_threshold(TALL, 0.1, "tensor", 8, "row").tolist() == [0.0]
    assert _C.salience_threshold(np.empty((3, 0), np.float32), 0.1, "row").tolist() == [0.0] * 3
    assert _C.salience_mask(TALL, np.zeros(1), "tensor", 8, "row").shape == TALL.shape


def test_read_only_arrays_are_accepted() -> None:
    w = np.ones((2, 3), np.float32)
    w.flags.writeable = False
    assert _C.soft_threshold(w, 0.0).tolist() == w.tolist()


def test_facts_of_the_format() -> None:
    assert (_C.OUTLIER_UNIT, _C.OUTLIER_BLOCK, _C.MAX_LEVEL, _C.MAX_CAPACITY) == (128.0, 256, 127, 16)
    assert _C.build_info()["format_version"] == _C.FORMAT_VERSION == 1
    assert [_C.words_per_row(K, bits) for K, bits in [(0, 4), (1, 3), (8, 4), (9, 4), (11, 3), (300, 8)]] == [
        0,
        1,
        1,
        2,
        2,
        75,
    ]


NONE_FOR_EVERY_TENSOR = """
import sys; sys.path.insert(0, "tests")
import shapes, test_bindings, torch
from precal_ext import _C
for name, arguments in shapes.op_examples().items():
    schema = getattr(torch.ops.precal, name).default._schema
    for i, argument in enumerate(schema.arguments):
        if str(argument.type) == "Tensor":
            print(name, argument.name, flush=True)
            call = [test_bindings.to_numpy(a) for a in arguments]
            call[i] = None
            try:
                getattr(_C, name)(*call)
            except (TypeError, ValueError) as error:
                assert argument.name in str(error), error
            else:
                raise SystemExit("accepted")
"""


def test_a_missing_tensor_is_an_error_and_not_a_crash() -> None:
    """In a process of its own: what reads through a null pointer ends it."""
    done = subprocess.run(
        [sys.executable, "-c", NONE_FOR_EVERY_TENSOR], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"None for {last}: exit status {done.returncode}: {done.stderr[-500:]}"


W = np.ones((4, 10), np.float32)
EMPTY_ROWS = shapes.random_weight(0, 5, 0, 4, 64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: _C.soft_threshold([1.0, 2.0], 0.0),
            TypeError,
            "w must be a numpy array or a DLPack tensor, got list",
        ),
        (
            lambda: _C.soft_threshold(1.0, 0.0),
            TypeError,
            "w must be a numpy array or a DLPack tensor, got float",
        ),
        (
            lambda: _C.soft_threshold(W.astype("f8"), 0.0),
            TypeError,
            "soft_threshold: w must have dtype float32 or float16",
        ),
        (lambda: _C.soft_threshold(W.astype("c8"), 0.0), TypeError, "soft_threshold: w must have dtype bool, uint8"),
        (lambda: _C.soft_threshold(W.astype("i2"), 0.0), TypeError, "soft_threshold: w must have dtype bool, uint8"),
        (lambda: _C.soft_threshold(np.array(["a"]), 0.0), TypeError, "soft_threshold: w must have dtype bool, uint8"),
        (lambda: _C.soft_threshold(np.array([None]), 0.0), TypeError, "soft_threshold: w must have dtype bool, uint8"),
        (lambda: _C.soft_threshold(W.astype(">f4"), 0.0), TypeError, "soft_threshold: w must have"),
        (
            lambda: _C.soft_threshold(torch.ones(3, dtype=torch.complex64), 0.0),
            TypeError,
            "soft_threshold: w must have dtype bool",
        ),
        (lambda: _C.soft_threshold(W.T, 0.0), ValueError, "soft_threshold: w must be contiguous"),
        (lambda: _C.soft_threshold(torch.ones(4, 10).T, 0.0), ValueError, "soft_threshold: w must be contiguous"),
        (lambda: _C.soft_threshold(W.reshape((1,) * 7 + W.shape), 0.0), ValueError, "w must have at most 8 dimensions"),
        (lambda: _C.soft_threshold(W, -1.0), ValueError, "soft_threshold: lam must be finite and >= 0, got -1"),
        (lambda: _C.pack(W.astype("u1"), 9), ValueError, "pack: bits must lie in [2, 8], got 9"),
        (lambda: _C.pack(np.full((1, 9), 8, np.uint8), 3), ValueError, "pack: codes must be below 2^3 = 8"),
        (lambda: _C.force_isa("neon"), ValueError, "force_isa: must be one of"),
        (lambda: _C.set_num_threads(0), ValueError, "set_num_threads: n must lie in [1, 1024], got 0"),
        (lambda: _C.outlier_blocks(-1), ValueError, "outlier_blocks: K must lie in [0, 2^30], got -1"),
        (lambda: _C.soft_threshold(W), TypeError, "incompatible function arguments"),
        (lambda: _C.soft_threshold(None, 0.0), TypeError, "soft_threshold: w must be a numpy array or a DLPack tensor"),
        (
            lambda: _C.soft_threshold(torch.ones(3, requires_grad=True), 0.0),
            TypeError,
            "soft_threshold: w must be a tensor that __dlpack__ hands over, got BufferError: Can't export tensors that",
        ),
        (
            lambda: _C.soft_threshold(fuzz_arguments.NoCapsule(), 0.0),
            TypeError,
            "soft_threshold: w must be a tensor that __dlpack__ hands over, got ValueError: PyCapsule_GetPointer",
        ),
        (
            lambda: _C.soft_threshold(fuzz_arguments.Exported(W, shape=[-4, 10]), 0.0),
            ValueError,
            "soft_threshold: w must have sizes >= 0 of less than 2^60 elements in all",
        ),
        (
            lambda: _C.soft_threshold(fuzz_arguments.Exported(W, shape=[2**40, 2**40]), 0.0),
            ValueError,
            "soft_threshold: w must have sizes >= 0 of less than 2^60 elements in all",
        ),
        (
            lambda: _C.soft_threshold(fuzz_arguments.Exported(W, ndim=-1), 0.0),
            ValueError,
            "soft_threshold: w must have at most 8 dimensions, got -1",
        ),
        (
            lambda: _C.soft_threshold(fuzz_arguments.Exported(W, data=None), 0.0),
            ValueError,
            "soft_threshold: w must have data, got a null pointer",
        ),
        (
            lambda: _C.soft_threshold(np.zeros(3, [("\ud800", "i2")]), 0.0),
            TypeError,
            "soft_threshold: w must have dtype",
        ),
        (
            lambda: _C.linear(TALL, ops.prepack(*EMPTY_ROWS).numpy(), None, *EMPTY_ROWS.numbers),
            MemoryError,
            "linear: an output of [1099511627776, 5] float32 must fit in memory",
        ),
        (
            lambda: _C.salience_mask(W, np.zeros(1), "all\x1b[2J" * 20),
            ValueError,
            "salience_mask: scope must be tensor, row or group, got all?[2Jall?[2Jall?[2Jall?[2Jall?[2Jall?[...",
        ),
        (lambda: _C.pack(LONG.astype("u1"), 4), ValueError, "pack: K must lie in [0, 2^30], got 1099511627776"),
        (lambda: _C.quantize_groups(LONG, None, 4, 8), ValueError, "quantize_groups: K must lie in [0, 2^30]"),
        (lambda: _C.words_per_row(2**62, 4), ValueError, "words_per_row: K must lie in [0, 2^30] and bits in [2, 8]"),
        (
            lambda: _C.prepacked_bytes(1, 1, 4, 64, 0, 0, False, "float32"),
            ValueError,
            "prepacked_bytes: scale_dtype must be e4m3 or float16, got float32",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
