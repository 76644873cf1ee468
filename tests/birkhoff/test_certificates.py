"""Certificates: sound against ball arithmetic, tight, honest about what they know, and refuted when tampered with."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import flint
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import birkhoff
from birkhoff import certificates
from birkhoff.certificates import Certificate, Provenance, certify, certify_product
from birkhoff.errors import DtypeError, OptionError, ShapeError
from tests.backends import BACKENDS, Backend, to_numpy


def truncated(count: int, n: int, std: float, seed: int = 0) -> np.ndarray:
    matrix = np.exp(np.random.default_rng(seed).normal(0, std, (count, n, n)))
    for _ in range(20):
        matrix /= matrix.sum(axis=-2, keepdims=True)
        matrix /= matrix.sum(axis=-1, keepdims=True)
    return matrix


def ball(matrix: np.ndarray) -> flint.arb_mat:
    return flint.arb_mat([[flint.arb(float(value)) for value in row] for row in matrix])


def norm_ball(matrix: flint.arb_mat, precision: int = 200) -> flint.arb:
    """An enclosure of the spectral norm of exact reals: the largest eigenvalue of A^T A, as a ball."""
    flint.ctx.prec = precision
    eigenvalues = flint.acb_mat(matrix.transpose() * matrix).eig(multiple=True)
    return max((value.real for value in eigenvalues), key=lambda real: float(real.mid())).sqrt()


def is_below(bound: float, value: flint.arb) -> bool:
    """Whether ``bound`` is proved to be at most ``value``."""
    return bool(flint.arb(bound) <= value) or bool(abs(flint.arb(bound) - value) < flint.arb(1e-40))


def is_sound(certificate: Certificate, index: int, norm: flint.arb) -> bool:
    low, high = (
        float(to_numpy(value).reshape(-1)[index]) for value in (certificate.norm2_lower, certificate.norm2_upper)
    )
    return is_below(low, norm) and is_below(-high, -norm)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "std"), [(1, 1.0), (2, 3.0), (4, 1.0), (4, 10.0), (4, 30.0), (9, 3.0), (40, 3.0)])
def test_bounds_hold_and_are_tight(backend: Backend, dtype: str, n: int, std: float) -> None:
    matrix = truncated(100, n, std).astype(dtype)
    certificate = certify(backend.asarray(matrix))
    norm = np.linalg.norm(matrix.astype(np.float64), 2, axis=(-2, -1))  # within 1e-14
    lower, upper = to_numpy(certificate.norm2_lower), to_numpy(certificate.norm2_upper)
    assert (lower <= norm + 1e-14).all()
    assert (upper >= norm - 1e-14).all()
    width = upper - lower
    assert np.median(width) <= 1e-5
    assert width.max() <= 5e-4
    assert to_numpy(certificate.row_error).max() <= (n + 1) * np.finfo(dtype).eps / 2 + 8 * (n + 4) * 2.0**-53


@pytest.mark.parametrize("std", [0.3, 3.0, 30.0])
def test_bounds_against_ball_arithmetic(std: float) -> None:
    matrix = truncated(25, 4, std)
    certificate = certify(matrix)
    for index, item in enumerate(matrix):
        norm = norm_ball(ball(item))
        assert is_sound(certificate, index, norm)
        # A certificate whose bound is moved inside by one part in 10^12 is refuted by the same oracle.
        for field, factor in (("norm2_upper", 1 - 1e-12), ("norm2_lower", 1 + 1e-12)):
            if certificate.norm2_upper[index] - certificate.norm2_lower[index] < 1e-13:
                wrong = dataclasses.replace(certificate, **{field: getattr(certificate, field) * factor})
                assert not is_sound(wrong, index, norm)


@given(
    hnp.arrays(
        np.float64,
        (3, 3),
        elements=st.one_of(
            st.floats(0, 2), st.floats(0, 1e-300), st.floats(0, 1e-307, allow_subnormal=True), st.just(0.0)
        ),
    )
)
@settings(max_examples=80, deadline=None)
def test_schur_and_sums_against_fractions(matrix: np.ndarray) -> None:
    """Sums, their radius and the absolute bounds are right in exact rational arithmetic, subnormal numbers included."""
    certificate = certify(matrix)
    exact = [[Fraction(float(value)) for value in row] for row in matrix]
    rows, columns = [sum(row) for row in exact], [sum(row[j] for row in exact) for j in range(3)]
    radius = Fraction(float(certificate.sums_radius))
    for true, given_sum, bound in (
        *zip(rows, certificate.row_sums, certificate.absolute_row_sums, strict=True),
        *zip(columns, certificate.column_sums, certificate.absolute_column_sums, strict=True),
    ):
        assert abs(Fraction(float(given_sum)) - true) <= radius
        assert true <= Fraction(float(bound))
    # ||A||_2^2 >= |A x|^2 / |x|^2 for every x: the upper bound must not be below any of these.
    upper = Fraction(float(certificate.norm2_upper)) ** 2
    for vector in ([1, 1, 1], [1, 2, 3], [5, 1, 0], rows):
        image = [sum(a * x for a, x in zip(row, vector, strict=True)) for row in exact]
        assert sum(value * value for value in image) <= upper * sum(Fraction(x) ** 2 for x in vector)
    # ||A||_2^2 <= ||A^T A||_F: the lower bound must not be above.
    gram = [[sum(exact[k][i] * exact[k][j] for k in range(3)) for j in range(3)] for i in range(3)]
    lower = Fraction(float(certificate.norm2_lower)) ** 4
    assert lower <= sum(value * value for row in gram for value in row)


def test_without_outward_rounding_the_bounds_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inflation is needed: with it taken out, exact sums exceed the claimed bounds."""
    matrix = truncated(50, 5, 1.0)

    def violations() -> int:
        certificate = certify(matrix)
        return sum(
            sum(Fraction(float(value)) for value in row) > Fraction(float(bound))
            for item, bounds in zip(matrix, certificate.absolute_row_sums, strict=True)
            for row, bound in zip(item, bounds, strict=True)
        )

    assert violations() == 0
    monkeypatch.setattr(certificates, "_EPS", 0.0)
    assert violations() > 10


def test_underflow_is_accounted_for() -> None:
    """Products of entries underflow to zero; the norm does not, so no bound may."""
    tiny = np.full((3, 3), 1e-200)
    single = certify(tiny)
    assert 3e-200 * (1 - 1e-14) <= single.norm2_upper <= 3.001e-200
    assert single.norm2_lower <= 3e-200
    product = certify_product(np.stack([tiny, tiny]))  # the norm is 9e-400, which is not zero
    assert product.norm2_upper > 0.0
    assert (product.absolute_row_sums > 0.0).all()


def test_a_flushed_subnormal_does_not_break_the_bound() -> None:
    """A torch mode reads subnormal numbers as zero; the certificate of the stored values must still hold."""
    matrix = torch.tensor([[1.0, 1e-310], [1e-310, 1.0]], dtype=torch.float64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        certificate = certify(matrix)
    finally:
        torch.set_flush_denormal(False)
    assert float(certificate.norm2_upper) > 1.0
    assert certificate.provenance is Provenance.enclosure


@pytest.mark.parametrize("n", [1000])
def test_large_matrices_are_read_in_blocks(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).random((n, n), dtype=np.float32) / n
    whole = certify(matrix, num_steps=3)
    monkeypatch.setattr(certificates, "_BLOCK_ENTRIES", {"cpu": 2**12})
    blocked = certify(matrix, num_steps=3)
    norm = np.linalg.norm(matrix.astype(np.float64), 2)
    for certificate in (whole, blocked):
        assert certificate.norm2_lower <= norm <= certificate.norm2_upper
        assert certificate.norm2_upper - certificate.norm2_lower < 1e-3
    # The blocked sums are other sums, so their rounding differs; the inflation grows with n as the error may.
    assert blocked.sums_radius >= n * 2.0**-53


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_products_are_chained(backend: Backend, std: float) -> None:
    stack = truncated(6 * 64, 4, std).reshape(6, 64, 4, 4)
    certificate = certify_product(backend.asarray(stack))
    product = stack[:, 0]
    for layer in range(1, 64):
        product = stack[:, layer] @ product
    norm = np.linalg.norm(product, 2, axis=(-2, -1))
    lower, upper = to_numpy(certificate.norm2_lower), to_numpy(certificate.norm2_upper)
    assert (lower <= norm * (1 + 1e-12)).all()
    assert (upper >= norm * (1 - 1e-12)).all()
    assert (upper - norm).max() < 1e-6
    np.testing.assert_allclose(to_numpy(certificate.row_sums), product.sum(axis=-1), rtol=1e-12)
    np.testing.assert_allclose(to_numpy(certificate.column_sums), product.sum(axis=-2), rtol=1e-12)
    separate = to_numpy(certify(backend.asarray(stack)).norm2_upper).prod(axis=1)
    assert (upper <= separate + 1e-9).all()
    if std == 10.0:
        assert separate.max() > 1.3 * upper.max()  # what multiplying per-layer norms would have said


def test_product_against_ball_arithmetic() -> None:
    stack = truncated(20, 3, 5.0)
    certificate = certify_product(stack)
    flint.ctx.prec = 200
    product = ball(stack[0])
    for layer in stack[1:]:
        product = ball(layer) * product
    assert is_sound(certificate, 0, norm_ball(product))


def test_orders_of_a_product() -> None:
    stack = truncated(5, 3, 4.0)
    product = stack[4] @ stack[3] @ stack[2] @ stack[1] @ stack[0]
    applied, written = certify_product(stack), certify_product(stack[::-1], order="written")
    listed = certify_product(list(stack))
    np.testing.assert_allclose(applied.column_sums, product.sum(axis=0), rtol=1e-13)
    for other in (written, listed):
        np.testing.assert_array_equal(applied.norm2_upper, other.norm2_upper)
        np.testing.assert_array_equal(applied.column_sums, other.column_sums)
    assert not np.allclose(certify_product(stack, order="written").column_sums, product.sum(axis=0))


def test_norm_exceeds_one_after_truncation() -> None:
    """What the documentation says: exact rows, truncated columns, and a spectral norm above one."""
    logits = np.random.default_rng(0).normal(0, 10, (500, 4, 4))
    certificate = certify(birkhoff.sinkhorn(logits))
    assert certificate.norm2_lower.max() > 1.05
    assert certificate.row_error.max() < 1e-14
    finished = certify(birkhoff.project(logits, finish="nonexpansive").matrix)
    assert finished.norm2_upper.max() <= 1.0 + 1e-14


def test_provenance() -> None:
    permutation = np.eye(4)[[1, 3, 0, 2]] * np.array([1.0, 0.5, 2.0, 1.0])
    exact = certify(permutation)
    assert exact.provenance is Provenance.exact
    assert exact.norm2_lower == exact.norm2_upper == 2.0
    assert certify(np.full((3, 1, 1), 0.3)).provenance is Provenance.exact
    for shared_line in (np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 1.0], [0.0, 0.0]])):
        certificate = certify(shared_line)
        assert certificate.provenance is Provenance.enclosure
        assert certificate.norm2_upper >= np.sqrt(2.0)
    assert certify(np.full((2, 2), 0.5)).provenance is Provenance.enclosure
    assert certify(np.stack([np.eye(2), np.full((2, 2), 0.5)])).provenance is Provenance.enclosure
    sampled = certify(truncated(50, 3, 1.0), num_samples=7)
    assert sampled.provenance is Provenance.sampled
    assert sampled.norm2_upper.shape == (7,)
    assert "sampled" in str(sampled)
    assert certify(truncated(5, 3, 1.0), num_samples=7).provenance is Provenance.enclosure


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-300])
def test_negative_and_non_finite_entries_have_no_upper_bound(bad: float) -> None:
    matrix = truncated(3, 3, 1.0)
    matrix[1, 2, 0] = bad
    certificate = certify(matrix)
    assert certificate.norm2_upper[1] == np.inf
    assert np.isfinite(certificate.norm2_upper[[0, 2]]).all()
    np.testing.assert_array_equal(certificate.norm2_upper[[0, 2]], certify(matrix[[0, 2]]).norm2_upper)
    assert certificate.norm2_lower[1] <= (np.linalg.norm(matrix[1], 2) if np.isfinite(bad) else np.inf)
    product = certify_product(np.stack([matrix, matrix], axis=1))
    assert product.norm2_upper[1] == np.inf
    alone = certify(np.full((1, 1), bad))  # at most one nonzero in each row: known, if it is finite
    assert alone.norm2_upper == (abs(bad) if np.isfinite(bad) else np.inf)


def test_overflow_is_unbounded_not_wrong() -> None:
    certificate = certify(np.full((2, 2), 1.5e308))
    assert certificate.norm2_upper == np.inf
    assert certificate.norm2_lower == 1.5e308
    assert certificate.sums_radius == np.inf
    large = certify(np.full((2, 2), 1e300))  # the Gram matrix overflows, the sums do not
    assert 2e300 <= large.norm2_upper <= 2.001e300


def test_signed_and_absolute_definitions_differ() -> None:
    matrix = np.array([[2.0, -1.0], [0.5, 0.5]])
    certificate = certify(matrix)
    assert certificate.forward_gain_max == 1.0
    assert certificate.forward_gain_min == 1.0
    assert certificate.backward_gain_max == 2.5
    assert certificate.backward_gain_min == 0.5
    assert certificate.norm_inf_upper == pytest.approx(3.0, rel=1e-14)
    assert certificate.norm_1_upper == pytest.approx(2.5, rel=1e-14)
    assert certify(abs(matrix)).norm2_upper >= np.linalg.norm(matrix, 2)
    product = certify_product(np.stack([matrix, matrix]))
    np.testing.assert_allclose(product.row_sums, (matrix @ matrix).sum(axis=1))
    np.testing.assert_allclose(product.absolute_row_sums, (abs(matrix) @ abs(matrix)).sum(axis=1), rtol=1e-14)


def test_bfloat16_is_certified_as_stored() -> None:
    exact = birkhoff.project(torch.randn(500, 4, 4, dtype=torch.float64), finish="exact").matrix
    stored = exact.to(torch.bfloat16)
    certificate = certify(stored.requires_grad_())
    norm = torch.linalg.matrix_norm(stored.detach().double(), 2)
    assert bool((certificate.norm2_lower <= norm + 1e-14).all() and (norm <= certificate.norm2_upper + 1e-14).all())
    assert 1.0005 < float(certificate.norm2_upper.max()) < 1.004
    assert float(certificate.row_error.max()) <= 2.0**-8
    assert not certificate.norm2_upper.requires_grad


def test_devices_without_float64_are_served_on_the_host() -> None:
    import array_api_strict

    matrix = truncated(3, 4, 1.0).astype(np.float32)
    device = array_api_strict.Device("no_float64")
    certificate = certify(array_api_strict.asarray(matrix, device=device))
    assert isinstance(certificate.norm2_upper, np.ndarray)
    np.testing.assert_array_equal(certificate.norm2_upper, certify(matrix).norm2_upper)


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        (np.ones((3, 2)), ShapeError),
        (np.ones(3), ShapeError),
        (np.ones((0, 0)), ShapeError),
        (np.ones((2, 2), dtype=int), DtypeError),
        (np.ones((2, 2), dtype=complex), DtypeError),
        ([[1.0]], TypeError),
    ],
)
def test_misuse(argument: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        certify(argument)


def test_misuse_of_options() -> None:
    matrix = np.eye(2)
    for call in (
        lambda: certify(matrix, num_steps=-1),
        lambda: certify(matrix, num_samples=0),
        lambda: certify_product(matrix[None], order="backwards"),
    ):
        with pytest.raises(OptionError):
            call()
    with pytest.raises(ShapeError, match="L, n, n"):
        certify_product(matrix)
    with pytest.raises(ShapeError, match="at least one factor"):
        certify_product(np.ones((3, 0, 2, 2)))
    with pytest.raises(ShapeError, match="one shape"):
        certify_product([np.eye(2), np.eye(3)])


def test_empty_batch() -> None:
    certificate = certify(np.ones((0, 5, 3, 3)))
    assert certificate.norm2_upper.shape == (0, 5)
    assert certificate.row_sums.shape == (0, 5, 3)
    assert "empty" in str(certificate)


@pytest.mark.parametrize("n", [4, 8])
def test_a_column_of_zeros_keeps_its_bound_where_a_device_flushes(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device loses is divided by the Collatz vector, which is zero at that column but for what lifts it."""
    monkeypatch.setattr(certificates._Product, "_flushes_subnormals", lambda self, single: True)
    matrix = np.random.default_rng(0).random((50, n, n)).astype(np.float32)
    matrix[:, :, 0] = 0
    matrix /= matrix.sum(axis=-1, keepdims=True)
    norm = np.linalg.norm(matrix.astype(np.float64), 2, axis=(-2, -1))
    upper = certify(matrix).norm2_upper
    assert (upper >= norm * (1 - 1e-14)).all()
    assert (upper <= norm * (1 + 1e-12)).all()
