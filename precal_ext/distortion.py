"""What every setting costs a fusion set and what it loses: rate-distortion points, from the weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precal_ext.config import QuantizeConfig
from precal_ext.measure import row_parts, sqnr_db, sum_squares
from precal_ext.plan import Job, Plan
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.quantize import fit_set_grid, quantize_weight
from precal_ext.shards import why_not
from precal_ext.weights import check_finite, read_sample, read_weight

# Weights of a set that are quantized to measure a point: evenly spaced rows, shared among the members. At 2**18 the
# error of a relative squared error is below a per cent.
SAMPLE = 1 << 18


@dataclass(frozen=True)
class Setting:
    """What the planner chooses for a fusion set."""

    bits: int
    group_size: int
    c: int

    def config(self, base: QuantizeConfig) -> QuantizeConfig:
        """The whole settings of a set's modules; grids of more than 6 bits are uniform."""
        kind = {"grid": base.grid, "trellis": base.trellis} if self.bits <= 6 else {"grid": "uniform", "trellis": False}
        return base._with({"bits": self.bits, "group_size": self.group_size, "c": self.c, **kind})

    def __str__(self) -> str:
        return f"{self.bits} bits g{self.group_size} c = {self.c}"


@dataclass(frozen=True)
class Point:
    """A setting of a set.

    Args:
        stored_bits: of all its members, everything counted but the 16 bytes of each shape.
        error: t^2, the mean over the set's weights of the relative squared error |W - W'|^2 / |W|^2 of their matrices.
        worst: the largest of those of its matrices.
    """

    setting: Setting
    stored_bits: int
    error: float
    worst: float

    @property
    def lowest_sqnr_db(self) -> float:
        return sqnr_db(1.0, self.worst)


def planned_sets(plan: Plan) -> dict[str, list[Job]]:
    """Fusion sets whose settings are to be chosen -> their jobs; an output head has those of ``lm_head``."""
    found: dict[str, list[Job]] = {}
    for job in plan.jobs:
        if job.spec is None or job.decision is None or (job.decision.head and plan.config.lm_head is not None):
            continue
        found.setdefault(job.decision.fusion_set, []).append(job)
    return found


def weights_of(members: Sequence[Job]) -> int:
    return sum(job.spec.N * job.spec.K for job in members if job.spec is not None)


def stored_bits(members: Sequence[Job], settings: QuantizeConfig) -> int:
    """Bits that a set takes, by the count of ``WeightSpec.bits_per_weight``."""
    return sum(spec.stored_bits() - 128 for spec in _specs(members, settings))


def fits(members: Sequence[Job], settings: QuantizeConfig, tensor_parallel: int) -> str:
    """Why a set cannot be cut into so many slices with these settings; "" when it can."""
    specs = zip(members, _specs(members, settings), strict=True)
    return next((why for job, spec in specs if (why := why_not(job.module, spec, tensor_parallel))), "")


def _specs(members: Sequence[Job], settings: QuantizeConfig) -> list[WeightSpec]:
    return [WeightSpec.from_config(job.spec.N, job.spec.K, settings) for job in members if job.spec is not None]


def measure_points(members: Sequence[Job], settings: Mapping[Setting, QuantizeConfig]) -> list[Point]:
    """Quantize a sample of a set with each of some settings, its grid fitted as the quantizer does.

    Raises:
        CheckpointError: the sample holds a NaN or an infinity.
    """
    samples = []
    for job in members:
        w = read_sample(job.info, max(1, SAMPLE // len(members)), job.conv1d)
        if not bool(torch.isfinite(w).all()):
            check_finite(job.info, read_weight(job.info, job.conv1d), job.conv1d)
        samples.append(w)
    sizes = [weights_of([job]) for job in members]
    found = []
    for setting, config in settings.items():
        grid = fit_set_grid(samples, config)
        errors = [relative_error(w, quantize_weight(w, config, grid)) for w in samples]
        mean = math.fsum(n * e for n, e in zip(sizes, errors, strict=True)) / sum(sizes)
        found.append(Point(setting, stored_bits(members, config), mean, max(errors)))
    return found


def relative_error(w: Tensor, q: QTensor) -> float:
    """|W - W'|^2 / |W|^2, 0 for a weight that is all zero; the same for any number of threads."""
    power = noise = 0.0
    for rows, part in row_parts(q):
        original = w[rows].double()
        power += sum_squares(original)
        noise += sum_squares(original - part.dequantize())
    return noise / power if power else 0.0


def candidates(
    base: QuantizeConfig, widths: Sequence[int], group_sizes: Sequence[int], capacities: Sequence[int]
) -> dict[Setting, QuantizeConfig]:
    """Every combination that the recipe knows, with its whole settings."""
    base = base._with({})
    every = [Setting(b, g, c) for b in widths for g in group_sizes for c in capacities]
    return {setting: setting.config(base) for setting in every}
