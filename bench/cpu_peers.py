"""Other packages' CPU kernels for bench/cpu.py: dense in float32 and bfloat16, and int4 weights.

Each quantizes the distinct rows with its own quantizer, or round-to-nearest where it has none, and repeats them. One
that is not installed is left out with a line that says so. bench/README.md tells how to install them.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib import metadata
from typing import Any

import numpy as np
from cpu_worker import Array, Contender, Ready, bf16_bits, bf16_values

GROUP = 128


class Torch(Contender):
    """Packed weights and bfloat16 or float32 activations of torch: `pack` one copy, `call` the kernel."""

    dtype = "bfloat16"
    bits, group_size = 16.0, 0

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch

    def versions(self) -> str:
        return f"torch {self.torch.__version__}"

    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "c": 0, "trellis": False, "mode": self.mode}

    def quantize(self) -> Any:
        """What `pack` and `values` need of the distinct rows."""
        return self.torch.from_numpy(self.weights.base).to(getattr(self.torch, self.dtype))

    def values(self, base: Any) -> Array:
        return np.asarray(base.float().numpy())

    @abstractmethod
    def pack(self, base: Any, order: Any, M: int) -> Any: ...

    @abstractmethod
    def call(self, x: Any, packed: Any) -> Any: ...

    def packed_bytes(self) -> int:
        return int(self.weights.N * self.weights.K * self.bits / 8)

    def prepare(self, M: int, copies: int, settings: dict[str, Any]) -> Ready:
        torch = self.torch
        base = self.keep("base", self.quantize)
        orders = [torch.from_numpy(self.weights.order(i)) for i in range(copies)]
        packed = [self.keep((i, self.pack_key(M)), lambda i=i: self.pack(base, orders[i], M)) for i in range(copies)]
        x = torch.from_numpy(self.activations(M)).to(getattr(torch, self.dtype))

        def run() -> list[Any]:
            return [self.call(x, p) for p in packed]

        def outputs() -> list[tuple[int, Array]]:
            return [(i, np.asarray(y.float().numpy())) for i, y in enumerate(run())]

        return Ready(run, outputs, copies, self.packed_bytes(), np.asarray(x.float().numpy()), self.values(base))

    def pack_key(self, M: int) -> Any:
        """What a packing depends on beside the copy."""
        return None


class DenseBf16(Torch):
    """oneDNN with a reordered weight, as a frozen or compiled model calls it; plain F.linear is slower."""

    mode = "bf16"

    def pack(self, base: Any, order: Any, M: int) -> Any:
        return self.torch.ops.mkldnn._reorder_linear_weight(base[order], M)

    def call(self, x: Any, packed: Any) -> Any:
        return self.torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def pack_key(self, M: int) -> Any:
        return M


class DenseFp32(DenseBf16):
    mode, dtype, bits = "f32", "float32", 32.0


class AtenInt4(Torch):
    """aten::_weight_int4pack_mm_for_cpu: (code - 8) * scale + zero, bfloat16 scale and zero per group of 128."""

    mode, bits, group_size = "a16", 4 + 32 / GROUP, GROUP

    def quantize(self) -> Any:
        torch = self.torch
        base = torch.from_numpy(self.weights.base)
        groups = base.reshape(len(base), -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        codes = ((groups - zero[..., None].float()) / scale[..., None].float() + 8).round().clamp(0, 15)
        return codes.reshape(base.shape).int(), scale, zero

    def values(self, base: Any) -> Array:
        codes, scale, zero = base
        groups = codes.reshape(len(codes), -1, GROUP)
        values = (groups - 8) * scale[..., None].double() + zero[..., None].double()
        return np.asarray(values.reshape(codes.shape).numpy())

    def pack(self, base: Any, order: Any, M: int) -> Any:
        codes, scale, zero = (t[order] for t in base)
        packed = self.torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, self.torch.stack([scale, zero], -1).transpose(0, 1).contiguous()

    def call(self, x: Any, packed: Any) -> Any:
        return self.torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], GROUP, packed[1])


class BitsAndBytes(Torch):
    """NF4 in the layout that its Linear4bit switches to on a CPU with AVX512_BF16; bfloat16 absmax per 64."""

    mode, bits, group_size = "a16", 4 + 16 / 64, 64

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import bitsandbytes as bnb

        if not bnb.functional.has_avx512bf16():
            raise ImportError("its fast CPU kernel needs AVX512_BF16")
        self.bnb = bnb

    def versions(self) -> str:
        return f"bitsandbytes {metadata.version('bitsandbytes')}"

    def quantize(self) -> Any:
        base = self.torch.from_numpy(self.weights.base).bfloat16()
        return self.bnb.functional.quantize_4bit(base, blocksize=64, quant_type="nf4")

    def values(self, base: Any) -> Array:
        codes, state = base
        bytes_ = codes.reshape(-1)
        nibbles = self.torch.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(-1, 64).long()  # the first one is the high
        absmax = state.absmax.reshape(-1, 1).bfloat16().double()
        return np.asarray((state.code.double()[nibbles] * absmax).reshape(len(self.weights.base), -1).numpy())

    def pack(self, base: Any, order: Any, M: int) -> Any:
        codes, state = base
        functional, rows = self.bnb.functional, len(self.weights.base)
        whole = functional.QuantState(
            absmax=state.absmax.reshape(rows, -1)[order].reshape(-1),
            shape=self.torch.Size((self.weights.N, self.weights.K)),
            code=state.code,
            blocksize=64,
            quant_type="nf4",
            dtype=state.dtype,
        )
        all_codes = codes.reshape(rows, -1)[order].reshape(-1, 1)
        return functional._convert_weight_packed_for_cpu(all_codes, whole)

    def call(self, x: Any, packed: Any) -> Any:
        return self.bnb.matmul_4bit(x, packed[0], quant_state=packed[1])


# ---- graph engines: one graph with a node for every copy -------------------------------------------------------------


def symmetric_int4(base: Array) -> tuple[Array, Array]:
    """Codes 0 to 15 and scales [rows, groups], value = (code - 8) * scale; the extreme weight sits on -8."""
    groups = base.reshape(len(base), -1, GROUP)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = (extreme / -8).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(groups / np.where(scale == 0, 1, scale)) + 8, 0, 15).astype(np.uint8)
    return codes.reshape(base.shape), scale[..., 0]


def symmetric_values(codes: Array, scale: Array) -> Array:
    groups = codes.reshape(len(codes), -1, GROUP).astype(np.float64) - 8
    return np.asarray((groups * scale[..., None].astype(np.float64)).reshape(codes.shape))


class OnnxRuntime(Contender):
    """MatMulNBits, symmetric, blocks of 128, float32 activations and scales."""

    level = 4
    mode = "a8"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import onnx
        import onnxruntime

        self.onnx, self.ort = onnx, onnxruntime

    def versions(self) -> str:
        return f"onnxruntime {self.ort.__version__}"

    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"bits": 4 + 32 / GROUP, "group_size": GROUP, "c": 0, "trellis": False, "mode": self.mode}

    def prepare(self, M: int, copies: int, settings: dict[str, Any]) -> Ready:
        helper, proto = self.onnx.helper, self.onnx.TensorProto
        N, K = self.weights.N, self.weights.K
        codes, scale = self.keep("base", lambda: symmetric_int4(self.weights.base))
        blocks = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(len(codes), K // GROUP, GROUP // 2)
        constants, nodes, results = [], [], []
        for i in range(copies):
            order = self.weights.order(i)
            for name, array in ((f"b{i}", blocks[order]), (f"s{i}", scale[order].reshape(-1))):
                constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
            settings_ = {"K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": self.level}
            inputs = ["x", f"b{i}", f"s{i}"]
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **settings_))
            results.append(helper.make_tensor_value_info(f"y{i}", proto.FLOAT, [M, N]))
        given = helper.make_tensor_value_info("x", proto.FLOAT, [M, K])
        graph = helper.make_graph(nodes, "copies", [given], results, constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        session = self.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        x = self.activations(M)

        def run() -> Any:
            return session.run(None, {"x": x})

        stored = N * K // 2 + N * K // GROUP * 4
        return Ready(run, lambda: list(enumerate(run())), copies, stored, x, symmetric_values(codes, scale))


class OnnxRuntimeLevel0(OnnxRuntime):
    level, mode = 0, "f32"


class OpenVino(Contender):
    """i4 constants with float16 scales per 128, decompressed inside MatMul; dynamic quantization of activations."""

    dynamic = GROUP
    mode = "a8"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import openvino

        self.ov = openvino
        self.core = openvino.Core()

    def versions(self) -> str:
        return f"openvino {metadata.version('openvino')}"

    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"bits": 4 + 16 / GROUP, "group_size": GROUP, "c": 0, "trellis": False, "mode": self.mode}

    def prepare(self, M: int, copies: int, settings: dict[str, Any]) -> Ready:
        from openvino import opset13 as op

        ov, N, K = self.ov, self.weights.N, self.weights.K
        codes, scale = self.keep("base", lambda: symmetric_int4(self.weights.base))
        signed = (codes ^ 8).astype(np.uint8)  # 4-bit two's complement of code - 8
        packed = signed[:, ::2] | signed[:, 1::2] << 4
        x = op.parameter([M, K], ov.Type.f32, name="x")
        outputs, kept = [], []
        for i in range(copies):
            order = self.weights.order(i)
            array = np.ascontiguousarray(packed[order])
            tensor = ov.Tensor(array, ov.Shape([N, K // GROUP, GROUP]), ov.Type.i4)
            kept.append((array, tensor))
            weight = op.convert(op.constant(tensor, shared_memory=True), ov.Type.f16)
            scales = op.constant(scale[order][..., None].astype(np.float16))
            scaled = op.reshape(op.multiply(weight, scales), np.array([N, K]), False)
            outputs.append(op.matmul(x, op.convert(scaled, ov.Type.f32), False, True))
        model = ov.Model(outputs, [x])
        wanted = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self.threads),
            "INFERENCE_PRECISION_HINT": "bf16",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(self.dynamic),
        }
        request = self.core.compile_model(model, "CPU", wanted).create_infer_request()
        values = bf16_values(bf16_bits(self.activations(M)))
        request.set_input_tensor(ov.Tensor(values, shared_memory=True))

        def found() -> list[tuple[int, Array]]:
            request.infer()
            return [(i, np.array(request.get_output_tensor(i).data)) for i in range(copies)]

        stored = N * K // 2 + N * K // GROUP * 2
        ready = Ready(request.infer, found, copies, stored, values, symmetric_values(codes, scale))
        self.made["kept"] = kept
        return ready


class OpenVinoStatic(OpenVino):
    dynamic, mode = 0, "a16"


PEERS: dict[str, type[Contender]] = {
    "torch fp32, oneDNN prepacked": DenseFp32,
    "torch bf16, oneDNN prepacked": DenseBf16,
    "aten int4pack g128": AtenInt4,
    "onnxruntime MatMulNBits g128, level 0": OnnxRuntimeLevel0,
    "onnxruntime MatMulNBits g128, level 4": OnnxRuntime,
    "openvino int4 g128, dynamic quantization off": OpenVinoStatic,
    "openvino int4 g128, dynamic quantization on": OpenVino,
    "bitsandbytes NF4 g64": BitsAndBytes,
}
