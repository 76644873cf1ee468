"""The fused steps as differentiable torch calls, for gradients of gradients and for forward mode.

The same formulas as the kernels, written with :mod:`mhc_layers.kernels.plain` on the tensors of the graph, so that
autograd can differentiate them, and their backward, again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_layers._fused_state import SiteParams
from mhc_layers.kernels import plain
from mhc_layers.kernels.options import site_options

__all__ = ["post_backward_composite", "pre_backward_composite", "pre_composite"]


def pre_composite(
    x: Tensor,
    params: SiteParams,
    previous: Tensor | None,
    options: str,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``u`` (normalised where the read ends with a norm), ``coef``, ``proj`` and ``rstd``."""
    slabs, squares = plain.project(x, params.phi)
    k = x.shape[-2] * x.shape[-1]
    coef, proj, rstd = plain.finish(
        slabs, squares, params[2:], params.bias, site_options(options), k, tuple(x.shape[:-2])
    )
    return _read(x, coef if previous is None else previous, norm, norm_eps), coef, proj, rstd


def _read(x: Tensor, coef: Tensor, norm: Tensor | None, norm_eps: float) -> Tensor:
    if norm is None:
        return plain.read_forward(x, coef)
    return plain.read_norm_forward(x, coef, norm, norm_eps)[0]


def _coefficients(x: Tensor, params: SiteParams, options: str) -> Tensor:
    return pre_composite(x, params, None, options)[1]


def post_backward_composite(g: Tensor, x: Tensor, f: Tensor, params: SiteParams, options: str) -> tuple[Tensor, Tensor]:
    """``df`` and ``dcoef`` of the write, differentiable in every argument."""
    n = x.shape[-2]
    h_post = _coefficients(x, params, options)[..., n : 2 * n]
    wide = g.to(h_post.dtype)
    df = (h_post.unsqueeze(-1) * wide).sum(-2).to(f.dtype)
    dh_post = (wide * f.to(wide.dtype).unsqueeze(-2)).sum(-1)
    dh_res = wide @ x.to(wide.dtype).mT
    return df, torch.cat([torch.zeros_like(dh_post), dh_post, dh_res.flatten(-2)], -1)


def pre_backward_composite(
    gu: Tensor | None,
    g: Tensor | None,
    dcoef: Tensor | None,
    x: Tensor,
    params: SiteParams,
    previous: Tensor | None,
    options: str,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x``, the five parameters, ``previous`` and ``norm``, differentiable in every argument."""
    coef = _coefficients(x, params, options)
    n = x.shape[-2]
    outputs, grads = [], []
    if gu is not None:
        outputs.append(_read(x, coef if previous is None else previous, norm, norm_eps))
        grads.append(gu)
    if dcoef is not None:
        outputs.append(coef)
        grads.append(dcoef)
    inputs = [x, *params, previous, norm]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True) if outputs else ()
    by_input = dict(zip([id(tensor) for tensor in wanted], found, strict=False))
    dx, *rest = [None if tensor is None else by_input.get(id(tensor)) for tensor in inputs]
    if g is not None:
        h_res = coef[..., 2 * n :].unflatten(-1, (n, n))
        carried = (h_res.mT @ g.to(h_res.dtype)).to(x.dtype)
        dx = carried if dx is None else dx + carried
    return dx, *rest
