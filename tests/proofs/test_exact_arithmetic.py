"""The instruments that claims measure with: fractions, balls, compensated sums, the model in extended precision."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from birkhoff import reference
from proofs import enclosure, measure, model, rational, strategies

needs_flint = pytest.mark.skipif(not enclosure.available(), reason="python-flint is not installed")


def test_compensated_sums_are_exact_where_plain_ones_are_not() -> None:
    matrix = np.array([[1.0, 2.0**-60, -1.0], [1e16, 1.0, -1e16], [0.1, 0.2, 0.3]])
    assert measure.sums(matrix, "rows").tolist() == [2.0**-60, 1.0, math.fsum([0.1, 0.2, 0.3])]
    assert np.array_equal(measure.sums(matrix.T, "columns"), measure.sums(matrix, "rows"))
    assert measure.sums(np.zeros((2, 0, 0)), "rows").shape == (2, 0)


def test_allowances() -> None:
    logits = np.array([[[0.0, 64.0], [-np.inf, 0.0]]])
    assert measure.logit_range(logits).tolist() == [64.0]
    assert measure.accuracy_allowance(logits, "float64")[0] == pytest.approx(4 * 2 * 2.0**-53 * 4)
    assert measure.marginal_allowance(4, "float32") == pytest.approx(5 * 2.0**-24, rel=1e-6)
    assert measure.marginal_allowance(4, "bfloat16") == pytest.approx(2.0**-8, rel=1e-4)


def test_rational_norm_decisions() -> None:
    matrix = np.array([[0.75, 0.25], [0.25, 0.75]])
    assert rational.norm_at_most(matrix, 1.0)
    assert not rational.norm_at_most(matrix, np.nextafter(1.0, 0))
    assert not rational.norm_below(matrix, 1.0)
    assert rational.norm_below(matrix, np.nextafter(1.0, 2))
    assert rational.norm_at_most(np.zeros((3, 3)), 0.0) and not rational.norm_below(np.zeros((3, 3)), 0.0)
    assert rational.norm_at_most(matrix, np.inf) and not rational.norm_at_most(matrix, -1.0)
    assert not rational.is_positive_semidefinite([[Fraction(0), Fraction(1)], [Fraction(1), Fraction(5)]])


def test_stack_decisions_agree_with_the_rationals() -> None:
    rng = np.random.default_rng(0)
    matrices = rng.random((60, 4, 4)) * 10.0 ** rng.uniform(-8, 8, (60, 1, 1))
    matrices[::5] = np.eye(4)
    matrices[1::5, :, 2] = 0
    norms = np.linalg.norm(matrices, 2, axis=(-2, -1))
    for factor in (0.5, 1 - 2.0**-52, 1.0, 1 + 2.0**-52, 1 + 1e-14, 2.0):
        bounds = norms * factor
        expected = [rational.norm_at_most(m, float(b)) for m, b in zip(matrices, bounds, strict=True)]
        assert measure.norms_at_most(matrices, bounds).tolist() == expected
        expected = [rational.norm_below(m, float(b)) for m, b in zip(matrices, bounds, strict=True)]
        assert measure.norms_below(matrices, bounds).tolist() == expected


def test_schur_holds_refuses_negative_and_nan() -> None:
    assert rational.schur_holds(np.array([[1.0, 2.0], [0.0, 3.0]]))
    assert not rational.schur_holds(np.array([[1.0, -1.0], [0.0, 1.0]]))
    assert not rational.schur_holds(np.array([[1.0, np.nan], [0.0, 1.0]]))


def test_rational_iteration_of_the_triangular_matrix_has_error_one_over_2k_plus_1() -> None:
    kernel = [[Fraction(1), Fraction(1)], [Fraction(0), Fraction(1)]]
    for count in (1, 5, 20):
        result = rational.iterate(kernel, count)
        assert rational.exact_sums(result, "rows") == [1, 1]
        errors = [abs(total - 1) for total in rational.exact_sums(result, "columns")]
        assert max(errors) == Fraction(1, 2 * count + 1)


def test_rational_rounding_is_doubly_stochastic_and_its_first_steps_are_not_above_one() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        entries = rational.exact(rng.random((4, 4)) * 2 * (rng.random((4, 4)) < 0.7))
        rounded = rational.round_to_polytope(entries)
        assert rational.exact_sums(rounded, "rows") == [1] * 4 == rational.exact_sums(rounded, "columns")
        assert min(min(row) for row in rounded) >= 0
        shrunk = rational.round_to_polytope(entries, complete=False)
        assert max(rational.exact_sums(shrunk, "rows") + rational.exact_sums(shrunk, "columns")) <= 1
        assert rational.round_to_polytope(rounded) == rounded


def test_the_model_agrees_with_the_library_s_oracle() -> None:
    logits = np.random.default_rng(2).standard_normal((20, 4, 4)) * 10
    for first in ("columns", "rows"):
        gap = np.abs(model.iterate(logits, 20, first) - reference.sinkhorn(logits, 20, first=first))
        assert gap.max() < 1e-14
        damped = model.damped_iterate(logits, 20, 1e-6, 1e-6, first=first)
        assert np.abs(damped - reference.sinkhorn_damped(logits, 20, first=first)).max() < 1e-14


def test_the_model_s_derivatives_match_differences() -> None:
    rng = np.random.default_rng(3)
    logits, direction = rng.standard_normal((2, 5, 3, 3))
    step = 1e-6
    for first in ("columns", "rows"):
        exact = model.derivative(logits, direction, 5, first)
        ahead, behind = (model.iterate(logits + s * step * direction, 5, first) for s in (1, -1))
        assert np.abs((ahead - behind) / (2 * step) - exact).max() < 1e-9
        exact = model.damped_derivative(logits, direction, 5, 1e-2, 1e-2, first)
        ahead, behind = (model.damped_iterate(logits + s * step * direction, 5, 1e-2, 1e-2, first) for s in (1, -1))
        assert np.abs((ahead - behind) / (2 * step) - exact).max() < 1e-9


@needs_flint
@pytest.mark.parametrize("eps", [None, (1e-6, 1e-6)])
@pytest.mark.parametrize("first", ["columns", "rows"])
def test_enclosures_contain_the_model_and_are_narrow(first: str, eps: tuple[float, float] | None) -> None:
    rng = np.random.default_rng(4)
    for scale in (0.1, 3.0, 100.0):
        for n in (1, 2, 5, 8):
            logits = scale * rng.standard_normal((n, n))
            balls = enclosure.iterate(logits, 20, first=first, eps=eps)
            assert enclosure.width(balls) < enclosure.TIGHT
            known = model.iterate(logits, 20, first) if eps is None else model.damped_iterate(logits, 20, *eps, first)
            assert enclosure.distance(balls, known.astype(np.float64)) < 1e-14
            assert enclosure.distance(balls, known.astype(np.float64) + 1e-9) > 9e-10


@needs_flint
def test_enclosure_of_zeros_and_ones_is_the_exact_fraction() -> None:
    pattern = np.array([[0.0, 0.0, -np.inf], [-np.inf, 0.0, 0.0], [0.0, -np.inf, 0.0]])
    pattern[0, 2] = 0.0
    kernel = [[Fraction(int(np.isfinite(v))) for v in row] for row in pattern]
    known = rational.iterate(kernel, 6)
    balls = enclosure.iterate(pattern, 6)
    for row, expected in zip(balls, known, strict=True):
        for ball, value in zip(row, expected, strict=True):
            assert (ball * value.denominator - value.numerator).contains(0)


@needs_flint
def test_enclosure_refuses_what_it_cannot_do_and_sees_nan() -> None:
    with pytest.raises(ValueError, match="n <= 8"):
        enclosure.iterate(np.zeros((9, 9)), 1)
    balls = enclosure.iterate(np.zeros((2, 2)), 1)
    assert enclosure.distance(balls, np.full((2, 2), np.nan)) == np.inf


def test_strategies_keep_their_promises() -> None:
    rng = np.random.default_rng(6)
    for name, generator in strategies.GENERATORS.items():
        values = generator(rng, (2, 3), 4, 5.0)
        assert values.shape == (2, 3, 4, 4) and np.isfinite(values).all(), name
    assert len(strategies.all_vertices(3, 8.0)) == 512
    with pytest.raises(ValueError, match="n <= 4"):
        strategies.all_vertices(5, 1.0)
    with pytest.raises(ValueError, match="unknown generators"):
        strategies.logits(generators=("nonsense",))
    with pytest.raises(ValueError, match="unknown layout"):
        strategies.layout(values, "nonsense")
    for name in strategies.LAYOUTS:
        assert np.array_equal(strategies.layout(values[0], name), values[0]), name


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rounding_to_a_dtype_matches_numpy(dtype: str) -> None:
    values = np.random.default_rng(7).standard_normal(1000) * 100
    assert np.array_equal(strategies.round_to(values, dtype), values.astype(dtype))


def test_rounding_to_bfloat16_matches_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(8).standard_normal(10_000).astype(np.float32)
    values[:4] = np.inf, -np.inf, 0.0, 1.00390625
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(strategies.round_to(values, "bfloat16"), expected)
