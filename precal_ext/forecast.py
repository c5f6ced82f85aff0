"""What a plan says of the loss that it leads to: two predictions with their intervals, and which of them is used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

COVERAGE = 0.9  # of the intervals


@dataclass(frozen=True)
class Figure:
    """A rise of NLL in nats per token, its interval, and which of its inputs lie beyond what it was fitted on."""

    rise_nats: float
    low_nats: float
    high_nats: float
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """The loss of a model that is quantized by a plan, on a text.

    Args:
        text: its file's name.  tokens: predicted ones.  nll_nats: loss of the model as it is.
        runs: over the text, that it took.
        used: "predictor" or "theorem", the one whose interval is narrower, as a ratio of rises.
        predictor: ``precal predict``'s.  theorem: sum a_l t_l^2.
    """

    text: str
    tokens: int
    nll_nats: float
    runs: int
    used: str
    predictor: Figure
    theorem: Figure

    @property
    def figure(self) -> Figure:
        """The one that is used."""
        found: Figure = getattr(self, self.used)
        return found

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        other = "theorem" if self.used == "predictor" else "predictor"
        said = {"predictor": "the predictor", "theorem": "the theorem"}
        f = self.figure
        found = [
            f"on {self.text}: NLL {self.nll_nats:.4f} -> {self.nll_nats + f.rise_nats:.4f} nats per token, a rise of "
            f"{_shown(f)}, by {said[self.used]}, which is more certain here; {said[other]}: "
            f"{_shown(getattr(self, other))}"
        ]
        for name in ("predictor", "theorem"):
            if outside := getattr(self, name).outside:
                found.append(f"beyond what {said[name]} was fitted on, so its interval is wider: {', '.join(outside)}")
        return found


def _shown(f: Figure) -> str:
    return f"{f.rise_nats:.4g} ({COVERAGE:.0%}: {f.low_nats:.4g} to {f.high_nats:.4g})"
