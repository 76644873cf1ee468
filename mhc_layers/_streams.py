"""The three passes over the streams, each with its gradient written out.

Left to autograd, the same mathematics keeps a float32 copy of bfloat16 streams for every product and adds three
separate gradients of the streams. Here the streams are threaded through: projection, read and write hand them on, so
that in the backward pass each adds its term to the gradient that arrives, in place, and only the streams themselves
are kept. :mod:`mhc_layers.reference` has the equations in one line each; the gradients are derived in
``docs/derivations/layer_backward``. Under ``torch.compile`` the plain steps are traced, since the compiler fuses and
recomputes by itself, and so they are in forward mode.

Shape legend: N tokens (any leading axes), n streams, C channels, K = n C, M rows of phi.
"""

from __future__ import annotations

import contextlib
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

__all__ = ["autocast_is_on", "normed_projection", "read", "without_autocast", "write"]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast is off on this device; free where it is off already."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for this device; never on the meta device, which torch has no answer for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def traces_plainly() -> bool:
    """Whether to leave the derivatives to torch: the compiler fuses by itself, and forward mode has no rule here."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0


def adds_in_place(grad: Tensor | None, dtype: torch.dtype) -> TypeGuard[Tensor]:
    """Whether a term may be added to this gradient in place: it exists, has the dtype, and nothing records it."""
    return grad is not None and grad.dtype == dtype and grad.is_contiguous() and not torch.is_grad_enabled()


def summed(term: Tensor, grad: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``grad + term``, rounded once to ``dtype``."""
    return (term if grad is None else grad.to(term.dtype) + term).to(dtype)


def project(flat: Tensor, phi: Tensor, eps: float, inside: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``z = flat phi^T / r``, ``1 / r`` and ``1 / sqrt(mean(x^2) [+ eps])``, the factor in dr/dx."""
    norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    if inside:
        inverse = inner = torch.rsqrt(norm.square() / flat.shape[-1] + eps)
    else:
        root = norm / flat.shape[-1] ** 0.5
        inverse = (root + eps).reciprocal()
        inner = torch.where(root > 0, root, 1.0).reciprocal()
    return torch.matmul(flat, phi.t()) * inverse, inverse, inner


def weighted_sum(x: Tensor, h: Tensor) -> Tensor:
    """``sum_i h[i] x[i]``, rounded once to the dtype of x."""
    with without_autocast(x.device.type):
        return torch.matmul(h.unsqueeze(-2), x.to(h.dtype)).squeeze(-2).to(x.dtype)


def mix_and_add(x: Tensor, f: Tensor, h_res: Tensor | None, h_post: Tensor) -> Tensor:
    """``sum_i h_res[o, i] x[i] + h_post[o] f``, rounded once to the dtype of x; h_res None is I."""
    with without_autocast(x.device.type):
        wide, f = x.to(h_post.dtype), f.to(h_post.dtype)
        mixed = wide if h_res is None else torch.matmul(h_res, wide)
        return torch.addcmul(mixed, h_post.unsqueeze(-1), f.unsqueeze(-2)).to(x.dtype)


class NormedProjection(Function):
    """``z = (x phi^T) / r`` with ``r = sqrt(mean(x^2) + eps)``, in the dtype of phi; hands x on.

    With ``w = dz / r`` and ``q = sum_m w_m z_m / K``: ``dx = w phi - (q / r) x`` and ``dphi = w^T x``. For an epsilon
    outside the root the second r is the root without it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, phi: Tensor, eps: float, inside: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with without_autocast(x.device.type):
            return (*project(x.flatten(-2).to(phi.dtype), phi, eps, inside), x.view_as(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, phi, ctx.eps, ctx.inside = inputs
        z, inverse, inner, _ = output
        ctx.mark_non_differentiable(inverse, inner)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, phi, z, inverse, inner)

    @staticmethod
    def backward(
        ctx: Any, dz: Tensor | None, d_inverse: None, d_inner: None, dx: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, phi, z, inverse, inner = ctx.saved_tensors
        if dz is None:
            return dx, None, None, None
        with without_autocast(x.device.type):
            flat = x.flatten(-2).to(phi.dtype)
            if torch.is_grad_enabled():  # a second derivative needs these as functions of x
                z, inverse, inner = project(flat, phi, ctx.eps, ctx.inside)
            w = dz * inverse
            radial = (w * z).sum(dim=-1, keepdim=True) * inner / -flat.shape[-1]
            rows = w.flatten(0, -2) if w.dim() > 1 else w.unsqueeze(0)
            dphi = torch.matmul(rows.t(), flat.reshape(-1, flat.shape[-1])) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, dphi, None, None
            if adds_in_place(dx, phi.dtype):
                dx.view(-1, flat.shape[-1]).addmm_(rows, phi)
                dx.view_as(flat).addcmul_(flat, radial)
            else:
                dx = summed(torch.addcmul(torch.matmul(w, phi), flat, radial).view_as(x), dx, x.dtype)
            return dx, dphi, None, None


class Read(Function):
    """``u = sum_i h[i] x[i]`` in the dtype of h, rounded once to that of x; hands x on.

    ``dh[i] = <du, x[i]>`` and ``dx[i] = h[i] du``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_sum(x, h), x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, du: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, h = ctx.saved_tensors
        if du is None:
            return dx, None
        with without_autocast(x.device.type):
            du = du.to(h.dtype)
            dh = torch.matmul(du.unsqueeze(-2), x.to(h.dtype).mT).squeeze(-2) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, dh
            if adds_in_place(dx, h.dtype):
                dx.addcmul_(h.unsqueeze(-1), du.unsqueeze(-2))
            else:
                dx = summed(h.unsqueeze(-1) * du.unsqueeze(-2), dx, x.dtype)
            return dx, dh


class Write(Function):
    """``y[o] = sum_i h_res[o, i] x[i] + h_post[o] f`` in the dtype of h_post, rounded once; h_res None is I.

    ``dx = h_res^T g``, ``df = sum_o h_post[o] g[o]``, ``dh_res[o, i] = <g[o], x[i]>``, ``dh_post[o] = <g[o], f>``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, f: Tensor, h_res: Tensor | None, h_post: Tensor) -> Tensor:
        return mix_and_add(x, f, h_res, h_post)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
        x, f, h_res, h_post = inputs
        ctx.identity = h_res is None
        ctx.save_for_backward(*((f, h_post) if h_res is None else (f, h_post, x, h_res)))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        f, h_post, *rest = ctx.saved_tensors
        with without_autocast(f.device.type):
            wide = g.to(h_post.dtype)
            df = torch.matmul(h_post.unsqueeze(-2), wide).squeeze(-2).to(f.dtype)
            dh_post = torch.matmul(f.to(h_post.dtype).unsqueeze(-2), wide.mT).squeeze(-2)
            if ctx.identity:  # a copy, since the passes before may add to it in place
                return g.clone(), df, None, dh_post
            x, h_res = rest
            dx = torch.matmul(h_res.mT, wide).to(x.dtype)
            return dx, df, torch.matmul(wide, x.to(h_post.dtype).mT), dh_post


def normed_projection(x: Tensor, phi: Tensor, eps: float, inside: bool) -> tuple[Tensor, Tensor]:
    """Return ``z (..., M)`` and the streams to use from here on."""
    if traces_plainly():
        with without_autocast(x.device.type):
            return project(x.flatten(-2).to(phi.dtype), phi, eps, inside)[0], x
    z, _, _, x = NormedProjection.apply(x, phi, eps, inside)
    return z, x


def read(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``u (..., C)`` and the streams to use from here on."""
    if traces_plainly():
        return weighted_sum(x, h), x
    return Read.apply(x, h)


def write(x: Tensor, f: Tensor, h_res: Tensor | None, h_post: Tensor) -> Tensor:
    """Return the next streams ``(..., n, C)``."""
    if traces_plainly():
        return mix_and_add(x, f, h_res, h_post)
    return Write.apply(x, f, h_res, h_post)
