"""Two sites, forward and backward, for the tests of replayed operators."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_layers import HyperConnection
from mhc_layers._torch_ops import fused_site
from mhc_layers.conventions import Convention
from mhc_layers.models.norm import RMSNorm

__all__ = ["OPERATORS", "make_sites", "run"]

_SITE = frozenset(("pre_forward", "post_forward", "post_backward", "pre_backward"))

OPERATORS = {False: _SITE, True: _SITE | {"boundary_forward", "boundary_backward"}}
"""Names of the operators that :func:`run` calls, with separate steps and with a fused boundary."""


def make_sites(convention: Convention, with_norm: bool, dim: int, *, device: str = "cpu") -> list[HyperConnection]:
    """Two sites of four streams with random parameters, which run fused wherever they are."""
    torch.manual_seed(0)
    sites = []
    for index in range(2):
        norm = RMSNorm(dim).to(device) if with_norm else None
        site = HyperConnection(
            dim, 4, norm=norm, convention=convention, index=index, implementation=fused_site(convention), device=device
        )
        with torch.no_grad():
            site.phi.normal_(std=0.1)
            site.bias.normal_(std=0.5)
            for alpha in (site.alpha_pre, site.alpha_post, site.alpha_res):
                alpha.fill_(0.9)
        sites.append(site)
    return sites


def run(sites: list[HyperConnection], seed: int, fused: bool, tokens: int) -> list[Tensor]:
    """Outputs and gradients on bfloat16 streams of a seed."""
    device = sites[0].phi.device
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)

    first, second = sites
    n, dim = first.num_streams, first.dim
    x, fs = draw(tokens, n, dim).requires_grad_(), [draw(tokens, dim).requires_grad_() for _ in sites]
    u, state = first.pre(x)
    if fused:
        y, v, state = first.boundary(x, fs[0], state, second)
    else:
        y = first.post(x, fs[0], state)
        v, state = second.pre(y, state.h_pre if first.convention.read_delay else None)
    out = second.post(y, fs[1], state)
    leaves = [x, *fs, *(parameter for site in sites for parameter in site.parameters())]
    gradients = [draw(*t.shape) for t in (u, v, out)]
    return [u, y, v, out, *torch.autograd.grad([u, v, out], leaves, gradients, materialize_grads=True)]
