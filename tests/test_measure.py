"""SQNR, KL, share of outliers: by numpy, and the properties that make them worth reporting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from shapes import HARD_MATRICES, gaussian, generator, student_t
from test_qtensor import quantize
from torch import Tensor

from precal_ext import QTensor, QuantizeConfig, WeightSpec, ops
from precal_ext.measure import kl_nats, measure, outlier_mask, sqnr_db

CONFIGS = [
    QuantizeConfig(),
    QuantizeConfig(bits=3, c=4, group_size=32),
    QuantizeConfig(bits=3, trellis=False),
    QuantizeConfig(c=0, grid="uniform"),
    QuantizeConfig(recipe="paper"),
    QuantizeConfig(recipe="rtn", bits=3),
]
IDS = ["precal", "precal c=4", "precal plain", "uniform", "paper", "rtn"]


# ---- SQNR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sqnr_by_numpy(config: QuantizeConfig, dtype: torch.dtype) -> None:
    w = student_t(33, 300).to(dtype)
    q = quantize(w, config)
    a, b = w.double().numpy(), q.dequantize().double().numpy()
    figures = measure(w, q)
    assert figures.power == pytest.approx(np.sum(a**2), rel=1e-12)
    assert figures.noise == pytest.approx(np.sum((a - b) ** 2), rel=1e-9)  # W - W' is rounded to float32
    assert figures.sqnr_db == pytest.approx(10 * math.log10(np.sum(a**2) / np.sum((a - b) ** 2)), rel=1e-9)
    assert figures.bits_per_weight == q.spec.bits_per_weight()


@pytest.mark.parametrize(
    ("power", "noise", "expected"), [(1.0, 0.01, 20.0), (0.0, 0.0, math.inf), (1.0, 0.0, math.inf)]
)
def test_sqnr_at_its_ends(power: float, noise: float, expected: float) -> None:
    assert sqnr_db(power, noise) == pytest.approx(expected)


def test_noise_without_power_has_no_sqnr() -> None:
    assert math.isnan(sqnr_db(0.0, 1.0))


# ---- outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [44, 300, 2048, 2304])  # 2304: segments of 288 = 256 + 32
@pytest.mark.parametrize("c", [1, 2])
def test_outlier_mask_against_a_loop(K: int, c: int) -> None:
    w = student_t(3, K)
    w[1] = 0  # entries that are not used must not mark column 0 of their block
    q = quantize(w, QuantizeConfig(c=c))
    index, value = q.tensors["weight_outlier_index"], q.tensors["weight_outlier_value"]
    expected = torch.zeros(3, K, dtype=torch.bool)
    for n in range(3):
        for b, (begin, _) in enumerate(reference.outlier_blocks(K)):
            for i in range(c):
                if value[n, b, i] != 0:
                    expected[n, begin + int(index[n, b, i])] = True
    found = outlier_mask(q)
    assert found is not None
    assert torch.equal(found, expected)
    assert not found[1].any()
    assert measure(w, q).salient_share == expected.sum().item() / expected.numel()


def test_outlier_mask_of_the_paper_recipe_is_the_salient_share() -> None:
    w = student_t(16, 300)
    q = quantize(w, QuantizeConfig(recipe="paper", alpha=0.05))
    found = outlier_mask(q)
    assert found is not None
    assert found.sum() == math.floor(0.05 * w.numel() + 0.5)
    assert w.abs()[found].min() > w.abs()[~found].max()
    assert measure(w, q).salient_share == found.sum().item() / w.numel()


@pytest.mark.parametrize("config", [QuantizeConfig(c=0), QuantizeConfig(recipe="rtn")], ids=["c=0", "rtn"])
def test_without_outliers_there_is_no_mask(config: QuantizeConfig) -> None:
    q = quantize(gaussian(4, 300), config)
    assert outlier_mask(q) is None
    assert measure(gaussian(4, 300), q).salient_share == 0


# ---- KL --------------------------------------------------------------------------------------------------------------


def uniform_qtensor(w: Tensor, bits: int) -> QTensor:
    """Codes on a uniform grid of step 1, so that w is in units of levels."""
    spec = WeightSpec.from_config(*w.shape, QuantizeConfig(recipe="rtn", bits=bits, group_size=w.shape[1]))
    half = 2 ** (bits - 1)
    codes = (w.round() + half).clamp(0, 2 * half - 1).to(torch.uint8)
    tensors = {
        "weight_packed": ops.pack(codes, bits),
        "weight_scale": torch.ones(len(w), 1, dtype=torch.float16),
        "weight_row_scale": torch.ones(len(w), dtype=torch.bfloat16),
        "weight_shape": torch.tensor(w.shape),
    }
    return QTensor(spec, tensors)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("kind", sorted(HARD_MATRICES))
def test_kl_is_finite_and_never_negative(config: QuantizeConfig, kind: str) -> None:
    w = HARD_MATRICES[kind](9, 300)
    kl = kl_nats(w, quantize(w, config))
    assert math.isfinite(kl)
    assert kl >= 0


def test_kl_of_weights_spread_evenly_over_their_cells_is_the_bias_alone() -> None:
    w = torch.rand(256, 256, generator=generator(1)) * 15 - 7.5  # 15 whole cells of a 4-bit grid
    kl = kl_nats(w, uniform_qtensor(w, 4))
    # 2048 bins over [-16, 16], 15 * 64 of them occupied; a histogram of n draws has a bias of (bins - cells) / 2n.
    bias = (15 * 64 - 15) / (2 * w.numel())
    assert kl == pytest.approx(bias, rel=0.2)


def test_kl_grows_with_coarser_grids() -> None:
    w = gaussian(256, 1024)
    for trellis, factor in ((False, 10), (True, 5)):
        found = [kl_nats(w, quantize(w, QuantizeConfig(bits=bits, trellis=trellis))) for bits in (6, 5, 4, 3, 2)]
        assert found == sorted(found)
        assert found[-1] > factor * found[0]


def test_kl_does_not_see_outliers() -> None:
    w = gaussian(32, 256)
    q = quantize(w, QuantizeConfig())
    mask = outlier_mask(q)
    assert mask is not None
    assert mask.any()
    # A hundred times larger, they keep their places, and the rest keeps its scales.
    larger = torch.where(mask, w * 100, w)
    assert kl_nats(larger, quantize(larger, QuantizeConfig())) == kl_nats(w, q)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize(("shape", "bins"), [((7, 300), 256), ((64, 512), 1024), ((256, 512), 2048)])
def test_kl_is_the_estimator_of_the_docstring(config: QuantizeConfig, shape: tuple[int, int], bins: int) -> None:
    """Again, by the float64 reference: bins from the number of weights, one scale per group, cells spread evenly."""
    w = student_t(*shape)
    q = quantize(w, config)
    spec, t = q.spec, q.tensors
    half = float(2**spec.bits) if spec.uniform else 256.0
    columns = reference.group_of_column(spec.K, spec.group_size)
    scales = reference.scale_values(t["weight_scale"])
    mask = outlier_mask(q)
    units = (t["weight_row_scale"].float()[:, None] * scales.float())[:, columns]
    if spec.split:
        assert mask is not None
        salient = (t["weight_row_scale"].float()[:, None] * t["weight_outlier_scale"].float())[:, columns]
        units = torch.where(mask, salient, units)
        mask = None
    x = w / units
    keep = units != 0 if mask is None else (units != 0) & ~mask
    index = reference.level_index(reference.unpack(t["weight_packed"], spec.bits, spec.K), spec.trellis)
    label, count = (index[keep][None], spec.grid_size) if spec.trellis else (None, 1)
    counts, _ = reference.histogram(x[keep][None], bins, -half, half, label=label, num_labels=count)
    levels = reference.levels_of(t.get("weight_grid"), spec.bits).clamp(min=-127).to(torch.int8)
    p = counts.sum(0) if spec.trellis else counts
    expected = reference.kl_divergence(p, reference.spread_codes(counts, -half, half, levels))
    assert kl_nats(w, q) == pytest.approx(expected, rel=1e-9, abs=1e-12)
