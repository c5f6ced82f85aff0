"""Every op again: in float64 (float32 where an op is specified to the bit), short, independent of the C++ code."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

OUTLIER_UNIT = 128.0
MAX_E4M3 = 0x7E


# ---- number formats and layout ---------------------------------------------------------------------------------------


def e4m3_values() -> Tensor:
    """float64 [256]: the value of every code; NaN for 0x7F and 0xFF."""
    values = []
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        values.append(math.nan if code & 0x7F == 0x7F else -value if code & 0x80 else value)
    return torch.tensor(values, dtype=torch.float64)


def scale_values(scale: Tensor) -> Tensor:
    """Group scales, e4m3 bits or float16, as float64."""
    return e4m3_values()[scale.long()] if scale.dtype == torch.uint8 else scale.double()


def bf16_values(bits: np.ndarray) -> Tensor:
    """bfloat16 as uint16 bits, the way numpy carries it, to float64."""
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)).double()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def outlier_blocks(K: int, segment: int = 0) -> list[tuple[int, int]]:
    """[begin, end) of each block: 256 columns, restarting at every segment, by default every eighth of K where K is a
    multiple of 256."""
    segment = segment or (K // 8 if K >= 2048 and K % 256 == 0 else K)
    return [
        (begin, min(begin + 256, start + segment))
        for start in range(0, K, max(segment, 1))
        for begin in range(start, start + segment, 256)
    ]


def pack(codes: Tensor, bits: int) -> Tensor:
    """One little-endian bit stream per row: the row is the integer sum(code[k] << (k * bits))."""
    N, K = codes.shape
    words = ceil_div(K * bits, 32)
    rows = []
    for row in codes.tolist():
        digits = "".join(format(code, f"0{bits}b") for code in reversed(row))
        rows.append(int(digits or "0", 2).to_bytes(words * 4, "little"))
    return torch.from_numpy(np.frombuffer(b"".join(rows), "<i4").reshape(N, words).copy())


def unpack(packed: Tensor, bits: int, K: int) -> Tensor:
    rows = []
    for row in packed.numpy():
        stream = int.from_bytes(row.tobytes(), "little")
        rows.append([(stream >> (k * bits)) & (2**bits - 1) for k in range(K)])
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(packed), K)


def group_of_column(K: int, group_size: int) -> Tensor:
    return torch.arange(K) // group_size


# ---- salience --------------------------------------------------------------------------------------------------------


def soft_threshold(w: Tensor, lam: float) -> Tensor:
    """sign(w) * max(|w| - lam / |w|, 0), written as (w^2 - lam) / w: w^2 is exact in double and nothing cancels."""
    x = w.double()
    out = torch.where(x * x > lam, (x * x - lam) / x, torch.zeros_like(x))
    return torch.where(torch.isfinite(x), out, x).float().to(w.dtype)


def units(shape: tuple[int, int], scope: str, group_size: int) -> list[tuple[slice, slice]]:
    """The parts of a matrix that share a threshold, in the order of ``lam.flatten()``."""
    N, K = shape
    if scope == "tensor":
        return [(slice(0, N), slice(0, K))]
    size = K if scope == "row" else group_size
    return [(slice(n, n + 1), slice(k, k + size)) for n in range(N) for k in range(0, K, max(size, 1))]


def salience_score(w: Tensor, normalize: str, group_size: int) -> Tensor:
    """float32: w, or (w - mean) / std of its row or group, 0 where the std is 0."""
    if normalize == "none":
        return w.float()
    score = torch.empty(w.shape, dtype=torch.float32)
    for unit in units(tuple(w.shape), normalize, group_size):
        x = w[unit].double()
        deviation = ((x - x.mean()) ** 2).mean().sqrt()
        score[unit] = ((x - x.mean()) / deviation).float() if deviation > 0 else 0.0
    return score


def salience_threshold(w: Tensor, alpha: float, scope: str, group_size: int, normalize: str) -> Tensor:
    """float64, flat: by sorting."""
    score = salience_score(w, normalize, group_size)
    result = []
    for unit in units(tuple(w.shape), scope, group_size):
        magnitudes = np.sort(score[unit].abs().flatten().numpy())[::-1]
        k = math.floor(alpha * len(magnitudes) + 0.5)
        if len(magnitudes) == 0 or (k > 0 and magnitudes[k - 1] == 0):
            result.append(0.0)
        elif k == 0:
            result.append(float(magnitudes[0]) ** 2)
        else:
            result.append(float(np.nextafter(magnitudes[k - 1], np.float32(0))) ** 2)
    return torch.tensor(result, dtype=torch.float64)


def salience_mask(w: Tensor, lam: Tensor, scope: str, group_size: int, normalize: str) -> Tensor:
    square = salience_score(w, normalize, group_size).double() ** 2
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for limit, unit in zip(lam.flatten(), units(tuple(w.shape), scope, group_size), strict=True):
        mask[unit] = square[unit] > limit
    return mask


# ---- histograms and grids --------------------------------------------------------------------------------------------


def histogram(
    w: Tensor,
    num_bins: int,
    lo: float,
    hi: float,
    divisor: Tensor | None = None,
    weight: Tensor | None = None,
    group_size: int = 128,
    label: Tensor | None = None,
    num_labels: int = 1,
) -> tuple[Tensor, Tensor]:
    N, K = w.shape
    if label is not None:
        parts = [histogram(w.float().masked_fill(label != i, math.nan), num_bins, lo, hi, divisor, weight, group_size)
                 for i in range(num_labels)]  # fmt: skip
        _, outside = histogram(w, num_bins, lo, hi, divisor, weight, group_size)
        return torch.stack([counts for counts, _ in parts]), outside
    columns = group_of_column(K, group_size)
    x = w.float() if divisor is None else w.float() / divisor[:, columns]
    mass = torch.ones(N, K, dtype=torch.int64) if weight is None else weight[:, columns]
    x, mass = x.double().flatten().numpy(), mass.flatten().numpy()
    edges = lo + np.arange(num_bins + 1) * ((hi - lo) / num_bins)
    inside = (x >= lo) & (x <= hi)
    bins = np.minimum(np.searchsorted(edges, x[inside], side="right") - 1, num_bins - 1)
    counts = np.zeros(num_bins, np.int64)
    np.add.at(counts, bins, mass[inside])
    outside = [int(mass[x < lo].sum()), int(mass[x > hi].sum()), int(mass[np.isnan(x)].sum())]
    return torch.from_numpy(counts), torch.tensor(outside)


def cell_of_bin(num_bins: int, lo: float, hi: float, grid: Tensor) -> np.ndarray:
    """The code of a weight at the centre of each bin: the number of midpoints of neighbouring levels below it."""
    levels = grid.flatten().double().numpy()
    centres = lo + (np.arange(num_bins) + 0.5) * ((hi - lo) / num_bins)
    return (centres[:, None] > (levels[1:] + levels[:-1]) / 2).sum(1)


def spread_codes(counts: Tensor, lo: float, hi: float, grid: Tensor) -> Tensor:
    if counts.dim() == 2:  # by code: each from its first to its last occupied bin
        total = np.zeros(counts.shape[1])
        for row in counts.double().numpy():
            bins = np.flatnonzero(row)
            if len(bins):
                total[bins[0] : bins[-1] + 1] += row.sum() / (bins[-1] - bins[0] + 1)
        return torch.from_numpy(total)
    mass = counts.double().numpy()
    occupied = np.flatnonzero(mass)
    density = np.zeros_like(mass)
    if len(occupied):
        hull = np.zeros(len(mass), bool)
        hull[occupied[0] : occupied[-1] + 1] = True
        cells = cell_of_bin(len(mass), lo, hi, grid)
        for code in np.unique(cells[hull]):
            cell = hull & (cells == code)
            density[cell] = mass[cell].mean()
    return torch.from_numpy(density)


def kl_divergence(p: Tensor, q: Tensor, smoothing: float = 0.0) -> float:
    """Sum of P log(P / Q) in nats; exact rational arithmetic would be the only shorter way to say it."""
    a, b = (p.double() + smoothing).tolist(), (q.double() + smoothing).tolist()
    scale_a, scale_b = max(a), max(b)
    if scale_a == 0 or scale_b == 0:
        return 0.0 if scale_a == scale_b else math.inf
    log_a, log_b = (math.log(math.fsum(m / s for m in masses)) for masses, s in ((a, scale_a), (b, scale_b)))
    terms = []
    for x, y in zip(a, b, strict=True):
        if x > 0 and y == 0:
            return math.inf
        if x > 0:
            log_p = math.log(x) - math.log(scale_a) - log_a
            log_q = math.log(y) - math.log(scale_b) - log_b
            terms.append(math.exp(log_p) * (log_p - log_q))
    return math.fsum(terms)


def grid_objective(counts: Tensor, lo: float, hi: float, grid: Tensor, mu: float) -> float:
    """What ``fit_grid`` minimises: relative squared error + mu * KL(P || spread_codes)."""
    p = counts.double().numpy() / counts.sum().item()
    centres = lo + (np.arange(len(p)) + 0.5) * ((hi - lo) / len(p))
    levels = grid.flatten().double().numpy()[cell_of_bin(len(p), lo, hi, grid)]
    error = float((p * (centres - levels) ** 2).sum() / (p * centres**2).sum())
    return error + mu * kl_divergence(counts, spread_codes(counts, lo, hi, grid)) if mu else error


# ---- weights ---------------------------------------------------------------------------------------------------------


def levels_of(grid: Tensor | None, bits: int) -> Tensor:
    """float64 [2^bits], or [2^(bits+1)] of a trellis."""
    return torch.arange(2**bits).double() - 2 ** (bits - 1) if grid is None else grid.flatten().double()


def level_index(codes: Tensor, trellis: bool, segment: int = 0) -> Tensor:
    """int64 [N, K]: the level of each code. In a trellis the two codes before it in its block have a say."""
    index = codes.long()
    if not trellis:
        return index
    result = torch.empty_like(index)
    for begin, end in outlier_blocks(codes.shape[1], segment):
        state = torch.zeros(2, len(codes), dtype=torch.int64)  # low bits of the code before and of the one before that
        for k in range(begin, end):
            result[:, k] = 2 * (index[:, k] ^ state[1]) + state[0]
            state = torch.stack([index[:, k] & 1, state[0]])
    return result


def trellis_quantize(
    v: Tensor, dense: Tensor, t: Tensor, levels: Tensor, group_size: int, search: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Scales and codes by the rules of csrc/cpu/trellis-inl.h, each row for itself.

    Args:
        v: float32 [N, K], weights in units of the row scale.  dense: bool [N, K], false for outliers.
        t: float32 [N, G], scale at which the extreme weight of a group meets the peak.  levels: float64 [2^(bits+1)].
    Returns:
        codes and e4m3 bits of the scales, uint8.
    """
    N, K = v.shape
    f32, rows, starts = np.float32, np.arange(N), {begin for begin, _ in outlier_blocks(K)}
    grid, values = levels.numpy().astype(np.int64), e4m3_values().numpy().astype(f32)
    top = int(grid[0] if abs(grid[0]) > abs(grid[-1]) else grid[-1])

    shift = 0
    while shift < 4 and (grid[-1] - grid[0]) * 2 ** (shift + 1) <= 8 * (len(grid) - 1):
        shift += 1
    doublings = 0
    while doublings < 8 and abs(top) * (128 >> doublings) > 32767 * 0.9375 * float(f32(search[0])):
        doublings += 1
    width = 4 if shift == 0 else 2
    lower = width * np.arange(-256 // width, 256 // width)  # edges of the cells, in levels
    subsets = grid.reshape(-1, 4).T  # [4, 2^(bits-1)]
    # twice the midpoints of neighbours below twice the centre
    index = (subsets[:, None, 1:] + subsets[:, None, :-1] < (2 * lower + width)[None, :, None]).sum(2)  # [4, cells]
    nearest = np.take_along_axis(subsets, index, 1)
    distance = np.clip((lower - nearest) * 2**shift, -127, 127 - width * 2**shift)

    reach = np.zeros(t.shape, f32)  # a
    for g in range(t.shape[1]):
        columns = slice(g * group_size, (g + 1) * group_size)
        reach[:, g] = np.where(dense[:, columns], v[:, columns].abs(), 0).max(1)
    of_column = group_of_column(K, group_size).numpy()
    limited = np.maximum(reach, f32(2**-20))
    numbers = np.rint(np.clip(v.numpy() * (f32(32767) / limited)[:, of_column], f32(-32767), f32(32767))).astype(int)
    counts = dense.numpy() & (reach > 0)[:, of_column]

    def multiplier(code: np.ndarray, g: int) -> np.ndarray:
        s = np.abs(values[code])
        unit = f32(2 ** (22 - doublings)) / f32(32767)
        m = np.rint(np.minimum(limited[:, g] * unit / np.where(s > 0, s, f32(1)), f32(32767)))
        return np.where(s > 0, np.sign(values[code]) * m, 0).astype(int)

    def cells(k: int, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of column k: number of the cell, and v / s beyond its lower edge in 1/128 of a level."""
        x = (numbers[:, k] * m + 2**14) >> 15
        for _ in range(doublings):
            x = np.clip(2 * x, -32768, 32767)
        return (x >> (9 if width == 4 else 8)) + len(lower) // 2, x & (128 * width - 1)

    def extend(cost: np.ndarray, g: int, m: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Costs [N, 4] after group g, relative to the least; the least; and for each column where its states came from,
        [N, 4] states."""
        history, total, run = [], np.zeros(N, f32), 0
        begin, end = g * group_size, min(K, (g + 1) * group_size)
        for k in range(begin, end):
            origin = np.zeros((N, 4), np.int64)
            if k in starts:
                origin[:] = cost.argmin(1)[:, None]  # numpy's argmin is the first
                cost = np.concatenate([cost.min(1, keepdims=True), np.full((N, 3), 65535)], 1)
                run = 0
            cell, rest = cells(k, m)
            e = distance[:, cell].T * 256 + rest[:, None] * 2 ** (shift + 1)
            error = np.where(counts[:, k, None], (e * e + 2**14) >> 15, 0)
            following = np.empty((N, 4), np.int64)
            for state in range(4):
                bit, previous = state & 1, state >> 1
                ways = []
                for before in (0, 1):
                    z = 2 * (bit ^ before) + previous
                    ways.append(np.minimum(cost[:, previous + 2 * before] + error[:, z], 65535))
                following[:, state] = np.minimum(*ways)
                if k not in starts:
                    origin[:, state] = previous + 2 * (ways[1] < ways[0])
            cost, run = following, run + 1
            history.append(origin)
            if run == 16 or k + 1 == end or k + 1 in starts:
                total += cost.min(1).astype(f32)
                cost, run = cost - cost.min(1, keepdims=True), 0
        return cost, total, history

    cost, chosen, scales = np.zeros((N, 4), f32), np.zeros((N, t.shape[1]), np.int64), []
    history: list[np.ndarray] = []
    sign = (t.numpy() < 0) * 0x80
    bounds = [(t.abs() * bound).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(int) for bound in search]
    for g in range(t.shape[1]):
        first = np.where(t[:, g] != 0, np.maximum(bounds[0][:, g], 1), 0)
        last = np.where(t[:, g] != 0, np.maximum(bounds[1][:, g], first), 0)

        def attempt(code: np.ndarray, g: int = g, cost: np.ndarray = cost) -> tuple[np.ndarray, ...]:
            square = np.where(values[code] != 0, values[code] * values[code], f32(1))[:, None]
            begin = np.rint(np.minimum(cost / square, f32(65535))).astype(np.int64)
            units, total, origins = extend(begin, g, multiplier(code, g))
            end = np.where(units == 65535, f32(np.inf), units.astype(f32) * square)
            return end.astype(f32), total * square[:, 0], origins

        least = np.full(N, np.inf, f32)
        for i in range(int((last - first).max()) + 1):
            code = np.minimum(first + i, last) | np.where(t[:, g] != 0, sign[:, g], 0)
            total = attempt(code)[1]
            better = total < least
            least, chosen[:, g] = np.where(better, total, least), np.where(better, code, chosen[:, g])
        cost, _, origins = attempt(chosen[:, g])
        history += origins
        scales.append(multiplier(chosen[:, g], g))
    codes, state = np.zeros((N, K), np.uint8), cost.argmin(1)
    for k in reversed(range(K)):
        since = k - max(begin for begin in starts if begin <= k)
        origin = history[k][rows, state]
        bit, previous = state & 1, state >> 1 if since > 0 else np.zeros_like(state)
        before = origin >> 1 if since > 1 else np.zeros_like(state)
        z1 = bit ^ before
        codes[:, k] = (2 * index[2 * z1 + previous, cells(k, scales[k // group_size])[0]] + z1) ^ before
        state = origin if since == 0 else previous + 2 * before
    return torch.from_numpy(codes), torch.from_numpy(chosen.astype(np.uint8))


def dequantize(
    packed: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    grid: Tensor | None,
    outlier_index: Tensor | None,
    outlier_value: Tensor | None,
    outlier_scale: Tensor | None,
    outlier_mask: Tensor | None,
    K: int,
    bits: int,
    group_size: int,
    segment: int = 0,
) -> Tensor:
    """float32, to the bit: products and sums are exact in float64 here, so the two ``.float()`` are the two roundings
    of the format."""
    columns = group_of_column(K, group_size)
    scales = scale_values(scale)[:, columns]
    if outlier_mask is not None:
        salient = np.unpackbits(outlier_mask.numpy(), axis=1, bitorder="little")[:, :K].astype(bool)
        scales = torch.where(torch.from_numpy(salient), scale_values(outlier_scale)[:, columns], scales)
    levels = levels_of(grid, bits)
    w = scales * levels[level_index(unpack(packed, bits, K), len(levels) == 2 ** (bits + 1), segment)]
    if outlier_index is not None:
        for b, (begin, _) in enumerate(outlier_blocks(K, segment)):
            for i in range(outlier_index.shape[2]):
                k = begin + outlier_index[:, b, i].long()
                w[torch.arange(len(w)), k] += OUTLIER_UNIT * e4m3_values()[outlier_value[:, b, i].long()]
    return (row_scale.double()[:, None] * w.float().double()).float()


def measure(
    w: Tensor,
    packed: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    grid: Tensor | None,
    outlier_index: Tensor | None,
    outlier_value: Tensor | None,
    outlier_scale: Tensor | None,
    outlier_mask: Tensor | None,
    K: int,
    bits: int,
    group_size: int,
    num_bins: int,
    half: float,
    segment: int = 0,
) -> tuple[Tensor, Tensor]:
    outliers = (outlier_index, outlier_value, outlier_scale, outlier_mask)
    dense = dequantize(packed, scale, row_scale, grid, *outliers, K, bits, group_size, segment)
    columns = group_of_column(K, group_size)
    unit = (row_scale.float()[:, None] * scale_values(scale).float())[:, columns]
    if outlier_mask is not None:
        salient = torch.from_numpy(np.unpackbits(outlier_mask.numpy(), axis=1, bitorder="little")[:, :K].astype(bool))
        other = (row_scale.float()[:, None] * scale_values(outlier_scale).float())[:, columns]
        unit = torch.where(salient, other, unit)
    x = torch.where(unit == 0, math.nan, w.float() / unit)
    if outlier_index is not None:
        for b, (begin, end) in enumerate(outlier_blocks(K, segment)):
            for n, i in np.ndindex(len(w), outlier_index.shape[2]):
                if outlier_value[n, b, i] & 0x7F and begin + int(outlier_index[n, b, i]) < end:
                    x[n, begin + int(outlier_index[n, b, i])] = math.nan
    levels = len(levels_of(grid, bits))
    labels = levels if levels == 2 ** (bits + 1) else 1
    label = level_index(unpack(packed, bits, K), True, segment) if labels > 1 else None
    counts, _ = histogram(x, num_bins, -half, half, label=label, num_labels=labels)
    noise = (dense - w.float()).double().square().sum(1)
    return counts.reshape(labels, num_bins), torch.stack([w.double().square().sum(1), noise], 1)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ w.double().T
    return y if bias is None else y + bias.double()


def sqnr_db(w: Tensor, approximation: Tensor) -> float:
    w = w.double()
    return float(10 * torch.log10((w**2).sum() / ((w - approximation.double()) ** 2).sum()))


def row_scale(base: Tensor) -> Tensor:
    """bfloat16 of the base of a row, which does not round to zero unless it is zero."""
    rounded = base.bfloat16()
    return torch.where((base > 0) & (rounded == 0), torch.tensor(1, dtype=torch.int16).view(torch.bfloat16), rounded)
