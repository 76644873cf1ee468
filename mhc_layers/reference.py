"""The whole layer in slow torch, one function per equation of the mHC paper.

Everything else in this package is compared with this file. Nothing here is fused, cached or dispatched; every
function works in the dtype of its inputs, so that float64 inputs give the oracle. Shapes: ``...`` tokens, n streams,
C channels. Equation numbers are those of arXiv 2512.24880v2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_layers.conventions import PAPER, Convention

__all__ = [
    "Coefficients",
    "apply_site",
    "coefficients",
    "compose",
    "dynamic_hc_coefficients",
    "eq3_next_streams",
    "eq5_hc_logits",
    "eq7_mhc_logits",
    "eq8_post",
    "eq8_pre",
    "eq9_sinkhorn_knopp",
    "flatten_streams",
    "hc_head",
    "root_mean_square",
    "sinkhorn_damped",
]


class Coefficients(NamedTuple):
    """The three maps of a site: ``h_pre (..., n)``, ``h_post (..., n)``, ``h_res (..., n, n)``."""

    h_pre: Tensor
    h_post: Tensor
    h_res: Tensor


def flatten_streams(x: Tensor) -> Tensor:
    """``vec(X)``: streams ``(..., n, C)`` to ``(..., n * C)``, stream-major, index ``i * C + c``."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def root_mean_square(x: Tensor, convention: Convention = PAPER) -> Tensor:
    """Eq. 15: ``r = ||x|| / sqrt(nC)`` over the last axis, kept, with the convention's epsilon."""
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    if convention.norm_eps_place == "inside":
        return torch.sqrt(mean_square + convention.norm_eps)
    return torch.sqrt(mean_square) + convention.norm_eps


def eq7_mhc_logits(
    x: Tensor, phi: Tensor, bias: Tensor, alphas: tuple[Tensor, Tensor, Tensor], convention: Convention = PAPER
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 in the order of Eq. 14-16: project the streams, divide by r, scale by the gates, add the bias.

    ``x (..., n, C)``, ``phi ((n + 2) n, n C)``, ``bias ((n + 2) n)``; returns the logits of pre ``(..., n)``, of
    post ``(..., n)`` and of the residual block ``(..., n, n)`` as it is stored.
    """
    n = x.shape[-2]
    vec = flatten_streams(x)
    r = root_mean_square(vec, convention)
    pre, post, res = (vec @ phi.mT).split([n, n, phi.shape[0] - 2 * n], dim=-1)
    bias_pre, bias_post, bias_res = bias.split([n, n, bias.shape[0] - 2 * n])
    pre = alphas[0] * pre / r + bias_pre
    post = alphas[1] * post / r + bias_post
    res = alphas[2] * res / r + bias_res
    return pre, post, res.reshape(*res.shape[:-1], n, n)


def eq8_pre(logits: Tensor, convention: Convention = PAPER) -> Tensor:
    """Eq. 8 and 17: ``h_pre = sigmoid(logits)``, plus the convention's ``eps_pre``."""
    return torch.sigmoid(logits) + convention.eps_pre


def eq8_post(logits: Tensor, convention: Convention = PAPER) -> Tensor:
    """Eq. 8 and 18: ``h_post = 2 sigmoid(logits)``; the 2 is the convention's ``post_multiplier``."""
    return convention.post_multiplier * torch.sigmoid(logits)


def eq9_sinkhorn_knopp(logits: Tensor, num_iters: int = 20, first: str = "columns") -> Tensor:
    """Eq. 9 and 19: exponentiate, then ``num_iters`` times divide one side by its sums and then the other.

    Divisions are subtractions of logarithms, since ``exp(logits)`` may overflow; only the last one is a division.
    """
    axes = (-2, -1) if first == "columns" else (-1, -2)
    log_matrix = logits
    for _ in range(num_iters - 1):
        for axis in axes:
            log_matrix = log_matrix - torch.logsumexp(log_matrix, dim=axis, keepdim=True)
    log_matrix = log_matrix - torch.logsumexp(log_matrix, dim=axes[0], keepdim=True)
    return torch.softmax(log_matrix, dim=axes[1])


def sinkhorn_damped(
    logits: Tensor, num_iters: int = 20, first: str = "rows", eps_start: float = 1e-6, eps_den: float = 1e-6
) -> Tensor:
    """DeepSeek-V4's recurrence: softmax over the first side, plus eps, then alternate with damped divisors."""
    axes = (-2, -1) if first == "columns" else (-1, -2)
    matrix = torch.softmax(logits, dim=axes[0]) + eps_start
    matrix = matrix / (matrix.sum(dim=axes[1], keepdim=True) + eps_den)
    for _ in range(num_iters - 1):
        for axis in axes:
            matrix = matrix / (matrix.sum(dim=axis, keepdim=True) + eps_den)
    return matrix


def residual_map(logits: Tensor, convention: Convention = PAPER) -> Tensor:
    """Return the operator ``h_res`` of stored logits ``(..., n, n)``, whatever their orientation."""
    if convention.start == "exp":
        stored = eq9_sinkhorn_knopp(logits, convention.num_iters, convention.stored_first)
    else:
        stored = sinkhorn_damped(
            logits, convention.num_iters, convention.stored_first, convention.eps_start, convention.eps_den
        )
    return stored.mT if convention.transposed else stored


def coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, alphas: tuple[Tensor, Tensor, Tensor], convention: Convention = PAPER
) -> Coefficients:
    """Eq. 7-9: the three maps of the mHC layer for streams ``x (..., n, C)``."""
    pre, post, res = eq7_mhc_logits(x, phi, bias, alphas, convention)
    return Coefficients(eq8_pre(pre, convention), eq8_post(post, convention), residual_map(res, convention))


def eq5_hc_logits(x: Tensor, theta: Tensor, norm_eps: float) -> Tensor:
    """The dynamic part of Eq. 5: ``tanh(theta x~^T)`` with each stream normalised on its own.

    ``theta (n + 2, C)`` holds the rows pre, post and res (one per output stream); returns ``(..., n + 2, n)``, with
    the input stream last.
    """
    normed = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + norm_eps)
    return torch.tanh(theta @ normed.mT)


def dynamic_hc_coefficients(
    x: Tensor, theta: Tensor, bias: Tensor, alphas: tuple[Tensor, Tensor, Tensor], norm_eps: float = 1e-6
) -> Coefficients:
    """Eq. 5 (Hyper-Connections, arXiv 2409.19606): free maps, each ``alpha tanh(theta x~^T) + b``."""
    n = x.shape[-2]
    dynamic = eq5_hc_logits(x, theta, norm_eps)
    bias_pre, bias_post, bias_res = bias.split([n, n, n * n])
    return Coefficients(
        alphas[0] * dynamic[..., 0, :] + bias_pre,
        alphas[1] * dynamic[..., 1, :] + bias_post,
        alphas[2] * dynamic[..., 2:, :] + bias_res.reshape(n, n),
    )


def read(x: Tensor, h_pre: Tensor) -> Tensor:
    """``u = sum_i h_pre[i] x[i]``: the sublayer's input ``(..., C)``."""
    return (h_pre[..., :, None] * x).sum(dim=-2)


def eq3_next_streams(x: Tensor, f: Tensor, h_res: Tensor, h_post: Tensor) -> Tensor:
    """Eq. 3 after the sublayer: ``x_next[o] = sum_i h_res[o, i] x[i] + h_post[o] f``."""
    return (h_res[..., :, :, None] * x[..., None, :, :]).sum(dim=-2) + h_post[..., :, None] * f[..., None, :]


def apply_site(
    x: Tensor,
    sublayer: torch.nn.Module,
    phi: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    convention: Convention = PAPER,
) -> Tensor:
    """Eq. 3: one whole site, streams ``(..., n, C)`` to streams of the same shape."""
    h_pre, h_post, h_res = coefficients(x, phi, bias, alphas, convention)
    return eq3_next_streams(x, sublayer(read(x, h_pre)), h_res, h_post)


def compose(matrices: Tensor) -> Tensor:
    """The product in Eq. 4: ``matrices (L, ..., n, n)`` in depth order, the last one acting last."""
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    return product


def hc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, convention: Convention) -> Tensor:
    """DeepSeek-V4's readout: sigmoid weights plus ``eps_pre``, no projection; ``(..., n, C)`` to ``(..., C)``."""
    vec = flatten_streams(x)
    weights = torch.sigmoid(scale * (vec @ fn.mT) / root_mean_square(vec, convention) + base) + convention.eps_pre
    return read(x, weights)
