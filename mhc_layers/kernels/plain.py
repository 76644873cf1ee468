"""The leaves of the fused layer in plain torch: the last row of every leaf's table.

They run on any device and in float64, return the same tensors as the kernels (:mod:`mhc_layers.kernels.table`), and
state the forward and the three-phase backward of a site equation by equation. They allocate freely and are not fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_layers.kernels.options import SiteOptions, padded_rows, streams_of

__all__ = [
    "broadcast_streams_backward",
    "broadcast_write_backward",
    "broadcast_write_forward",
    "finish",
    "finish_backward",
    "norm_rows",
    "project",
    "read_backward",
    "read_forward",
    "read_norm_backward",
    "read_norm_forward",
    "recompute_block",
    "reduce_slabs",
    "residual_map",
    "residual_map_backward",
    "streams_backward",
    "write_backward",
    "write_forward",
]


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def project(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Raw products ``[1, M, N]`` and sums of squares ``[1, M]``: one slab."""
    vec = _tokens(x).flatten(1).to(_wide(x, phi))
    return (vec @ phi.to(vec.dtype).mT).unsqueeze(0), vec.square().sum(1).unsqueeze(0)


def _steps(options: SiteOptions) -> list[tuple[int, float]]:
    """Axis and epsilon of every division, in order."""
    axes = (-2, -1) if options.first == "columns" else (-1, -2)
    steps = [(axis, options.eps_den) for _ in range(options.num_iters) for axis in axes]
    return steps if options.method == "knopp" else steps[1:]


def _start(logits: Tensor, options: SiteOptions) -> Tensor:
    """exp of the logits less the maximum of the first side, or the softmax over it."""
    axis = -2 if options.first == "columns" else -1
    if options.method == "knopp":
        return torch.exp(logits - logits.amax(axis, keepdim=True))
    return torch.softmax(logits, axis)


def residual_map(logits: Tensor, options: SiteOptions) -> Tensor:
    """Project stored logits ``(..., n, n)``; the result is as stored."""
    matrix = _start(logits, options)
    if options.method != "knopp":
        matrix = matrix + options.eps_start
    for axis, eps in _steps(options):
        matrix = matrix / (matrix.sum(axis, keepdim=True) + eps)
    return matrix


def residual_map_backward(logits: Tensor, grad: Tensor, options: SiteOptions) -> Tensor:
    """Exact gradient of :func:`residual_map`: y = m / s gives dm = (dy - sum(dy y)) / s along the divided axis."""
    start = _start(logits, options)
    matrix = start if options.method == "knopp" else start + options.eps_start
    history = []
    for axis, eps in _steps(options):
        total = matrix.sum(axis, keepdim=True) + eps
        matrix = matrix / total
        history.append((axis, total, matrix))
    for axis, total, result in reversed(history):
        grad = (grad - (grad * result).sum(axis, keepdim=True)) / total
    if options.method == "knopp":
        return grad * start
    axis = -2 if options.first == "columns" else -1
    return start * (grad - (grad * start).sum(axis, keepdim=True))


def finish(
    slabs: Tensor,
    squares: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    bias: Tensor,
    options: SiteOptions,
    k: int,
    lead: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the slabs and form ``coef``, ``proj`` and ``rstd`` (Eq. 15 to 19)."""
    num_rows = slabs.shape[-1]
    n = streams_of(num_rows)
    rstd = torch.rsqrt(squares.sum(0) / k + options.norm_eps)
    proj = slabs.sum(0) * rstd.unsqueeze(-1)
    pre, post, res = _logits(proj, alphas, bias, n)
    matrix = residual_map(res, options)
    h_res = matrix.mT if options.transposed else matrix
    h_pre, h_post = torch.sigmoid(pre) + options.eps_pre, options.post_multiplier * torch.sigmoid(post)
    coef = torch.cat([h_pre, h_post, h_res.flatten(-2)], -1)
    return coef.view(*lead, num_rows), proj.view(*lead, num_rows), rstd.view(lead)


def _logits(proj: Tensor, alphas: tuple[Tensor, Tensor, Tensor], bias: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 16: alpha times the normalised projections, plus the bias."""
    pre, post, res = proj.split([n, n, n * n], -1)
    bias_pre, bias_post, bias_res = bias.split([n, n, n * n])
    res = alphas[2] * res + bias_res
    return alphas[0] * pre + bias_pre, alphas[1] * post + bias_post, res.unflatten(-1, (n, n))


def _copied(x: Tensor, copies: int) -> Tensor:
    """The streams that the only one of ``x (..., 1, C)`` stands for."""
    return x if copies == 1 else x.expand(*x.shape[:-2], copies, -1)


def read_forward(x: Tensor, coef: Tensor, *, copies: int = 1) -> Tensor:
    """``u = sum_i h_pre[i] x[i]``; ``coef`` starts with h_pre. One stream may stand for ``copies`` equal ones."""
    x = _copied(x, copies)
    h_pre = coef[..., : x.shape[-2]].unsqueeze(-1)
    return (h_pre * x.to(_wide(x, coef))).sum(-2).to(x.dtype)


def write_forward(x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    """``x'[o] = sum_i h_res[o, i] x[i] + h_post[o] f``."""
    n = x.shape[-2]
    h_post, h_res = coef[..., n : 2 * n], coef[..., 2 * n :].unflatten(-1, (n, n))
    dtype = _wide(x, coef)
    return (h_res @ x.to(dtype) + h_post.unsqueeze(-1) * f.to(dtype).unsqueeze(-2)).to(x.dtype)


def write_backward(
    g: Tensor, x: Tensor, f: Tensor, proj: Tensor, alpha_post: Tensor, bias: Tensor, options: SiteOptions
) -> tuple[Tensor, Tensor]:
    """Phase A: ``df = sum_o h_post[o] g[o]``, ``dh_post[o] = <g[o], f>``, ``dh_res[o, i] = <g[o], x[i]>``."""
    n = x.shape[-2]
    dtype = _wide(x, proj)
    h_post = options.post_multiplier * torch.sigmoid(alpha_post * proj[..., n : 2 * n] + bias[n : 2 * n])
    wide = g.to(dtype)
    df = (h_post.unsqueeze(-1) * wide).sum(-2).to(f.dtype)
    dh_post = (wide * f.to(dtype).unsqueeze(-2)).sum(-1)
    dh_res = wide @ x.to(dtype).mT
    return df, torch.cat([torch.zeros_like(dh_post), dh_post, dh_res.flatten(-2)], -1)


def read_backward(gu: Tensor, x: Tensor) -> Tensor:
    """Phase B1: ``dots[i] = <du, x[i]>``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(dtype) * gu.to(dtype).unsqueeze(-2)).sum(-1)


def finish_backward(
    proj: Tensor,
    rstd: Tensor,
    dcoef: Tensor,
    dots: Tensor | None,
    alphas: tuple[Tensor, Tensor, Tensor],
    bias: Tensor,
    options: SiteOptions,
    k: int,
    stream_dtype: torch.dtype,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint of the coefficients: ``mix [M, n, n + 2]``, ``dz [M, 1, PAD(N)]`` and partials ``[1, PAD(N) + 4]``."""
    num_rows = proj.shape[-1]
    n = streams_of(num_rows)
    padded = padded_rows(num_rows)
    proj, rstd, dcoef = proj.reshape(-1, num_rows), rstd.reshape(-1), dcoef.reshape(-1, num_rows)
    pre, post, res = _logits(proj, alphas, bias, n)
    s_pre, s_post = torch.sigmoid(pre), torch.sigmoid(post)
    matrix = residual_map(res, options)
    h_res = matrix.mT if options.transposed else matrix
    d_pre, d_post, d_res = dcoef.split([n, n, n * n], -1)
    if dots is not None:
        d_pre = d_pre + dots.reshape(-1, n)
    d_res = d_res.unflatten(-1, (n, n))
    dl_res = residual_map_backward(res, d_res.mT if options.transposed else d_res, options)
    dl_post = d_post * options.post_multiplier * s_post * (1 - s_post)
    dl = torch.cat([d_pre * s_pre * (1 - s_pre), dl_post, dl_res.flatten(-2)], -1)
    gates = torch.cat([alphas[0].expand(n), alphas[1].expand(n), alphas[2].expand(n * n)])
    dz = gates * dl * rstd.unsqueeze(-1)
    rc = -(gates * dl * proj).sum(-1) * rstd.square() / k
    h_read = s_pre + options.eps_pre if read is None else read.reshape(-1, n)
    mix = torch.cat([h_res.mT, h_read.unsqueeze(-1), rc[:, None, None].expand(-1, n, 1)], -1)
    dalpha = [(dl * proj).sum(0)[rows].sum().reshape(1) for rows in (slice(n), slice(n, 2 * n), slice(2 * n, None))]
    params = proj.new_zeros(1, padded + 4)
    params[0, :num_rows] = dl.sum(0)
    params[0, padded : padded + 3] = torch.cat(dalpha)
    return mix, torch.nn.functional.pad(dz, (0, padded - num_rows)).unsqueeze(1), params


def streams_backward(
    x: Tensor, g: Tensor | None, gu: Tensor | None, mix: Tensor, dz: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """Phase B2: ``dx[i] = sum_o h_res[o, i] g[o] + h_pre[i] du + (dz phi)[i] + rc x[i]``, a slab ``dphi = dz^T x``."""
    num_rows = phi.shape[0]
    n = x.shape[-2]
    wide = _tokens(x).to(mix.dtype)
    dz = dz.to(mix.dtype).sum(1)[:, :num_rows]
    dx = (dz @ phi.to(mix.dtype)).view_as(wide) + mix[:, :, n + 1, None] * wide
    if g is not None:
        dx = dx + mix[:, :, :n] @ _tokens(g).to(mix.dtype)
    if gu is not None:
        dx = dx + mix[:, :, n, None] * gu.reshape(-1, 1, gu.shape[-1]).to(mix.dtype)
    return dx.to(x.dtype).view_as(x), (dz.mT @ wide.flatten(1)).unsqueeze(0)


def recompute_block(
    x: Tensor, fs: list[Tensor], coefs: list[Tensor], reads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Streams that entered every site of a block but the first, and the inputs of all its sublayers."""
    xs, us = [], [read_forward(x, reads[0])]
    for f, coef, read in zip(fs, coefs, reads[1:], strict=True):
        x = write_forward(x, f, coef)
        xs.append(x)
        us.append(read_forward(x, read))
    return xs, us


def reduce_slabs(slabs: Tensor | tuple[Tensor, Tensor], params: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the slabs, or the first and the others, and over the partials."""
    dphi = slabs[0] + slabs[1].sum(0) if isinstance(slabs, tuple) else slabs.sum(0)
    return dphi, params.sum(0)


def norm_rows(u: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``u / sqrt(mean(u^2) + eps) * weight``, rounded once to the dtype of u, and one over the root."""
    wide = u.to(_wide(u, weight))
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * inverse.unsqueeze(-1) * weight).to(u.dtype), inverse


def read_norm_forward(x: Tensor, coef: Tensor, weight: Tensor, eps: float, *, copies: int = 1) -> tuple[Tensor, Tensor]:
    """:func:`read_forward`, then the norm of what it returned."""
    return norm_rows(read_forward(x, coef, copies=copies), weight, eps)


def read_norm_backward(
    gv: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    proj: Tensor,
    alpha_pre: Tensor,
    bias: Tensor,
    options: SiteOptions,
    read: Tensor | None = None,
    *,
    copies: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Phase B1 through the norm: ``du = s (a - s^2 <a, u> u / C)`` with ``a = weight dv``; ``<du, x[i]>``; dweight."""
    x = _copied(x, copies)
    n, dim = x.shape[-2:]
    if read is None:
        read = torch.sigmoid(alpha_pre * proj[..., :n] + bias[:n]) + options.eps_pre
    u = read_forward(x, read).to(proj.dtype)
    wide, scale = gv.to(proj.dtype), inverse.unsqueeze(-1)
    a = wide * weight
    du = scale * (a - scale.square() * (a * u).sum(-1, keepdim=True) / dim * u)
    dots = (x.to(proj.dtype) * du.unsqueeze(-2)).sum(-1)
    return du.to(gv.dtype), dots, (wide * u * scale).flatten(0, -2).sum(0)


def broadcast_write_forward(e: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    """:func:`write_forward` of n copies of ``e (..., 1, C)``."""
    return write_forward(_copied(e, streams_of(coef.shape[-1])), f, coef)


def broadcast_write_backward(
    g: Tensor, e: Tensor, f: Tensor, proj: Tensor, alpha_post: Tensor, bias: Tensor, options: SiteOptions
) -> tuple[Tensor, Tensor]:
    """:func:`write_backward` of n copies: ``dh_res[o, i] = <g[o], e>`` for every i."""
    return write_backward(g, _copied(e, g.shape[-2]), f, proj, alpha_post, bias, options)


def broadcast_streams_backward(
    e: Tensor, g: Tensor | None, gu: Tensor | None, mix: Tensor, dz: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum over n equal streams of dx, and dphi summed over them; ``phi (N, C)`` is summed as well."""
    num_rows, dim = phi.shape
    n = streams_of(num_rows)
    wide, dz = e.reshape(-1, dim).to(mix.dtype), dz.to(mix.dtype).sum(1)[:, :num_rows]
    de = dz @ phi.to(mix.dtype) + mix[:, 0, n + 1, None] * wide
    if g is not None:
        de = de + (mix[:, :, :n].sum(1).unsqueeze(1) @ _tokens(g).to(mix.dtype)).squeeze(1)
    if gu is not None:
        de = de + mix[:, :, n].sum(1, keepdim=True) * gu.reshape(-1, dim).to(mix.dtype)
    return de.to(e.dtype).view_as(e), (dz.mT @ wide).unsqueeze(0)
