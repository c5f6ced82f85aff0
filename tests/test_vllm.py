"""The plug-in inside vLLM's own layers, in this process: every format, every kind of layer, every way to load wrongly.

Needs vLLM (`make test-vllm`); the server and tensor parallelism are in test_vllm_server.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from shapes import generator, student_t
from test_qtensor import quantize
from torch import Tensor, nn

from precal_ext import ModelFormat, PrecalLinear, QTensor, QuantizeConfig
from precal_ext.quantize import fit_set_grid, quantize_weight

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")

from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from precal_ext.integrations.vllm import register

register()
from precal_ext.integrations._vllm import PrecalConfig, PrecalLinearMethod

pytest_plugins = ["vllm_fixtures"]
pytestmark = pytest.mark.usefixtures("current_config")

HIDDEN, HEADS, SHARED, HEAD = 256, 4, 2, 32
QKV = {"q": (HEADS * HEAD, HIDDEN), "k": (SHARED * HEAD, HIDDEN), "v": (SHARED * HEAD, HIDDEN)}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.0.self_attn"


def config_of(settings: QuantizeConfig | None = None, **more: Any) -> PrecalConfig:
    config = PrecalConfig(ModelFormat(settings or QuantizeConfig(), **more))
    config.packed_modules_mapping = PACKED
    return config


def fused(shapes: Mapping[Any, tuple[int, int]], settings: QuantizeConfig) -> dict[Any, QTensor]:
    """Members of a fusion set: one grid."""
    weights = {name: student_t(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    grid = fit_set_grid(list(weights.values()), settings)
    return {name: quantize_weight(w, settings, grid) for name, w in weights.items()}


def fill(layer: nn.Module, q: QTensor, *shard: Any, skip: tuple[str, ...] = (), **changed: Tensor) -> None:
    for key, tensor in {**q.tensors, **changed}.items():
        if key not in skip:
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, tensor, *shard)


def qkv_layer(config: PrecalConfig, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    prefix = f"{ATTENTION}.qkv_proj"
    return layers.QKVParallelLinear(HIDDEN, HEAD, HEADS, SHARED, bias, False, dtype, config, prefix)


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def inputs(dtype: torch.dtype = torch.float32, K: int = HIDDEN) -> Tensor:
    return torch.randn(5, K, generator=generator(9)).to(dtype)


@torch.inference_mode()
def alone(q: QTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return PrecalLinear.from_qtensor(q, bias)(x)


@torch.inference_mode()
def run(layer: Any, x: Tensor) -> Tensor:
    y, _ = layer(x)
    return y


FORMATS = [QuantizeConfig(bits=b) for b in range(2, 9)]
FORMATS += [QuantizeConfig(bits=b, trellis=False) for b in (2, 3, 4, 6)]
FORMATS += [QuantizeConfig(bits=b, grid="uniform", c=c) for b, c in ((3, 0), (4, 2), (8, 0))]
FORMATS += [QuantizeConfig(c=0), QuantizeConfig(c=4, group_size=32), QuantizeConfig(group_size=-1)]
FORMATS += [QuantizeConfig(recipe=r, bits=b) for r in ("rtn", "paper") for b in (3, 4, 8)]


def describe(s: QuantizeConfig) -> str:
    return f"{s.recipe}-{s.bits}-{s.grid}-g{s.group_size}-c{s.c}" + "-trellis" * bool(s.trellis)


# ---- every format in every kind of layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FORMATS, ids=describe)
def test_fused_attention_is_its_parts(settings: QuantizeConfig) -> None:
    layer, parts, x = qkv_layer(config_of(settings)), fused(QKV, settings), inputs()
    for shard, q in parts.items():
        fill(layer, q, shard)
    y = run(finish(layer), x)
    assert torch.equal(y, torch.cat([alone(q, x) for q in parts.values()], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_and_biases_of_every_dtype(dtype: torch.dtype) -> None:
    settings = QuantizeConfig()
    layer, parts, x = qkv_layer(config_of(settings), True, dtype), fused(QKV, settings), inputs(dtype)
    biases = {shard: torch.randn(shape[0], generator=generator(3)).to(dtype) for shard, shape in QKV.items()}
    for shard, q in parts.items():
        fill(layer, q, shard)
        layer.bias.weight_loader(layer.bias, biases[shard], shard)
    y = run(finish(layer), x)
    assert y.dtype == dtype
    assert torch.equal(y, torch.cat([alone(q, x, biases[shard]) for shard, q in parts.items()], dim=-1))


def test_rounding_of_activations_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    data, q, outputs = ModelFormat(QuantizeConfig()).to_dict(), quantize(student_t(64, HIDDEN), QuantizeConfig()), {}
    for activations in ("f32", "a16", "a8"):
        monkeypatch.setenv("PRECAL_ACTIVATIONS", activations)
        config = PrecalConfig.from_config(data)
        layer = layers.ColumnParallelLinear(HIDDEN, 64, False, params_dtype=torch.float32, quant_config=config)
        fill(layer, q)
        module = PrecalLinear.from_qtensor(q)
        module.activations = activations
        outputs[activations] = run(finish(layer), inputs())
        with torch.inference_mode():
            assert torch.equal(outputs[activations], module(inputs()))
    assert not torch.equal(outputs["a8"], outputs["a16"])
    monkeypatch.setenv("PRECAL_ACTIVATIONS", "a4")
    with pytest.raises(ValueError, match="PRECAL_ACTIVATIONS must be one of f32, a16, a8, got 'a4'"):
        PrecalConfig.from_config(data)


def test_gate_and_up_and_weights_fused_on_disk() -> None:
    settings, shapes = QuantizeConfig(bits=3), {0: (320, HIDDEN), 1: (320, HIDDEN)}
    parts, x = fused(shapes, settings), inputs()

    def layer() -> Any:
        sizes, prefix = [320, 320], "model.layers.0.mlp.gate_up_proj"
        kind = layers.MergedColumnParallelLinear
        return kind(HIDDEN, sizes, False, params_dtype=torch.float32, quant_config=config_of(settings), prefix=prefix)

    apart = layer()
    for shard, q in parts.items():
        fill(apart, q, shard)
    whole = layer()
    both = quantize(torch.cat([student_t(*shape, seed=i) for i, shape in enumerate(shapes.values())]), settings)
    fill(whole, both)
    assert torch.equal(run(finish(apart), x), torch.cat([alone(q, x) for q in parts.values()], dim=-1))
    assert torch.equal(run(finish(whole), x), alone(both, x))


@pytest.mark.parametrize("kind", ["ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear"])
@pytest.mark.parametrize("K", [172, 256, 2304])
def test_single_layers(kind: str, K: int) -> None:
    settings = QuantizeConfig()
    q, x = quantize(student_t(64, K), settings), inputs(K=K)
    arguments = {"params_dtype": torch.float32, "quant_config": config_of(settings), "prefix": "model.layers.0.x_proj"}
    layer = getattr(layers, kind)(K, 64, False, **arguments)
    fill(layer, q)
    assert torch.equal(run(finish(layer), x), alone(q, x))


@pytest.mark.parametrize("vocabulary", [512, 500])
def test_output_head_with_a_padded_vocabulary(vocabulary: int) -> None:
    settings = QuantizeConfig(bits=8, group_size=64)
    q, x = quantize(student_t(vocabulary, HIDDEN), settings), inputs()
    head = ParallelLMHead(vocabulary, HIDDEN, False, torch.float32, quant_config=config_of(settings), prefix="lm_head")
    assert isinstance(head.quant_method, PrecalLinearMethod)
    fill(head, q)
    finish(head)
    with torch.inference_mode():
        y = head.quant_method.apply(head, x)
    assert y.shape == (5, 512)
    assert torch.equal(y[:, :vocabulary], alone(q, x)) and not y[:, vocabulary:].any()


def test_what_stays_dense() -> None:
    kept = (f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj", "lm_head")
    config = config_of(modules_to_not_convert=kept)
    assert isinstance(qkv_layer(config).quant_method, layers.UnquantizedLinearMethod)
    head = ParallelLMHead(512, HIDDEN, False, torch.float32, quant_config=config, prefix="lm_head")
    embedding = VocabParallelEmbedding(512, HIDDEN, torch.float32, quant_config=config, prefix="model.embed_tokens")
    for layer in (head, embedding):
        assert not isinstance(layer.quant_method, PrecalLinearMethod) and hasattr(layer, "weight")


def test_only_the_tile_order_stays() -> None:
    settings = QuantizeConfig()
    layer, parts = qkv_layer(config_of(settings)), fused(QKV, settings)
    for shard, q in parts.items():
        fill(layer, q, shard)
    finish(layer)
    assert not [name for name, _ in layer.named_parameters()]
    assert [name for name, _ in layer.named_buffers()] == ["weight_packed"]
    buffer = layer.weight_packed
    finish(layer)  # vLLM may ask again
    assert layer.weight_packed is buffer


def test_compiled_without_a_graph_break() -> None:
    settings = QuantizeConfig()
    layer, parts = qkv_layer(config_of(settings)), fused(QKV, settings)
    for shard, q in parts.items():
        fill(layer, q, shard)
    finish(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5, 7):
        x = torch.randn(tokens, HIDDEN, generator=generator(tokens))
        assert torch.equal(run(compiled, x), run(layer, x))


# ---- traps -----------------------------------------------------------------------------------------------------------


def test_members_with_grids_of_their_own_keep_them() -> None:
    settings = QuantizeConfig(bits=3)
    layer, x = qkv_layer(config_of(settings), True), inputs()
    parts = {shard: quantize(student_t(*shape, seed=i), settings) for i, (shard, shape) in enumerate(QKV.items())}
    assert not torch.equal(parts["q"].tensors["weight_grid"], parts["v"].tensors["weight_grid"])
    biases = {shard: torch.randn(shape[0], generator=generator(3)) for shard, shape in QKV.items()}
    for shard, q in parts.items():
        fill(layer, q, shard)
        layer.bias.weight_loader(layer.bias, biases[shard], shard)
    y = run(finish(layer), x)
    assert torch.equal(y, torch.cat([alone(q, x, biases[shard]) for shard, q in parts.items()], dim=-1))


@pytest.mark.parametrize("fields", [{"bits": 3}, {"c": 0}, {"group_size": 32}])
def test_unequal_settings_in_one_matrix_are_refused(fields: dict[str, Any]) -> None:
    config = config_of(module_overrides={f"{ATTENTION}.v_proj": fields})
    expected = f"{ATTENTION}.v_proj and {ATTENTION}.q_proj must have the same settings"
    with pytest.raises(ValueError, match=re.escape(expected)):
        qkv_layer(config)


def test_a_half_converted_matrix_is_refused() -> None:
    config = config_of(modules_to_not_convert=(f"{ATTENTION}.k_proj",))
    with pytest.raises(ValueError, match=r"k_proj and .*q_proj must have the same settings.*got none \(dense\)"):
        qkv_layer(config)


def test_settings_of_one_module() -> None:
    fields = {"bits": 6, "group_size": 32}
    modules = [f"{ATTENTION}.{name}" for name in PACKED["qkv_proj"]]
    config = config_of(module_overrides={name: fields for name in modules})
    layer = qkv_layer(config)
    assert (layer.quant_method.spec.bits, layer.quant_method.spec.group_size) == (6, 32)
    assert layer.weight_packed.shape == (sum(N for N, _ in QKV.values()), HIDDEN * 6 // 32)


@pytest.mark.parametrize("key", ["weight_packed", "weight_grid", "weight_outlier_value", "weight_shape"])
def test_a_part_without_a_tensor_is_refused(key: str) -> None:
    settings = QuantizeConfig()
    layer, parts = qkv_layer(config_of(settings)), fused(QKV, settings)
    for shard, q in parts.items():
        fill(layer, q, shard, skip=(key,) if shard == "k" else ())
    expected = f"qkv_proj.{key}: must be loaded for all 3 of its parts, got q, v"
    with pytest.raises(ValueError, match=re.escape(expected)):
        finish(layer)


def test_nothing_loaded_is_refused_unless_weights_are_made_up() -> None:
    layer = qkv_layer(config_of())
    with pytest.raises(ValueError, match="must be loaded for all 3 of its parts, got nothing"):
        finish(layer)
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        made_up = qkv_layer(config_of())
    assert run(finish(made_up), inputs()).shape == (5, sum(N for N, _ in QKV.values()))


def test_buffers_start_at_zero() -> None:
    layer = qkv_layer(config_of(QuantizeConfig(c=2)))
    assert len(list(layer.parameters())) == 7
    assert not any(bool(p.any()) for p in layer.parameters())


def test_tensors_of_another_shape_or_dtype_are_refused() -> None:
    settings = QuantizeConfig()
    layer, q = qkv_layer(config_of(settings)), fused(QKV, settings)["k"]
    t = q.tensors
    # vLLM would take the first rows, and convert.
    for key, wrong in (
        ("weight_packed", torch.cat([t["weight_packed"]] * 2)),
        ("weight_packed", t["weight_packed"].long()),
        ("weight_scale", t["weight_scale"].half()),
        ("weight_grid", t["weight_grid"][:, :16].contiguous()),
        ("weight_shape", t["weight_shape"] + 1),
    ):
        with pytest.raises(ValueError, match=rf"qkv_proj \(k\)\.{key}: must be"):
            fill(layer, q, "k", **{key: wrong})


def test_damaged_values_are_refused_by_name() -> None:
    settings = QuantizeConfig()
    layer, parts = qkv_layer(config_of(settings)), fused(QKV, settings)
    bad = torch.full_like(parts["v"].tensors["weight_scale"], 0x7F)
    for shard, q in parts.items():
        fill(layer, q, shard, **({"weight_scale": bad} if shard == "v" else {}))
    with pytest.raises(ValueError, match=re.escape(f"{ATTENTION}.qkv_proj.weight_scale: must hold no NaN")):
        finish(layer)


@pytest.mark.parametrize(
    ("K", "settings", "size", "why", "good"),
    [
        (768, QuantizeConfig(), 2, "a slice of 384 columns cuts a block of 256", "1, 3"),
        (
            768,
            QuantizeConfig(c=0, trellis=False, group_size=128),
            4,
            "a slice of 192 columns cuts a group",
            "1, 2, 3, 6",
        ),
        (
            96,
            QuantizeConfig(bits=3, grid="uniform", c=0, group_size=16),
            2,
            "a slice of 48 codes of 3 bits ends inside an int32 word",
            "1, 3",
        ),
        (11008, QuantizeConfig(group_size=32), 16, "a slice of 688 columns cuts a group", "1, 2, 4, 8"),
    ],
)
def test_a_partition_that_cuts_groups_blocks_or_words_is_refused(
    K: int, settings: QuantizeConfig, size: int, why: str, good: str
) -> None:
    method = PrecalLinearMethod("model.layers.0.mlp.down_proj", settings)
    with pytest.raises(ValueError) as refused:
        method.create_weights(nn.Module(), K // size, [64], K, 64, torch.float32, weight_loader=None)
    message = str(refused.value)
    assert message.startswith("precal: model.layers.0.mlp.down_proj must be cut into whole groups, blocks and words")
    assert f"got --tensor-parallel-size {size}: {why}" in message
    assert message.endswith(f"sizes that cut it so: {good}")


# ---- what vLLM asks the configuration --------------------------------------------------------------------------------


def test_registered_once() -> None:
    assert QUANTIZATION_METHODS.count("precal") == 1
    register()
    assert QUANTIZATION_METHODS.count("precal") == 1
    assert get_quantization_config("precal") is PrecalConfig


def test_the_configuration_of_a_checkpoint() -> None:
    data = ModelFormat(QuantizeConfig(bits=3)).to_dict()
    config = PrecalConfig.from_config(data)
    assert config.get_name() == "precal" and config.format.config.bits == 3
    assert config.get_supported_act_dtypes() == [torch.bfloat16, torch.float16, torch.float32]
    with pytest.raises(ValueError, match="format_version must be 1"):
        PrecalConfig.from_config({**data, "format_version": 99})


def test_names_follow_vllms_model() -> None:
    mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )
    name = "model.language_model.layers.0.mlp.down_proj"
    config = config_of(modules_to_not_convert=("lm_head",), module_overrides={name: {"bits": 6}})
    config.apply_vllm_mapper(mapper)
    assert config.settings_of("language_model.lm_head") is None
    settings = config.settings_of("language_model.model.layers.0.mlp.down_proj")
    assert settings is not None and settings.bits == 6
