"""Every Triton kernel of the fused layer in the interpreter, against float64.

The interpreter computes bf16 products and sums wrongly and truncates when it stores bf16, so kernels cast to float32
before any arithmetic there (``UPCAST``) and bf16 results may be off by one unit in the last place. The shapes are not
multiples of any tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import mhc_layers._recompute  # noqa: F401 - registers an operator
from mhc_layers.conventions import DEEPSEEK_V4, PAPER
from mhc_layers.kernels import plain
from mhc_layers.kernels.options import options_key, site_options
from mhc_layers.kernels.table import LEAVES, explain
from tests.kernels.mhc_cases import leaves_chain, make_problem, oracle, relative_error
from tests.kernels.mhc_cuda_cases import Site

pytest.importorskip("triton")

pytestmark = pytest.mark.interpret

STREAMS = ("u", "out", "dx", "df")

#: Relative error of results in the streams' dtype, and of float32 results.
TOLERANCE = {torch.float32: (1e-6, 3e-6), torch.float16: (5e-4, 3e-5), torch.bfloat16: (4e-3, 5e-5)}


@functools.cache
def triton_leaf(name: str) -> Any:
    row = next(row for row in LEAVES[name].rows if row.name == "triton")
    return row.load("run")


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    from mhc_layers.kernels.triton.configs import is_interpreting

    if not is_interpreting():
        pytest.skip("needs TRITON_INTERPRET=1 from the start of the process")


LARGE_EPS = dataclasses.replace(DEEPSEEK_V4, eps_pre=0.1, eps_start=0.05, eps_den=0.05)  # so that each counts

CASES = [
    (4, 40, 7, torch.float32, PAPER),
    (4, 64, 33, torch.bfloat16, PAPER),
    (4, 48, 20, torch.float32, DEEPSEEK_V4),
    (3, 50, 9, torch.float32, PAPER),
    (3, 50, 9, torch.bfloat16, DEEPSEEK_V4),
    (1, 16, 3, torch.float32, PAPER),
    (2, 33, 5, torch.float16, PAPER),
    (6, 20, 17, torch.float32, PAPER),
    (8, 24, 5, torch.bfloat16, DEEPSEEK_V4),
    (4, 1000, 1, torch.float32, PAPER),
    (4, 24, 5, torch.float32, LARGE_EPS),
]


@pytest.mark.parametrize(("n", "c", "tokens", "dtype", "convention"), CASES)
def test_site_equals_float64(n: int, c: int, tokens: int, dtype: torch.dtype, convention: Any) -> None:
    problem = make_problem(tokens, n, c, dtype)
    exact = oracle(problem, convention)
    ours = leaves_chain(problem, convention, triton_leaf)
    rounded, summed = TOLERANCE[dtype]
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    for name, error in errors.items():
        assert error < (rounded if name in STREAMS else summed), errors
    assert all(ours[name].dtype == dtype for name in STREAMS)


def test_two_runs_are_equal_bit_for_bit() -> None:
    problem = make_problem(19, 4, 72, torch.bfloat16)
    first, second = (leaves_chain(problem, PAPER, triton_leaf) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tokens() -> None:
    problem = make_problem(0, 4, 24, torch.float32)
    ours = leaves_chain(problem, PAPER, triton_leaf)
    assert ours["dx"].shape == (0, 4, 24)
    assert torch.equal(ours["dphi"], torch.zeros(24, 96))
    assert not ours["dbias"].any()


def test_last_backward_kernel_in_turn_equals_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    from mhc_layers.kernels.triton import streams_backward
    from mhc_layers.kernels.triton.configs import StreamsBackwardConfig

    # streams that fit in a cache would be taken in turn whatever the number of splits
    monkeypatch.setattr(streams_backward, "_CACHE_BYTES", 0)
    streams_backward.streams_backward_launch.cache_clear()

    site = Site(4, 24, 150, device="cpu")
    leaf, arguments = triton_leaf("streams_backward"), (site.x, site.g, site.gu, site.mix, site.dz, site.phi)
    ranges, in_turn = (leaf(*arguments, config=StreamsBackwardConfig(16, 32, 4, k, 4, 1)) for k in (2, 10))
    assert torch.equal(ranges[0], in_turn[0])
    first, others = in_turn[1]
    assert others.shape[0] == 9
    expected, expected_dphi = site.streams_backward()
    rounded, summed = TOLERANCE[torch.bfloat16]
    assert relative_error(in_turn[0], expected) < rounded
    assert relative_error(first.double() + others.double().sum(0), expected_dphi) < summed


@pytest.mark.parametrize("absent", ["g", "gu"])
def test_absent_gradients(absent: str) -> None:
    n, c, tokens = 4, 24, 6
    p = make_problem(tokens, n, c, torch.float32)
    given = {"g": p.g, "gu": p.gu, absent: None}
    options = site_options(options_key(PAPER))
    slabs, squares = plain.project(p.x, p.phi)
    coef, proj, rstd = plain.finish(slabs, squares, p.alphas, p.bias, options, n * c, (tokens,))
    arguments = (proj, rstd, coef, None, p.alphas, p.bias, options, n * c, torch.float32)
    results = []
    for leaf in (triton_leaf, lambda name: getattr(plain, name)):
        mix, dz, _ = leaf("finish_backward")(*arguments)
        results.append(leaf("streams_backward")(p.x, given["g"], given["gu"], mix, dz, p.phi))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    first, others = results[0][1]
    torch.testing.assert_close(first + others.sum(0), results[1][1].sum(0), rtol=1e-5, atol=1e-5)


def test_delayed_read_uses_the_other_coefficients() -> None:
    n, c, tokens = 4, 16, 5
    p = make_problem(tokens, n, c, torch.float32)
    before = torch.rand(tokens, 24)[:, :n]  # a slice: the rows are strided
    options = site_options(options_key(DEEPSEEK_V4))
    slabs, squares = plain.project(p.x, p.phi)
    coef, proj, rstd = plain.finish(slabs, squares, p.alphas, p.bias, options, n * c, (tokens,))
    arguments = (proj, rstd, coef, None, p.alphas, p.bias, options, n * c, torch.float32, before)
    mix, _, _ = triton_leaf("finish_backward")(*arguments)
    torch.testing.assert_close(mix[:, :, n], before)
    u = triton_leaf("read_forward")(p.x, before)
    torch.testing.assert_close(u, plain.read_forward(p.x, before))


def test_shared_coefficients_have_stride_zero() -> None:
    x = torch.randn(5, 4, 16)
    first = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(5, 4)
    assert torch.equal(triton_leaf("read_forward")(x, first), x[:, 0])


@pytest.mark.parametrize("std", [3.0, 30.0])
def test_wide_logits_stay_finite(std: float) -> None:
    problem = make_problem(9, 4, 16, torch.float32, std=std)
    exact = oracle(problem, PAPER)
    ours = leaves_chain(problem, PAPER, triton_leaf)
    assert all(torch.isfinite(value).all() for value in ours.values())
    assert relative_error(ours["coef"], exact["coef"]) < 2e-6 * max(1.0, std)
    rows = ours["coef"][:, 8:].unflatten(-1, (4, 4)).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-6)


def test_operators_take_strided_tensors() -> None:
    def both(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.randn(*shape[:-1], 2 * shape[-1])
        return wide[..., ::2], wide[..., ::2].contiguous()

    ops, options = torch.ops.mhc_layers, options_key(PAPER)
    x, f, g, phi, bias, coef = (both(s) for s in ((5, 4, 8), (5, 8), (5, 4, 8), (24, 32), (24,), (5, 24)))
    rstd = both((5,))
    alphas = [torch.tensor(0.5)] * 3
    results = []
    for k in (0, 1):
        parameters = (phi[k], bias[k], *alphas)
        backward = ops.pre_backward(x[k], *parameters, None, coef[k], rstd[k], g[k], f[k], coef[k], options)
        results.append(
            [
                *ops.pre_forward(x[k], *parameters, coef[k][:, :4], options),
                ops.post_forward(x[k], f[k], coef[k]),
                *ops.post_backward(g[k], x[k], f[k], coef[k], bias[k], alphas[1], options),
                *backward[:2],
                backward[2][:24],  # beyond these, padding up to the gates
                backward[2][32:35],
                *ops.boundary_forward(x[k], f[k], coef[k], *parameters, options, False),
                *ops.recompute_block(x[k], [f[k]], [coef[k]], [coef[k], coef[k]])[1],
            ]
        )
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize(("n", "sites"), [(4, 3), (3, 1)])
def test_a_block_is_rebuilt(n: int, sites: int) -> None:
    x, fs = torch.randn(7, n, 20), [torch.randn(7, 20) for _ in range(sites - 1)]
    coefs = [torch.rand(7, n * (n + 2)) for _ in range(sites)]
    ours = triton_leaf("recompute_block")(x, fs, coefs[:-1], coefs)
    exact = plain.recompute_block(x, fs, coefs[:-1], coefs)
    for kind in (0, 1):
        for rebuilt, expected in zip(ours[kind], exact[kind], strict=True):
            torch.testing.assert_close(rebuilt, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rebuilt_block_has_the_bits_of_its_sites(dtype: torch.dtype) -> None:
    """Streams are rounded between sites, as they were when the forward stored them."""
    x, fs = torch.randn(7, 4, 20).to(dtype), [torch.randn(7, 20).to(dtype) for _ in range(2)]
    coefs = [torch.rand(7, 24) for _ in range(3)]
    xs, us = triton_leaf("recompute_block")(x, fs, coefs[:-1], coefs)
    streams = [x]
    for f, coef in zip(fs, coefs, strict=False):
        streams.append(triton_leaf("write_forward")(streams[-1], f, coef))
    assert all(torch.equal(ours, stored) for ours, stored in zip(xs, streams[1:], strict=True))
    for u, stored, coef in zip(us, streams, coefs, strict=True):
        assert torch.equal(u, triton_leaf("read_forward")(stored, coef))


def test_table_prefers_triton_here() -> None:
    chosen = explain(torch.zeros(1, 4, 8))
    in_cuda_only = {"boundary_forward", "boundary_read_forward", "streams_backward_chained"}
    assert {name for name, found in chosen.items() if isinstance(found, str)} == in_cuda_only
    assert {found.row.name for found in chosen.values() if not isinstance(found, str)} == {"triton"}
