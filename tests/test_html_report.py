"""precal report: one page that needs nothing else, says what the directory says, and trusts no name in it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import Folder, Run, Source, add_tokenizer, save_tiny
from safetensors.torch import load_file, save_file
from shapes import generator

from precal_ext import QuantizeConfig, charts, html_report, quantize_checkpoint
from precal_ext.measure import outlier_mask
from precal_ext.quantize import fit_set_grid, quantize_weight

pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, their nesting, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path, original: Path | None = None) -> tuple[str, Page]:
    text = html_report.render(html_report.gather(folder, original))
    return text, Page(text)


@pytest.mark.parametrize("recipe", ["precal", "paper", "rtn"])
def test_the_page_needs_nothing_else(source: Source, quantized: Folder, recipe: str) -> None:
    text, page = page_of(quantized("llama-6m", recipe, 4), source("llama-6m"))
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "srcset", "action")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", text)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert text.startswith("<!doctype html>")
    # 7 kinds and the worst ten, two drawings each; sizes; per figure by layer, by kind, and both
    assert page.tags["svg"] == 2 * (7 + 10) + 1 + 2 * 3
    assert not re.search(r"\bnan\b|\binf\b|None", page.text)


def test_the_page_says_what_the_report_says(source: Source, quantized: Folder) -> None:
    folder = quantized("llama-6m", "precal", 4)
    _, page = page_of(folder, source("llama-6m"))
    data = json.loads((folder / "precal_report.json").read_text())
    summary = data["summary"]
    for figure in (f"{summary['sqnr_db']:.2f} dB SQNR", f"{summary['kl_nats']:.4f} nats KL"):
        assert figure in page.text
    assert f"{summary['bits_per_weight']:.3f} bits per weight" in page.text
    assert "recipe precal, 4 bits, groups of 64, 1 outlier per 256 weights, fitted grid" in page.text
    figures = {t["tensor"]: t["figures"] for t in data["tensors"] if "figures" in t}
    for name, f in figures.items():
        assert re.search(rf"{re.escape(name)} .{{0,60}} {f['sqnr_db']:.2f} {f['kl_nats']:.4f} ", page.text)
    worst = sorted(figures, key=lambda name: figures[name]["sqnr_db"])[:10]
    section = page.text.split("The worst 10")[1].split("Every quantized matrix")[0]
    found = re.findall("(model\\.\\S+\\.weight) [\\d,]+ \N{MULTIPLICATION SIGN} ", section)
    assert found[:10] == worst
    share = sum(figures[n]["noise"] for n in worst) / sum(f["noise"] for f in figures.values())
    assert f"together {100 * share:.2f} % of the squared error" in section
    assert "No original was given" not in page.text


def test_without_the_original_it_says_so(quantized: Folder) -> None:
    _, page = page_of(quantized("llama-6m", "precal", 4))
    assert "No original was given, so the histograms below show the weights after quantization only" in page.text
    assert "Weights after quantization" in page.text
    assert ("path", "class", "before") not in page.attributes
    assert ("path", "class", "after") in page.attributes
    assert ("line", "class", "threshold") in page.attributes


def test_without_figures_they_are_left_out_or_measured(source: Source, quantized: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("llama-6m", "precal", 4), tmp_path / "copy")
    recorded, _ = page_of(folder, source("llama-6m"))
    (folder / "precal_report.json").unlink()
    _, page = page_of(folder)
    assert "SQNR and KL are not recorded" in page.text
    assert "dB SQNR" not in page.text
    assert "The worst" not in page.text
    measured, page = page_of(folder, source("llama-6m"))
    assert "SQNR and KL were measured for this page" in page.text
    # The same drawings and tables, only the sentence on where figures come from differs.
    assert measured.split("Where the bits go")[1] == recorded.split("Where the bits go")[1]


HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'</title></svg><script>{{ 7 * 7 }}"


def test_names_are_text(tiny_quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_quantized, tmp_path / HOSTILE.replace("/", "|"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {n.replace("model.layers.0.mlp.up_proj", "model.layers.0." + HOSTILE): t for n, t in tensors.items()}
    renamed["<b>extra</b>\x1b\x00"] = torch.zeros(999, 9)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "precal_report.json").read_text())
    data["notes"] = ["<script>note</script>", "\ud800"]
    for item in data["tensors"]:
        item["tensor"] = item["tensor"].replace("model.layers.0.mlp.up_proj", "model.layers.0." + HOSTILE)
    (folder / "precal_report.json").write_text(json.dumps(data))
    text, page = page_of(folder)
    html_report.write(tmp_path / "page.html", text)
    assert not page.tags.keys() & {"script", "img", "b"} - {"b"}
    assert page.tags["b"] == 5  # the tiles
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "model.layers.0." + HOSTILE in html.unescape(text)
    assert "49" not in page.words
    assert "\x1b" not in text and "\x00" not in text
    assert (tmp_path / "page.html").read_bytes().decode("utf-8") == text


# ---- the numbers behind the drawings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(), QuantizeConfig(bits=3, c=4), QuantizeConfig(bits=8), QuantizeConfig(c=0),
        QuantizeConfig(recipe="paper"), QuantizeConfig(recipe="rtn", bits=3), QuantizeConfig(group_size=-1),
    ],
    ids=["default", "c4", "8 bits", "c0", "paper", "rtn", "row"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributions_count_every_weight(config: QuantizeConfig, dtype: torch.dtype) -> None:
    w = torch.randn(60, 300, generator=generator(1)).to(dtype)
    q = quantize_weight(w, config, fit_set_grid([w], config))
    d = html_report.distribution(w, q)
    mask = outlier_mask(q)
    outliers = 0 if mask is None else int(mask.sum())
    assert d.before is not None
    assert d.dense_before is not None
    assert sum(d.before) == w.numel() and d.beyond == 0
    # Restored weights may fall just outside the range of the original's.
    assert w.numel() - 5 <= sum(d.after) <= w.numel()
    assert sum(d.kept or []) == outliers
    # Every dense weight has one of the levels; with two scales those with either.
    assert sum(d.mass) == w.numel() - (0 if q.spec.split else outliers)
    assert sum(d.dense_before) == sum(d.mass)
    grid = q.tensors.get("weight_grid")
    half = 2 ** (config.bits - 1)
    expected = range(-half, half) if grid is None else sorted(set(grid.flatten().tolist()))
    assert d.levels == list(map(float, expected))
    if outliers:
        assert d.threshold is not None
        above = int((w.double().abs() > d.threshold).sum())
        assert above == outliers if dtype == torch.float32 else above >= outliers  # ties survive together
    else:
        assert (d.threshold, d.kept) == (None, None)
    bare = html_report.distribution(None, q)
    assert (bare.before, bare.dense_before) == (None, None)
    assert (bare.levels, bare.mass) == (d.levels, d.mass)


def test_the_mass_of_a_level_is_the_number_of_its_codes() -> None:
    w = torch.randn(32, 256, generator=generator(2))
    config = QuantizeConfig(c=0)
    q = quantize_weight(w, config, fit_set_grid([w], config))
    levels = q.tensors["weight_grid"].flatten()[q.level_index().flatten().long()]
    expected = Counter(levels.tolist())
    d = html_report.distribution(w, q)
    assert dict(zip(d.levels, d.mass, strict=True)) == {level: expected[int(level)] for level in d.levels}


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_degenerate_weights_are_drawn(value: float) -> None:
    w = torch.full((4, 64), value)
    q = quantize_weight(w, QuantizeConfig(), fit_set_grid([w], QuantizeConfig()))
    d = html_report.distribution(w, q)
    drawing = charts.weight_histogram(d.half, d.before, d.after, d.kept, d.threshold, "w")
    drawing += charts.level_histogram(d.levels, d.mass, d.dense_before, d.level_half, "w")
    assert not re.search(r"nan|inf", drawing)
    Page(drawing)


def test_a_giant_weight_does_not_hide_the_others() -> None:
    w = torch.randn(64, 256, generator=generator(3))
    w[3, 5] = 1e6
    q = quantize_weight(w, QuantizeConfig(), fit_set_grid([w], QuantizeConfig()))
    d = html_report.distribution(w, q)
    assert d.beyond == 1
    assert sum(d.before or []) == w.numel() - 1


# ---- drawings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1.0], [5.0, 5.0], [0.0], [-3.0, 8.0], [1e-9, 2e-9], [1e9, 3e9], [21.8, 22.17]])
def test_axes_hold_their_values_and_have_distinct_ticks(values: list[float]) -> None:
    axis = charts.Axis.around(values, 0, 100)
    assert all(0 <= axis(v) <= 100 for v in values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 11
    assert all(axis.lo - 1e-6 * abs(axis.lo) <= v <= axis.hi + 1e-6 * abs(axis.hi) for v, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)
    for value, label in ticks:
        assert math.isclose(float(label.replace("\N{MINUS SIGN}", "-")), value, rel_tol=1e-3, abs_tol=1e-12)


def test_cells_end_half_way_between_levels() -> None:
    assert charts.cell_edges([-100.0, -20.0, 0.0, 127.0]) == [-140.0, -60.0, -10.0, 63.5, 190.5]
    assert charts.cell_edges([3.0]) == [2.0, 4.0]


def test_many_layers_and_kinds_stay_inside_the_drawing() -> None:
    kinds, layers = [f"mlp.experts.*.some_projection_{i}" for i in range(40)], list(range(200))
    values = [[float(i * j) for j in layers] for i in range(40)]
    for drawing in (
        charts.heat_map(kinds, layers, values, 2, True, "heat"),
        charts.per_kind([(k, 1.0, [("x", 0.5), ("y", 1.5)]) for k in kinds], "dB", 2, "kinds"),
        charts.per_layer([(i, 1.0 + i, 0.5, 300.0) for i in layers], "dB", 2, "layers"),
    ):
        box = re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing)
        assert box is not None
        for x in re.findall(r' (?:c?x|x1|x2)="([-\d.]+)"', drawing):
            assert 0 <= float(x) <= float(box[1]) + 0.01
        for y in re.findall(r' (?:c?y|y1|y2)="([-\d.]+)"', drawing):
            assert 0 <= float(y) <= float(box[2]) + 0.01
    assert "\N{HORIZONTAL ELLIPSIS}" in charts.per_kind([(kinds[0], 1.0, [])], "dB", 2, "kinds")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(run: Run, tmp_path: Path, tiny: Path, tiny_quantized: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    code, out, err = run("report", tiny_quantized, "--html", page, "--original", tiny)
    assert (code, err) == (0, "")
    assert out.startswith(f"{page}: ")
    assert page.read_text() == page_of(tiny_quantized, tiny)[0]
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert page.stat().st_mode & 0o777 == 0o644


def test_the_loss_on_a_text(run: Run, tmp_path: Path) -> None:
    settings = {"vocab_size": 4096, "hidden_size": 64, "max_position_embeddings": 512}
    source = add_tokenizer(save_tiny(tmp_path / "source", **settings))
    quantize_checkpoint(source, tmp_path / "out")
    (tmp_path / "a text.txt").write_text("The old man looked at the sea, and the sea looked back at him. " * 40)
    arguments = ("report", tmp_path / "out", "--html", tmp_path / "page.html", "--original", source)
    code, _, err = run(*arguments, "--text", tmp_path / "a text.txt", "--limit", 2)
    assert (code, err) == (0, "")
    text = Page((tmp_path / "page.html").read_text()).text
    _, out, _ = run(
        "eval", tmp_path / "out", "--text", tmp_path / "a text.txt", "--reference", source, "--limit", 2, "--json"
    )
    result = json.loads(out)
    before = math.exp(result["nll_nats"] - result["delta_nll_nats"])
    assert f"perplexity {before:.3f} {result['perplexity']:.3f}" in text
    assert f"nats per token {result['kld_nats']:.4f} ±" in text
    assert f"on {result['tokens']:,} tokens of a text.txt" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "page.txt"], "page.txt: must be a file that ends in .html"),
        (["--html", "."], ".: must be a file that ends in .html"),
        (["--html", "page.html", "--text", "t.txt"], "report: --text needs --original MODEL"),
        (["--html", "nowhere/page.html"], "No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_refused(
    run: Run, tiny_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("report", tiny_quantized, *options)
    assert (code, out) == (3, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_damage_leaves_the_old_page(run: Run, tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    code, _, err = run("report", tiny, "--html", page)
    assert code == 3
    assert "must be a model quantized by precal" in err
    assert page.read_text() == "old"
