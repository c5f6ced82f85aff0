"""Textbook GPTQ (arXiv 2210.17323) for microscaling integers, for the study of scaling_laws.py: one matrix at a time.

Columns are rounded from the first to the last, and each one's error is made up for by those after it. A block's scale
is taken from its weights as they are when its turn comes, and stays. Hessians are of the full-precision model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from precal_ext.landscape import damped
from precal_ext.mx import MXFormat, block_exponents, decode, encode_under


def gptq(w: Tensor, moments: Tensor, fmt: MXFormat, damping: float = 0.01) -> Tensor:
    """W' float32 [N, K] of a weight whose inputs have X' X = ``moments`` [K, K]."""
    w, K = w.double().clone(), w.shape[1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moments, damping)))
    U = torch.linalg.cholesky(inverse, upper=True)  # row i: the inverse Hessian of columns i and later, over its root
    done = torch.empty(w.shape, dtype=torch.float32)
    for begin in range(0, K, fmt.block):
        end = min(K, begin + fmt.block)
        exponent = block_exponents(w[:, begin:end].float(), fmt)
        scales, errors = (exponent + 127).to(torch.uint8), torch.zeros(w.shape[0], end - begin, dtype=torch.float64)
        for i in range(begin, end):
            column = w[:, i : i + 1]
            done[:, i : i + 1] = decode(encode_under(column, exponent, fmt), scales, fmt)
            error = (column - done[:, i : i + 1].double()) / U[i, i]
            w[:, i + 1 : end] -= error * U[i, i + 1 : end]
            errors[:, i - begin : i - begin + 1] = error
        w[:, end:] -= errors @ U[begin:end, end:]
    return done
