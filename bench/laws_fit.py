"""Fits and validates the predictor of `precal predict` on the rows of `scaling_laws.py`. Needs scikit-learn
(`pip install 'precal[predict]'`).

Every variant is validated by leaving out one family after the other. Of the forests within 5 % of the least mean
absolute error there, on rises below a nat, the one with the fewest features is fitted to all families and shipped.
Models that are held out are in no fit and choose nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recipes import facts
from rows import Row

from precal_ext.forecast import COVERAGE
from precal_ext.forest import Forest, write_forest
from precal_ext.landscape import read_profile
from precal_ext.outlook import TRACE_RADIUS
from precal_ext.predict import FEATURES, LEAST, LEAST_TRACE, log_rise

TREES, LEAF = 100, 3
FAR = 1e30
NEAR = 1.05  # of two errors that are so near, the one of fewer features is preferred
CLOSED = {  # rises that need no fit
    "radial profile read off": "radial_nats",
    "linearity theorem": "theorem_nats",
    "profile at the length by a_l": "weighted_nats",
    "profile at the length by the Hessian's diagonal, and slope": "shaped_nats",
    "profile at the length by the curvature along the error, and slope": "along_nats",
}
PAPER = ("log10_parameters", "nll_nats", "bits", "log2_group", "power_of_two_scales", "gptq", "sqnr_mean_db")
PAPER += ("sqnr_min_db",)
LOCAL = ("gptq", "shrinkage", "log_along", "log_gptq_gain", "radial_over_along", "shaped_over_along")
RISING = ("log_radial", "log_theorem", "log_weighted", "log_shaped", "log_along")
BASE, THEOREM = FEATURES.index("log_along"), FEATURES.index("log_theorem")


@dataclass(frozen=True)
class Variant:
    """A way to predict: which features, which learner, what it learns, and which share of that is believed."""

    name: str
    features: tuple[str, ...] = FEATURES
    target: str = "log"  # "delta", "log": log(delta + LEAST), "ratio": that minus log_along
    learner: str = "forest"
    share: float = 1.0

    def fit(self, x: np.ndarray, delta: np.ndarray) -> Any:
        return learner(self.learner, self.features).fit(x[:, self.columns], self.encode(x, delta))

    def predict(self, fitted: Any, x: np.ndarray) -> np.ndarray:
        """Rises in nats."""
        y = fitted.predict(x[:, self.columns])
        if self.target == "delta":
            return y
        return np.exp(self.share * y + (x[:, BASE] if self.target == "ratio" else 0)) - LEAST

    def encode(self, x: np.ndarray, delta: np.ndarray) -> np.ndarray:
        if self.target == "delta":
            return delta
        return logarithm(delta) - (x[:, BASE] if self.target == "ratio" else 0)

    @property
    def columns(self) -> list[int]:
        return [FEATURES.index(name) for name in self.features]


def logarithm(delta: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(delta, 0) + LEAST)


def learner(name: str, features: Sequence[str]) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor

    if name == "forest":
        return RandomForestRegressor(
            n_estimators=TREES, min_samples_leaf=LEAF, max_features=0.5, random_state=0, n_jobs=1
        )
    rising = [int(f in RISING) for f in features]
    return HistGradientBoostingRegressor(
        learning_rate=0.05, max_iter=200, max_leaf_nodes=15, min_samples_leaf=5, monotonic_cst=rising, random_state=0
    )


VARIANTS = [
    Variant("SQNR alone (forest)", ("sqnr_mean_db",)),
    Variant("forest: size, loss, SQNR, format; of the logarithm", PAPER),
    Variant("forest: all features, of the rise", target="delta"),
    Variant("forest: all features, of the logarithm"),
    Variant("forest: all features, of the ratio to the last closed form", target="ratio"),
    Variant("forest: all features, half of the ratio", target="ratio", share=0.5),
    Variant("forest: features of the error alone, of the ratio", LOCAL, target="ratio"),
    Variant("forest: features of the error alone, half of the ratio", LOCAL, target="ratio", share=0.5),
    Variant("monotone boosting: all features, of the logarithm", learner="boosting"),
    Variant("monotone boosting: all features, half of the ratio", target="ratio", learner="boosting", share=0.5),
]


def matrix(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """FEATURES float32 [rows, F] and true rises."""
    x = np.array([[r["features"][name] for name in FEATURES] for r in rows], dtype=np.float32)
    return x, np.array([r["delta_nll_nats"] for r in rows])


def across_families(rows: Sequence[Row], run: Callable[[Sequence[Row], Sequence[Row]], np.ndarray]) -> np.ndarray:
    """What is predicted of every row by a fit to the other families."""
    found = np.zeros(len(rows))
    for family in dict.fromkeys(r["family"] for r in rows):
        test = [i for i, r in enumerate(rows) if r["family"] == family]
        found[test] = run([r for r in rows if r["family"] != family], [rows[i] for i in test])
    return found


def scores(rows: Sequence[Row], predicted: np.ndarray) -> dict[str, dict[str, float]]:
    """R^2 and mean absolute error on the rows with a true rise below a nat: all, those after GPTQ, the others."""
    delta = np.array([r["delta_nll_nats"] for r in rows])
    gptq = np.array([r["format"].endswith("+gptq") for r in rows], dtype=bool)
    found = {}
    for name, mask in (("all", delta < 1), ("gptq", (delta < 1) & gptq), ("others", (delta < 1) & ~gptq)):
        true, said = delta[mask], predicted[mask]
        spread = float(((true - true.mean()) ** 2).sum()) if len(true) else 0.0
        found[name] = {
            "rows": len(true),
            "r2": 1 - float(((true - said) ** 2).sum()) / spread if spread else math.nan,
            "mae_nats": float(np.abs(true - said).mean()) if len(true) else math.nan,
        }
    return found


def to_forest(
    fitted: Any,
    variant: Variant,
    x: np.ndarray,
    width: tuple[float, float],
    rival: tuple[float, float, float] = (0.0, -FAR, FAR),
) -> Forest:
    """A fitted forest as arrays. Thresholds become the float32 below: for float32 inputs that asks the same."""
    columns = np.array(variant.columns)
    parts: dict[str, list[np.ndarray]] = {key: [] for key in ("feature", "threshold", "left", "right", "value")}
    start = [0]
    for estimator in fitted.estimators_:
        tree = estimator.tree_
        leaf, first = tree.children_left < 0, start[-1]
        threshold = tree.threshold.astype(np.float32)
        above = threshold.astype(np.float64) > tree.threshold
        threshold[above] = np.nextafter(threshold[above], np.float32(-np.inf))
        parts["feature"].append(np.where(leaf, -1, columns[np.maximum(tree.feature, 0)]).astype(np.int16))
        parts["threshold"].append(np.where(leaf, 0, threshold).astype(np.float32))
        parts["left"].append(np.where(leaf, 0, tree.children_left + first).astype(np.int32))
        parts["right"].append(np.where(leaf, 0, tree.children_right + first).astype(np.int32))
        parts["value"].append(np.where(leaf, variant.share * tree.value[:, 0, 0], 0).astype(np.float32))
        start.append(first + tree.node_count)
    arrays: dict[str, Any] = {key: np.concatenate(part) for key, part in parts.items()}
    low, high = np.full(len(FEATURES), -FAR), np.full(len(FEATURES), FAR)  # what it does not see cannot lie outside
    low[columns], high[columns] = x.min(0)[columns], x.max(0)[columns]
    arrays |= {"start": np.array(start, dtype=np.int32), "low": low.astype(np.float32), "high": high.astype(np.float32)}
    arrays["base"] = np.array(BASE if variant.target == "ratio" else -1, dtype=np.int32)
    arrays["width"] = np.array(width, dtype=np.float32)
    arrays["rival"] = np.array(rival, dtype=np.float32)
    return Forest(FEATURES, arrays)


def interval_width(rows: Sequence[Row], variant: Variant) -> tuple[float, float]:
    """Conformal: the factor and the floor with which intervals hold 90 % of the rows of families that are left out."""
    spread, miss = np.zeros(len(rows)), np.zeros(len(rows))
    for family in dict.fromkeys(r["family"] for r in rows):
        x, delta = matrix([r for r in rows if r["family"] != family])
        forest = to_forest(variant.fit(x, delta), variant, x, (0.0, 0.0))
        test = [i for i, r in enumerate(rows) if r["family"] == family]
        x, delta = matrix([rows[i] for i in test])
        spread[test] = forest.trees(x).std(0)
        miss[test] = np.abs(forest.predict(x)[1] - logarithm(delta))
    floor = float(np.median(spread))
    return float(np.quantile(miss / (spread + floor), COVERAGE)), floor


def theorem_range(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Half the conformal interval of the linearity theorem, and the range of what it said. It needs no fit, so all rows
    are left out; but those after GPTQ, of which it knows nothing."""
    x, delta = matrix(plain(rows))
    said = x[:, THEOREM].astype(float)
    miss = np.abs(said - logarithm(delta))
    return float(np.quantile(miss, COVERAGE)), float(said.min()), float(said.max())


def plain(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if not r["format"].endswith("+gptq")]


def without_gradients(row: Row) -> Row:
    """The row as ``forecast_plan`` would have it: the trace read off the profile, not by Hutchinson's estimator."""
    f, profile = dict(row["features"]), row["profile"]
    trace = max(profile[row["radii"].index(TRACE_RADIUS)] / TRACE_RADIUS**2, LEAST_TRACE)
    gain, first = math.exp(f["log_gptq_gain"]), 0.0 if f["gptq"] else f["slope_nats"]
    found = {"along": row["curvature_along_nats"], "shaped": row["diagonal_nats"] - f["slope_nats"]}
    rises = {}
    for name, second in found.items():
        length = math.sqrt(max(second * gain / trace, 0.0))
        rises[f"{name}_nats"] = read_profile(row["radii"], profile, length) + first
        f[f"log_{name}"] = log_rise(rises[f"{name}_nats"])
    f["radial_over_along"] = f["log_radial"] - f["log_along"]
    f["shaped_over_along"] = f["log_shaped"] - f["log_along"]
    return {**row, **rises, "features": {**f, "log_trace": math.log(trace)}}


def certainty(rows: Sequence[Row], forest: Forest) -> Row:
    """The predictor and the theorem on rows without GPTQ: shares that lie in the intervals, medians of the factor up to
    their ends, how often the predictor's is the narrower one, and the share in the narrower."""
    rows = [without_gradients(r) for r in plain(rows)]
    x, delta = matrix(rows)
    y = logarithm(delta)
    low, _, high, _ = forest.predict(x)
    ends = np.array([forest.of_rival(float(v))[:2] for v in x[:, THEOREM]])
    ours, theirs = (low <= y) & (y <= high), (ends[:, 0] <= y) & (y <= ends[:, 1])
    half, rival = (high - low) / 2, (ends[:, 1] - ends[:, 0]) / 2
    narrower = half <= rival
    return {
        "rows": len(rows),
        "predictor": {"covered": float(ours.mean()), "factor": float(np.exp(np.median(half)))},
        "theorem": {"covered": float(theirs.mean()), "factor": float(np.exp(np.median(rival)))},
        "predictor_narrower": float(narrower.mean()),
        "covered": float(np.where(narrower, ours, theirs).mean()),
    }


def covered(rows: Sequence[Row], forest: Forest) -> float:
    """Share of the rows whose true rise lies in the interval."""
    x, delta = matrix(rows)
    low, _, high, _ = forest.predict(x)
    y = logarithm(delta)
    return float(((low <= y) & (y <= high)).mean())


def fit_all(source: Path, out: Path, predictor: Path) -> None:
    data = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows, held = [r for r in data if not r["held_out"]], [r for r in data if r["held_out"]]
    found: list[Row] = []

    def record(name: str, kind: str, families: np.ndarray, others: np.ndarray) -> None:
        found.append(
            {"predictor": name, "kind": kind, "families": scores(rows, families), "held_out": scores(held, others)}
        )

    for name, key in CLOSED.items():
        record(name, "closed", *(np.array([r[key] for r in part]) for part in (rows, held)))
    said = (np.array([without_gradients(r)["along_nats"] for r in part]) for part in (rows, held))
    record("the last, the trace read off the profile", "closed", *said)
    for variant in VARIANTS:

        def run(train: Sequence[Row], test: Sequence[Row], variant: Variant = variant) -> np.ndarray:
            fitted = variant.fit(*matrix(train))
            return variant.predict(fitted, matrix(test)[0])

        record(variant.name, variant.learner, across_families(rows, run), run(rows, held))
    able = {v.name: v for v in VARIANTS if v.learner == "forest" and v.target != "delta"}
    errors = {r["predictor"]: r["families"]["all"]["mae_nats"] for r in found if r["predictor"] in able}
    near = [name for name, error in errors.items() if error <= NEAR * min(errors.values())]
    variant = able[min(near, key=lambda name: (len(able[name].features), errors[name]))]
    x, delta = matrix(rows)
    width = interval_width(rows, variant)
    rival = theorem_range(rows)
    forest = to_forest(variant.fit(x, delta), variant, x, width, rival)

    def apart(family: str) -> Forest:
        x, delta = matrix([r for r in rows if r["family"] != family])
        return to_forest(variant.fit(x, delta), variant, x, width, rival)

    families = list(dict.fromkeys(r["family"] for r in rows))
    sure = {f: certainty([r for r in rows if r["family"] == f], apart(f)) for f in families}
    sure |= {n: certainty([r for r in held if r["model"] == n], forest) for n in _models(held)}
    write_forest(predictor, forest)
    names = sorted({r["model"] for r in rows})
    summary = {
        "predictor": "shipped",
        "kind": "shipped",
        "variant": variant.name,
        "nodes": len(forest.arrays["feature"]),
        "models": names,
        "rows": len(rows),
        "width": width,
        "theorem": rival,
        "certainty": sure,
        "covered_held_out": {n: covered([r for r in held if r["model"] == n], forest) for n in _models(held)},
        "held_out_models": {
            n: scores(part := [r for r in held if r["model"] == n], _said(forest, part)) for n in _models(held)
        },
        "left_out_families": {
            f: scores(
                part := [r for r in rows if r["family"] == f],
                variant.predict(variant.fit(*matrix([r for r in rows if r["family"] != f])), matrix(part)[0]),
            )
            for f in families
        },
    }
    found.append(summary)
    made = facts("bench/scaling_laws.py")
    out.write_text("".join(json.dumps({**row, **made}) + "\n" for row in found), encoding="utf-8")
    for row in found[:-1]:
        a, b = row["families"]["all"], row["held_out"]["all"]
        print(
            f"{row['predictor']:52} families R2 {a['r2']:7.3f} MAE {a['mae_nats']:.4f}   "
            f"held out R2 {b['r2']:7.3f} MAE {b['mae_nats']:.4f}"
        )
    print(json.dumps(summary, indent=1))


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in rows))


def _said(forest: Forest, rows: Sequence[Row]) -> np.ndarray:
    return np.exp(forest.predict(matrix(rows)[0])[1]) - LEAST
