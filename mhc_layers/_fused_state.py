"""What a fused site keeps between reading and writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mhc_layers._sharding import is_distributed
from mhc_layers.models.norm import RMSNorm

if TYPE_CHECKING:
    from mhc_layers.hyper_connection import HyperConnection

__all__ = ["FusedState", "SiteParams", "fused_norm", "token_rows", "without_data"]


class SiteParams(NamedTuple):
    """Parameters of a site as the fused ops take them, float32: ``phi (N, K)``, ``bias (N,)``, 0-d gates."""

    phi: Tensor
    bias: Tensor
    alpha_pre: Tensor
    alpha_post: Tensor
    alpha_res: Tensor

    @classmethod
    def of(cls, site: HyperConnection) -> SiteParams:
        """Parameters of a site, by name."""
        own = site._parameters  # a module's attribute is looked up by Python, five of them take as long as a launch
        if own.keys() >= _FIELDS:
            return cls(own["phi"], own["bias"], own["alpha_pre"], own["alpha_post"], own["alpha_res"])  # type: ignore[arg-type]
        return cls(site.phi, site.bias, site.alpha_pre, site.alpha_post, site.alpha_res)

    @classmethod
    def of_gradients(cls, dphi: Tensor, dparams: Tensor) -> SiteParams:
        """Part what a backward operator returns: ``dphi (N, K)``, ``dparams (PAD(N) + 4,)`` (dbias, then dalpha)."""
        padded = dparams.shape[0] - 4
        return cls(dphi, dparams[: dphi.shape[0]], dparams[padded], dparams[padded + 1], dparams[padded + 2])


_FIELDS = frozenset(SiteParams._fields)


class FusedState(NamedTuple):
    """State of a fused site, for ``post`` and ``boundary`` only.

    ``coef (..., N)`` holds h_pre, h_post and h_res. ``link`` has the shape of the streams and no data: its *gradient*
    is g = dL/dx_next as it stands, not ``h_res^T g``, so that the backward of the read can write dx once.
    ``proj (..., N)`` and ``rstd (...)`` are the normalised projections and 1/r, all that the backward needs beyond
    inputs and outputs.
    """

    coef: Tensor
    link: Tensor
    proj: Tensor
    rstd: Tensor
    params: SiteParams
    options: str

    @property
    def num_streams(self) -> int:
        """Number of streams n."""
        return self.link.shape[-2]

    @property
    def h_pre(self) -> Tensor:
        """Coefficients of the read, ``(..., n)``."""
        return self.coef[..., : self.num_streams]

    @property
    def h_post(self) -> Tensor:
        """Coefficients of the write, ``(..., n)``."""
        return self.coef[..., self.num_streams : 2 * self.num_streams]

    @property
    def h_res(self) -> Tensor:
        """The operator on the streams, ``(..., n, n)``, output stream first."""
        n = self.num_streams
        return self.coef[..., 2 * n :].unflatten(-1, (n, n))


def fused_norm(site: HyperConnection, x: Tensor) -> tuple[Tensor | None, float]:
    """Gain ``(C,)`` in float32 and epsilon of the norm that ends a site's read, if the kernels can run it, else None.

    They run :class:`torch.nn.RMSNorm` and :class:`~mhc_layers.models.norm.RMSNorm` themselves, no subclasses, with a
    gain over all channels that is distributed only if the streams are; without hooks and without a ``forward`` that
    replaces the class's (as offloading does), which would not be called.
    """
    norm: Any = site.input_norm
    if norm is None or type(norm) not in (nn.RMSNorm, RMSNorm) or "forward" in norm.__dict__:
        return None, 0.0
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return None, 0.0
    weight, eps = norm.weight, norm.eps
    if weight is None or weight.shape != x.shape[-1:] or weight.dtype == torch.float64:
        return None, 0.0
    if is_distributed(weight) != is_distributed(x):
        return None, 0.0
    return weight.to(torch.float32), torch.finfo(x.dtype).eps if eps is None else eps


def token_rows(previous: Tensor) -> Tensor:
    """Coefficients with one stride for all tokens: a slice of contiguous rows, or a row expanded to all tokens."""
    if previous.stride(-1) == 1 and (previous.dim() <= 2 or not any(previous.stride()[:-1])):
        return previous
    base = previous.stride(-2)
    steps = [base]
    for size in reversed(previous.shape[1:-1]):
        steps.insert(0, steps[0] * size)
    regular = previous.stride(-1) == 1 and tuple(steps) == tuple(previous.stride()[:-1])
    return previous if regular else previous.contiguous()


def without_data(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of one value in memory, for the sake of its gradient: every stride is zero."""
    return like.new_empty_strided(shape, (0,) * len(shape))
