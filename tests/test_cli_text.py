"""precal eval, generate and demo: figures against plain torch, refusals, what is printed."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DEMO, Run, altered, edit_config

from precal_ext import CheckpointError, QuantizeConfig, cli, load_quantized, quantize_checkpoint

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

SENTENCES = [
    "The old man looked at the sea, and the sea looked back at him.",
    "Once upon a time there was a little girl who loved to play in the rain.",
    "It was the best of times.",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(SENTENCES * 3))
    return path


@pytest.fixture(scope="module")
def talking_quantized(talking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("talking-quantized") / "talking-3bit"
    quantize_checkpoint(talking, out, QuantizeConfig(bits=3))
    return out


def figures(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run("eval", *arguments, "--json")
    assert code == 0, err

    def no_constant(text: str) -> None:
        pytest.fail(f"{text} is not JSON")

    return json.loads(out, parse_constant=no_constant)


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_perplexity_and_divergence_in_plain_torch(run: Run, talking: Path, talking_quantized: Path, text: Path) -> None:
    """Windows of 16 tokens, each predicted from its own start; the last one is short and so padded."""
    found = figures(run, talking_quantized, "--text", text, "--reference", talking, "--window", 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(talking)
    model, reference = load_quantized(talking_quantized), transformers.AutoModelForCausalLM.from_pretrained(talking)
    ids = tokenizer(text.read_text())["input_ids"]
    nll = kld = 0.0
    agreed = tokens = 0
    for first in range(0, len(ids), 16):
        window = torch.tensor([ids[first : first + 16]])
        if window.shape[1] < 2:
            continue
        with torch.no_grad():
            q = model(window).logits[0, :-1].double().log_softmax(-1)
            p = reference(window).logits[0, :-1].double().log_softmax(-1)
        target = window[0, 1:]
        nll -= q[range(len(target)), target].sum().item()
        kld += (p.exp() * (p - q)).sum().item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(target)
    assert found["tokens"] == tokens
    assert found["nll_nats"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found["kld_nats"] == pytest.approx(kld / tokens, rel=1e-2)
    assert found["top1"] == pytest.approx(agreed / tokens)
    assert found["kld_nats"] > 0


def test_a_model_is_not_far_from_itself(run: Run, talking_quantized: Path, text: Path) -> None:
    options = ("--text", text, "--reference", talking_quantized, "--window", 32)
    found = figures(run, talking_quantized, *options)
    assert (found["kld_nats"], found["top1"]) == (0, 1)
    code, out, err = run("eval", talking_quantized, *options)
    assert code == 0
    assert re.search(r"perplexity [\d.]+ +\(NLL [\d.]+ \+/- [\d.]+ nats, \d+ tokens\)", out)
    assert re.search(r"KLD +0\.00000 ", out)
    assert "100.00% agreement" in out
    assert "Traceback" not in err


def test_without_a_reference_there_is_no_divergence(run: Run, talking: Path, text: Path) -> None:
    found = figures(run, talking, "--text", text, "--window", 8, "--limit", 2)
    assert found["tokens"] == 14
    assert found["kld_nats"] is None
    assert found["top1"] is None


def test_one_window_has_no_standard_error(run: Run, talking: Path, text: Path) -> None:
    found = figures(run, talking, "--text", text, "--limit", 1)
    assert found["nll_stderr"] is None
    assert "nan" not in run("eval", talking, "--text", text, "--limit", 1)[1]


def test_lines_of_jsonl_are_documents(run: Run, talking: Path, tmp_path: Path) -> None:
    # A line separator of Unicode inside a string is no end of a line in JSON.
    documents = [*SENTENCES, "one\u2028two\x85three"]
    path = tmp_path / "text.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in documents) + "\n\n", encoding="utf-8"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(talking)
    expected = sum(min(len(tokenizer(d)["input_ids"]), 10) - 1 for d in documents)
    assert figures(run, talking, "--text", path, "--window", 10)["tokens"] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "must be a readable UTF-8 text file"),
        ("binary.txt", b"\xff\xfe\xfa", "must be a readable UTF-8 text file"),
        ("empty.txt", b"", "must have at least 2 tokens of text, got fewer"),
        ("plain.jsonl", b"no json\n", 'every line must be a JSON object with a "text" field'),
        ("other.jsonl", b'{"content": "x"}\n', 'every line must be a JSON object with a "text" field'),
    ],
)
def test_a_text_that_cannot_be_used(
    run: Run,
    talking: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run("eval", talking, "--text", tmp_path / name)
    assert (code, out) == (3, "")
    assert message in err


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda f: shutil.rmtree(f),
        lambda f: (f / "config.json").unlink(),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        lambda f: edit_config(f, model_type="new-and-unknown"),
        lambda f: edit_config(f, hidden_size="x"),
        lambda f: edit_config(f, num_hidden_layers=10**9),
        lambda f: edit_config(f, num_labels=10**9),
        lambda f: edit_config(f, _attn_implementation="someone/attention"),
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
    ],
    ids=[
        "nothing there",
        "no config",
        "no weights",
        "truncated",
        "unknown architecture",
        "settings",
        "layers",
        "labels",
        "attention of the hub",
        "no tokenizer",
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(
    run: Run,
    talking_quantized: Path,
    text: Path,
    tmp_path: Path,
    command: str,
    damage: Any,
) -> None:
    folder = shutil.copytree(talking_quantized, tmp_path / "model")
    damage(folder)
    code, out, err = run(command, folder, *(["--text", text] if command == "eval" else ["Once"]))
    assert (code, out) == (3, "")
    assert "precal: " in err
    assert str(folder) in err or "new-and-unknown" in err
    assert "Traceback" not in err


def test_a_reference_with_another_vocabulary_is_refused(run: Run, talking: Path, text: Path, tmp_path: Path) -> None:
    other = shutil.copytree(talking, tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 4096, "content": "<new>"})
    (other / "tokenizer.json").write_text(json.dumps(data))
    code, _, err = run("eval", talking, "--text", text, "--reference", other)
    assert code == 3
    assert "must have the tokenizer of" in err


# ---- what transformers would make up --------------------------------------------------------------------------------


def dense_by_name(folder: Path) -> None:
    """config.json says that a quantized weight is dense."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings["modules_to_not_convert"].append("model.layers.1.mlp.up_proj")
    edit_config(folder, quantization_config=settings)


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_weight_that_is_dense_by_name_alone_is_refused(
    run: Run, talking_quantized: Path, text: Path, tmp_path: Path, command: str
) -> None:
    folder = shutil.copytree(talking_quantized, tmp_path / "model")
    dense_by_name(folder)
    code, out, err = run(command, folder, *(["--text", text] if command == "eval" else ["Once"]))
    assert (code, out) == (3, "")
    assert "model.layers.1.mlp.up_proj must be dense as modules_to_not_convert says, got a quantized weight" in err
    with pytest.raises(CheckpointError, match="must be dense as modules_to_not_convert says"):
        load_quantized(folder)


def test_a_model_that_lacks_a_weight_is_not_measured(run: Run, talking: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = altered(talking, tmp_path / "model", lambda tensors: tensors.pop(name))
    code, out, err = run("eval", folder, "--text", text)
    assert (code, out) == (3, "")
    assert err == f"precal: {folder}: every tensor of the model must be there, got none for {name}\n"


# ---- code of a stranger ----------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({marker!r}).touch()
import transformers
# Classes of their own: transformers marks those that it takes from here.
class StrangeConfig(transformers.LlamaConfig):
    model_type = "strange"
class StrangeModel(transformers.LlamaForCausalLM):
    config_class = StrangeConfig
class StrangeTokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["model", "tokenizer"])
def strange(request: pytest.FixtureRequest, talking_quantized: Path, tmp_path: Path) -> Path:
    """A model directory whose model or tokenizer is code of its own, which leaves a file "ran" beside it."""
    folder = shutil.copytree(talking_quantized, tmp_path / "model")
    (folder / "strange.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    if request.param == "model":
        auto = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
        edit_config(folder, model_type="strange", architectures=["StrangeModel"], auto_map=auto)
    else:
        data = json.loads((folder / "tokenizer_config.json").read_text())
        data.update(tokenizer_class="StrangeTokenizer", auto_map={"AutoTokenizer": ["strange.StrangeTokenizer", None]})
        (folder / "tokenizer_config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("command", ["eval", "generate", "demo", "report"])
def test_code_of_a_model_is_not_run(
    run: Run, strange: Path, talking: Path, text: Path, tmp_path: Path, command: str
) -> None:
    arguments = {
        "eval": ["--text", text],
        "generate": ["Once"],
        "demo": ["--text", text],
        "report": ["--html", tmp_path / "page.html", "--original", talking, "--text", text],
    }
    code, _, err = run(command, strange, *arguments[command])
    assert code == 3
    assert err.startswith(f"precal: {strange}: must have a ")
    assert "that transformers knows, got one with code of its own, which this command does not run; if you trust" in err
    assert err.endswith("load it in Python: load_quantized(DIR, trust_remote_code=True)\n")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("strange", ["model"], indirect=True)
def test_load_quantized_runs_code_for_who_asks_for_it(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        load_quantized(strange)
    assert not (tmp_path / "ran").exists()
    load_quantized(strange, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


# ---- generate --------------------------------------------------------------------------------------------------------


def generated(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run("generate", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_generate_continues_the_prompt(run: Run, talking_quantized: Path) -> None:
    data = generated(run, talking_quantized, SENTENCES[0], "--max-new-tokens", 5)
    assert 1 <= data["new_tokens"] <= 5
    assert data["text"].strip().startswith(SENTENCES[0])
    assert data["tokens_per_second"] > 0
    assert generated(run, talking_quantized, SENTENCES[0], "--max-new-tokens", 5)["text"] == data["text"]


def test_generate_prints_text_and_speed_apart(run: Run, talking_quantized: Path) -> None:
    code, out, err = run("generate", talking_quantized, "Once", "--max-new-tokens", 3)
    assert code == 0
    assert "Once" in out
    assert "per second" not in out
    assert re.search(r"[123] tokens, [\d.]+ per second\n$", err)


def test_a_seed_repeats_what_is_sampled(run: Run, talking_quantized: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--max-new-tokens", 8, "--temperature", 2.0, "--seed", seed)
        return generated(run, talking_quantized, "Once", *options)["text"]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_demo_compares_both_widths(run: Run, talking: Path, text: Path, tmp_path: Path) -> None:
    code, out, err = run("demo", talking, "--text", text, "--prompt", "Once", "--out", tmp_path)
    assert code == 0, err
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines() if " MB" in line}
    assert list(rows) == ["original", "4 bits", "3 bits"]
    bits = {name: float(row.split("MB")[1].split()[0]) for name, row in rows.items()}
    assert bits["original"] == 32
    assert 4 < bits["4 bits"] < 5.5
    assert 3 < bits["3 bits"] < bits["4 bits"]
    for name in rows:
        assert f"--- {name}" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["talking-3bit", "talking-4bit"]


def test_demo_knows_its_model_is_not_in_the_wheel(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEMO.parent == cli.DEMO
    assert (cli.DEMO / "text.txt").is_file()
    monkeypatch.setattr(cli, "DEMO", tmp_path)
    code, _, err = run("demo")
    assert code == 3
    assert "demo: MODEL must be given" in err
