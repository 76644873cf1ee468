"""Tests written for mutants that survived the rest of the suite."""

from __future__ import annotations

import ast
import dataclasses
import re

import numpy as np
import pytest

import birkhoff
from birkhoff import solvers
from birkhoff.rounding import round_to_nonexpansive, round_to_polytope


@pytest.mark.parametrize("name", solvers.__all__)
def test_solvers_are_immutable_values(name: str) -> None:
    solver = getattr(solvers, name)()
    assert hash(solver) == hash(getattr(solvers, name)()) and solver == getattr(solvers, name)()
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.num_iters = 3
    with pytest.raises(TypeError):
        getattr(solvers, name)(3)


@pytest.mark.parametrize("offset", [-1e6, -2e3, 2e3, 1e6])
@pytest.mark.parametrize("name", ["SinkhornKnopp", "SinkhornLog", "SinkhornDamped"])
def test_offsets_change_neither_result_nor_gradient(name: str, offset: float) -> None:
    solver = getattr(solvers, name)()
    logits = np.round(np.random.default_rng(0).standard_normal((3, 4, 4)) * 8) / 8
    grad = np.random.default_rng(1).standard_normal(logits.shape)
    moved = logits + offset
    assert np.abs(birkhoff.project(moved, solver).matrix - birkhoff.project(logits, solver).matrix).max() < 1e-13
    adjoint = birkhoff.adjoints.Unrolled()
    assert np.abs(adjoint.vjp(moved, grad, solver) - adjoint.vjp(logits, grad, solver)).max() < 1e-13


def test_rounding_keeps_zeros_positive() -> None:
    matrix = np.array([[0.0, -0.25], [2.0, 0.5]])
    for finish in (round_to_nonexpansive, round_to_polytope):
        result = finish(matrix)
        assert not np.signbit(result).any()


def test_the_zero_matrix_is_rounded_to_the_uniform_one() -> None:
    assert np.array_equal(round_to_polytope(np.zeros((3, 3))), np.full((3, 3), 1 / 3))
    assert np.array_equal(round_to_nonexpansive(np.zeros((3, 3))), np.zeros((3, 3)))


@pytest.mark.parametrize("weight", [0.0, -1.0, 2.0, 3.0])
def test_over_relaxation_outside_zero_and_two_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="relaxation"):
        solvers.SinkhornLog(relaxation=weight)


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("name", ["SinkhornKnopp", "SinkhornLog", "SinkhornDamped"])
def test_gradient_and_tangent_go_through_the_range_cap(name: str, first: str) -> None:
    solver = getattr(solvers, name)(range_cap=1.5, first=first, num_iters=3)
    rng = np.random.default_rng(2)
    logits, grad, direction = 2 * rng.standard_normal((3, 5, 4, 4))
    step = 1e-6
    ahead, behind = (birkhoff.project(logits + s * step * direction, solver).matrix for s in (1, -1))
    numeric = np.sum(grad * (ahead - behind)) / (2 * step)
    pulled = birkhoff.adjoints.Unrolled().vjp(logits, grad, solver)
    assert np.sum(pulled * direction) == pytest.approx(numeric, abs=1e-6)
    torch = pytest.importorskip("torch")

    def function(x):  # type: ignore[no-untyped-def]
        return birkhoff.project(x, solver).matrix

    pair = (torch.from_numpy(logits),), (torch.from_numpy(direction),)
    _, pushed = torch.func.jvp(function, *pair)
    assert float((pushed * torch.from_numpy(grad)).sum()) == pytest.approx(numeric, abs=1e-6)


def test_rounding_has_derivative_one_at_zero_entries() -> None:
    torch = pytest.importorskip("torch")
    matrix = torch.tensor([[0.25, 0.0], [0.0, 0.25]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(round_to_nonexpansive(matrix).sum(), matrix)
    assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("name", solvers.__all__)
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", None])
def test_num_iters_must_be_a_positive_integer(name: str, value: object) -> None:
    with pytest.raises(ValueError, match="num_iters"):
        getattr(solvers, name)(num_iters=value)


@pytest.mark.parametrize("name", solvers.__all__)
@pytest.mark.parametrize("options", [{"tol": 0.0}, {"tol": -1e-3}, {"first": "diagonal"}, {"first": None}])
def test_other_options_outside_their_domain_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        getattr(solvers, name)(**options)


@pytest.mark.parametrize("name", ["SinkhornKnopp", "SinkhornLog", "SinkhornDamped", "Newton"])
@pytest.mark.parametrize("cap", [0.0, -1.0])
def test_a_range_cap_must_be_positive(name: str, cap: float) -> None:
    with pytest.raises(ValueError, match="range_cap"):
        getattr(solvers, name)(range_cap=cap)


def test_small_options_are_accepted() -> None:
    solvers.SinkhornKnopp(num_iters=1, tol=1e-300, range_cap=1e-300)
    solvers.SinkhornLog(relaxation=1e-3)
    solvers.SinkhornLog(relaxation=1.999)
    solvers.SinkhornDamped(eps_start=0.0, eps_den=0.0)
    for option in ("eps_start", "eps_den"):
        with pytest.raises(ValueError, match=option):
            solvers.SinkhornDamped(**{option: -1e-9})


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SinkhornDamped", {"eps_start": 0.1, "eps_den": 0.05}),
        ("SinkhornDamped", {"eps_start": 0.1, "eps_den": 0.0, "range_cap": 1.0}),
        ("SinkhornDamped", {"eps_start": 0.0, "eps_den": 0.2}),
        ("SinkhornLog", {"range_cap": 1.0}),
        ("SinkhornLog", {"relaxation": 1.4}),
        ("SinkhornKnopp", {"range_cap": 1.0}),
    ],
)
def test_first_and_second_derivatives_with_every_option(name: str, options: dict[str, float], first: str) -> None:
    torch = pytest.importorskip("torch")
    solver = getattr(solvers, name)(num_iters=2, first=first, **options)
    logits = torch.tensor([[0.3, -1.7, 0.9], [1.4, 0.2, -0.6], [-2.1, 0.5, 0.1]], dtype=torch.float64)

    def function(x):  # type: ignore[no-untyped-def]
        return birkhoff.project(x, solver).matrix

    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(function, (logits,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (logits,), check_fwd_over_rev=True)


def test_the_damped_recurrence_with_large_eps_is_the_oracle() -> None:
    from birkhoff import reference

    logits = np.random.default_rng(3).standard_normal((4, 3, 3)) * 3
    for first in ("columns", "rows"):
        for eps_start, eps_den in ((0.1, 0.05), (0.0, 0.3), (0.2, 0.0)):
            solver = solvers.SinkhornDamped(num_iters=4, first=first, eps_start=eps_start, eps_den=eps_den)
            known = reference.sinkhorn_damped(logits, 4, first=first, eps_start=eps_start, eps_den=eps_den)
            assert np.abs(birkhoff.project(logits, solver).matrix - known).max() < 1e-14


def test_a_line_of_structural_zeros_stays_zero_without_eps() -> None:
    logits = np.array([[-np.inf, -np.inf], [0.0, 1.0]])
    matrix = birkhoff.project(logits, solvers.SinkhornDamped(eps_start=0.0, eps_den=0.0, num_iters=3)).matrix
    assert np.array_equal(matrix[0], [0.0, 0.0]) and np.isfinite(matrix).all()


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("name", ["SinkhornKnopp", "SinkhornLog", "SinkhornDamped"])
def test_equal_largest_logits_share_the_gradient_of_a_raised_one(name: str, first: str) -> None:
    """A constant added to a first-normalised line changes nothing, ties or not: its gradient adds up to zero."""
    solver = getattr(solvers, name)(range_cap=1.5, first=first, num_iters=3)
    logits = np.array([[2.0, 0.0, 1.0], [2.0, -4.0, 1.0], [-3.0, 0.0, 1.0]])
    grad = np.random.default_rng(4).standard_normal((3, 3))
    if first == "rows":
        logits = logits.T
    pulled = birkhoff.adjoints.Unrolled().vjp(logits, grad, solver)
    assert np.abs(pulled.sum(axis=0 if first == "columns" else 1)).max() < 1e-14
    assert np.abs(pulled).max() > 1e-3


@pytest.mark.parametrize("name", solvers.__all__)
def test_defaults_are_the_documented_ones(name: str) -> None:
    kind = getattr(solvers, name)
    for field in dataclasses.fields(kind):
        line = next(line for line in kind.__doc__.splitlines() if re.match(rf" *{field.name}\b.* : ", line))
        found = re.search(r"default (.+)$", line)
        if field.default is None:
            assert "optional" in line and found is None, line
        else:
            assert found and ast.literal_eval(found[1]) == field.default, line


@pytest.mark.parametrize("eps_start", [0.0, 1e-6])
def test_derivatives_of_the_damped_recurrence_are_finite_where_its_softmax_underflows(eps_start: float) -> None:
    torch = pytest.importorskip("torch")
    solver = solvers.SinkhornDamped(num_iters=3, eps_start=eps_start)
    logits = torch.tensor([[0.0, -2000.0, 0.5], [-2000.0, 0.0, 0.0], [0.3, 1.0, 0.0]], dtype=torch.float64)
    logits.requires_grad_(True)
    weight = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    (first,) = torch.autograd.grad((birkhoff.project(logits, solver).matrix * weight).sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad((first * weight).sum(), logits)
    assert torch.isfinite(first).all() and torch.isfinite(second).all()
    assert float(first.detach().abs().max()) > 1e-3 and float(second.abs().max()) > 1e-3
