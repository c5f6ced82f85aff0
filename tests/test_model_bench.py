"""precal bench: what it runs is the model, its parts add up, what it refuses; the models of bench/models.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import Run, logits, save_tiny
from torch import nn

from precal_ext import CheckpointError, PrecalLinear, QuantizeConfig, cli, load_quantized, quantize_checkpoint
from precal_ext import bench as bench_module
from precal_ext.bench import PHASES, Measured, Process, Speed, bench, lines
from precal_ext.bench_worker import PARTS, Clock, CountOps, Turns, Worker, busy_seconds, describe, parts_of
from precal_ext.linear import set_activations

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

QUICK: dict[str, Any] = {"tokens": 2, "prompt_length": 5, "rounds": 2, "threads": 1}


@pytest.fixture(scope="module")
def with_head(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "tiny-llama-head"
    quantize_checkpoint(tiny, out, QuantizeConfig(lm_head=4))
    return out


@pytest.fixture(scope="module")
def speed(tiny: Path, with_head: Path) -> Speed:
    return bench(with_head, tiny, dtype="float32", **QUICK)


# ---- the result ------------------------------------------------------------------------------------------------------


def test_parts_add_up_to_the_speed(speed: Speed) -> None:
    assert speed.original is not None and speed.ratio is not None
    for m in (speed.quantized, speed.original):
        assert set(m.milliseconds) == set(m.tokens_per_second) == set(PHASES)
        assert m.total("decode") == pytest.approx(1e3 / m.tokens_per_second["decode"])
        assert m.total("prefill") == pytest.approx(5e3 / m.tokens_per_second["prefill"])
        for phase in PHASES:
            assert list(m.milliseconds[phase]) == list(PARTS)
            assert all(0 < ms < m.total(phase) for ms in m.milliseconds[phase].values())
            assert m.outside(phase) == pytest.approx(m.total(phase) - m.milliseconds[phase]["linear"])
            assert m.milliseconds[phase][m.largest(phase)] == max(m.milliseconds[phase].values())
        assert m.peak_bytes >= (m.resident_bytes or 0) > 50e6
    # Paired inside rounds, so not exactly the ratio of the medians; but of two rounds both lie between the extremes.
    assert all(0.01 < ratio < 100 for ratio in speed.ratio.values())


def test_sizes_are_those_of_the_models(speed: Speed, tiny: Path, with_head: Path) -> None:
    for m, model in ((speed.quantized, load_quantized(with_head)), (speed.original, None)):
        model = model or transformers.AutoModelForCausalLM.from_pretrained(tiny)
        assert m is not None
        everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert m.weight_bytes == everything
        head = model.get_output_embeddings()
        assert m.lm_head_bytes == sum(t.nbytes for t in (*head.parameters(), *head.buffers()))
        assert m.lm_head_bits == (4 if isinstance(head, PrecalLinear) else None)
        linears = [x for n, x in model.named_modules() if n.endswith("_proj")]
        assert m.linear_bytes == sum(t.nbytes for x in linears for t in (*x.parameters(), *x.buffers()))
    assert speed.original is not None and speed.quantized.linear_bytes < speed.original.linear_bytes
    assert speed.decode_floor == pytest.approx(
        (speed.quantized.linear_bytes + speed.quantized.lm_head_bytes) / speed.read_gbps / 1e6
    )


def test_the_logits_are_compared(speed: Speed, tiny: Path, with_head: Path) -> None:
    expected, got = (Turns(m, 64, 5).logits() for m in (
        transformers.AutoModelForCausalLM.from_pretrained(tiny).eval(), load_quantized(with_head)
    ))  # fmt: skip
    a, b = torch.tensor(expected), torch.tensor(got)
    assert speed.logits_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
    assert 0 < speed.logits_error < 0.5


def test_as_text_and_as_json(run: Run, speed: Speed, tiny: Path, tiny_quantized: Path) -> None:
    text = "\n".join(lines(speed))
    for word in ("original", "quantized", "ratio", *PARTS, "dominates", "torch ops", "GB/s", "float32", "1 thread,"):
        assert word in text
    options = ["--tokens", 2, "--prompt-length", 4, "--rounds", 1, "--threads", 1, "--activations", "a8"]
    code, out, err = run("bench", tiny_quantized, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["original"] is found["ratio"] is found["logits_error"] is None
    assert found["settings"]["activations"] == "a8" and found["settings"]["prompt_length"] == 4
    assert found["quantized"]["ops_outside"] > 10
    code, out, err = run("bench", tiny_quantized, "--original", tiny, *options)
    assert code == 0, err
    assert "decode: " in out and "ratio" in out


def test_verdict_names_the_largest_part() -> None:
    parts = dict(zip(PARTS, (2.0, 1.0, 5.0, 1.0, 1.0), strict=True))
    m = Measured(
        "m", {"prefill": 1.0, "decode": 100.0}, dict.fromkeys(PHASES, parts), 14, 10**9, 10**7, 10**6, None, 1, None
    )
    speed = Speed(m, None, None, None, 10.0, 0.09, bench_settings())
    text = "\n".join(lines(speed))
    assert "quiet" not in text
    assert "took 25% of the CPU meanwhile" in "\n".join(lines(dataclasses.replace(speed, foreign=0.25)))
    assert "attention dominates with 50%; 80% of a token is outside" in text
    assert "14 torch ops of 500.0 us each" in text
    assert "takes 1.10 ms at the 10.0 GB/s" in text and "11% of its time" in text


def bench_settings() -> dict[str, Any]:
    return {"threads": 2, "dtype": "bfloat16", "activations": "a16", "rounds": 3, "tokens": 4, "prompt_length": 8}


# ---- what it runs ----------------------------------------------------------------------------------------------------


def test_a_turn_writes_what_generate_writes(tiny_quantized: Path) -> None:
    model: Any = load_quantized(tiny_quantized)
    turns = Turns(model, 64, 6)
    with torch.no_grad():
        output = turns.decode(turns.prefill(), 5)
    written = model.generate(turns.prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    # The last logits after a prompt of 6 and 5 tokens are those of the whole at once.
    whole = model(input_ids=written[:, :11]).logits[:, -1]
    torch.testing.assert_close(output.logits[:, -1], whole, rtol=1e-3, atol=1e-4)
    assert output.past_key_values.get_seq_length() == 11


def test_every_module_has_a_part(tiny: Path, with_head: Path) -> None:
    for model in (load_quantized(with_head), transformers.AutoModelForCausalLM.from_pretrained(tiny)):
        found = parts_of(model)
        assert set(found) == set(model.modules())
        count = {part: sum(p == part for p in found.values()) for part in PARTS}
        assert (count["linear"], count["lm_head"], count["attention"], count["norms"]) == (14, 1, 2, 5)
        facts = describe(model)
        assert (facts["linears"], facts["vocabulary"], facts["positions"]) == (14, 64, 64)
    assert facts["quantized"] == 0 and facts["lm_head_bits"] is None


def test_own_time_is_without_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that a module moves on by a known step."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    class Step(nn.Module):
        def __init__(self, before: float, *inside: nn.Module) -> None:
            super().__init__()
            self.before, self.inside = before, nn.ModuleList(inside)

        def forward(self) -> None:
            nonlocal now
            now += self.before
            for module in self.inside:
                module()

    leaf, other = Step(1.0), Step(10.0)
    middle = Step(100.0, leaf, other, leaf)
    top = Step(1000.0, middle, leaf)
    own = lambda: None  # noqa: E731  an instance's own forward must be there again afterwards
    other.__dict__["forward"] = own
    with Clock().on({leaf: "linear", middle: "attention", top: "other"}) as clock:
        top()
        assert "forward" in leaf.__dict__
    assert clock.seconds == {"linear": 3.0, "lm_head": 0.0, "attention": 100.0, "norms": 0.0, "other": 1000.0}
    assert "forward" not in leaf.__dict__ and other.forward is own
    with Clock().on({other: "norms"}) as clock:
        other()
    assert other.forward is own


def test_ops_are_counted() -> None:
    with CountOps() as ops:
        a = torch.ones(3) + 1
        _ = a * a
    assert ops.count == 3
    inside = nn.Sequential(nn.ReLU(), nn.ReLU())
    for apart, expected in (([], 3), ([inside], 1), ([inside[0]], 2), ([inside, inside[1]], 1)):
        with CountOps(apart) as ops:
            inside(a) + 1
        assert ops.count == expected
    assert not inside._forward_hooks and not inside[1]._forward_pre_hooks


def test_models_differ_by_their_linear_layers_alone(speed: Speed) -> None:
    assert speed.original is not None and speed.quantized.ops_outside == speed.original.ops_outside > 10


def test_the_timed_model_answers_the_same(tiny_quantized: Path) -> None:
    model: Any = load_quantized(tiny_quantized)
    before = logits(model)
    split = Turns(model, 64, 4).split(2)
    assert torch.equal(logits(model), before)
    assert all(not m.__dict__.get("forward") for m in model.modules())
    assert all(set(parts) == set(PARTS) and all(math.isfinite(s) for s in parts.values()) for parts in split.values())


def test_a_worker_sets_threads_dtype_and_activations(tiny_quantized: Path) -> None:
    worker, threads = Worker(), torch.get_num_threads()
    try:
        worker.load(str(tiny_quantized), "bfloat16", 2, "a8", 4)
        assert worker.turns is not None and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    modules = list(worker.turns.model.modules())
    assert {m.activations for m in modules if isinstance(m, PrecalLinear)} == {"a8"}
    assert worker.turns.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert worker.answer("memory")["peak_bytes"] > 50e6


def test_activations_are_set_on_every_layer(tiny_quantized: Path) -> None:
    model = load_quantized(tiny_quantized)
    exact = logits(model)
    assert set_activations(model, "a8") == 14
    assert not torch.equal(logits(model), exact) or "avx512" not in bench_isa()
    set_activations(model, "a16")
    assert torch.equal(logits(model), exact)
    with pytest.raises(ValueError, match="set_activations: activations must be one of f32, a16, a8, got 'a4'"):
        set_activations(model, "a4")


def bench_isa() -> str:
    from precal_ext import _C

    return _C.cpu_isa()


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "bench: tokens must be at least 1, got 0"),
        ({"rounds": -1}, "bench: rounds must be at least 1, got -1"),
        ({"activations": "a4"}, "bench: activations must be one of f32, a16, a8, got 'a4'"),
        ({"dtype": "int8"}, "bench: dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        ({"prompt_length": 63}, "must have room for prompt and tokens, 65 in all, got max_position_embeddings 64"),
    ],
)
def test_arguments_are_checked(tiny_quantized: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(tiny_quantized, **{**QUICK, **change})


def test_models_that_do_not_fit_are_refused(tiny: Path, tiny_quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a model quantized by precal"):
        bench(tiny, **QUICK)
    with pytest.raises(CheckpointError, match="must be the model before quantization, got a quantized one"):
        bench(tiny_quantized, tiny_quantized, **QUICK)
    other = save_tiny(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"must be the original of .* got 14 linear layers, .* and 7 linear layers"
    ):
        bench(tiny_quantized, other, **QUICK)
    with pytest.raises(CheckpointError, match=r"nothing: must be a Hugging Face model directory"):
        bench(tiny_quantized, tmp_path / "nothing", **QUICK)


def test_a_process_that_fails_says_why(tiny_quantized: Path, tmp_path: Path) -> None:
    process = Process(tmp_path / "gone", 1)
    try:
        with pytest.raises(CheckpointError, match=r"gone: must be a Hugging Face model directory, got no config.json"):
            process.ask("load", model=str(tmp_path / "gone"), dtype="float32", threads=1, activations="a16",
                        prompt_length=4)  # fmt: skip
        with pytest.raises(CheckpointError, match="gone: AttributeError"):
            process.ask("turn", tokens=1)
        process.process.kill()
        with pytest.raises(CheckpointError, match="its process must answer, got exit status -9; out of memory"):
            process.ask("memory")
    finally:
        process.close()
    assert process.process.returncode == -9


def test_what_other_processes_take_is_seen() -> None:
    if not Path("/proc/stat").is_file():
        pytest.skip("needs /proc/stat")
    before, own = busy_seconds(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert busy_seconds() - before >= 0.15  # ours is among everybody's


def test_native_dtype_is_bfloat16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_module.native_dtype() in ("bfloat16", "float32")

    def refuse(*arguments: object) -> None:
        raise RuntimeError("bf16_dot: this CPU lacks it")

    monkeypatch.setattr(bench_module._C, "measure_limit", refuse)
    assert bench_module.native_dtype() == "float32"


# ---- bench/models.py -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models_script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        spec = importlib.util.spec_from_file_location("bench_models", ROOT / "bench" / "models.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return module


def test_the_synthetic_model_has_a_billion_parameters(models_script: ModuleType) -> None:
    count = sum(math.prod(shape) for shape in models_script.tensors_of(models_script.LLAMA_1B).values())
    assert 1.0e9 < count < 1.2e9 and models_script.LLAMA_1B["vocab_size"] == 32000


@pytest.mark.parametrize("tied", [False, True])
def test_the_synthetic_model_loads(models_script: ModuleType, tmp_path: Path, tied: bool) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {**models_script.LLAMA_1B, **small, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": tied}
    folder = models_script.make_llama(tmp_path / "a", config)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    found = logits(model)
    assert torch.isfinite(found).all() and 0.1 < float(found.float().std()) < 10
    again = models_script.make_llama(tmp_path / "b", config)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.fixture
def from_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


def test_the_heads_settings_are_settings(from_bench: Any) -> None:
    found = {label: QuantizeConfig(**setting) for label, setting in from_bench("head").SETTINGS.items()}
    assert {c.lm_head for c in found.values()} == {None, 8, 4} and {c.bits for c in found.values()} == {4, 3}
    fine = found["4 bits, head 4 bits, g16, c = 2"].for_module("lm_head", head=True)
    assert (fine.bits, fine.group_size, fine.c, fine.trellis) == (4, 16, 2, True)


def test_the_table_has_every_figure(from_bench: Any, speed: Speed) -> None:
    facts = {"date": "2030-01-02", "cpu": "CPU", "isa": "avx512", "torch": "t", "precal": "p", "command": "python x"}
    row = {**facts, "threads": 1, "commit": "c", "transformers": "5", **speed.to_dict()}
    rows = [{**row, "model": "llama-6m", "format": "4 bits"}, {**row, "model": "llama-1b", "format": "4 bits"}]
    rows[1]["ratio"] = {"prefill": 1.0, "decode": 2.49}
    head = {"format": "4 bits, head 8 bits", "head_bits_per_weight": 8.25, "head_bytes": 1081344, "text": "a_eval.txt"}
    heads = [{**head, **facts, "kld_nats": 0.01234, "kld_stderr": 0.0002}]
    section = "\n".join(from_bench("whole_models").models_section(rows, heads))
    assert "CPU, avx512, 1 thread:" in section and "2030-01-02, commit c" in section
    q, o = speed.quantized, speed.original
    assert o is not None and speed.ratio is not None
    rates = q.tokens_per_second["decode"], o.tokens_per_second["decode"]
    assert f"| llama-6m | 4 bits | {rates[0]:.1f} | {rates[1]:.1f} | **{speed.ratio['decode']:.2f}** |" in section
    assert f"| {q.total('decode'):.2f} | {q.outside('decode') / q.total('decode'):.0%} |" in section
    assert f"| {q.ops_outside}, " in section and "| llama-1b | original, float32 |" in section
    assert "Target 2.5 x: missed, 2.49 x." in section and section.count("Target") == 1
    assert "| 4 bits, head 8 bits | 8.25 | 1,081,344 | 0.0123 +/- 0.0002 |" in section
    assert f"dense {rates[0]:.1f} ({q.weight_bytes / 1e6:.1f} MB)" in section
    nothing = "\n".join(from_bench("whole_models").models_section([], []))
    assert "No run of `make bench-models`" in nothing and "|" not in nothing


def test_its_settings_are_options_of_the_commands(models_script: ModuleType) -> None:
    parser = cli._parser()
    for how, run in models_script.SETTINGS.values():
        parser.parse_args(["quantize", "MODEL", "OUT", *how])
        parser.parse_args(["bench", "DIR", *run])
