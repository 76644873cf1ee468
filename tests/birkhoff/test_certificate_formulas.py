"""The certificate is the documented one: allowances, blocks and flushed subnormals as on its derivation page."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest

from birkhoff import certificates
from birkhoff.certificates import Provenance, certify, certify_product

TWO_U = 2.0**-52
TINY = 2.0**-1022
TINY32 = 2.0**-126


def enclosed(n: int, low: float, high: float, entry: float, loss: float = 0.0) -> tuple[float, float]:
    """(eq-enclose) for a matrix of equal entries and a vector of equal components; n and entry powers of two."""
    factor = (n + 4) * TWO_U
    above = n * (entry * high) * (1.0 + factor) + (4 * n * TINY + 2 * n * loss * high)
    return max(0.0, n * (entry * low) * (1.0 - factor) - 4 * n * TINY), above


def expected(n: int, entry: float, layers: int, loss: float = 0.0) -> dict[str, float]:
    """Bounds of a power of the constant matrix, whose every sum is exact before it is moved outward."""
    low = high = 1.0
    for _ in range(layers):
        low, high = enclosed(n, low, high, entry, loss)
    sums_low, sums_high = low, high
    for _ in range(layers):
        low, high = enclosed(n, low, high, entry, loss)
    schur = np.sqrt(sums_high) * np.sqrt(sums_high) * (1.0 + 4 * TWO_U)
    collatz = np.sqrt(high) * (1.0 + 2 * TWO_U)
    above = (n + 10) * TWO_U

    def ratio(numerator: float, denominator: float) -> float:
        root = np.sqrt(float(n))
        return numerator * root * (1.0 - above) / (denominator * root * (1.0 + above))

    lower = max(ratio(sums_low, 1.0), ratio(low, sums_high), entry if layers == 1 else 0.0)
    return {
        "absolute_row_sums": sums_high,
        "sums_radius": (sums_high - sums_low) * (1.0 + 2 * TWO_U),
        "norm2_upper": min(schur, collatz),
        "norm2_lower": lower,
    }


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize(
    ("layers", "log2_entry"),
    [(1, 0), (2, 0), (3, 0), (3, -2), (3, -150), (3, 150), (1, -510), (1, -900), (1, -1015), (1, 500)],
)
@pytest.mark.parametrize("n", [2, 4])
def test_bounds_of_constant_matrices_bit_for_bit(n: int, layers: int, log2_entry: int, num_steps: int) -> None:
    entry = 2.0**log2_entry
    stack = np.full((layers, n, n), entry)
    certificate = certify_product(stack, num_steps=num_steps)
    for field, value in expected(n, entry, layers).items():
        assert (getattr(certificate, field) == value).all(), field
    assert (certificate.absolute_column_sums == certificate.absolute_row_sums).all()
    for sums in (certificate.row_sums, certificate.column_sums):
        assert (sums == (n * entry) ** layers).all()
    assert certificate.row_error == (abs((n * entry) ** layers - 1) + certificate.sums_radius) * (1.0 + 4 * TWO_U)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_what_underflow_may_take_is_four_normal_numbers_for_each_entry(n: int) -> None:
    certificate = certify(np.zeros((n, n)))
    assert (certificate.absolute_row_sums == 4 * n * TINY).all()
    assert certificate.sums_radius == pytest.approx(4 * n * TINY, rel=1e-14)
    assert certificate.norm2_upper == certificate.norm2_lower == 0.0


@pytest.mark.parametrize(("dtype", "loss"), [(np.float32, TINY32), (np.float64, TINY)])
def test_a_device_that_flushes_subnormals_gets_wider_bounds_and_nothing_exact(
    dtype: Any, loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates._Product, "_flushes_subnormals", lambda self, single: True)
    for entry in (1.0, 2.0**-100, 0.0):
        certificate = certify(np.full((4, 4), entry, dtype=dtype))
        for field, value in expected(4, entry, 1, loss).items():
            assert (getattr(certificate, field) == value).all(), field
    assert certify(np.eye(3, dtype=dtype)).provenance is Provenance.enclosure


def test_torch_is_asked_whether_it_flushes_subnormals() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float64):
        identity = torch.eye(3, dtype=dtype)
        assert certify(identity).provenance is Provenance.exact
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals to zero; the test above covers what then follows")
        try:
            assert certify(identity).provenance is Provenance.enclosure
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("entries", [1, 9, 40, 200, 1000])
def test_blocks_bound_the_memory_and_change_no_bound(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk holds at most the block in all its factors (or one matrix), and a row block likewise (or one row)."""
    stack = np.random.default_rng(0).random((7, 3, 4, 4))
    whole = certify_product(stack)
    monkeypatch.setattr(certificates, "_BLOCK_ENTRIES", {"cpu": entries})
    chunks: list[tuple[int, int]] = []
    real = certificates._bounds

    def watched(product: Any, num_steps: int) -> Any:
        chunks.append((product.batch, product.rows_per_block))
        return real(product, num_steps)

    monkeypatch.setattr(certificates, "_bounds", watched)
    blocked = certify_product(stack)
    assert [batch for batch, _ in chunks] == _pieces(7, max(1, entries // (3 * 16)))
    assert all(min(4, rows) == max(1, min(4, entries // (batch * 4))) for batch, rows in chunks)
    for field in ("norm2_lower", "norm2_upper", "row_sums", "column_sums"):
        np.testing.assert_allclose(getattr(blocked, field), getattr(whole, field), rtol=1e-14)


def _pieces(count: int, size: int) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def test_the_narrowest_dtype_of_a_product_decides_what_reading_may_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates._Product, "_flushes_subnormals", lambda self, single: True)
    factors = [np.full((4, 4), 2.0**-100, dtype=dtype) for dtype in (np.float64, np.float32)]
    for field, value in expected(4, 2.0**-100, 2, TINY32).items():
        assert (getattr(certify_product(factors), field) == value).all(), field


def test_a_certificate_is_an_immutable_value_of_one_matrix_by_default() -> None:
    numbers = [np.ones(1)] * 7
    with pytest.raises(TypeError):
        certificates.Certificate(*numbers)
    fields = [field.name for field in dataclasses.fields(certificates.Certificate)][:7]
    certificate = certificates.Certificate(**dict(zip(fields, numbers, strict=True)))
    assert certificate.num_layers == 1 and not certificate.sampled
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.num_layers = 2
    assert certificate == certificate and certificate != dataclasses.replace(certificate)  # no comparing of arrays
    assert len({certificate, certificate}) == 1


def test_gains_and_errors_are_the_extremes_over_lines() -> None:
    matrix = np.array([[0.25, 0.0, 0.0], [0.5, 0.5, 0.0], [1.0, 1.0, 1.5]])  # rows 0.25, 1, 3.5; columns 1.75, 1.5, 1.5
    certificate = certify(matrix)
    assert (certificate.forward_gain_min, certificate.forward_gain_max) == (0.25, 3.5)
    assert (certificate.backward_gain_min, certificate.backward_gain_max) == (1.5, 1.75)
    assert certificate.row_error == pytest.approx(2.5, rel=1e-13) and certificate.row_error >= 2.5
    assert certificate.column_error == pytest.approx(0.75, rel=1e-13) and certificate.column_error >= 0.75


def test_samples_are_spread_from_the_first_to_the_last() -> None:
    stack = np.stack([k * np.eye(2) for k in range(1, 8)])
    assert certify(stack, num_samples=3).norm2_upper.tolist() == [1.0, 4.0, 7.0]
    assert certify(stack, num_samples=1).norm2_upper.tolist() == [1.0]
    assert certify(stack, num_samples=6).provenance is Provenance.sampled
    whole = certify(stack.reshape(7, 1, 2, 2), num_samples=7)
    assert whole.provenance is Provenance.exact and whole.norm2_upper.shape == (7, 1)


def test_a_signed_matrix_among_others_has_absolute_sums() -> None:
    signed = np.array([[2.0, -1.0], [0.5, 0.5]])
    certificate = certify(np.stack([np.eye(2), signed, np.eye(2)]))
    np.testing.assert_allclose(certificate.absolute_row_sums, [[1, 1], [3, 1], [1, 1]], rtol=1e-14)
    np.testing.assert_allclose(certificate.absolute_column_sums, [[1, 1], [2.5, 1.5], [1, 1]], rtol=1e-14)
    assert certificate.norm2_upper.tolist() == [1.0, np.inf, 1.0]


def test_reading_loss_is_that_of_the_largest_component(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates._Product, "_flushes_subnormals", lambda self, single: True)
    first = np.array([[1.0, 0.0], [0.0, 2.0**60]], dtype=np.float32)
    certificate = certify_product([first, np.zeros_like(first)])  # flushed entries of the zeros may have been subnormal
    assert (certificate.absolute_row_sums >= 4 * TINY32 * 2.0**60).all()
    assert (certificate.absolute_row_sums <= 4.01 * TINY32 * 2.0**60).all()


@pytest.mark.parametrize("log2_scale", [-300, -40, 40, 300])
@pytest.mark.parametrize("n", [4, 40])
def test_bounds_scale_with_the_matrix(n: int, log2_scale: int) -> None:
    """Also where squarings of the Gram matrix or many power steps would leave float64 without rescaling."""
    matrix = np.random.default_rng(0).random((5, n, n)) ** 4
    plain, scaled = certify(matrix), certify(matrix * 2.0**log2_scale)
    for field in ("norm2_lower", "norm2_upper"):
        np.testing.assert_allclose(getattr(scaled, field), 2.0**log2_scale * getattr(plain, field), rtol=1e-13)
    assert (plain.norm2_upper - plain.norm2_lower).max() <= 1e-9 * plain.norm2_upper.max()


@pytest.mark.parametrize("n", [4, 40])
def test_a_product_scales_with_its_factors(n: int) -> None:
    stack = np.random.default_rng(1).random((6, n, n)) ** 4
    scales = 2.0 ** np.array([100, -100, 200, -300, 100, 0])[:, None, None]
    plain, scaled = certify_product(stack), certify_product(stack * scales)
    for field in ("norm2_lower", "norm2_upper"):
        np.testing.assert_allclose(getattr(scaled, field), getattr(plain, field), rtol=1e-13)
    assert plain.norm2_upper - plain.norm2_lower <= 1e-9 * plain.norm2_upper


@pytest.mark.parametrize("matrix", [[[1.0, 2.0, 0.0], [3.0, 4.0, 0.0], [5.0, 6.0, 0.0]], [[1.0, 3.0], [0.0, 1.0]]])
def test_zero_columns_and_entries_leave_the_bounds_tight(matrix: list[list[float]]) -> None:
    certificate = certify(np.array(matrix))
    assert certificate.norm2_upper - certificate.norm2_lower <= 1e-12 * np.linalg.norm(matrix, 2)


def test_without_steps_the_vector_of_ones_is_all_there_is() -> None:
    matrix = np.random.default_rng(2).random((4, 4)) ** 3
    bounds = [float(certify(matrix, num_steps=steps).norm2_upper) for steps in (0, 1, 2, 5)]
    ones = np.sqrt((matrix.T @ (matrix @ np.ones(4))).max())
    schur = np.sqrt(matrix.sum(axis=0).max() * matrix.sum(axis=1).max())
    assert bounds[0] == pytest.approx(min(ones, schur), rel=1e-12)
    assert bounds == sorted(bounds, reverse=True) and bounds[1] < bounds[0] * (1 - 1e-3)
    assert bounds[3] == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-6)


def test_the_radius_is_that_of_the_largest_sum() -> None:
    matrix = np.array([[1.0, 1.0], [2.0**40, 2.0**40]])
    for turned in (matrix, matrix.T):
        certificate = certify(turned)
        assert certificate.sums_radius == pytest.approx(2.0**41 * 2 * (2 + 4) * TWO_U, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "layers", "blocks"), [((40000, 8, 8), 1, 6.0), ((2000, 8, 8), 20, 1.6), ((1, 600, 600), 6, 1.6)]
)
def test_temporaries_have_as_many_entries_as_a_block(shape: tuple[int, int, int], layers: int, blocks: float) -> None:
    """2^20 numbers of float64 on the host, of which a few are alive at a time, for many matrices and for large ones."""
    stack = [np.random.default_rng(0).random(shape, dtype=np.float32) for _ in range(layers)]
    certify_product([layer[:1] for layer in stack])
    tracemalloc.start()
    certify_product(stack)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= blocks * 8 * 2**20


def test_a_batch_that_fits_a_block_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    real = certificates._bounds

    def watched(product: Any, num_steps: int) -> Any:
        batches.append(product.batch)
        return real(product, num_steps)

    monkeypatch.setattr(certificates, "_bounds", watched)
    for count, expected in ((2**16, [2**16]), (2**16 + 1, [2**16, 1]), (0, [0]), (1, [1])):
        batches.clear()
        certify(np.zeros((count, 4, 4)), num_steps=0)
        assert batches == expected


@pytest.mark.parametrize("signed", [False, True])
def test_the_radius_of_a_product_is_rounding(signed: bool) -> None:
    stack = np.random.default_rng(3).random((3, 4, 4)) - (0.5 if signed else 0.0)
    assert certify_product(stack).sums_radius <= 2e-13


def test_steps_are_squarings_up_to_32_and_single_above() -> None:
    """Two blocks of norms 1 and 0.9: 3 squarings are 8 power steps, which leave 5 times less of the second vector."""
    gaps = []
    for n in (32, 33):
        matrix = np.zeros((n, n))
        matrix[: n // 2, : n // 2] = np.random.default_rng(0).random((n // 2, n // 2))
        matrix[n // 2 :, n // 2 :] = np.random.default_rng(1).random((n - n // 2, n - n // 2))
        for half, norm in ((slice(0, n // 2), 1.0), (slice(n // 2, n), 0.9)):
            matrix[half, half] *= norm / np.linalg.norm(matrix[half, half], 2)
        certificate = certify(matrix, num_steps=3)
        gaps.append(float(certificate.norm2_upper - certificate.norm2_lower))
    assert gaps[0] <= 0.003 and gaps[1] >= 0.01


@pytest.mark.parametrize("function", [certify, certify_product])
def test_default_effort_is_the_documented_one(function: Any) -> None:
    documented = re.search(r"num_steps : int, default (\d+)", inspect.getdoc(certify) or "")
    assert documented and inspect.signature(function).parameters["num_steps"].default == int(documented[1])


def test_norms_are_free_of_overflow_and_of_rows_that_are_zero() -> None:
    matrix = np.zeros((3, 3))
    matrix[0] = [2.0**300, 2.0**299, 2.0**-300]
    matrix[1] = [2.0**298, 2.0**300, 0.0]
    certificate = certify(matrix)
    norm = np.linalg.norm(matrix * 2.0**-300, 2)
    for bound in (certificate.norm2_lower, certificate.norm2_upper):
        assert bound * 2.0**-300 == pytest.approx(norm, rel=1e-12)
