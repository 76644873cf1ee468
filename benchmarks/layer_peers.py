"""Other implementations of one mHC site, behind one interface: parameters, read, write, and their convention.

Each peer is optional. A peer that cannot run says why, and the report repeats it. All take streams ``(M, n, C)``
bfloat16 and the same float32 parameters; what each does with them is in its ``note``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import tile_kernels
from mhc_layers import DEEPSEEK_V4, PAPER
from mhc_layers.conventions import Convention

__all__ = ["PEERS", "Parameters", "Peer", "Runner"]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """A site's parameters in the library's layout: phi ``(N, nC)``, gates ``(3,)``, bias ``(N,)``, float32."""

    phi: Tensor
    alpha: Tensor
    bias: Tensor

    def double(self) -> Parameters:
        """Return float64 leaves that require gradients."""
        return Parameters(*(t.detach().double().requires_grad_() for t in (self.phi, self.alpha, self.bias)))


class Runner(Protocol):
    """One site, ready to run. ``leaves`` are what gradients are taken for."""

    leaves: list[Tensor]

    def pre(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the sublayer's input and what ``post`` needs."""
        ...

    def post(self, x: Tensor, f: Tensor, state: Any) -> Tensor:
        """Return the next streams."""
        ...

    def library_gradients(self, gradients: list[Tensor]) -> Parameters:
        """Gradients of ``leaves`` in the library's layout."""
        ...


@dataclasses.dataclass(frozen=True)
class Peer:
    """A named way to run a site."""

    name: str
    make: Callable[[Parameters, int], Runner]
    convention: Convention
    note: str
    modules: tuple[str, ...] = ()
    #: relative Frobenius errors it must meet before it is timed: outputs, stream gradients, gradient of phi
    gate: tuple[float, float, float] = (5e-3, 1.5e-2, 2e-2)
    #: rows of the table of leaves that it may use; all if empty
    rows: tuple[str, ...] = ()
    #: whether its first call compiles, so that compiling ahead in another process saves time
    builds: bool = False

    def refuse(self) -> str | None:
        """Name the missing package, or return None."""
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


class TileKernels:
    """TileKernels 1.0.0: phi rounded to TF32, one read for the projection and one for u."""

    def __init__(self, parameters: Parameters, num_streams: int) -> None:
        self._functional, self._n = tile_kernels.load("tile_kernels.modeling.mhc.functional"), num_streams
        self.leaves = [t.detach().clone().requires_grad_() for t in (parameters.phi, parameters.alpha, parameters.bias)]

    def pre(self, x: Tensor) -> tuple[Tensor, Any]:
        phi, alpha, bias = self.leaves
        u, state = self._functional.mhc_pre(
            x[None], phi, alpha, bias, mhc_mult=self._n, post_mult_value=2.0, sinkhorn_repeat=20
        )
        return u.squeeze(0), state  # not u[0], whose backward fills and copies a tensor

    def post(self, x: Tensor, f: Tensor, state: Any) -> Tensor:
        return self._functional.mhc_post(f[None], x[None], *state).squeeze(0)

    def library_gradients(self, gradients: list[Tensor]) -> Parameters:
        return Parameters(*gradients)


class Liger:
    """Liger-Kernel: phi in bfloat16, atomics in the backward."""

    def __init__(self, parameters: Parameters, num_streams: int) -> None:
        from liger_kernel.transformers import functional

        self._functional = functional
        phi = parameters.phi.t().bfloat16().contiguous()
        gates = [gate.clone() for gate in parameters.alpha]
        self.leaves = [t.detach().clone().requires_grad_() for t in (phi, *gates, parameters.bias)]

    def pre(self, x: Tensor) -> tuple[Tensor, Any]:
        phi, *gates, bias = self.leaves
        h_pre, h_post, h_res = self._functional.liger_mhc_coeffs(x, phi, bias, *gates, tmax=20)
        return self._functional.liger_mhc_pre(x, h_pre).to(x.dtype), (h_post, h_res)

    def post(self, x: Tensor, f: Tensor, state: Any) -> Tensor:
        return self._functional.liger_mhc_post_res(x, f, *state).to(x.dtype)

    def library_gradients(self, gradients: list[Tensor]) -> Parameters:
        phi, pre, post, res, bias = gradients
        return Parameters(phi.t().float(), torch.stack([pre, post, res]), bias)


class Transformers:
    """The hyper-connection module of transformers' DeepSeek-V4, with the decoder layer's own write."""

    def __init__(self, parameters: Parameters, num_streams: int) -> None:
        from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

        dim = parameters.phi.shape[1] // num_streams
        config = DeepseekV4Config(hidden_size=dim)
        config.hc_mult, config.hc_sinkhorn_iters, config.hc_eps = num_streams, 20, DEEPSEEK_V4.eps_den
        config.rms_norm_eps = DEEPSEEK_V4.norm_eps
        with torch.device(parameters.phi.device):
            self._module = DeepseekV4HyperConnection(config)
        with torch.no_grad():
            self._module.fn.copy_(parameters.phi)
            self._module.base.copy_(parameters.bias)
            self._module.scale.copy_(parameters.alpha)
        self.leaves = [self._module.fn, self._module.scale, self._module.base]

    def pre(self, x: Tensor) -> tuple[Tensor, Any]:
        post, comb, u = self._module(x[None])
        return u.squeeze(0), (post, comb)

    def post(self, x: Tensor, f: Tensor, state: Any) -> Tensor:
        post, comb = state
        mixed = comb.to(x.dtype).transpose(-1, -2) @ x[None]
        return (post.to(x.dtype).unsqueeze(-1) * f[None, :, None] + mixed).squeeze(0)

    def library_gradients(self, gradients: list[Tensor]) -> Parameters:
        return Parameters(*gradients)


def _plain_pre(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, gemm: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-2]
    flat = x.flatten(1)
    rstd = torch.rsqrt(flat.float().square().mean(-1, keepdim=True))
    proj = (flat.to(gemm) @ phi.to(gemm).t()).float() * rstd
    pre, post, res = proj.split([n, n, n * n], dim=-1)
    h_pre = torch.sigmoid(alpha[0] * pre + bias[:n])
    h_post = 2 * torch.sigmoid(alpha[1] * post + bias[n : 2 * n])
    logits = (alpha[2] * res + bias[2 * n :]).unflatten(-1, (n, n))
    matrix = torch.exp(logits - logits.amax(-2, keepdim=True))
    for _ in range(20):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    u = (h_pre.unsqueeze(-1) * x.float()).sum(-2).to(x.dtype)
    return u, h_post, matrix


def _plain_post(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    mixed = (h_res.unsqueeze(-1) * x.float().unsqueeze(-3)).sum(-2)
    return (mixed + h_post.unsqueeze(-1) * f.float().unsqueeze(-2)).to(x.dtype)


class PlainTorch:
    """The paper's equations in torch, as one writes them down; eager or compiled."""

    def __init__(self, parameters: Parameters, gemm: torch.dtype, compiled: bool) -> None:
        self.leaves = [t.detach().clone().requires_grad_() for t in (parameters.phi, parameters.alpha, parameters.bias)]
        self._gemm = gemm
        self._pre = torch.compile(_plain_pre, dynamic=False) if compiled else _plain_pre
        self._post = torch.compile(_plain_post, dynamic=False) if compiled else _plain_post

    def pre(self, x: Tensor) -> tuple[Tensor, Any]:
        u, h_post, h_res = self._pre(x, *self.leaves, self._gemm)
        return u, (h_post, h_res)

    def post(self, x: Tensor, f: Tensor, state: Any) -> Tensor:
        return self._post(x, f, *state)

    def library_gradients(self, gradients: list[Tensor]) -> Parameters:
        return Parameters(*gradients)


#: Liger's recurrence: a softmax over the rows of the acting operator, epsilons of 1e-6
_LIGER_CONVENTION = Convention(
    name="liger", first="rows", start="softmax", eps_start=1e-6, eps_den=1e-6, norm_eps=1e-6, readout="mean"
)

PEERS: tuple[Peer, ...] = (
    Peer(
        "TileKernels",
        TileKernels,
        DEEPSEEK_V4,
        "V4 convention; phi rounded to TF32",
        ("tile_kernels", "tilelang"),
        builds=True,
    ),
    Peer("Liger", Liger, _LIGER_CONVENTION, "rows first with epsilons; phi bf16", ("liger_kernel",), builds=True),
    Peer(
        "transformers DeepSeek-V4",
        Transformers,
        DEEPSEEK_V4.replace(apply_dtype="activation"),
        "V4 convention; the write in bf16",
        ("transformers",),
    ),
    Peer(
        "torch.compile, bf16 GEMM",
        lambda parameters, n: PlainTorch(parameters, torch.bfloat16, compiled=True),
        PAPER,
        "as the paper; x phi in bf16",
        builds=True,
    ),
    Peer(
        "eager, fp32",
        lambda parameters, n: PlainTorch(parameters, torch.float32, compiled=False),
        PAPER,
        "as the paper, fp32 as written",
    ),
)
