"""Other libraries' projections as plain functions of logits, so that ``python -m proofs --projection`` can try them.

``python -m proofs --projection proofs.adapters:pot_log --last columns``

Each takes an array (..., n, n) of logits and returns a matrix whose rows and columns are meant to sum to 1. Nothing is
corrected on the way: batches are unfolded where a library takes one matrix or one batch axis, and that is all.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from proofs.backends import BACKENDS

__all__ = [
    "PEERS",
    "Peer",
    "liger",
    "lucidrains",
    "lucidrains_log",
    "lucidrains_triton",
    "pot",
    "pot_batch",
    "pot_batch_log",
    "pot_log",
    "tile_kernels",
    "transformers_deepseek_v4",
]

NUM_ITERS = 20
"""Iterations asked of every library that takes a number; POT's loops stop by a tolerance, or at 100 and 1000."""


@dataclass(frozen=True)
class Peer:
    """One projection of another library, and how to call it.

    Parameters
    ----------
    function : str
        Its name in this module.
    package : str
        What has to be importable.
    last : {"rows", "columns"}
        The side it normalises last.
    backend : str
        Which arrays it takes.
    num_iters : int or None
        Given where it is the plain iteration of that many steps; ``None`` for a tolerance, or for added eps.
    dtypes : tuple of str, optional
        What it computes in, where that is not every dtype that it takes.
    sizes : tuple of int, optional
        The n that it is made for, where that is not every n.
    about : str
        What is called, and what makes it another function than exp and alternating sums.
    """

    function: str
    package: str
    last: str
    backend: str
    num_iters: int | None
    about: str
    dtypes: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def missing(self) -> str | None:
        """Return why it cannot run here, or ``None``."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return BACKENDS[self.backend].missing()


SINGLE = ("float32", "float16", "bfloat16")
"""For what computes in float32 whatever it is given."""

PEERS: tuple[Peer, ...] = (
    Peer("pot", "ot", "rows", "numpy", None, "ot.sinkhorn, method 'sinkhorn', at most 100, one matrix a call"),
    Peer("pot_log", "ot", "rows", "numpy", None, "ot.sinkhorn, method 'sinkhorn_log', at most 100, one matrix a call"),
    Peer("pot_batch", "ot", "columns", "numpy", None, "ot.solve_batch, 'sinkhorn', tol 1e-5, at most 1000"),
    Peer("pot_batch_log", "ot", "columns", "numpy", None, "ot.solve_batch, 'log_sinkhorn', tol 1e-5, at most 1000"),
    Peer("lucidrains", "hyper_connections", "rows", "torch", NUM_ITERS, "hyper_connections.mHCv2.sinkhorn_knopps",
         SINGLE),
    Peer(
        "lucidrains_log", "hyper_connections", "rows", "torch", NUM_ITERS,
        "hyper_connections.mHCv2.log_domain_sinkhorn_knopps", SINGLE,
    ),
    Peer(
        "transformers_deepseek_v4", "transformers", "columns", "torch", None,
        "DeepseekV4HyperConnection, the stored comb; softmax start, eps 1e-6 in every divisor", SINGLE,
    ),
    Peer("lucidrains_triton", "hyper_connections", "rows", "triton", NUM_ITERS, "hyper_connections.triton_sinkhorn",
         ("float32",)),
    Peer(
        "liger", "liger_kernel", "columns", "triton", None,
        "liger_kernel.ops.mhc.mhc_split_sinkhorn_fwd; softmax start, eps 1e-6 in every divisor", ("float32",),
        (1, 2, 4, 8, 16, 32),
    ),
    Peer(
        "tile_kernels", "tile_kernels", "columns", "triton", None,
        "tile_kernels sinkhorn_normalize; softmax start, eps 1e-6 in every divisor", ("float32",),
        (1, 2, 4, 8, 16, 32),
    ),
)  # fmt: skip
"""Every adapter, in the order of the published table."""


def _loops(function: Any) -> Any:
    """Mark a function that unfolds the stack; the claim about large ones is not made of it."""
    function.one_by_one = True
    return function


def _one_by_one(logits: np.ndarray, method: str) -> np.ndarray:
    ot = importlib.import_module("ot")
    n = logits.shape[-1]
    weights = np.full(n, 1 / n, dtype=logits.dtype)
    stack = logits.reshape(-1, n, n)
    plans = [ot.sinkhorn(weights, weights, -x, 1.0, method=method, numItermax=100, warn=False) for x in stack]
    return n * np.array(plans).reshape(logits.shape)


@_loops
def pot(logits: np.ndarray) -> np.ndarray:
    """Return POT's plan between uniform marginals, times n."""
    return _one_by_one(logits, "sinkhorn")


@_loops
def pot_log(logits: np.ndarray) -> np.ndarray:
    """Return POT's log-domain plan between uniform marginals, times n."""
    return _one_by_one(logits, "sinkhorn_log")


def _batched(logits: np.ndarray, method: str) -> np.ndarray:
    batch = importlib.import_module("ot.batch")
    n = logits.shape[-1]
    result = batch.solve_batch(-logits.reshape(-1, n, n), reg=1.0, method=method, max_iter=1000, tol=1e-5)
    return n * result.plan.reshape(logits.shape)


def pot_batch(logits: np.ndarray) -> np.ndarray:
    """Return POT's batched plan between uniform marginals, times n."""
    return _batched(logits, "sinkhorn")


def pot_batch_log(logits: np.ndarray) -> np.ndarray:
    """Return POT's batched log-domain plan between uniform marginals, times n."""
    return _batched(logits, "log_sinkhorn")


def lucidrains(logits: Any) -> Any:
    """Return the linear iteration of lucidrains' mHC."""
    return importlib.import_module("hyper_connections.mHCv2").sinkhorn_knopps(logits, iters=NUM_ITERS)


def lucidrains_log(logits: Any) -> Any:
    """Return the log-domain iteration of lucidrains' mHC."""
    return importlib.import_module("hyper_connections.mHCv2").log_domain_sinkhorn_knopps(logits, iters=NUM_ITERS)


def lucidrains_triton(logits: Any) -> Any:
    """Return lucidrains' Triton kernel's result."""
    return importlib.import_module("hyper_connections.triton_sinkhorn").triton_sinkhorn(logits, iters=NUM_ITERS)


@_loops
def transformers_deepseek_v4(logits: Any) -> Any:
    """Return the stored comb of transformers' DeepSeek-V4 connection whose logits are its bias."""
    torch = importlib.import_module("torch")
    module = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
    n = logits.shape[-1]
    facts = SimpleNamespace(hc_mult=n, hc_sinkhorn_iters=NUM_ITERS, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=1)
    site = module.DeepseekV4HyperConnection(facts).requires_grad_(False).to(logits.device)
    site.fn.zero_()
    site.scale.fill_(1.0)
    streams = torch.ones(1, 1, n, 1, device=logits.device)
    combs = []
    for matrix in logits.reshape(-1, n * n):
        base = torch.cat([torch.zeros(2 * n, device=logits.device), matrix.float()])
        combs.append(torch.func.functional_call(site, {"base": base}, (streams,))[1].reshape(n, n))
    stacked = torch.stack(combs) if combs else logits.reshape(-1, n, n)
    return stacked.reshape(logits.shape).to(logits.dtype)


def liger(logits: Any) -> Any:
    """Return h_res of Liger's coefficient kernel, its logits given as the mix; its gradient is Liger's."""
    torch: Any = importlib.import_module("torch")
    ops = importlib.import_module("liger_kernel.ops.mhc")
    n = logits.shape[-1]
    one, bias = torch.ones((), device=logits.device), torch.zeros(n * (n + 2), device=logits.device)

    def mix(x: Any) -> Any:
        flat = x.reshape(-1, n * n).float()
        return torch.cat([torch.zeros(flat.shape[0], 2 * n, device=flat.device), flat], dim=1).contiguous()

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            eps = {"pre_eps": 0.0, "sinkhorn_eps": 1e-6, "post_mult": 2.0}
            matrix = ops.mhc_split_sinkhorn_fwd(mix(x), bias, one, one, one, tmax=NUM_ITERS, **eps)[2]
            return matrix.reshape(x.shape).to(x.dtype)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Any) -> Any:
            (x,) = ctx.saved_tensors
            upstream = grad.reshape(-1, n, n).float().contiguous()
            result = ops.mhc_sinkhorn_bwd(mix(x), bias, one, upstream, tmax=NUM_ITERS, sinkhorn_eps=1e-6)
            return result.reshape(x.shape).to(x.dtype)

    return Call.apply(logits)


def tile_kernels(logits: Any) -> Any:
    """Return TileKernels' normalisation."""
    if importlib.util.find_spec("tilelang.utils.target") is None:  # tilelang 0.1.15 has moved what TileKernels imports
        sys.modules["tilelang.utils.target"] = importlib.import_module("tilelang.backend.target")
    ops = importlib.import_module("tile_kernels.modeling.mhc.ops.sinkhorn")
    return ops.sinkhorn_normalize(logits, repeat=NUM_ITERS, eps=1e-6)
