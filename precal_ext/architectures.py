"""The linear modules of well-known decoders by their configs alone, so that transformers need not be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Decoder:
    """An architecture whose layers are ``model.layers.I`` and hold no linears but those named here.

    Args:
        tied: whether the head is the embedding where the config does not say.
        linears: names inside a layer.
        biases: key of the config (empty: always) -> what holds where the config does not say, and the linears that
            have a bias then.
    """

    tied: bool = False
    linears: tuple[str, ...] = _ATTENTION + _MLP
    biases: Mapping[str, tuple[bool, tuple[str, ...]]] = field(default_factory=dict)


_ATTENTION_BIAS = {"attention_bias": (False, _ATTENTION)}
_EITHER_BIAS = {**_ATTENTION_BIAS, "mlp_bias": (False, _MLP)}
_PHI3 = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
_STARCODER2 = (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")

# model_type and architecture, as config.json has them. tests/test_select.py compares each with transformers' model.
_DECODERS = {
    ("llama", "LlamaForCausalLM"): Decoder(biases=_EITHER_BIAS),
    ("mistral", "MistralForCausalLM"): Decoder(),
    ("qwen2", "Qwen2ForCausalLM"): Decoder(biases={"": (True, _ATTENTION[:3])}),
    ("qwen3", "Qwen3ForCausalLM"): Decoder(biases=_ATTENTION_BIAS),
    ("gemma", "GemmaForCausalLM"): Decoder(tied=True, biases=_ATTENTION_BIAS),
    ("gemma2", "Gemma2ForCausalLM"): Decoder(tied=True, biases=_ATTENTION_BIAS),
    ("gemma3_text", "Gemma3ForCausalLM"): Decoder(tied=True, biases=_ATTENTION_BIAS),
    ("phi3", "Phi3ForCausalLM"): Decoder(linears=_PHI3),
    ("olmo", "OlmoForCausalLM"): Decoder(biases=_ATTENTION_BIAS),
    ("olmo2", "Olmo2ForCausalLM"): Decoder(biases=_ATTENTION_BIAS),
    ("smollm3", "SmolLM3ForCausalLM"): Decoder(tied=True, biases=_EITHER_BIAS),
    ("granite", "GraniteForCausalLM"): Decoder(biases=_EITHER_BIAS),
    ("stablelm", "StableLmForCausalLM"): Decoder(biases={"use_qkv_bias": (False, _ATTENTION[:3])}),
    ("starcoder2", "Starcoder2ForCausalLM"): Decoder(
        tied=True, linears=_STARCODER2, biases={"use_bias": (True, _STARCODER2)}
    ),
}


@dataclass(frozen=True)
class KnownLinears:
    """The linear modules of a model, by name: all of them, whether the head is the embedding, those without a bias."""

    names: tuple[str, ...]
    tied: bool
    unbiased: frozenset[str]
    head: str = _HEAD
    embedding: str = _EMBEDDING


def known_linears(model_config: Mapping[str, Any], tensors: int) -> KnownLinears | None:
    """What config.json says of the linear modules, with no other package.

    Args:
        model_config: of config.json.  tensors: how many the checkpoint has.
    Returns:
        None for architectures that are not of the list, for settings whose meaning only transformers knows, and where
        the checkpoint has too few tensors for so many layers.
    """
    architectures, layers = model_config.get("architectures"), model_config.get("num_hidden_layers")
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    decoder = _DECODERS.get((str(model_config.get("model_type")), str(architectures[0])))
    if decoder is None or type(layers) is not int or not 0 < layers <= tensors:
        return None

    tied = model_config.get("tie_word_embeddings", decoder.tied)
    chosen = {key: model_config.get(key, default) for key, (default, _) in decoder.biases.items()}
    if any(type(said) is not bool for said in (tied, *chosen.values())):
        return None
    biased = {leaf for key, said in chosen.items() if said for leaf in decoder.biases[key][1]}
    names = [(f"model.layers.{i}.{leaf}", leaf) for i in range(layers) for leaf in decoder.linears]
    unbiased = frozenset({_HEAD, *(name for name, leaf in names if leaf not in biased)})
    return KnownLinears((*(name for name, _ in names), _HEAD), tied, unbiased)
