"""The recipes on real weights: which is better at which size, and the baselines against a second implementation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import forced_threads, shared
from hypothesis import given
from hypothesis import strategies as st
from models import DEMO, assert_same_tensors
from safetensors.torch import load_file
from shapes import generator, student_t
from test_qtensor import quantize
from torch import Tensor

from precal_ext import QuantizeConfig, ops
from precal_ext.grids import constant_grid
from precal_ext.measure import measure, outlier_mask, sqnr_db
from precal_ext.quantize import fit_set_grid, quantize_weight, sample_rows
from precal_ext.salience import salient, shrink_lam


@pytest.fixture(scope="module", params=["llama-6m", "gpt2"])
def weights(request: pytest.FixtureRequest) -> list[Tensor]:
    """Rows of three matrices of a trained model, 80 000 weights."""
    if request.param == "gpt2":
        tensors = load_file(shared("models", "gpt2-attention-sample.safetensors"))
        return [w[:36].contiguous() for _, w in sorted(tensors.items())][:3]
    tensors = load_file(DEMO / "model.safetensors")
    layer = "model.layers.1."
    names = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    return [tensors[f"{layer}{name}.weight"][:64].contiguous() for name in names]


def pooled(weights: Sequence[Tensor], config: QuantizeConfig) -> tuple[float, float]:
    """SQNR in dB and stored bits per weight of all of them together."""
    figures = [(w.numel(), measure(w, quantize(w, config))) for w in weights]
    total = sum(n for n, _ in figures)
    bits = sum(n * f.bits_per_weight for n, f in figures) / total
    return sqnr_db(sum(f.power for _, f in figures), sum(f.noise for _, f in figures)), bits


# ---- who is better ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3])
def test_precal_beats_rounding_at_every_group_size(weights: list[Tensor], bits: int) -> None:
    ours, our_bits = pooled(weights, QuantizeConfig(bits=bits))
    others = {g: pooled(weights, QuantizeConfig(bits=bits, recipe="rtn", group_size=g)) for g in (32, 64, 128, 256)}
    assert max(b for _, b in others.values()) > our_bits > min(b for _, b in others.values())
    assert all(ours > sqnr for sqnr, _ in others.values())


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize(
    ("alpha", "ours"),
    [
        (0.02, {}),  # the default, against 4.39 bits
        (0.05, {"group_size": 32}),  # against 4.60
        (0.08, {"group_size": 32, "c": 3}),  # against 4.81
    ],
)
def test_precal_beats_the_paper_at_fewer_bits(weights: list[Tensor], bits: int, alpha: float, ours: dict) -> None:
    sqnr, our_bits = pooled(weights, QuantizeConfig(bits=bits, **ours))
    other, stored_bits = pooled(weights, QuantizeConfig(bits=bits, recipe="paper", alpha=alpha))
    published_bits = bits + 32 / 128 + alpha * 7
    assert our_bits < published_bits < stored_bits
    assert sqnr > other


@pytest.mark.parametrize("bits", [4, 3])
def test_every_part_of_precal_helps(weights: list[Tensor], bits: int) -> None:
    """Scales under a search, then the grid for Gaussian groups, then one outlier a block."""
    steps = [
        QuantizeConfig(bits=bits, recipe="rtn", group_size=64),
        QuantizeConfig(bits=bits, c=0, grid="uniform"),
        QuantizeConfig(bits=bits, c=0, grid="constant"),
        QuantizeConfig(bits=bits, c=1, grid="constant"),
    ]
    found = [pooled(weights, config)[0] for config in steps]
    assert found == sorted(found)


@pytest.mark.parametrize("c", [0, 1])
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_fitted_grid_is_no_worse_than_the_one_it_starts_from(
    weights: list[Tensor], bits: int, c: int, rounds: int
) -> None:
    fitted, _ = pooled(weights, QuantizeConfig(bits=bits, c=c, fit_rounds=rounds, mu=0.0))
    constant, _ = pooled(weights, QuantizeConfig(bits=bits, c=c, grid="constant"))
    # 0.003 dB: scales are searched again on the new grid, on their own coarse steps.
    assert fitted >= constant - 0.003


def test_more_bits_smaller_groups_and_more_outliers_are_better(weights: list[Tensor]) -> None:
    for field, values in {"bits": (2, 3, 4, 5), "group_size": (128, 64, 32), "c": (0, 1, 2, 4)}.items():
        found = [pooled(weights, QuantizeConfig(**{field: value}))[0] for value in values]
        assert found == sorted(found), field


# ---- grids of fusion sets --------------------------------------------------------------------------------------------


def test_a_set_has_one_grid_fitted_on_all_of_its_weights(weights: list[Tensor]) -> None:
    config = QuantizeConfig(c=0)
    # Evenly spread weights want evenly spread levels, so the second moves the grid of both.
    first = weights[0].float()
    second = (torch.rand(first.shape, generator=generator(3)) - 0.5) * 3.5 * first.std()
    alone, both = fit_set_grid([first], config), fit_set_grid([first, second], config)
    assert alone is not None
    assert both is not None
    assert both.shape == (1, 32)
    assert not torch.equal(alone, both)
    assert torch.equal(both, fit_set_grid([second, first], config))  # a sum does not depend on its order
    for w in (first, second):
        assert torch.equal(quantize_weight(w, config, both).tensors["weight_grid"], both)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QuantizeConfig(recipe="rtn"), None),
        (QuantizeConfig(recipe="paper"), None),
        (QuantizeConfig(bits=8), None),
        (QuantizeConfig(grid="constant"), constant_grid(4, 64, True)),
        (QuantizeConfig(fit_rounds=0, trellis=False), constant_grid(4, 64, False)),
        (QuantizeConfig(bits=3, grid="constant", group_size=-1), constant_grid(3, 256, True)),
    ],
    ids=["rtn", "paper", "8 bits", "constant", "no rounds", "whole rows"],
)
def test_grids_that_are_not_fitted(config: QuantizeConfig, expected: Tensor | None) -> None:
    found = fit_set_grid([student_t(8, 64)], config)
    assert found is None if expected is None else torch.equal(found, expected)


def test_of_the_grids_on_the_way_the_best_is_taken() -> None:
    """Squared error + mu * KL, both measured on the weights themselves."""
    w = (torch.rand(256, 512, generator=generator(3)) - 0.5) * 0.1  # evenly spread: the Gaussian start is a bad one
    costs = []
    for rounds in (0, 1, 2, 4):
        config = QuantizeConfig(c=0, fit_rounds=rounds)
        q = quantize_weight(w, config, fit_set_grid([w], config))
        figures = measure(w, q)
        costs.append(figures.noise / figures.power + config.mu * figures.kl_nats)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.85 * costs[0]


def test_a_set_without_mass_keeps_the_starting_grid() -> None:
    assert torch.equal(fit_set_grid([torch.zeros(4, 64)], QuantizeConfig()), constant_grid(4, 64, True))


@pytest.mark.parametrize(("N", "limit", "rows"), [(10, 640, 10), (10, 639, 9), (10, 64, 1), (10, 1, 1), (1, 1, 1)])
def test_sampled_rows_are_evenly_spaced(N: int, limit: int, rows: int) -> None:
    w = torch.arange(N)[:, None].expand(N, 64).float().contiguous()
    found = sample_rows(w, limit)[:, 0].long()
    assert found.tolist() == [i * N // rows for i in range(rows)]


@pytest.mark.parametrize(
    "config",
    [QuantizeConfig(), QuantizeConfig(bits=3, c=2, mu=0.01, trellis=False), QuantizeConfig(recipe="paper")],
)
def test_the_same_bytes_on_one_thread_and_on_two(weights: list[Tensor], config: QuantizeConfig) -> None:
    made = []
    for count in (1, 2):
        with forced_threads(count):
            made.append(quantize(weights[0], config))
    assert_same_tensors(dict(made[0].tensors), dict(made[1].tensors))


# ---- the baselines again, in plain torch -----------------------------------------------------------------------------


def min_max(w: Tensor, mask: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """W' and its step per weight: one symmetric grid per group for the weights of ``mask``, exact scales."""
    N, K = w.shape
    top = 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(torch.where(mask, w, 0.0), (0, -K % group_size)).reshape(N, -1, group_size)
    step = (padded.abs().amax(2, keepdim=True) / top).expand_as(padded)
    codes = torch.where(step > 0, padded / step, 0.0).round().clamp(-top, top)
    return tuple(x.reshape(N, -1)[:, :K] for x in (codes * step, step))  # type: ignore[return-value]


def assert_close_but_for_ties(w: Tensor, ours: Tensor, expected: Tensor, step: Tensor, bits: int) -> None:
    """A stored scale is off by a float16 rounding, 2**-11, so levels move by that much of themselves, and a weight that
    close to the middle of two levels may take the other."""
    moved = 2**-11 * 2 ** (bits - 1) * 1.01
    nearest_midpoint = ((w / step).abs().frac() - 0.5).abs()
    decided = (nearest_midpoint > moved) & (step > 0)
    assert decided.double().mean() > 0.95
    difference = (ours - expected).abs()
    assert (difference[decided] <= moved * step[decided]).all()
    assert (difference <= (1 + moved) * step).all()


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("group_size", [128, 96])
def test_rtn_is_symmetric_rounding(weights: list[Tensor], bits: int, group_size: int) -> None:
    for w in weights[:2]:
        q = quantize(w, QuantizeConfig(recipe="rtn", bits=bits, group_size=group_size))
        exact = w.double()
        expected, step = min_max(exact, torch.ones_like(exact, dtype=torch.bool), bits, group_size)
        assert_close_but_for_ties(exact, q.dequantize().double(), expected, step, bits)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3, 1.0])
def test_paper_is_two_symmetric_grids_per_group(weights: list[Tensor], bits: int, alpha: float) -> None:
    for w in weights[:2]:
        q = quantize(w, QuantizeConfig(recipe="paper", bits=bits, alpha=alpha))
        exact = w.double()
        k = int(alpha * w.numel() + 0.5)
        magnitudes = exact.abs().flatten().sort(descending=True).values
        # Ties of a 16-bit model survive together; zeros never do.
        mask = (exact.abs() >= magnitudes[k - 1]) & (exact != 0) if k else torch.zeros_like(exact, dtype=torch.bool)
        found = outlier_mask(q)
        assert found is not None
        assert torch.equal(found, mask)
        rest, rest_step = min_max(exact, ~mask, bits, 128)
        top, top_step = min_max(exact, mask, bits, 128)
        expected, step = torch.where(mask, top, rest), torch.where(mask, top_step, rest_step)
        assert_close_but_for_ties(exact, q.dequantize().double(), expected, step, bits)


@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
@pytest.mark.parametrize("normalize", ["none", "row", "group"])
def test_paper_with_any_scope_and_score(scope: str, normalize: str) -> None:
    w = student_t(9, 300).bfloat16()
    q = quantize(w, QuantizeConfig(recipe="paper", bits=3, group_size=64, scope=scope, normalize=normalize))
    mask = salient(w, 0.05, scope, 64, normalize)
    codes, *rest = ops.quantize_split(w, mask, 3, 64)
    names = ["weight_packed", "weight_scale", "weight_row_scale", "weight_outlier_scale", "weight_outlier_mask"]
    for name, want in zip(names, [ops.pack(codes, 3), *rest], strict=True):
        assert torch.equal(q.tensors[name], want), name


# ---- the published loop ----------------------------------------------------------------------------------------------

ALPHAS = [0.0, 1e-6, 0.01, 0.05, 0.5, 0.999, 1.0]


def heavy_tails() -> Tensor:
    return torch.tan((torch.rand(32, 65, generator=generator(5)) - 0.5) * 3.1415)  # nearly Cauchy


def half_zero() -> Tensor:
    w = student_t(32, 65)
    w[:, ::2] = 0
    return w


MATRICES = {
    "heavy tails": heavy_tails(),
    "half of it zero": half_zero(),
    "all zero": torch.zeros(4, 9),
    "ties": (student_t(32, 65) * 100).round(),
    "all equal": torch.full((4, 9), -0.3),
    "one weight": torch.tensor([[0.7]]),
    "bfloat16": student_t(32, 65).bfloat16(),
    "float16, tiny": (student_t(32, 65) * 1e-5).half(),
    "float32, tiny": student_t(32, 65) * 1e-34,
    "float32, huge": student_t(32, 65) * 1e36,
}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", sorted(MATRICES))
def test_the_explicit_loop_gives_the_mask_of_the_exact_threshold(name: str, alpha: float) -> None:
    w = MATRICES[name]
    assert torch.equal(w.double().square() > shrink_lam(w, alpha), salient(w, alpha))


@given(
    st.lists(st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-15 else 0.0), min_size=1, max_size=40),
    st.floats(0, 1),
    st.sampled_from([0.1, 0.5, 0.9]),
)  # fmt: skip
def test_the_loop_on_any_weights_with_any_factor(values: list[float], alpha: float, factor: float) -> None:
    w = torch.tensor([values])
    assert torch.equal(w.double().square() > shrink_lam(w, alpha, factor), salient(w, alpha))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5,), "alpha must lie in"),
        ((-0.1,), "alpha"),
        ((0.1, 1.0), "factor must lie in"),
        ((0.5, 0.5, 1), "within 1 steps"),
    ],
)
def test_the_loop_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"shrink_lam: .*{message}"):
        shrink_lam(torch.tensor([[1.0, 0.1, 0.01]]), *arguments)


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("shape", [(600, 1024), (1, 100_003)])
def test_figures_and_grids_do_not_depend_on_threads(shape: tuple[int, int], trellis: bool) -> None:
    """Large enough that torch would split its own sums over threads."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(5)).pow(3)
    config = QuantizeConfig(group_size=8, trellis=trellis)
    found = []
    for threads in (1, 2, 4):
        with forced_threads(threads):
            grid = fit_set_grid([w], config)
            found.append((grid, measure(w, quantize_weight(w, config, grid))))
    for grid, figures in found[1:]:
        assert torch.equal(grid, found[0][0])
        assert figures == found[0][1]
