"""What was done to every tensor, with figures; it is returned, printed, and stored beside the weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from precal_ext._version import __version__
from precal_ext.config import QuantizeConfig
from precal_ext.measure import Figures, sqnr_db
from precal_ext.mixtures import block_of, is_expert

REPORT_NAME = "precal_report.json"


@dataclass(frozen=True)
class Entry:
    """One tensor. ``figures`` and ``settings`` are None unless it was quantized."""

    tensor: str
    action: str  # "quantize", "keep" (a linear left alone) or "copy" (anything else)
    reason: str
    shape: tuple[int, ...]
    dtype: str
    fusion_set: str | None = None
    settings: dict[str, Any] | None = None
    figures: Figures | None = None
    calibration: dict[str, Any] | None = None  # tokens seen, relative errors of the outputs on them; or why not

    def to_record(self) -> dict[str, Any]:
        """Every field, infinities included, for the journal of an unfinished run."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> Entry:
        figures = data["figures"]
        known = {"shape": tuple(data["shape"]), "figures": None if figures is None else Figures(**figures)}
        return cls(**{**data, **known})

    def output_errors(self) -> str:
        """Relative error of the outputs on the calibration text with these codes, and with the data-free ones."""
        if self.calibration is None or "output_error" not in self.calibration:
            return "-"
        return f"{self.calibration['output_error']:.2e}, {self.calibration['output_error_before']:.2e}"

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "tensor": self.tensor,
            "action": self.action,
            "reason": self.reason,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }
        if self.figures is not None:
            data["fusion_set"] = self.fusion_set
            data["settings"] = self.settings
            # JSON has no infinity: an exact tensor has sqnr_db null.
            data["figures"] = {k: v if math.isfinite(v) else None for k, v in self.figures.to_dict().items()}
        if self.calibration is not None:
            data["calibration"] = self.calibration
        return data


@dataclass
class Report:
    """The result of quantizing a model."""

    config: QuantizeConfig
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    # SHA-256 of every tensor of the output by its name there (digest.sha256), for `precal verify`.
    digests: dict[str, str] = field(default_factory=dict)
    # On which text, and how; None when no data was used.
    calibration: dict[str, Any] | None = None
    # ``BitPlan.summary`` of the plan that chose the settings, None without one.
    plan: Mapping[str, Any] | None = None

    @property
    def quantized(self) -> list[Entry]:
        return [e for e in self.entries if e.figures is not None]

    def left_alone(self) -> dict[str, str]:
        """Linears that were not quantized, by tensor, and why; experts of a layer together, for the reason of one."""
        found: dict[str, str] = {}
        for e in self.entries:
            if e.action == "keep":
                found.setdefault(f"{block_of(e.tensor)}.*" if is_expert(e.tensor) else e.tensor, e.reason)
        return found

    @property
    def weights(self) -> int:
        return sum(math.prod(e.shape) for e in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, all overhead counted."""
        bits = sum(e.figures.bits_per_weight * math.prod(e.shape) for e in self.quantized if e.figures)
        return bits / self.weights if self.weights else math.nan

    @property
    def sqnr_db(self) -> float:
        """10 log10 of the summed |W|^2 over the summed |W - W'|^2 of all quantized weights."""
        figures = [e.figures for e in self.quantized if e.figures]
        return sqnr_db(sum(f.power for f in figures), sum(f.noise for f in figures))

    @property
    def kl_nats(self) -> float:
        """Mean KL of the quantized tensors, by number of weights."""
        total = sum(e.figures.kl_nats * math.prod(e.shape) for e in self.quantized if e.figures)
        return total / self.weights if self.weights else math.nan

    def published_bits(self) -> float | None:
        """The paper recipe's own count: bits + 32 / group_size + alpha * log2(group_size); None for the others."""
        c = self.config
        if not c.split or c.group_size is None or c.group_size < 1:
            return None
        return c.bits + 32 / c.group_size + c.alpha * math.log2(c.group_size)

    def summary(self) -> dict[str, Any]:
        return {
            "tensors_quantized": len(self.quantized),
            "tensors": len(self.entries),
            "weights_quantized": self.weights,
            "bits_per_weight": _finite(self.bits_per_weight),
            "published_bits_per_weight": self.published_bits(),
            "sqnr_db": _finite(self.sqnr_db),
            "kl_nats": _finite(self.kl_nats),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def to_dict(self) -> dict[str, Any]:
        """Without times, so that the same input gives the same bytes."""
        return {
            "precal_version": __version__,
            "config": self.config.to_dict(),
            **({} if self.calibration is None else {"calibration": self.calibration}),
            "summary": self.summary(),
            "notes": self.notes,
            **({} if self.plan is None else {"plan": self.plan}),
            "tensors": [e.to_dict() for e in self.entries],
            "sha256": self.digests,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_markdown(self) -> str:
        """The table of ``OUT/README.md``."""
        more = "" if self.calibration is None else " output error, before |"
        lines = [
            "| tensor | shape | bits | group | c | bits/weight | SQNR dB | KL nats |" + more,
            "|---|---|---|---|---|---|---|---|" + ("---|" if more else ""),
        ]
        for e in self.quantized:
            f, s = e.figures, e.settings or {}
            assert f is not None
            line = (
                f"| `{e.tensor}` | {e.shape[0]} x {e.shape[1]} | {s['bits']} | {s['group_size']} | {s['c']} | "
                f"{f.bits_per_weight:.3f} | {f.sqnr_db:.2f} | {f.kl_nats:.4f} |"
            )
            lines.append(line + (f" {e.output_errors()} |" if more else ""))
        kept = self.left_alone()
        if kept:
            lines += [
                "",
                "Linear layers left as they are: " + "; ".join(f"`{name}` ({why})" for name, why in kept.items()) + ".",
            ]
        return "\n".join(lines) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
