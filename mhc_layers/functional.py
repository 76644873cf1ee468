"""Stateless steps on streams ``(..., n, C)``: coefficients, read, write, expand, collapse.

These are the plain-torch steps that every device can run; fused kernels replace them row by row (the table in
``mhc_layers._registry``). Coefficients are always computed in float32 or better, whatever the dtype of the streams and
whether or not autocast is on. Narrower streams are widened for each product and not kept wide.

Shape legend: B tokens' leading axes ``...``, n streams, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from birkhoff._checks import as_count
from birkhoff._project import matrix as solve
from birkhoff.solvers import SinkhornDamped, SinkhornKnopp
from mhc_layers import _streams
from mhc_layers._streams import without_autocast
from mhc_layers.conventions import PAPER, Convention

__all__ = [
    "Parameters",
    "SiteParameters",
    "coefficients",
    "collapse_streams",
    "expand_streams",
    "gate_maps",
    "hc_coefficients",
    "hc_head_weights",
    "project_residual",
    "read",
    "site_logits",
    "write",
]


class SiteParameters(Protocol):
    """What the coefficient functions need of a site: its parameters, as attributes."""

    @property
    def phi(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor: ...

    @property
    def alpha_pre(self) -> Tensor: ...

    @property
    def alpha_post(self) -> Tensor: ...

    @property
    def alpha_res(self) -> Tensor: ...


class Parameters(NamedTuple):
    """Plain values of a site's parameters, for use without a module.

    ``phi ((n + 2) n, n C)``, ``bias ((n + 2) n)``, rows ordered pre, post, res; the gates are 0-d.
    """

    phi: Tensor
    bias: Tensor
    alpha_pre: Tensor
    alpha_post: Tensor
    alpha_res: Tensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Dtype of coefficients: float64 if any input has it, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def solver_of(convention: Convention) -> Any:
    """The solver of :mod:`birkhoff.solvers` that projects the stored logits of a convention."""
    if convention.start == "exp":
        return SinkhornKnopp(num_iters=convention.num_iters, first=convention.stored_first)
    return SinkhornDamped(
        num_iters=convention.num_iters,
        first=convention.stored_first,
        eps_start=convention.eps_start,
        eps_den=convention.eps_den,
    )


def project_residual(logits: Tensor, convention: Convention = PAPER) -> Tensor:
    """Project stored residual logits ``(..., n, n)`` onto the convention's operator ``h_res`` (Eq. 9 and 19).

    The result, of the same shape and dtype, acts from the left, output stream first; a transposed convention is
    transposed here, as a view.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import DEEPSEEK_V4
    >>> from mhc_layers.functional import project_residual
    >>> project_residual(torch.zeros(2, 2), DEEPSEEK_V4)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    stored = solve(logits, solver_of(convention))
    return stored.mT if convention.transposed else stored


def inverse_rms(vec: Tensor, convention: Convention) -> Tensor:
    """``1 / r`` over the last axis, kept, in the compute dtype; the streams are not copied."""
    norm = torch.linalg.vector_norm(vec, dim=-1, keepdim=True, dtype=compute_dtype(vec.dtype))
    if convention.norm_eps_place == "inside":
        return torch.rsqrt(norm.square() / vec.shape[-1] + convention.norm_eps)
    return torch.reciprocal(norm / vec.shape[-1] ** 0.5 + convention.norm_eps)


def threaded_logits(x: Tensor, params: SiteParameters, convention: Convention = PAPER) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`site_logits`, and also the streams to use from here on (``mhc_layers._streams``)."""
    n = x.shape[-2]
    num_res = params.phi.shape[0] - 2 * n
    with without_autocast(x.device.type):
        phi = params.phi.to(compute_dtype(x.dtype, params.phi.dtype))
        z, x = _streams.normed_projection(x, phi, convention.norm_eps, convention.norm_eps_place == "inside")
        alphas = [params.alpha_pre.expand(n), params.alpha_post.expand(n)]
        gates = torch.cat([*alphas, params.alpha_res.expand(num_res)] if num_res else alphas)
        gate, residual = torch.addcmul(params.bias, z, gates).split([2 * n, num_res], dim=-1)
    return gate, residual, x


def site_logits(x: Tensor, params: SiteParameters, convention: Convention = PAPER) -> tuple[Tensor, Tensor]:
    """Project the streams ``(..., n, C)`` to a site's logits: those of both gates ``(..., 2 n)`` and the rest.

    Equations 14 to 16 of the paper: the division by r and the gates come after the matrix product.
    """
    return threaded_logits(x, params, convention)[:2]


def gate_maps(logits: Tensor, convention: Convention = PAPER) -> tuple[Tensor, Tensor]:
    """Equations 17 and 18: logits ``(..., 2 n)`` of both gates to ``h_pre`` and ``h_post``, each ``(..., n)``."""
    h_pre, h_post = torch.sigmoid(logits).chunk(2, dim=-1)
    if convention.eps_pre:
        h_pre = h_pre + convention.eps_pre
    return h_pre, convention.post_multiplier * h_post


def coefficients(x: Tensor, params: SiteParameters, convention: Convention = PAPER) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the three maps of an mHC site from its streams.

    Parameters
    ----------
    x : Tensor
        Streams ``(..., n, C)``, any floating dtype.
    params : SiteParameters
        ``phi ((n + 2) n, n C)``, ``bias ((n + 2) n)`` and three 0-d gates, see :class:`Parameters`.
    convention : Convention
        Orientation, order and epsilons.

    Returns
    -------
    h_pre, h_post : Tensor
        ``(..., n)``, float32 (float64 for float64 inputs).
    h_res : Tensor
        ``(..., n, n)``, the operator that acts from the left.

    Notes
    -----
    Equations 14 to 19 of the paper.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.functional import Parameters, coefficients
    >>> n, C = 2, 4
    >>> params = Parameters(torch.zeros(8, 8), torch.zeros(8), *torch.full((3,), 0.01).unbind())
    >>> h_pre, h_post, h_res = coefficients(torch.ones(n, C), params)
    >>> h_pre, h_post, h_res[0]
    (tensor([0.5000, 0.5000]), tensor([1., 1.]), tensor([0.5000, 0.5000]))
    """
    n = x.shape[-2]
    with without_autocast(x.device.type):
        gate, residual = site_logits(x, params, convention)
        return *gate_maps(gate, convention), project_residual(residual.unflatten(-1, (n, n)), convention)


def hc_coefficients(x: Tensor, params: SiteParameters, convention: Convention = PAPER) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the free maps of dynamic Hyper-Connections (arXiv 2409.19606; Eq. 5 of the mHC paper).

    ``params.phi`` is ``(n + 2, C)`` and shared by the streams: the row of pre, the row of post, and one row for each
    output stream. Each map is ``alpha * tanh(phi x~) + bias``, with every stream normalised on its own.
    Returns what :func:`coefficients` returns.
    """
    n = x.shape[-2]
    with without_autocast(x.device.type):
        dtype = compute_dtype(x.dtype, params.phi.dtype)
        projected = F.linear(x.to(dtype), params.phi.to(dtype))  # (..., n, n + 2)
        dynamic = torch.tanh(projected * inverse_rms(x, convention))
        bias_pre, bias_post, bias_res = params.bias.split([n, n, n * n])
        return (
            torch.addcmul(bias_pre, params.alpha_pre, dynamic[..., 0]),
            torch.addcmul(bias_post, params.alpha_post, dynamic[..., 1]),
            torch.addcmul(bias_res.view(n, n), params.alpha_res, dynamic[..., 2:].mT),
        )


def read(x: Tensor, h_pre: Tensor) -> Tensor:
    """Return the sublayer's input ``u = sum_i h_pre[i] x[i]``, ``(..., C)`` in the dtype of ``x``.

    Streams are ``x (..., n, C)``, weights ``h_pre (..., n)``. The sum is taken in float32, or in float64 if one of them
    has it, and rounded once.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.functional import read
    >>> read(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.5]))
    tensor([2.5000, 4.0000])
    """
    return _streams.read(x, h_pre.to(compute_dtype(x.dtype, h_pre.dtype)))[0]


def write(x: Tensor, f: Tensor, h_res: Tensor | None, h_post: Tensor, *, apply_dtype: str = "float32") -> Tensor:
    """Return the next streams ``x_next[o] = sum_i h_res[o, i] x[i] + h_post[o] f``.

    Parameters
    ----------
    x : Tensor
        Streams ``(..., n, C)``.
    f : Tensor
        Sublayer output ``(..., C)``.
    h_res : Tensor or None
        Operator ``(..., n, n)``; None means the identity.
    h_post : Tensor
        ``(..., n)``.
    apply_dtype : {"float32", "activation"}
        "float32": everything in float32 (or float64, if an input has it), one rounding. "activation": coefficients
        and each product rounded to the dtype of ``x``.

    Returns
    -------
    Tensor
        ``(..., n, C)`` in the dtype of ``x``.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.functional import write
    >>> write(torch.ones(2, 3), torch.full((3,), 5.0), torch.eye(2), torch.tensor([1.0, 0.0]))
    tensor([[6., 6., 6.],
            [1., 1., 1.]])
    """
    if apply_dtype == "float32":
        dtype = compute_dtype(x.dtype, h_post.dtype)
        return _streams.write(x, f, None if h_res is None else h_res.to(dtype), h_post.to(dtype))
    with without_autocast(x.device.type):
        written = h_post.to(x.dtype).unsqueeze(-1) * f.to(x.dtype).unsqueeze(-2)
        return written + (x if h_res is None else torch.matmul(h_res.to(x.dtype), x))


def expand_streams(e: Tensor, num_streams: int) -> Tensor:
    """Copy ``(..., C)`` to equal streams ``(..., n, C)``.

    Parameters
    ----------
    e : Tensor
        ``(..., C)``, an embedding.
    num_streams : int
        Number of streams n, at least 1.

    Returns
    -------
    Tensor
        ``(..., n, C)`` in the dtype of ``e``, a copy.

    Raises
    ------
    ValueError
        If ``num_streams`` is not an integer of at least 1.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import expand_streams
    >>> expand_streams(torch.ones(2, 8), 4).shape
    torch.Size([2, 4, 8])
    """
    return e.unsqueeze(-2).repeat_interleave(as_count(num_streams, "num_streams", least=1), dim=-2)


def collapse_streams(x: Tensor, weights: Tensor | None = None, *, reduce: str = "mean") -> Tensor:
    """Collapse streams ``(..., n, C)`` to ``(..., C)``.

    Parameters
    ----------
    x : Tensor
        Streams.
    weights : Tensor, optional
        ``(n,)`` or ``(..., n)``: the weighted sum of the streams. Without it, ``reduce`` decides.
    reduce : {"mean", "sum"}
        Used without ``weights``.

    Returns
    -------
    Tensor
        ``(..., C)`` in the dtype of ``x``.

    Raises
    ------
    ValueError
        If ``reduce`` is another word.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import collapse_streams, expand_streams
    >>> collapse_streams(expand_streams(torch.full((3,), 2.0), 4))
    tensor([2., 2., 2.])
    """
    if weights is not None:
        return read(x, weights.expand(*x.shape[:-1]))
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}; accepted: 'mean', 'sum'.")
    return x.mean(dim=-2) if reduce == "mean" else x.sum(dim=-2)


def hc_head_weights(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, convention: Convention) -> Tensor:
    """Return DeepSeek-V4's readout weights ``(..., n)``: ``sigmoid(scale * fn x / r + base) + eps_pre``.

    ``fn (n, n C)``, ``base (n,)``, ``scale (1,)``, in float32 or better.
    """
    with without_autocast(x.device.type):
        vec = x.flatten(-2)
        dtype = compute_dtype(x.dtype, fn.dtype)
        projected = F.linear(vec.to(dtype), fn.to(dtype)) * inverse_rms(vec, convention)
        return torch.sigmoid(torch.addcmul(base, scale, projected)) + convention.eps_pre
