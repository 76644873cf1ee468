"""CUDA C++ kernels of the fused layer against float64, on a GPU; every output starts as NaN.

Shapes: n in {2, 3, 4, 6}, C that divides nothing (1000, 1001, 90), one token, a few, a tile and a bit, thousands.
"""

from collections.abc import Iterator

import pytest
import torch

from mhc_layers.kernels.cuda import boundary, streams_backward
from mhc_layers.kernels.triton.read import read_forward
from mhc_layers.kernels.triton.write import write_forward
from tests.kernels.mhc_cuda_cases import BF16, FP32, Site, correctly_rounded, error

pytestmark = pytest.mark.gpu

SHAPES = [
    (4, 1280, 130),
    (4, 1000, 7),
    (4, 1001, 33),
    (4, 90, 1),
    (4, 4096, 2049),
    (3, 1280, 130),
    (3, 333, 17),
    (2, 1000, 70),
]


@pytest.fixture(autouse=True)
def outputs_start_as_nan() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("n", "c", "m"), [*SHAPES, (6, 1280, 130), (6, 333, 9), (6, 1001, 3)])
def test_streams_backward_equals_float64(n: int, c: int, m: int) -> None:
    site = Site(n, c, m)
    assert streams_backward.applies(site.x, site.g, site.gu) is None
    dx, slabs = streams_backward.streams_backward(site.x, site.g, site.gu, site.mix, site.dz, site.phi)
    expected_dx, expected_dphi = site.streams_backward()
    assert error(dx, expected_dx) < BF16
    assert correctly_rounded(dx, expected_dx) > 0.98
    assert error(slabs.double().sum(0), expected_dphi) < FP32
    again = streams_backward.streams_backward(site.x, site.g, site.gu, site.mix, site.dz, site.phi)
    assert torch.equal(dx, again[0]) and torch.equal(slabs, again[1])


@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
def test_chained_backward_equals_its_two_parts(n: int, c: int, m: int) -> None:
    site = Site(n, c, m)
    assert streams_backward.applies_chained(site.x, site.g, site.gu) is None
    arguments = (site.x, site.g, site.gu, site.mix, site.dz, site.phi)
    dx, slabs, df, dcoef = streams_backward.streams_backward_chained(
        *arguments, site.y, site.f, site.proj, site.alpha[1], site.bias, 2.0
    )
    alone, alone_slabs = streams_backward.streams_backward(*arguments)
    assert torch.equal(dx, alone)
    assert error(slabs.double().sum(0), alone_slabs.double().sum(0)) < FP32
    expected_df, expected_dcoef = site.write_backward(dx)
    assert error(df, expected_df) < BF16
    assert error(dcoef, expected_dcoef) < FP32
    assert bool((dcoef[:, :n] == 0).all())


@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
@pytest.mark.parametrize("delayed", [False, True])
def test_boundary_forward_equals_float64(n: int, c: int, m: int, delayed: bool) -> None:
    site = Site(n, c, m)
    assert boundary.applies(site.x) is None
    if delayed:
        out, u, slabs, squares = boundary.boundary_read_forward(site.x, site.f, site.coef, site.phi)
    else:
        u = None
        out, slabs, squares = boundary.boundary_forward(site.x, site.f, site.coef, site.phi)
    site.check_boundary(out, u, slabs, squares)


@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
def test_boundary_writes_the_bits_of_the_separate_write(n: int, c: int, m: int) -> None:
    """The sum of a stream is written out as multiply-adds in one order, in CUDA C++ and in Triton."""
    site = Site(n, c, m)
    out, _, _ = boundary.boundary_forward(site.x, site.f, site.coef, site.phi)
    delayed, u, _, _ = boundary.boundary_read_forward(site.x, site.f, site.coef, site.phi)
    written = write_forward(site.x, site.f, site.coef)
    assert torch.equal(out, written) and torch.equal(delayed, written)
    assert torch.equal(u, read_forward(written, site.coef))


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Batch invariance: any prefix of the tokens gives the same bits for those tokens."""
    site, few = Site(4, 1280, 130), 37
    out, slabs, squares = boundary.boundary_forward(site.x, site.f, site.coef, site.phi)
    head = boundary.boundary_forward(site.x[:few], site.f[:few], site.coef[:few], site.phi)
    assert (
        torch.equal(out[:few], head[0])
        and torch.equal(slabs[:, :few], head[1])
        and torch.equal(squares[:, :few], head[2])
    )


def test_inputs_may_begin_anywhere() -> None:
    """Kernels copy 16 bytes at a time; a contiguous input may begin at any element."""
    site = Site(4, 256, 20)
    expected = boundary.boundary_forward(site.x, site.f, site.coef, site.phi)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        buffer = tensor.new_empty(tensor.numel() + 1)
        buffer[1:] = tensor.flatten()
        return buffer[1:].view_as(tensor)

    for got, want in zip(
        boundary.boundary_forward(*map(shifted, (site.x, site.f, site.coef, site.phi))), expected, strict=True
    ):
        assert torch.equal(got, want)


def test_no_tokens() -> None:
    site = Site(4, 256, 0)
    out, slabs, squares = boundary.boundary_forward(site.x, site.f, site.coef, site.phi)
    assert out.shape == (0, 4, 256) and slabs.shape[1:] == (0, 24) and squares.shape[1:] == (0,)
    dx, dphi = streams_backward.streams_backward(site.x, site.g, site.gu, site.mix, site.dz, site.phi)
    assert dx.shape == (0, 4, 256) and bool((dphi == 0).all())


def test_refusals_say_why() -> None:
    x = torch.zeros(2, 4, 64, device="cuda")
    assert "bfloat16" in str(boundary.applies(x))
    assert "n in" in str(boundary.applies(x.bfloat16()[:, :1].contiguous()))
    assert "absent" in str(streams_backward.applies(x.bfloat16(), None, x.bfloat16()))
