"""Problems, the float64 oracle and the leaf-by-leaf chain that the tests of the fused kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhc_layers import reference
from mhc_layers.conventions import Convention
from mhc_layers.kernels.options import options_key, padded_rows, site_options

__all__ = ["Problem", "leaves_chain", "make_problem", "oracle", "relative_error"]


@dataclass(frozen=True)
class Problem:
    """One site's inputs, parameters and the gradients that arrive."""

    x: Tensor
    f: Tensor
    g: Tensor
    gu: Tensor
    phi: Tensor
    bias: Tensor
    alphas: tuple[Tensor, Tensor, Tensor]


def make_problem(
    num_tokens: int, n: int, c: int, dtype: torch.dtype, *, device: str = "cpu", std: float = 0.5, seed: int = 0
) -> Problem:
    """Random streams of unit size; ``phi`` is float32 and not representable in bf16."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows, k = n * (n + 2), n * c
    return Problem(
        x=draw(num_tokens, n, c).to(dtype),
        f=draw(num_tokens, c).to(dtype),
        g=draw(num_tokens, n, c).to(dtype),
        gu=draw(num_tokens, c).to(dtype),
        phi=draw(rows, k) / k**0.5,
        bias=std * draw(rows),
        alphas=tuple(torch.tensor(value, device=device) for value in (0.8, 1.1, 0.9)),
    )


def oracle(problem: Problem, convention: Convention) -> dict[str, Tensor]:
    """Outputs and gradients of the site in float64, by autograd of the reference."""
    names = ("x", "f", "phi", "bias")
    x, f, phi, bias = (getattr(problem, name).double().requires_grad_() for name in names)
    alphas = tuple(alpha.double().requires_grad_() for alpha in problem.alphas)
    maps = reference.coefficients(x, phi, bias, alphas, convention)
    u = reference.read(x, maps.h_pre)
    out = reference.eq3_next_streams(x, f, maps.h_res, maps.h_post)
    grads = torch.autograd.grad([u, out], [x, f, phi, bias, *alphas], [problem.gu.double(), problem.g.double()])
    coef = torch.cat([maps.h_pre, maps.h_post, maps.h_res.flatten(-2)], -1)
    return {
        "coef": coef.detach(),
        "u": u.detach(),
        "out": out.detach(),
        "dx": grads[0],
        "df": grads[1],
        "dphi": grads[2],
        "dbias": grads[3],
        "dalphas": torch.stack(grads[4:]),
    }


def leaves_chain(problem: Problem, convention: Convention, get_leaf: Any) -> dict[str, Tensor]:
    """The site through its leaves, forward and backward; ``get_leaf(name)`` gives an implementation."""
    p, options = problem, site_options(options_key(convention))
    k, rows = p.x.shape[-2] * p.x.shape[-1], p.phi.shape[0]
    slabs, squares = get_leaf("project")(p.x, p.phi)
    coef, proj, rstd = get_leaf("finish")(slabs, squares, p.alphas, p.bias, options, k, p.x.shape[:-2])
    u = get_leaf("read_forward")(p.x, coef)
    out = get_leaf("write_forward")(p.x, p.f, coef)
    df, dcoef = get_leaf("write_backward")(p.g, p.x, p.f, proj, p.alphas[1], p.bias, options)
    dots = get_leaf("read_backward")(p.gu, p.x)
    mix, dz, partials = get_leaf("finish_backward")(proj, rstd, dcoef, dots, p.alphas, p.bias, options, k, p.x.dtype)
    dx, dphi_slabs = get_leaf("streams_backward")(p.x, p.g, p.gu, mix, dz, p.phi)
    dphi, dparams = get_leaf("reduce_slabs")(dphi_slabs, partials)
    padded = padded_rows(rows)
    return {
        "coef": coef,
        "u": u,
        "out": out,
        "dx": dx,
        "df": df,
        "dphi": dphi,
        "dbias": dparams[:rows],
        "dalphas": dparams[padded : padded + 3],
    }


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference, relative to the exact value's."""
    if exact.numel() == 0:
        return 0.0
    difference = ours.detach().double().cpu() - exact.double().cpu()
    return float(difference.norm() / exact.double().norm().cpu().clamp_min(1e-30))
