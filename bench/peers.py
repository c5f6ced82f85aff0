"""Weight formats of other packages, run through the packages themselves: W [N, K] float32 -> (W', bits per weight).

Bits count everything a file would hold: codes, scales and zero points in 16 bits where the package computes them in 32
(what is stored in practice), positions, second-level scales. A package that is not installed leaves its rows out, with
a line that says so. `bench/README.md` tells how to install them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Format = Callable[[Tensor], tuple[Tensor, float]]
LAB = Path(__file__).resolve().parents[2] / "shared" / "lab" / "formats.py"


def peers(bits: int) -> Iterator[tuple[str, str, Format]]:
    """(name, package and version, format) of everything installed that has this width."""
    for module, make in (
        ("bitsandbytes", bitsandbytes_formats),
        ("hqq", hqq_formats),
        ("auto_adpq", auto_adpq_formats),
        ("torchao", torchao_formats),
        ("optimum.quanto", quanto_formats),
        ("sinq", sinq_formats),
        ("auto_round", auto_round_formats),
        ("pywhispercpp", ggml_formats),
    ):
        try:
            if importlib.util.find_spec(module) is None:
                raise ImportError("not installed")
            found = list(make(bits))
        except ImportError as error:
            print(f"peers: {module} is left out: {error}", file=sys.stderr)
            continue
        for name, run in found:
            yield name, version(module), run


def version(module: str) -> str:
    from importlib import metadata

    name = {"optimum.quanto": "optimum-quanto", "auto_round": "auto-round"}.get(module, module)
    shown = {"pywhispercpp": "ggml in pywhispercpp"}.get(name, name)
    return f"{shown} {metadata.version(name)}"


def by_groups(w: Tensor, group_size: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Packages that need whole groups get K padded with zeros."""
    K = w.shape[1]
    padded = torch.nn.functional.pad(w, (0, -K % group_size))
    return run(padded).reshape(w.shape[0], -1)[:, :K].float()


def per_group(w: Tensor, group_size: int, bits: float) -> float:
    """Bits per weight of what is stored once a group; a row that ends in part of a group pays for the whole one."""
    K = w.shape[1]
    return bits * math.ceil(K / group_size) / K


def bitsandbytes_formats(bits: int) -> Iterator[tuple[str, Format]]:
    functional = importlib.import_module("bitsandbytes.functional")
    if bits != 4:
        return

    def nf4(double: bool) -> Format:
        def run(w: Tensor) -> tuple[Tensor, float]:
            def go(v: Tensor) -> Tensor:
                codes, state = functional.quantize_4bit(v, blocksize=64, quant_type="nf4", compress_statistics=double)
                if not double:
                    state.absmax = state.absmax.half().float()  # counted in 16 bits, so used in 16 bits
                restored: Tensor = functional.dequantize_4bit(codes, state)
                return restored

            # double quantization: absmax in 8 bits, one 32-bit scale for 256 of them
            return by_groups(w, 64, go), 4 + per_group(w, 64, 8 + 32 / 256 if double else 16)

        return run

    yield "bitsandbytes NF4 g64", nf4(False)
    yield "bitsandbytes NF4 g64, double quantization", nf4(True)


def hqq_formats(bits: int) -> Iterator[tuple[str, Format]]:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer

    def hqq(group_size: int) -> Format:
        def run(w: Tensor) -> tuple[Tensor, float]:
            def go(v: Tensor) -> Tensor:
                codes, meta = quantizer.quantize(
                    v,
                    nbits=bits,
                    group_size=group_size,
                    axis=1,
                    optimize=True,
                    device="cpu",
                    compute_dtype=torch.float32,
                )
                meta["scale"], meta["zero"] = meta["scale"].half().float(), meta["zero"].half().float()
                restored: Tensor = quantizer.dequantize(codes, meta)
                return restored

            return by_groups(w, group_size, go), bits + per_group(w, group_size, 32)

        return run

    for group_size in (64, 128):
        yield f"hqq g{group_size}", hqq(group_size)


def auto_adpq_formats(bits: int) -> Iterator[tuple[str, Format]]:
    package = importlib.import_module("auto_adpq")

    def adpq(alpha: float) -> Format:
        def run(w: Tensor) -> tuple[Tensor, float]:
            config = package.AutoAdpQConfig(
                group_size=128, n_iters=250, alpha=alpha, q_bit=bits, symmetrical_quantization=True, data_packing=False
            )

            def go(v: Tensor) -> Tensor:
                return torch.as_tensor(package.Auto_AdpQ(config=config).quantize_reconstruct(v.numpy())).float()

            # two 16-bit scales a group and an ideal list of positions: the published count
            return by_groups(w, 128, go), bits + per_group(w, 128, 32) + alpha * math.log2(128)

        return run

    for alpha in (0.02, 0.05, 0.08):
        yield f"auto_adpq alpha = {alpha:.0%}", adpq(alpha)


def torchao_formats(bits: int) -> Iterator[tuple[str, Format]]:
    quantization = importlib.import_module("torchao.quantization")
    granularity = importlib.import_module("torchao.quantization.granularity").PerGroup
    mapping = importlib.import_module("torchao.quantization.quant_primitives").MappingType

    def intx(group_size: int, asymmetric: bool) -> Format:
        def run(w: Tensor) -> tuple[Tensor, float]:
            def go(v: Tensor) -> Tensor:
                linear = torch.nn.Linear(v.shape[1], v.shape[0], bias=False)
                linear.weight.data = v.clone()
                config = quantization.IntxWeightOnlyConfig(
                    weight_dtype=getattr(torch, f"int{bits}"),
                    granularity=granularity(group_size),
                    mapping_type=mapping.ASYMMETRIC if asymmetric else mapping.SYMMETRIC,
                )
                quantization.quantize_(linear, config)
                restored: Tensor = linear.weight.dequantize().detach()
                return restored

            return by_groups(w, group_size, go), bits + per_group(w, group_size, 16 + (bits if asymmetric else 0))

        return run

    for group_size in (32, 64, 128):
        yield f"torchao int{bits} asym g{group_size}", intx(group_size, True)


def quanto_formats(bits: int) -> Iterator[tuple[str, Format]]:
    quanto = importlib.import_module("optimum.quanto")
    if bits != 4:
        return

    def qint4(group_size: int) -> Format:
        def run(w: Tensor) -> tuple[Tensor, float]:
            def go(v: Tensor) -> Tensor:
                scale, shift = quanto.MaxOptimizer()(v, quanto.qint4, 0, group_size)
                scale, shift = scale.half().float(), shift.half().float()
                q = quanto.quantize_weight(v, quanto.qint4, 0, scale, shift, group_size)
                restored: Tensor = q.dequantize()
                return restored

            return by_groups(w, group_size, go), 4 + per_group(w, group_size, 32)

        return run

    for group_size in (64, 128):
        yield f"quanto qint4 g{group_size}", qint4(group_size)


def sinq_formats(bits: int) -> Iterator[tuple[str, Format]]:
    package = importlib.import_module("sinq.sinqlinear")

    def sinq(group_size: int) -> Format:
        def run(w: Tensor) -> tuple[Tensor, float]:
            def go(v: Tensor) -> Tensor:
                linear = torch.nn.Linear(v.shape[1], v.shape[0], bias=False)
                linear.weight.data = v.clone()
                settings: Any = package.sinq_base_quant_config(nbits=bits, group_size=group_size, method="dual")
                q = package.SINQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
                restored: Tensor = q.dequantize().detach()
                return restored

            # its default, "dual": scale and shift a group, a column scale, all in 16 bits
            return by_groups(w, group_size, go), bits + per_group(w, group_size, 32) + 16 / w.shape[0]

        return run

    for group_size in (64, 128):
        yield f"SINQ g{group_size}", sinq(group_size)


def auto_round_formats(bits: int) -> Iterator[tuple[str, Format]]:
    """What its iters = 0 mode picks when there is no activation statistic, i.e. without data."""
    get_quant_func = importlib.import_module("auto_round.data_type.utils").get_quant_func

    def rtn(group_size: int, symmetric: bool, search: bool, neuqi: bool) -> Format:
        quantize, _ = get_quant_func(
            "int", bits, sym=symmetric, disable_opt_rtn=not search, iters=0, enable_neuqi=neuqi
        )

        def run(w: Tensor) -> tuple[Tensor, float]:
            def go(v: Tensor) -> Tensor:
                restored, scale, _ = quantize(v, bits=bits, group_size=group_size, imatrix=None)
                codes = (restored.reshape(scale.shape[0], -1) / scale.float()).round()
                return codes * scale.half().float()  # counted in 16 bits, so used in 16 bits

            return by_groups(w, group_size, go), bits + per_group(w, group_size, 16 + (0 if symmetric else bits))

        return run

    yield "auto-round RTN sym g128", rtn(128, True, False, False)
    yield "auto-round RTN asym g128", rtn(128, False, False, False)
    yield "auto-round optimized RTN sym g128", rtn(128, True, True, False)
    for group_size in (128, 64):
        yield f"auto-round NeUQI asym g{group_size}", rtn(group_size, False, True, True)


# ggml's type numbers (they are in every gguf file, so they do not change), by width.
GGML_TYPES = {
    2: {"Q2_K": 10, "IQ2_S": 22},
    3: {"Q3_K": 11, "IQ3_XXS": 18, "IQ3_S": 21},
    4: {"Q4_0": 2, "Q4_1": 3, "Q4_K": 12, "IQ4_NL": 20, "IQ4_XS": 23, "MXFP4": 39, "NVFP4": 40},
    5: {"Q5_0": 6, "Q5_1": 7, "Q5_K": 13},
    6: {"Q6_K": 14},
    8: {"Q8_0": 8},
}


def ggml_formats(bits: int) -> Iterator[tuple[str, Format]]:
    """ggml's own C functions, without an importance matrix: libggml-base travels in the wheel of pywhispercpp."""
    from importlib import metadata

    found = [f for f in metadata.files("pywhispercpp") or [] if f.name in ("libggml-base.so", "libggml-base.dylib")]
    if not found:
        raise ImportError("this build of pywhispercpp has no libggml-base")
    library = ctypes.CDLL(str(found[0].locate()))
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_row_size.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def ggml(name: str, kind: int) -> Format:
        dequantize = getattr(library, "dequantize_row_" + name.lower().replace("_k", "_K"))
        dequantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        dequantize.restype = None

        def run(w: Tensor) -> tuple[Tensor, float]:
            def go(v: Tensor) -> Tensor:
                v, restored = v.contiguous(), torch.empty(v.shape)
                stored = torch.zeros(v.shape[0] * library.ggml_row_size(kind, v.shape[1]), dtype=torch.uint8)
                written = library.ggml_quantize_chunk(kind, v.data_ptr(), stored.data_ptr(), 0, *v.shape, None)
                if written != stored.numel():
                    raise RuntimeError(f"ggml_quantize_chunk: must write {stored.numel()} bytes, got {written}")
                dequantize(stored.data_ptr(), restored.data_ptr(), v.numel())
                return restored

            # whole super-blocks of 256; the zeros that fill the last one are not counted
            return by_groups(w, 256, go), library.ggml_row_size(kind, 256) * 8 / 256

        return run

    for name, kind in GGML_TYPES.get(bits, {}).items():
        yield f"ggml {name}", ggml(name, kind)


def lab(bits: int) -> Iterator[tuple[str, str, Format]]:
    """Round-to-nearest and the two-level formats of ../shared/lab; nothing where it is absent."""
    if not LAB.is_file():
        print("peers: ../shared is absent, so are the lab's formats", file=sys.stderr)
        return
    spec = importlib.util.spec_from_file_location("precal_lab_formats", LAB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def counted(run: Format, *stored: tuple[int, float]) -> Format:
        """Count (group size, bits a group) as a file holds them."""
        return lambda w: (run(w)[0], bits + sum(per_group(w, size, cost) for size, cost in stored))

    for g in (128, 64, 32):
        yield f"RTN sym g{g}", "lab", counted(module.rtn(bits, g), (g, 16))
        yield f"RTN asym g{g}", "lab", counted(module.rtn(bits, g, "asym"), (g, 16 + bits))
    yield "RTN asym g64, MSE scales", "lab", counted(module.rtn(bits, 64, "asym", True), (64, 16 + bits))
    yield "two-level g32 (k-quant-like)", "lab", counted(module.two_level(bits, 32, 8, 6), (32, 12), (256, 32))
    yield "two-level g16", "lab", counted(module.two_level(bits, 16, 16, 4), (16, 8), (256, 32))
