"""Flop and byte formulas of the fused operators, against counted operations and counted tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhc_layers import PAPER, HyperConnection, _boundary_ops, _broadcast_ops, _site_ops
from mhc_layers._recompute import RECOMPUTE_BLOCK
from mhc_layers._torch_ops import fused_site
from mhc_layers.kernels.cost import bytes_moved
from mhc_layers.kernels.table import leaf

SHAPES = [(4, 10, 6), (3, 7, 5), (1, 5, 4)]


def contractions(x: Tensor, phi: Tensor, h_pre: Tensor, h_post: Tensor, h_res: Tensor, f: Tensor) -> list[Tensor]:
    """The products of a site, each as a matrix product that the counter knows: projection, square, read, write."""
    vec = x.flatten(1)
    mixed = h_res @ x + h_post.unsqueeze(2) @ f.unsqueeze(1)
    return [vec @ phi.T, vec.unsqueeze(1) @ vec.unsqueeze(2), h_pre.unsqueeze(1) @ x, mixed]


@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "boundary"])
def test_flops_are_those_of_the_products(n: int, c: int, m: int, fused: bool) -> None:
    """Two sites. The products counted one by one give the square's gradient twice, 2 x; the kernels form it once."""
    rows = n * (n + 2)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((m, n, c), (rows, n * c), (m, n), (m, n))]
    tensors += [torch.randn(shape, requires_grad=True) for shape in ((m, n, n), (m, c))]
    with FlopCounterMode(display=False) as counter:
        outputs = contractions(*tensors)
        torch.autograd.grad(outputs, tensors, [torch.ones_like(output) for output in outputs])
    products = counter.get_total_flops() - 2 * m * n * c

    sites = [HyperConnection(c, n, convention=PAPER, implementation=fused_site(PAPER)) for _ in range(2)]
    x, f = torch.randn(m, n, c, requires_grad=True), torch.randn(m, c, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        u, state = sites[0].pre(x)
        if fused:
            y, v, state = sites[0].boundary(x, f, state, sites[1])
        else:
            y = sites[0].post(x, f, state)
            v, state = sites[1].pre(y)
        (u.sum() + v.sum() + sites[1].post(y, f, state).sum()).backward()
    names = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert ("mhc_layers.boundary_backward" in names) == fused
    assert counter.get_total_flops() == 2 * products


@pytest.mark.parametrize("sites", [1, 3])
def test_flops_of_a_rebuilt_block_are_its_reads_and_writes(sites: int) -> None:
    n, c, m = 4, 10, 6
    x, fs = torch.randn(m, n, c), [torch.randn(m, c) for _ in range(sites - 1)]
    coefs = [torch.randn(m, n * (n + 2)) for _ in range(sites)]
    with FlopCounterMode(display=False) as counter:
        RECOMPUTE_BLOCK(x, fs, coefs[:-1], coefs)
    ours = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        for index, coef in enumerate(coefs):
            h_pre, h_post, h_res = coef.split([n, n, n * n], -1)
            h_pre.unsqueeze(1) @ x
            if index < sites - 1:
                x = h_res.unflatten(-1, (n, n)) @ x + h_post.unsqueeze(2) @ fs[index].unsqueeze(1)
    assert ours == counter.get_total_flops()


def stream_values(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the values of the streams' dtype that enter and leave the leaves of the operators in a run."""
    total = 0

    def counting(name: str, x: Tensor, **settings: Any) -> Callable[..., Any] | None:
        target = leaf(name, x, **settings)
        if target is None:
            return None

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal total
            results = target(*arguments, **options)
            given = [*arguments, *(results if isinstance(results, tuple) else (results,))]
            total += sum(value.numel() for value in given if isinstance(value, Tensor) and value.dtype == x.dtype)
            return results

        return call

    with monkeypatch.context() as patch:
        for module in (_site_ops, _boundary_ops, _broadcast_ops):
            patch.setattr(module, "leaf", counting)
        run()
    return total


@pytest.mark.parametrize("norm", [False, True], ids=["read", "norm"])
@pytest.mark.parametrize("kind", ["", "broadcast_"], ids=["streams", "embedding"])
@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
def test_bytes_are_those_of_the_tensors(
    n: int, c: int, m: int, kind: str, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = HyperConnection(
        c, n, convention=PAPER, implementation=fused_site(PAPER), norm=torch.nn.RMSNorm(c) if norm else None
    )
    x = torch.randn(m, 1 if kind else n, c).bfloat16().requires_grad_()
    f = torch.randn(m, c).bfloat16().requires_grad_()

    def moved(step: str) -> int:
        item_sizes = (2, 0)
        total, coefficients = (bytes_moved(kind + step, m, n, c, item_size=size, norm=norm) for size in item_sizes)
        return total - coefficients

    def forward() -> tuple[Tensor, Tensor]:
        u, state = site.pre(x, broadcast=bool(kind))
        return u, site.post(x, f, state)

    assert 2 * stream_values(forward, monkeypatch) == moved("pre_forward") + moved("post_forward")
    outputs = forward()
    counted = 2 * stream_values(
        lambda: torch.autograd.grad(outputs, [x, f], [torch.ones_like(output) for output in outputs]), monkeypatch
    )
    assert counted == moved("post_backward") + moved("pre_backward")


def test_an_unknown_step_is_named() -> None:
    with pytest.raises(ValueError, match=r"step is 'read'; accepted: 'pre_forward'"):
        bytes_moved("read", 1, 4, 8)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_boundary_reads_the_streams_between_its_sites_once_less(n: int) -> None:
    m, c = 100, 64
    streams = 2 * m * n * c

    def moved(*steps: str) -> int:
        return sum(bytes_moved(step, m, n, c) - bytes_moved(step, m, n, c, item_size=0) for step in steps)

    assert moved("boundary_forward") == moved("pre_forward", "post_forward") - streams
    assert moved("boundary_read_forward") == moved("boundary_forward") - streams
    assert moved("boundary_backward") == moved("pre_backward", "post_backward") - streams
