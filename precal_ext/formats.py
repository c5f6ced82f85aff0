"""Formats of a model's weights by their names, and what each makes of a model in memory.

    mxint{bits}_{block}    microscaling integers, round-to-nearest          mxint4_32
    mxfp4                  microscaling E2M1, blocks of 32
    precal{bits}_g{group}[_c{outliers}]    the default recipe               precal4_g64, precal3_g16_c0
    rtn{bits}_g{group}     round-to-nearest under float16 scales            rtn4_g128

A microscaling integer format followed by ``+gptq`` is that format after GPTQ, which needs text to make: nothing here
makes it, but ``predict`` says what it would lose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from precal_ext.config import QuantizeConfig
from precal_ext.inplace import Quantizing
from precal_ext.mx import MXFormat, fake_quantize, parse_mx
from precal_ext.qtensor import WeightSpec
from precal_ext.select import decide
from precal_ext.sites import Site, find_sites, heads_of, tied_of

GPTQ = "+gptq"
_OURS = re.compile(r"(precal|rtn)(\d{1,4})_g(\d{1,9})(?:_c(\d{1,4}))?")
EXAMPLES = "mxint4_32, mxint4_32+gptq, mxfp4, precal4_g64, precal3_g32_c2, rtn4_g128"


@dataclass(frozen=True)
class Format:
    """What weights become.

    Args:
        how: a microscaling format, or settings of precal.  gptq: whether GPTQ decides the codes.
    """

    name: str
    how: MXFormat | QuantizeConfig
    gptq: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.how.bits

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        if isinstance(self.how, MXFormat):
            return self.how.block
        assert self.how.group_size is not None
        return self.how.group_size

    def stored_bits(self, N: int, K: int) -> float:
        """Of a weight [N, K], everything counted."""
        if isinstance(self.how, MXFormat):
            return N * K * self.how.bits_per_weight(K)
        return float(WeightSpec.from_config(N, K, self.how).stored_bits())


def parse_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: no format is called so.
    """
    plain = name.removesuffix(GPTQ)
    gptq = plain != name
    mx = parse_mx(plain)
    if mx is not None and not (gptq and mx.floating):
        return Format(name, mx, gptq)
    found = _OURS.fullmatch(plain)
    if found and not gptq:
        c = {} if found[4] is None else {"c": int(found[4])}
        fields: dict[str, Any] = {"recipe": found[1], "bits": int(found[2]), "group_size": int(found[3]), **c}
        return Format(name, QuantizeConfig(**fields))
    raise ValueError(f"formats: a name must be one like {EXAMPLES}, got {name!r}")


def weight_sites(model: nn.Module) -> dict[str, Site]:
    """The weights of a model that precal quantizes when nobody says otherwise, by module."""
    sites = find_sites(model)
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    conv1d = {name for name, site in sites.items() if site.conv1d}
    found = decide(sites, QuantizeConfig(), heads_of(model, sites), tied_of(model, sites), model_type, conv1d)
    return {d.module: sites[d.module] for d in found if d.quantized}


def quantized_weights(model: nn.Module, fmt: Format) -> Iterator[tuple[str, Tensor]]:
    """Module and W' float32 [N, K] of every weight of ``weight_sites``; the model stays as it is. Of a format with
    ``+gptq`` it is what round-to-nearest gives."""
    if isinstance(fmt.how, MXFormat):
        for name, site in weight_sites(model).items():
            yield name, fake_quantize(site.weight().contiguous(), fmt.how)
        return
    work = Quantizing(model, fmt.how)
    for parameter in work.pending:
        for name, q in work.take(parameter).items():
            yield name, q.dequantize()
