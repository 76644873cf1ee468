"""Triton Sinkhorn and Newton kernels in the interpreter, against float64: few programs, every branch."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy speaks of the NaN and infinities that are put in
]
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from birkhoff.kernels.triton import sinkhorn  # noqa: E402
from birkhoff.kernels.triton.newton import newton_forward  # noqa: E402
from tests.kernels.sinkhorn_cases import (  # noqa: E402
    UNIT,
    allowed,
    expected,
    expected_gradient,
    marginal_error,
    vertices,
)

EPS = {"eps_start": 1e-6, "eps_den": 1e-6}


def check(rng: np.random.Generator, n: int, std: float, dtype: torch.dtype = torch.float32, **options) -> None:
    """Forward within the contract, backward within the roundings that the range allows; inputs stay as they were."""
    options = {"method": "knopp", "num_iters": 20, "first": "columns"} | options
    batch = {1: 5, 2: 9, 3: 9, 4: 9}.get(n, 3)
    logits = torch.tensor(rng.normal(size=(batch, n, n)) * std).to(dtype)
    grad = torch.tensor(rng.normal(size=(batch, n, n))).to(dtype)
    before = logits.clone()
    matrix = sinkhorn.sinkhorn_forward(logits, **options)
    pulled = sinkhorn.sinkhorn_backward(logits, grad, **options)
    assert matrix.dtype == pulled.dtype == dtype
    assert torch.equal(logits, before)
    exact = logits.double().numpy()
    tolerance = allowed(exact, dtype)
    np.testing.assert_allclose(matrix.double().numpy(), expected(exact, **options), rtol=0, atol=2 * tolerance)
    reference = expected_gradient(exact, grad.double().numpy(), **options)
    scale = max(1.0, np.abs(reference).max())
    # the interpreter truncates when it stores bfloat16, so one unit more than on the GPU
    limit = scale * (8 * tolerance + 2 * (UNIT[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0))
    np.testing.assert_allclose(pulled.double().numpy(), reference, rtol=0, atol=limit)


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9])
def test_forward_and_backward(rng: np.random.Generator, n: int, first: str) -> None:
    check(rng, n, 1.0, first=first)


@pytest.mark.parametrize("n", [13, 16, 32])
def test_larger_matrices(rng: np.random.Generator, n: int) -> None:
    check(rng, n, 2.0, num_iters=3)


@pytest.mark.parametrize("num_iters", [1, 2, 9, 10, 23])
def test_segments_of_the_backward(rng: np.random.Generator, num_iters: int) -> None:
    check(rng, 4, 2.0, num_iters=num_iters)
    check(rng, 4, 2.0, num_iters=num_iters, method="damped", **EPS)


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("n", [2, 4, 5, 17])
def test_damped(rng: np.random.Generator, n: int, first: str) -> None:
    check(rng, n, 3.0, method="damped", first=first, **EPS)
    check(rng, n, 3.0, method="damped", first=first, num_iters=4, eps_start=0.1, eps_den=0.5)  # every term counts


@pytest.mark.parametrize("n", [3, 4, 6, 7, 17])
def test_wide_logits(rng: np.random.Generator, n: int) -> None:
    check(rng, n, 10.0)  # more than 2^-60 below: unpaired reciprocals
    check(rng, n, 100.0, num_iters=4)  # more than 2^-100 below: logarithms


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(rng: np.random.Generator, dtype: torch.dtype) -> None:
    check(rng, 4, 2.0, dtype)
    check(rng, 5, 2.0, dtype, num_iters=4)


@pytest.mark.parametrize("n", [4, 5, 17])
def test_range_cap(rng: np.random.Generator, n: int) -> None:
    check(rng, n, 5.0, range_cap=3.0, num_iters=5)
    check(rng, n, 5.0, range_cap=3.0, num_iters=5, first="rows")


@pytest.mark.parametrize("n", [4, 5, 17])
def test_equal_largest_logits_share_the_gradient_of_a_raised_one(rng: np.random.Generator, n: int) -> None:
    logits = 2.0 * torch.tensor(rng.integers(-1, 2, size=(6, n, n)), dtype=torch.float32)
    grad = torch.tensor(rng.normal(size=(6, n, n)), dtype=torch.float32)
    for first in ("columns", "rows"):
        options = {"method": "knopp", "num_iters": 3, "first": first, "range_cap": 3.0}
        pulled = sinkhorn.sinkhorn_backward(logits, grad, **options)
        reference = expected_gradient(logits.double().numpy(), grad.double().numpy(), **options)
        np.testing.assert_allclose(pulled.numpy(), reference, rtol=0, atol=1e-6)


def test_vertices() -> None:
    logits = vertices(100.0, 1021)
    matrix = sinkhorn.sinkhorn_forward(logits)
    np.testing.assert_allclose(
        matrix.numpy(),
        expected(logits.double().numpy(), method="knopp", num_iters=20, first="columns"),
        rtol=0,
        atol=allowed(logits.numpy(), torch.float32),
    )


@pytest.mark.parametrize("n", [4, 5, 17])
def test_bad_neighbours_and_exact_zeros(rng: np.random.Generator, n: int) -> None:
    logits = torch.tensor(rng.normal(size=(7, n, n)), dtype=torch.float32)
    logits[1, 0, 1] = torch.nan
    logits[2, 2, 2] = torch.inf
    logits[3, 1, 2] = -torch.inf
    logits[4, :, 1] = -torch.inf  # a line of zeros stays
    logits[6, 1, :] = -torch.inf
    options = {"method": "knopp", "num_iters": 5, "first": "columns"}
    matrix = sinkhorn.sinkhorn_forward(logits, **options)
    assert matrix[1].isnan().all() and matrix[2].isnan().any()
    good = [0, 3, 4, 5, 6]
    np.testing.assert_allclose(
        matrix[good].numpy(), expected(logits[good].double().numpy(), **options), rtol=0, atol=1e-6
    )
    assert matrix[3, 1, 2] == 0
    grad = torch.tensor(rng.normal(size=(7, n, n)), dtype=torch.float32)
    pulled = sinkhorn.sinkhorn_backward(logits, grad, **options)
    finite = [0, 3, 5]
    reference = expected_gradient(logits[finite].double().numpy(), grad[finite].double().numpy(), **options)
    np.testing.assert_allclose(pulled[finite].numpy(), reference, rtol=0, atol=3e-6)
    assert pulled[3, 1, 2] == 0 and pulled[[4, 6]].isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16, 17])
def test_edges_of_tiles(rng: np.random.Generator, n: int) -> None:
    """A program's last matrices: the bits of a larger batch."""
    block = max(sinkhorn._entry(table, n)[1] for table in (sinkhorn._FORWARD, sinkhorn._BACKWARD))
    logits = torch.tensor(rng.normal(size=(2 * block + 1, n, n)), dtype=torch.float32)
    grad = torch.tensor(rng.normal(size=(2 * block + 1, n, n)), dtype=torch.float32)
    matrix = sinkhorn.sinkhorn_forward(logits, num_iters=2)
    pulled = sinkhorn.sinkhorn_backward(logits, grad, num_iters=2)
    for batch in sorted({1, block - 1, block, block + 1} - {0}):
        assert torch.equal(sinkhorn.sinkhorn_forward(logits[:batch], num_iters=2), matrix[:batch])
        assert torch.equal(sinkhorn.sinkhorn_backward(logits[:batch], grad[:batch], num_iters=2), pulled[:batch])


def test_empty_batch() -> None:
    empty = torch.empty(0, 4, 4)
    assert sinkhorn.sinkhorn_forward(empty).shape == (0, 4, 4)
    assert sinkhorn.sinkhorn_backward(empty, empty).shape == (0, 4, 4)
    matrix, counts = newton_forward(empty)
    assert matrix.shape == (0, 4, 4) and counts.shape == (0,)


@pytest.mark.parametrize(("n", "std"), [(1, 1.0), (2, 2.0), (2, 40.0), (3, 10.0), (4, 1.0), (4, 40.0), (8, 3.0)])
def test_newton_reaches_its_tolerance(rng: np.random.Generator, n: int, std: float) -> None:
    logits = torch.tensor(rng.normal(size=(20, n, n)) * std, dtype=torch.float32)
    for first in ("columns", "rows"):
        matrix, counts = newton_forward(logits, first=first)
        assert max(marginal_error(matrix, 1), marginal_error(matrix, 2)) <= 1e-6
        assert int(counts.max()) <= 30
    if n == 2:
        theta = logits[:, 0, 0] + logits[:, 1, 1] - logits[:, 0, 1] - logits[:, 1, 0]
        torch.testing.assert_close(newton_forward(logits)[0][:, 0, 0], torch.sigmoid(theta / 2), rtol=0, atol=1e-5)
    if std == 1.0:
        limit = expected(logits.double().numpy(), method="knopp", num_iters=2000, first="columns")
        np.testing.assert_allclose(newton_forward(logits)[0].numpy(), limit, rtol=0, atol=2e-6)


def test_newton_where_blocks_come_apart() -> None:
    """Blocks joined by entries below rounding: the roundings of their sums once made all of the step."""
    hard = torch.tensor([
        [[0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
        [[0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]],
    ])  # fmt: skip
    matrix, counts = newton_forward(hard.float() * 100.0)
    assert max(marginal_error(matrix, 1), marginal_error(matrix, 2)) <= 1e-6
    assert int(counts.max()) <= 30


def test_newton_on_vertices_and_in_float64(rng: np.random.Generator) -> None:
    matrix, _ = newton_forward(vertices(100.0, 2039))
    assert max(marginal_error(matrix, 1), marginal_error(matrix, 2)) <= 1e-6
    matrix, _ = newton_forward(torch.tensor(rng.normal(size=(8, 4, 4)) * 10), tol=1e-12)
    assert max(marginal_error(matrix, 1), marginal_error(matrix, 2)) <= 1e-12
