"""The loss around a model's weights against calculus, the forest against scikit-learn, and `precal predict`."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from models import DEMO, Run, tiny_model
from torch import Tensor, nn

from precal_ext import CheckpointError
from precal_ext import landscape as ls
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.forest import Forest, read_forest, write_forest
from precal_ext.formats import parse_format, quantized_weights, weight_sites
from precal_ext.mx import MXFormat, fake_quantize
from precal_ext.predict import FEATURES, PREDICTOR, Prediction, Surroundings, features_of, mark_frontier, predict

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "bench"))
pytest_plugins = ["package_fixtures"]

WINDOWS = [[(7 * i + 3 * w) % 64 for i in range(24)] for w in range(3)] + [[1, 2, 3, 4, 5]]
FAMILIES = ["Llama", "GPT2", "OPT"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Random weights, large enough that the loss is no plane."""
    made = tiny_model(request.param)
    with torch.no_grad():
        for site in weight_sites(made).values():
            site.weight().mul_(8)
    return made


@pytest.fixture
def llama() -> nn.Module:
    return tiny_model("Llama")


# ---- the landscape ---------------------------------------------------------------------------------------------------


def test_the_model_is_what_it_was(model: nn.Module) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    asks = [p.requires_grad for p in model.parameters()]
    around = Surroundings.measure(model, WINDOWS)
    with pytest.raises(RuntimeError, match="stop"), ls.moved(around.sites, ls.random_direction(around.sites, 0)):
        assert ls.mean_nll(model, WINDOWS) != around.nll_nats
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == asks
    assert all(p.grad is None for p in model.parameters())
    assert around.nll_nats == evaluate(model, WINDOWS).nll_nats


def test_a_random_direction_is_as_long_as_the_weights(llama: nn.Module) -> None:
    sites = weight_sites(llama)
    d = ls.random_direction(sites, 0)
    assert ls.relative_error(sites, d) == pytest.approx(1, rel=1e-5)
    assert all(share == pytest.approx(1, rel=1e-5) for share in ls.relative_errors(sites, d).values())
    assert all(share == pytest.approx(1, rel=1e-5) for share in ls.set_errors(sites, d).values())
    assert abs(ls.shrinkage(sites, d)) < 0.05
    halved = {name: -0.5 * site.weight() for name, site in sites.items()}
    assert ls.shrinkage(sites, halved) == pytest.approx(0.5)
    assert ls.sqnr_figures(sites, halved) == pytest.approx((20 * math.log10(2),) * 2)


def test_slope_and_curvature_are_those_of_the_loss(model: nn.Module) -> None:
    """Along a direction, against differences of the loss in float64. Llama's norms compute in float32 all the same, so
    the difference is a wide one there; OPT's ReLU has kinks, which a wide one would cross."""
    model = model.double()
    sites = weight_sites(model)
    d = {name: v.double() for name, v in ls.random_direction(sites, 3).items()}
    h = 3e-3 if model.config.model_type == "llama" else 1e-4

    def loss(t: float) -> float:
        with ls.moved(sites, d, t):
            nll = tokens = 0.0
            for window in WINDOWS:  # each alone, and in float64, which evaluate is not
                logits = model(input_ids=torch.tensor([window])).logits[0, :-1].log_softmax(-1)
                nll -= float(logits.gather(-1, torch.tensor(window)[1:, None]).sum())
                tokens += len(window) - 1
        return nll / tokens

    with torch.no_grad():
        up, here, down = loss(h), loss(0), loss(-h)
    gradient = ls.gradient(model, sites, WINDOWS)
    assert ls.slope(gradient, d) == pytest.approx((up - down) / (2 * h), rel=3e-3)
    product = ls.curvature_product(model, sites, WINDOWS, d)
    second = sum(float((product[name] * d[name]).sum()) for name in d)
    assert second == pytest.approx((up - 2 * here + down) / h**2, rel=2e-2)
    if model.config.model_type != "gpt2":
        return
    short = {name: v * 1e-3 for name, v in d.items()}
    assert ls.curvature_along(model, sites, WINDOWS, short, step=0.01) == pytest.approx(second / 2 * 1e-6, rel=0.15)


def test_hutchinsons_trace_is_the_trace(llama: nn.Module) -> None:
    """Of one module, against products with every unit vector."""
    name = "model.layers.1.self_attn.k_proj"
    sites = {name: weight_sites(llama)[name]}
    N, K = sites[name].shape
    exact = 0.0
    for column in range(0, K, 4):  # a quarter of the columns, every row: signs below only there
        for row in range(N):
            unit = torch.zeros(N, K)
            unit[row, column] = 1
            exact += float(ls.curvature_product(llama, sites, WINDOWS, {name: unit})[name][row, column])
    _, diagonal = ls.hutchinson_traces(llama, sites, WINDOWS, probes=200)
    found = float(diagonal[name][:, ::4].sum())
    noise = float(diagonal[name].abs().mean()) * math.sqrt(N * K / 4)
    assert abs(found - exact) < max(0.3 * abs(exact), noise)


def test_hutchinsons_diagonal_of_a_known_hessian() -> None:
    """A head that is the only weight: H is the softmax's covariance times the inputs', in closed form."""
    sites, model, x = one_layer()
    p = torch.softmax(x @ sites["head"].weight().t(), 1)
    exact = torch.einsum("tv,tk->vk", p * (1 - p), x.square()) / len(x)
    trace, diagonal = ls.hutchinson_traces(model, sites, [list(range(9))], probes=400)
    assert trace["head"] == pytest.approx(float(exact.sum()), rel=0.05)
    assert float((diagonal["head"] - exact).abs().mean()) < 0.3 * float(exact.mean())
    error = {"head": torch.full_like(exact, 0.1)}
    assert ls.diagonal_rises(diagonal, error)["head"] == pytest.approx(trace["head"] * 0.005, rel=1e-4)


class OneLayer(nn.Module):
    """Token -> fixed vector -> logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return type("Output", (), {"logits": self.head(self.table(input_ids))})()


def one_layer() -> tuple[Any, nn.Module, Tensor]:
    from precal_ext.sites import find_sites

    model = OneLayer()
    return find_sites(model), model, model.table.weight.detach()[:8]


def test_moments_are_of_the_inputs_of_real_tokens(model: nn.Module) -> None:
    sites = weight_sites(model)
    name = next(n for n in sites if n.endswith(("q_proj", "c_attn")))
    seen: list[Tensor] = []
    hook = sites[name].module.register_forward_pre_hook(lambda _, a: seen.append(a[0][0].double()))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=torch.tensor([window]))
    hook.remove()
    x = torch.cat(seen)
    assert torch.allclose(ls.input_moments(model, sites, WINDOWS)[name], x.t() @ x, rtol=1e-4, atol=1e-4)


def test_a_profile_is_read_in_logarithms() -> None:
    radii, rises = (0.1, 0.2, 0.4), (0.01, 0.04, 0.16)
    for t in (0.01, 0.1, 0.15, 0.3, 0.4):
        assert ls.read_profile(radii, rises, t) == pytest.approx(t * t)
    assert ls.read_profile(radii, rises, 0.0) == 0
    assert ls.read_profile(radii, rises, 3.0) == pytest.approx(0.16)  # no further
    assert ls.read_profile(radii, (-0.1, -0.1, 0.16), 0.1) == pytest.approx(ls.LEAST_RISE)


def test_sensitivities_predict_noise_in_a_trained_model() -> None:
    """Small noise in every module at once rises by the sum of what each alone does; so do the traces say."""
    model, tokenizer = load(DEMO)
    model = model.float()
    windows = read_windows(tokenizer, DEMO.parent / "text.txt", 80, 2)
    around = Surroundings.measure(model, windows)
    sites, a, t = around.sites, around.sensitivities, 0.04
    assert set(a) == set(ls.fusion_sets(sites))
    assert any(name.endswith("(q_proj,k_proj,v_proj)") for name in a)
    rise = around.profile[ls.RADII.index(t)]
    assert rise > 1e-4
    assert rise == pytest.approx(sum(a.values()) * t * t, rel=0.5)
    assert rise == pytest.approx(around.trace_rise() * t * t, rel=0.7)
    assert around.profile == sorted(around.profile)
    assert all(0 < gain < 1 for gain in around.gains.values())


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def correlated(K: int, tokens: int = 2000) -> Tensor:
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x @ torch.randn(K, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def output_error(w: Tensor, done: Tensor, moments: Tensor) -> float:
    d = (done - w).double()
    return float(((d @ moments) * d).sum())


def test_gptqs_gain_is_what_gptq_gains() -> None:
    from gptq_mx import gptq

    x = correlated(48)
    moments, w, fmt = x.t() @ x, torch.randn(256, 48, generator=torch.Generator().manual_seed(3)), MXFormat(6, 48)
    plain, better = output_error(w, fake_quantize(w, fmt), moments), output_error(w, gptq(w, moments, fmt), moments)
    gain = ls.gptq_gain(moments, len(x))
    assert gain < 0.7
    assert better / plain == pytest.approx(gain, rel=0.25)


def test_gptq_without_correlation_rounds_to_nearest() -> None:
    from gptq_mx import gptq

    w, moments = torch.randn(32, 80, generator=torch.Generator().manual_seed(0)), torch.eye(80, dtype=torch.float64)
    for fmt in (MXFormat(3, 32), MXFormat(4, 16)):
        assert torch.equal(gptq(w, moments, fmt), fake_quantize(w, fmt))
    assert ls.gptq_gain(moments, 10**9) == pytest.approx(1)
    assert ls.gptq_gain(torch.zeros(5, 5, dtype=torch.float64), 9) == 1


def test_gptq_gives_weights_of_the_format() -> None:
    from gptq_mx import gptq

    x, fmt = correlated(40), MXFormat(3, 16)
    x[:, 7] = 0  # an input that is always zero
    w = torch.randn(16, 40, generator=torch.Generator().manual_seed(4))
    done = gptq(w, x.t() @ x, fmt)
    assert torch.equal(fake_quantize(done, fmt), done) or bool(torch.isfinite(done).all())
    assert output_error(w, done, x.t() @ x) < output_error(w, fake_quantize(w, fmt), x.t() @ x)


def test_the_gain_holds_on_inputs_that_gptq_has_not_seen() -> None:
    from gptq_mx import gptq

    x, fmt = correlated(48, 4000), MXFormat(6, 48)
    few, many = x[:100], x[100:]
    w = torch.randn(256, 48, generator=torch.Generator().manual_seed(3))
    unseen = many.t() @ many
    better = output_error(w, gptq(w, few.t() @ few, fmt), unseen) / output_error(w, fake_quantize(w, fmt), unseen)
    gain = ls.gptq_gain(few.t() @ few, len(few))
    assert gain == pytest.approx(better, rel=0.35)
    assert ls.gptq_gain(few.t() @ few, 10**9) < 0.75 * better  # what it looks like on what was seen


# ---- features --------------------------------------------------------------------------------------------------------


def test_features_of_real_formats(model: nn.Module) -> None:
    around = Surroundings.measure(model, WINDOWS)
    for name in ("mxint3_16", "mxint3_16+gptq", "mxfp4", "precal4_g64", "rtn4_g32"):
        fmt = parse_format(name)
        weights = dict(quantized_weights(model, fmt))
        curvature = ls.curvature_along(model, around.sites, WINDOWS, ls.error_of(around.sites, weights))
        features, theories = features_of(around, fmt, weights, curvature)
        assert tuple(features) == FEATURES
        assert all(map(math.isfinite, [*features.values(), *theories.values()]))
        assert features["bits"] == fmt.bits
        error = ls.error_of(around.sites, weights)
        shares = ls.relative_errors(around.sites, error)
        least = min(-10 * math.log10(share) for share in shares.values())
        assert features["sqnr_min_db"] == pytest.approx(least)
        assert (features["log_gptq_gain"] < 0) == fmt.gptq
        a = around.sensitivities
        sets = ls.set_errors(around.sites, error)
        assert theories["theorem_nats"] == pytest.approx(sum(a[s] * sets[s] for s in a))


def test_quantized_weights_are_those_of_quantize_model(model: nn.Module) -> None:
    import copy

    from precal_ext import QuantizeConfig, quantize_model
    from precal_ext.sites import precal_modules

    done = copy.deepcopy(model)
    quantize_model(done, QuantizeConfig(bits=3))
    found = dict(quantized_weights(model, parse_format("precal3_g64")))
    made = dict(precal_modules(done))
    assert sorted(found) == sorted(made)
    assert all(torch.equal(w, made[name].dequantize()) for name, w in found.items())


# ---- the forest ------------------------------------------------------------------------------------------------------


def random_rows(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, len(FEATURES))).astype(np.float32)
    x[:, 2] = random.integers(2, 9, rows)  # ties
    return x, np.exp(x[:, FEATURES.index("log_along")] + 0.3 * np.sin(x[:, 0]))


@pytest.mark.parametrize("target", ["log", "ratio"])
@pytest.mark.parametrize("features", [FEATURES, ("sqnr_mean_db", "log_along", "bits")])
def test_numpy_says_what_scikit_learn_says(target: str, features: Sequence[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from laws_fit import BASE, Variant, to_forest

    variant = Variant("test", tuple(features), target, share=0.5)
    x, delta = random_rows(300)
    fitted = variant.fit(x, delta)
    write_forest(tmp_path / "forest.npz", to_forest(fitted, variant, x, (1.0, 0.1)))
    forest = read_forest(tmp_path / "forest.npz", FEATURES)
    new = np.concatenate([x, random_rows(500, 1)[0], np.full((1, len(FEATURES)), 50, dtype=np.float32)])
    expected = 0.5 * fitted.predict(new[:, variant.columns]) + (new[:, BASE] if target == "ratio" else 0)
    low, middle, high, outside = forest.predict(new)
    assert np.allclose(middle, expected, rtol=1e-6, atol=1e-6)
    each = [0.5 * tree.predict(new[:, variant.columns]) for tree in fitted.estimators_]
    assert np.allclose(forest.trees(new), each, rtol=1e-6, atol=1e-6)
    assert ((low <= middle) & (middle <= high)).all()
    assert not outside[:300].any()
    assert sorted(np.flatnonzero(outside[-1])) == sorted(variant.columns)


def small_forest(**changed: Any) -> Forest:
    """Two trees: x0 <= 0.5 gives 1 or 3; and always 2."""
    arrays: dict[str, Any] = {
        "start": np.array([0, 3, 4], dtype=np.int32),
        "feature": np.array([0, -1, -1, -1], dtype=np.int16),
        "threshold": np.array([0.5, 0, 0, 0], dtype=np.float32),
        "left": np.array([1, 0, 0, 0], dtype=np.int32),
        "right": np.array([2, 0, 0, 0], dtype=np.int32),
        "value": np.array([0, 1, 3, 2], dtype=np.float32),
        "low": np.array([0, 0], dtype=np.float32),
        "high": np.array([1, 1], dtype=np.float32),
        "base": np.array(-1, dtype=np.int32),
        "width": np.array([2, 0.1], dtype=np.float32),
        "rival": np.array([0.5, -2, 2], dtype=np.float32),
    }
    return Forest(("a", "b"), {**arrays, **changed})


def test_what_lies_outside_widens_the_interval() -> None:
    x = np.array([[0.5, 0.5], [0.6, 0.5], [0.6, 1.5], [-4.0, 9.0]], dtype=np.float32)
    low, middle, high, outside = small_forest().predict(x)
    assert middle.tolist() == [1.5, 2.5, 2.5, 1.5]
    assert outside.tolist() == [[False, False], [False, False], [False, True], [True, True]]
    half = 2 * (0.5 + 0.1)
    expected = [half, half, half * (1 + 0.5 * 1.5), half * (1 + 0.5 * 5 + 0.5 * 9)]
    assert (high - middle).tolist() == pytest.approx(expected)
    assert (middle - low).tolist() == pytest.approx(expected)


def test_the_rivals_interval_grows_outside_its_range_too() -> None:
    forest = small_forest()
    assert forest.of_rival(1.5) == (1.0, 2.0, False)
    assert forest.of_rival(4.0) == (4 - 0.875, 4 + 0.875, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"left": np.array([0, 0, 0, 0], dtype=np.int32)}, "left must be a later node of the same tree"),
        ({"right": np.array([3, 0, 0, 0], dtype=np.int32)}, "right must be a later node of the same tree"),
        ({"feature": np.array([2, -1, -1, -1], dtype=np.int16)}, r"feature and base must lie in \[-1, 2\)"),
        ({"base": np.array(2, dtype=np.int32)}, r"feature and base must lie in \[-1, 2\)"),
        ({"start": np.array([0, 3, 5], dtype=np.int32)}, "start must rise from 0 to the number of nodes, 4"),
        ({"start": np.array([0], dtype=np.int32)}, "start must rise from 0"),
        ({"value": np.array([0, 1, math.nan, 2], dtype=np.float32)}, "value must be finite, got NaN"),
        ({"value": np.array([0.0, 1, 3, 2])}, "value must be float32, got float64"),
        ({"low": np.array([0], dtype=np.float32)}, r"low must have shape \[2\], got \[1\]"),
    ],
)
def test_a_forest_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        small_forest(**changed)


def test_files_are_judged_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "forest.npz"
    write_forest(path, small_forest())
    first = path.read_bytes()
    write_forest(path, small_forest())
    assert path.read_bytes() == first
    assert read_forest(path, ["a", "b"]).predict(np.zeros((1, 2), dtype=np.float32))[1] == [1.5]
    with pytest.raises(CheckpointError, match="must be fitted on the features a, c, got a, b"):
        read_forest(path, ["a", "c"])
    path.write_bytes(first[:-40])
    with pytest.raises(CheckpointError, match="must be a predictor that can be read"):
        read_forest(path, ["a", "b"])
    np.savez(path, names=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="must be a predictor that can be read"):
        read_forest(path, ["a", "b"])
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError, match="must be a predictor that can be read"):
        read_forest(path, ["a", "b"])
    np.savez_compressed(path, names=np.zeros(5_000_000))
    with pytest.raises(CheckpointError, match="must unpack to at most 16,000,000 bytes"):
        read_forest(path, ["a", "b"])
    with pytest.raises(CheckpointError, match="must be a predictor that can be read"):
        read_forest(tmp_path / "none.npz", ["a", "b"])


def test_the_shipped_predictor_is_small_and_whole() -> None:
    assert PREDICTOR.stat().st_size < 500_000
    forest = read_forest(PREDICTOR, FEATURES)
    assert len(forest.arrays["start"]) > 50


# ---- predictions -----------------------------------------------------------------------------------------------------


def prediction(name: str, size: int, nll: float | None, dB: float = 10) -> Prediction:
    return Prediction(name, 4.0, size, dB, dB, nll, nll, nll, 0.0)


def test_the_frontier_has_what_nothing_beats() -> None:
    found = [("a", 10, 3.0), ("b", 20, 2.0), ("c", 20, 2.5), ("d", 30, 2.0), ("e", 40, 1.0), ("f", 40, 1.0)]
    marked = mark_frontier([prediction(*f) for f in found])
    assert [p.format for p in marked if p.frontier] == ["a", "b", "e", "f"]
    blind = mark_frontier([prediction("a", 10, None, 12), prediction("b", 20, None, 11)])
    assert [p.format for p in blind if p.frontier] == ["a"]


def test_sizes_are_those_of_the_tensors(llama: nn.Module) -> None:
    sites = weight_sites(llama)
    count, rows = sum(s.weight().numel() for s in sites.values()), [s.shape for s in sites.values()]
    everything = sum(p.numel() for p in llama.parameters())
    (found,) = predict(llama, [parse_format("mxint4_16")])
    blocks = sum(N * -(-K // 16) for N, K in rows)
    assert found.size_bytes == 4 * (everything - count) + math.ceil((4 * count + 8 * blocks) / 8)
    assert found.bits_per_weight == pytest.approx(4 + 8 * blocks / count)
    assert (found.nll_nats, found.delta_nll_nats, found.frontier) == (None, None, True)


def test_the_command_with_text(run: Run, talking: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old man looked at the sea, and the sea looked back at him. " * 40)
    names = "mxint2_32,mxint4_32,mxint4_32+gptq,mxint8_32,precal4_g64"
    code, out, err = run("predict", talking, "--text", text, "--formats", names, "--limit", 2, "--json")
    assert code == 0, err
    found = {p["format"]: p for p in json.loads(out)["predictions"]}
    assert list(found) == names.split(",")
    for p in found.values():
        assert p["low_nats"] <= p["nll_nats"] <= p["high_nats"]
    assert found["mxint2_32"]["sqnr_mean_db"] < found["mxint4_32"]["sqnr_mean_db"] < found["mxint8_32"]["sqnr_mean_db"]
    assert found["mxint4_32"]["size_bytes"] == found["mxint4_32+gptq"]["size_bytes"] < found["mxint8_32"]["size_bytes"]
    code, out, _ = run("predict", talking, "--text", text, "--formats", names, "--limit", 2)
    assert code == 0
    assert "predicted NLL (nats per token)" in out
    assert len([line for line in out.splitlines() if line[2:].startswith(("mxint", "precal"))]) == 5


def test_the_table_says_what_is_beyond_the_fit() -> None:
    from precal_ext.foresight import table

    inside, outside = prediction("a", 10, 3.0), dataclasses.replace(prediction("b", 20, 2.0), outside=("shrinkage",))
    lines = table(mark_frontier([inside, outside]))
    assert [line for line in lines if line.endswith("beyond the fit")] == [lines[2]]
    assert "so intervals are wider: shrinkage" in lines[-1]
    assert len(table(mark_frontier([inside]))) == 3


def test_the_command_without_text_says_what_it_cannot(run: Run, talking: Path) -> None:
    code, out, err = run("predict", talking, "--formats", "mxint4_32+gptq,precal4_g64")
    assert code == 0, err
    assert "no text: weights alone tell SQNR and size" in out
    assert "NLL" not in out
    assert "GPTQ lowers the loss, not the error" in out


def test_the_plot(run: Run, talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "plot.svg"
    code, _, err = run("predict", talking, "--plot", tmp_path / "plot.txt")
    assert (code, "must be a file that ends in .png, .svg or .pdf" in err) == (3, True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        code, _, err = run("predict", talking, "--plot", page)
        assert (code, "--plot needs matplotlib; pip install 'precal[predict]'" in err) == (3, True)
    pytest.importorskip("matplotlib")
    code, _, err = run("predict", talking, "--formats", "mxint4_32,precal4_g64", "--plot", page)
    assert code == 0, err
    assert "mxint4_32" in page.read_text() or page.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "int4"], "formats: a name must be one like"),
        (["--formats", ","], "predict: --formats must name a format, got none"),
        (["--text", "nowhere.txt"], "nowhere.txt: must be a readable UTF-8 text file"),
    ],
)
def test_refusals(run: Run, talking: Path, arguments: list[str], message: str) -> None:
    code, _, err = run("predict", talking, *arguments)
    assert code == 3
    assert message in err


def test_a_quantized_model_is_refused(run: Run, tiny_quantized: Path) -> None:
    code, _, err = run("predict", tiny_quantized)
    assert code == 3
    assert "predict: the model must have dense linear layers to quantize, got none" in err
