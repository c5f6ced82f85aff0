"""Which modules of a model are quantized, why, and which of them servers fuse into one matrix."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precal_ext.architectures import known_linears
from precal_ext.config import MODULE_FIELDS, ModelFormat, QuantizeConfig, same_experts
from precal_ext.headers import impossible_settings
from precal_ext.mixtures import block_of, find_experts, is_expert, pooled

logger = logging.getLogger("precal")

# Left alone unless --include names them: the output head, and the routers of mixtures of experts, whose few weights
# decide which experts run.
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|score|classifier)$|^(head|output)$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)$")
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate|wg)(\.|$)")

# Without transformers: the linear layers of the architectures whose names are known.
_KNOWN_LINEARS = re.compile(
    r"(^|\.)(q_proj|k_proj|v_proj|o_proj|qkv_proj|out_proj|gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3|fc1|fc2"
    r"|dense|dense_h_to_4h|dense_4h_to_h|query_key_value)$"
)
_KNOWN_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Gemma3", "Phi",
        "Phi3", "OPT", "GPTNeoX", "Falcon", "StableLm", "Olmo", "Olmo2", "SmolLM3", "Granite", "Cohere", "Starcoder2",
    )
)  # fmt: skip

# Those whose linear layers are transformers' Conv1D.
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
_CONV1D_ARCHITECTURES = frozenset({"GPT2LMHeadModel", "OpenAIGPTLMHeadModel"})

# Siblings that servers load as one matrix.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

# Linears whose weight the model's own code in transformers reads or rewrites, by model_type.
_REWRITTEN = {"rwkv": re.compile(r"(^|\.)(attention\.output|feed_forward\.value)$")}


class SelectionError(ValueError):
    """No sensible choice of modules; the message says what to name."""


@dataclass(frozen=True)
class Decision:
    """What happens to one linear module.

    Args:
        module: its name.  action: "quantize" or "keep".  reason: why, in a few words.
        fusion_set: name of the set it shares its grid and settings with; its own name when it is alone.
        head: whether it is an output head, whose bits are ``QuantizeConfig.lm_head``'s.
    """

    module: str
    action: str
    reason: str
    fusion_set: str
    head: bool = False

    @property
    def quantized(self) -> bool:
        return self.action == "quantize"

    def settings(self, config: QuantizeConfig) -> QuantizeConfig:
        """The module's own."""
        return config.for_module(self.module, self.head)


def keep_sets_of(decisions: Sequence[Decision], found: Mapping[str, str]) -> list[Decision]:
    """Decisions with the modules of ``found`` kept for the reason given there, and with them their fusion sets, whose
    members must have one format, and the experts beside them, which are one module in memory."""

    def set_of(d: Decision) -> str:
        return block_of(d.module) if is_expert(d.module) else d.fusion_set

    sets = {set_of(d): d.module for d in reversed(decisions) if d.module in found}

    def changed(d: Decision) -> Decision:
        if not d.quantized or set_of(d) not in sets:
            return d
        reason = found.get(d.module, f"fused with {sets[set_of(d)]}, which is kept")
        return dataclasses.replace(d, action="keep", reason=reason)

    return [changed(d) for d in decisions]


def fusion_set_of(module: str) -> str:
    """The name of a module's fusion set: siblings of the table, and all experts of a layer."""
    parent, _, leaf = module.rpartition(".")
    for names in _FUSED:
        if leaf in names:
            leaf = "(" + ",".join(names) + ")"
    name = f"{parent}.{leaf}" if parent else leaf
    return pooled(name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module can become ``PrecalLinear``: an ``nn.Linear``, unless its owner reads the weight itself."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer that holds its weight as [K, N]."""
    host = sys.modules.get("transformers.pytorch_utils")
    return host is not None and isinstance(module, host.Conv1D)


def is_head(module: str) -> bool:
    """Whether a module is called as output heads are."""
    return _HEAD.search(module) is not None


def decide(
    linears: Iterable[str],
    config: QuantizeConfig,
    heads: Collection[str] = (),
    tied: Collection[str] = (),
    model_type: str = "",
    conv1d: Collection[str] = (),
) -> list[Decision]:
    """Choose among the linear modules of a model.

    Args:
        linears: names of all modules that compute x @ W.T.
        heads: those known to be output heads.  tied: those that share their weight with another module.
        model_type: transformers' name of the architecture; some need a linear or two as they are.
        conv1d: those whose weight is held as [K, N].
    Raises:
        SelectionError: ``include`` names a tied module, ``lm_head`` finds no head, or a fusion set would get unequal
            settings.
    """
    rewritten = _REWRITTEN.get(model_type)
    decisions = []
    for name in linears:
        head = name in heads or is_head(name)
        included = _first_match(config.include, name)
        excluded = _first_match(config.exclude, name)
        keep = ""
        if excluded is not None:
            keep = f"excluded by {excluded!r}"
        elif head and config.lm_head is not None:
            pass
        elif name in tied:
            if included is not None:
                raise SelectionError(
                    f"select: {name} must not be included, it shares its weight with the embedding; "
                    "--lm-head BITS gives it one of its own"
                )
            keep = "shares its weight with the embedding"
        elif rewritten is not None and rewritten.search(name):
            keep = f"rescaled in place by the {model_type} model"
        elif included is None and head:
            keep = "output head"
        elif included is None and _ROUTER.search(name):
            keep = "router"
        kind = "Conv1D, stored as the linear layer it is" if name in conv1d else "linear layer"
        reason = keep or (f"included by {included!r}" if included is not None else kind)
        if head and not keep and config.lm_head is not None:
            reason = "output head, apart from the embedding" if name in tied else "output head"
        decisions.append(Decision(name, "keep" if keep else "quantize", reason, fusion_set_of(name), head))
    if config.lm_head is not None and not any(d.head and d.quantized for d in decisions):
        some = ", ".join(d.module for d in decisions if d.head) or "none"
        raise SelectionError(f"select: --lm-head must find an output head that is not excluded, got {some}")
    kept_experts = {d.module: d.reason for d in decisions if is_expert(d.module) and not d.quantized}
    decisions = keep_sets_of(decisions, kept_experts)
    _check_sets(decisions, config)
    return decisions


def _first_match(patterns: Sequence[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)


def _module_fields(config: QuantizeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in MODULE_FIELDS}


def _check_sets(decisions: Sequence[Decision], config: QuantizeConfig) -> None:
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for d in decisions:
        if not d.quantized:
            continue
        fields = _module_fields(d.settings(config))
        first, expected = settings.setdefault(d.fusion_set, (d.module, fields))
        if fields != expected:
            raise SelectionError(
                f"select: {d.module} and {first} must share their settings, servers fuse them into one matrix; "
                f"got {fields} and {expected}. Write the override so that it matches both"
            )


def model_format(
    decisions: Sequence[Decision],
    config: QuantizeConfig,
    absent: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    conv1d: Collection[str] = (),
) -> ModelFormat:
    """What ``config.json`` says of these decisions.

    Args:
        absent: linear modules of the model without a weight of their own in the checkpoint (a tied head); those that
            get one all the same are named only as quantized.
        names: checkpoint name -> name in the model, where they differ.
        conv1d: modules whose dense weight is [K, N].
    """
    names = names or {}
    base = config._with({})
    overrides = {}
    for d in decisions:
        fields = _module_fields(d.settings(config))
        if d.quantized and fields != _module_fields(base):
            overrides[names.get(d.module, d.module)] = {k: v for k, v in fields.items() if v != getattr(base, k)}
    kept = [names.get(d.module, d.module) for d in decisions if not d.quantized]
    kept = [block_of(name) if is_expert(name) else name for name in kept]
    kept += sorted(set(absent) - {d.module for d in decisions if d.quantized})
    turned = tuple(names.get(d.module, d.module) for d in decisions if d.quantized and d.module in conv1d)
    return ModelFormat(base, tuple(dict.fromkeys(kept)), overrides, turned)


# ---- the linear modules of a checkpoint -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearModules:
    """Linear modules found for a checkpoint, by checkpoint name, and how they were found.

    Args:
        names: those whose weight is a matrix of the checkpoint, in its order.
        heads, tied: the output heads, and those that share their weight, among them.
        absent: linears of the model without a weight of their own in the checkpoint, by name in the model.
        model_names: checkpoint name -> name in the model, where they differ.
        source: how they were found: "architecture", "transformers", "name patterns" or "include"; the first two know
            the model.
        shared: output head that is absent -> the tensor of the checkpoint whose weight it uses.
        unbiased: those that have no bias in the model, where the model is known.
        conv1d: those whose weight is [K, N] in the checkpoint.
        missing: those of ``absent`` that must have a weight there, and experts without theirs beside others; by name in
            the model.
    """

    names: tuple[str, ...]
    heads: frozenset[str]
    tied: frozenset[str]
    absent: frozenset[str]
    model_names: Mapping[str, str]
    source: str
    shared: Mapping[str, str] = field(default_factory=dict)
    unbiased: frozenset[str] = frozenset()
    conv1d: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()

    @property
    def complete(self) -> bool:
        """Whether all linear modules of the model are known, rather than those with known names."""
        return self.source in ("architecture", "transformers")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``from_dict`` gives the same back."""
        return {k: sorted(v) if isinstance(v, frozenset) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LinearModules:
        kinds = ("heads", "tied", "absent", "unbiased", "conv1d", "missing")
        sets = {key: frozenset(data.get(key, ())) for key in kinds}
        return cls(**{**data, **sets, "names": tuple(data["names"])})


def find_linears(
    folder: Path, model_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: QuantizeConfig
) -> LinearModules:
    """Linear modules of a model directory whose weight is a matrix of the checkpoint.

    By the config alone for well-known decoders whose checkpoint has all linears under the usual names; else on
    transformers' model, built without memory on the meta device, when it is installed and knows the architecture; else
    by name for the architectures of a list; else by ``include`` alone.

    Raises:
        SelectionError: unknown architecture and no ``include``.
    """
    matrices = {
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2
    }
    for problem in impossible_settings(model_config, len(shapes)):
        raise SelectionError(f"{folder / 'config.json'}: {problem}")
    found = _from_config(model_config, matrices, shapes) or _from_transformers(folder, matrices)
    if found is None:
        architectures = [str(a) for a in model_config.get("architectures") or []]
        names: set[str] = set()
        source = "include"
        conv1d: set[str] = set()
        if any(a in _KNOWN_ARCHITECTURES for a in architectures):
            names = {name for name in matrices if _KNOWN_LINEARS.search(name)}
            source = "name patterns"
        elif any(a in _CONV1D_ARCHITECTURES for a in architectures):
            names = conv1d = {name for name in matrices if _CONV1D.search(name)}
            source = "name patterns"
        elif not config.include:
            some = ", ".join(sorted(matrices)[:4])
            raise SelectionError(
                f"select: the architecture must be known, got {', '.join(architectures) or 'none'}; install precal[hf] "
                f"or name the linear layers with --include REGEX (matrices here: {some}, ...)"
            )
        head = {"lm_head"}
        tied = head if model_config.get("tie_word_embeddings") else set()
        names = names | (head & matrices)
        embeddings = [name + ".weight" for name in sorted(matrices) if _EMBEDDING.search(name)]
        untied = model_config.get("tie_word_embeddings") is False  # some tie by default, and do not say so
        shared = {"lm_head": embeddings[0]} if head - matrices and len(embeddings) == 1 and not untied else {}
        sets = frozenset(head & matrices), frozenset(tied & matrices), frozenset(head - matrices)
        found = LinearModules(tuple(names), *sets, {}, source, shared, conv1d=frozenset(conv1d))
    extra = {name for name in matrices - set(found.names) if _first_match(config.include, name) is not None}
    if found.complete and extra:
        some = ", ".join(sorted(extra)[:3])
        raise SelectionError(
            f"select: --include must match linear layers only, got {list(config.include)}, which matches {some}: "
            "no nn.Linear of this model, so it could not be loaded again"
        )
    order = {name: i for i, name in enumerate(shapes)}
    names_in_order = sorted(set(found.names) | extra, key=lambda n: order[n + ".weight"])
    return dataclasses.replace(found, names=tuple(names_in_order))


def _from_config(
    model_config: Mapping[str, Any], matrices: set[str], shapes: Mapping[str, tuple[int, ...]]
) -> LinearModules | None:
    """What the config says, where the checkpoint agrees; None where somebody else is to be asked."""
    known = known_linears(model_config, len(shapes))
    if known is None:
        return None
    absent = set(known.names) - matrices
    shared = {}
    if absent == {known.head} and known.tied and known.embedding in shapes:
        shared = {known.head: known.embedding}
    elif absent:
        return None  # tensors are missing, or have other names
    heads = frozenset({known.head}) - absent
    tied = heads if known.tied else frozenset()
    names = tuple(name for name in known.names if name in matrices)
    unbiased = known.unbiased - absent
    return LinearModules(names, heads, tied, frozenset(absent), {}, "architecture", shared, unbiased=unbiased)


def _from_transformers(folder: Path, matrices: set[str]) -> LinearModules | None:
    """Asks transformers; None when it is not installed or cannot build the model.

    Where nobody has imported it yet, in a process of its own: its hundred megabytes do not stay with us.
    """
    if "transformers" in sys.modules:
        answer = None if sys.modules["transformers"] is None else _linears_of(folder)
    elif importlib.util.find_spec("transformers") is not None:
        answer = _ask_another_process(folder)
    else:
        answer = None
    if answer is None or "error" in answer:
        if answer is not None:
            logger.warning("transformers cannot build this model (%s); choosing by name", answer["error"])
        return None

    experts = {same_experts(name): name for name in matrices if is_expert(name)}

    def stored_as(name: str) -> str:
        """Checkpoints of a base model lack its prefix; experts may lie in a block of another name."""
        names = name, name.removeprefix(answer["prefix"])
        found = next((v for v in names if v in matrices), names[1])
        return next((experts[v] for v in map(same_experts, names) if v in experts), found) if is_expert(name) else found

    names, heads, tied, absent, unbiased, conv1d = set(), set(), set(), set(), set(), set()
    model_names, shared = {}, {}
    needed, prefixed = set(), any(name.startswith(answer["prefix"]) for name in matrices)
    for name, the_head, tied_to, biased, is_turned in answer["linears"]:
        stored = stored_as(name)
        if stored not in matrices:
            # A base model by itself has no prefix, and no head.
            if tied_to is None and name not in answer["optional"] and not (the_head and not prefixed):
                needed.add(name)
            if not is_expert(name):
                absent.add(name)
            if the_head and tied_to is not None and stored_as(tied_to) in matrices:
                shared[name] = stored_as(tied_to) + ".weight"
            continue
        names.add(stored)
        if stored != name:
            model_names[stored] = name
        if the_head:
            heads.add(stored)
        if tied_to is not None:
            tied.add(stored)
        if not biased:
            unbiased.add(stored)
        if is_turned:
            conv1d.add(stored)
    sets = frozenset(heads), frozenset(tied), frozenset(absent)
    if answer["renamed"]:  # a name that is not there may be another one's: only where others of its kind are there
        kinds = {_kind(model_names.get(name, name)) for name in names}
        needed = {name for name in needed if _kind(name) in kinds}
    known = {"unbiased": frozenset(unbiased), "conv1d": frozenset(conv1d), "missing": frozenset(needed)}
    return LinearModules(tuple(names), *sets, model_names, "transformers", shared, **known)


def _linears_of(folder: Path) -> dict[str, Any]:
    """The linear modules of transformers' model, built without memory: name, whether it is the head, which module it
    shares its weight with, whether it has a bias, whether its weight is [K, N]."""
    import transformers

    try:
        # False and not the default, which asks on the terminal whether to run code of the model's directory.
        hf_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    except Exception as error:  # whatever a model's own code raises: the caller has another way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"error": f"version {transformers.__version__}: {reason}"}
    head = model.get_output_embeddings()
    tied = {k: v.removesuffix(".weight") for k, v in tied_parameters(model).items()}
    linears = [
        (name, m is head, tied.get(f"{name}.weight"), m.bias is not None, is_conv1d(m))
        for name, m in model.named_modules()
        if is_linear(m) or is_conv1d(m)
    ]
    experts = find_experts(model)
    for name, layout in experts.items():
        linears += [(f"{name}.{e}.{leaf}", False, None, False, False) for e, leaf, _, _ in layout.parts()]
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    optional = [name for name, *_ in linears if any(p.search(f"{name}.weight") for p in ignored)]
    return {
        "prefix": model.base_model_prefix + ".",
        "linears": linears,
        "optional": optional,
        "renamed": has_renames(model),
    }


def has_renames(model: Any) -> bool:
    """Whether transformers renames or rebuilds tensors of this architecture when it loads them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # version 4 renames nothing
        return bool(getattr(model, "_checkpoint_conversion_mapping", None))
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _kind(name: str) -> str:
    """A module's name without its numbers."""
    return re.sub(r"\d+", "*", same_experts(name))


def tied_parameters(model: Any) -> dict[str, str]:
    """Name of a parameter that is another's -> the other's."""
    said = getattr(model, "all_tied_weights_keys", None)
    if said is not None:
        return dict(said)
    first: dict[int, str] = {}  # transformers 4 ties at once and lists nothing
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: first[key] for name, key in names.items() if first.setdefault(key, name) != name}


# What the answer may take: a model of 10**5 modules needs a minute and 1 GB.
ANSWER_SECONDS, ANSWER_MEMORY = 600.0, 8 << 30

# The child sees the modules that we see, and nothing else; its answer is the last line, whatever was printed before. No
# config makes it fill the memory.
_CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]),) * 2)
sys.path[:] = sys.argv[1].split("\\n")
from pathlib import Path
from precal_ext.select import print_linears
print_linears(Path(sys.argv[2]))
"""


def print_linears(folder: Path) -> None:
    """The child's part of ``find_linears``."""
    print("\n" + json.dumps(_linears_of(folder)), flush=True)


def _ask_another_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, "\n".join(sys.path), str(folder), str(ANSWER_MEMORY)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer after {ANSWER_SECONDS} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
