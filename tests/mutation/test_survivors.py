"""Tests written for mutants that survived the rest of the suite."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import numpy as np
import pytest

import birkhoff
from birkhoff import _math, solvers
from birkhoff._layout import frame_for
from birkhoff._xp import array_namespace
from birkhoff.rounding import round_to_nonexpansive, round_to_polytope
from birkhoff.solvers.protocol import from_text, to_text
from birkhoff.solvers.range_cap import cap, pull_cap, push_cap


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


NUMPY = array_namespace(np.zeros(1))


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize(
    ("name", "options", "halves"),
    [
        ("SinkhornKnopp", {}, 14),
        ("SinkhornLog", {}, 14),
        ("SinkhornLog", {"relaxation": 1.5}, 16),  # the first and the last half step are not relaxed
        ("SinkhornDamped", {}, 13),  # the softmax is the first half step
    ],
)
def test_the_tape_of_an_adjoint_holds_every_half_step_once(
    name: str, options: dict[str, float], halves: int, first: str
) -> None:
    solver = getattr(solvers, name)(num_iters=7, first=first, **options)
    logits = np.random.default_rng(0).normal(size=(2, 3, 3))
    steps = list(solver.trajectory(logits, frame_for(NUMPY, np.float64, branch=True)))
    assert len(steps) == halves
    for matrix, axis, weight in steps:
        if weight == 1.0 and name != "SinkhornDamped":
            assert np.abs(matrix.sum(axis=axis) - 1).max() <= 1e-14
    assert np.abs(steps[-1][0] - birkhoff.project(logits, solver).matrix).max() <= 1e-14


class _CountingExponentials:
    """NumPy, with the calls of ``exp`` counted."""

    __name__ = "numpy"

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(NUMPY, name)

    def exp(self, values: np.ndarray) -> np.ndarray:
        self.count += 1
        return np.exp(values)


def test_logarithms_cost_one_exponential_per_half_step_and_one_at_the_end() -> None:
    """The count for [SinkhornLog] that its module promises."""
    counting = _CountingExponentials()
    solver, frame = solvers.SinkhornLog(), frame_for(counting, np.float64, branch=True)
    state = solver.init(np.random.default_rng(0).normal(size=(2, 3, 3)), frame)
    assert counting.count == 0
    for _ in range(5):
        state = solver.step(state, frame)
    solver.matrix(state, frame)
    assert counting.count == 2 * 5 + 1


def test_a_relaxation_of_one_is_the_plain_iteration_to_the_bit() -> None:
    """Of [SinkhornLog]: a weight of one must not add the rounding of a difference."""
    solver, frame = solvers.SinkhornLog(), frame_for(NUMPY, np.float64, branch=True)
    state = solver.init(30 * np.random.default_rng(0).normal(size=(20, 4, 4)), frame)
    (plain,) = state
    for axis in (-2, -1):
        plain = _math.log_divide(NUMPY, plain, axis, np.float64, branch=True)
    assert np.array_equal(solver.step(state, frame)[0], plain)


@pytest.mark.parametrize("name", ["SinkhornKnopp"])
def test_float32_of_a_wide_range_is_computed_in_float64(name: str) -> None:
    logits = np.random.default_rng(0).uniform(-150.0, 150.0, size=(20, 4, 4)).astype(np.float32)
    wide = birkhoff.project(logits.astype(np.float64), getattr(solvers, name)()).matrix
    assert np.array_equal(birkhoff.project(logits, getattr(solvers, name)()).matrix, wide.astype(np.float32))


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("name", ["SinkhornKnopp", "SinkhornLog"])
def test_an_entry_far_below_its_line_costs_the_others_no_digits(name: str, first: str) -> None:
    """Exponents are taken from the largest of a line: entries that count have small ones, exact to a rounding."""
    logits = np.random.default_rng(0).normal(size=(2000, 4, 4)).astype(np.float32)
    logits[:, 0, 0] = -35.0
    known = birkhoff.project(logits.astype(np.float64), solvers.SinkhornLog(num_iters=1, first=first)).matrix
    result = birkhoff.project(logits, getattr(solvers, name)(num_iters=1, first=first)).matrix
    assert np.abs(result - known).max() <= 4 * 2.0**-24


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("name", ["SinkhornKnopp", "SinkhornLog", "SinkhornDamped"])
def test_a_cap_that_raises_nothing_changes_nothing(name: str, first: str) -> None:
    """Also where a logit lies exactly at it, as rounded logits do: that one keeps its value and its gradient."""
    logits = np.array(
        [[[3.0, 1.0, 0.0], [0.0, -2.0, 0.0], [-1.0, 2.0, 0.0]], [[4.0, 0.0, 1.0], [0.0, 4.0, 0.0], [1.0] * 3]]
    )
    plain, capped = (getattr(solvers, name)(first=first, num_iters=3, range_cap=value) for value in (None, 4.0))
    grad = np.random.default_rng(0).normal(size=logits.shape)
    adjoint = birkhoff.adjoints.Unrolled()
    assert np.array_equal(birkhoff.project(logits, capped).matrix, birkhoff.project(logits, plain).matrix)
    assert np.array_equal(adjoint.vjp(logits, grad, capped), adjoint.vjp(logits, grad, plain))


@pytest.mark.parametrize("axis", [-1, -2])
def test_the_cap_has_its_derivative_and_that_its_transpose(axis: int) -> None:
    """For any gradient, not only for those that add up to zero along a line."""
    rng, frame = np.random.default_rng(0), frame_for(NUMPY, np.float64)
    logits, tangent, grad = 2 * rng.standard_normal((3, 5, 4, 4))
    pushed, pulled = push_cap(logits, tangent, 1.5, axis, frame), pull_cap(logits, grad, 1.5, axis, frame)
    ahead, behind = (cap(logits + sign * 1e-6 * tangent, 1.5, axis, frame) for sign in (1, -1))
    assert np.abs(pushed - (ahead - behind) / 2e-6).max() <= 1e-8
    assert np.sum(pulled * tangent) == pytest.approx(np.sum(grad * pushed), rel=1e-12)


def test_the_text_of_a_solver_is_that_of_its_construction() -> None:
    """A tracer may put symbols in place of its numbers; a solver of somebody else has no kept text."""
    solver = solvers.SinkhornKnopp(num_iters=7)
    written = to_text(solver)
    object.__setattr__(solver, "num_iters", object())
    assert to_text(solver) == written and from_text(written) == solvers.SinkhornKnopp(num_iters=7)

    @dataclasses.dataclass(frozen=True)
    class Other:
        num_iters: int = 3

    assert to_text(Other()) == f"{__name__}:Other(num_iters=3)"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shrinking_takes_four_units_of_roundoff_more_than_the_sum(dtype: type) -> None:
    eps = np.finfo(dtype).eps  # two units
    for finish in (round_to_nonexpansive, round_to_polytope):
        assert np.abs(finish(np.array([[1.0 + 4 * eps]], dtype=dtype)) - 1).max() <= 2 * eps
    shrunk = round_to_nonexpansive(np.diag([2.0, 4.0]).astype(dtype))
    assert (shrunk.diagonal() >= 1 - 2 * eps).all() and (shrunk.diagonal() < 1).all()


def test_sums_are_accumulated_in_the_dtype_asked_for() -> None:
    values = np.array([[2.0**24], [1.0], [1.0]], dtype=np.float32)
    assert _math.reduce_sum(NUMPY, values, 0, np.float64)[0, 0] == 2.0**24 + 2
    assert _math.reduce_sum(NUMPY, values, 0, np.float32).dtype == np.float32


def test_reciprocals_are_those_of_numpy() -> None:
    """Potentials twice as large give the same matrix; only their range would show it."""
    values = np.array([0.25, 3.0, np.inf])
    assert np.array_equal(_math.reciprocal(values), 1.0 / values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_of_a_sum_are_normal_numbers_on_the_host(dtype: type) -> None:
    tiny = np.finfo(dtype).smallest_normal
    exponents = np.array([0.0, -3.0, np.log(tiny), -800.0, -np.inf], dtype=dtype)
    on_host = _math.exp_in_sum(NUMPY, exponents, True)
    assert np.array_equal(on_host[:2], np.exp(exponents[:2]))
    assert (on_host >= tiny).all() and (on_host[2:] <= 2 * tiny).all()
    assert np.array_equal(_math.exp_in_sum(NUMPY, exponents, False), np.exp(exponents))


def test_a_sum_that_rounds_to_one_keeps_its_derivative() -> None:
    torch = pytest.importorskip("torch")
    xp = array_namespace(torch.zeros(1))
    logits = torch.tensor([[0.0, -20.0]], dtype=torch.float32, requires_grad=True)
    matrix = _math.softmax(xp, logits, -1, torch.float64)
    (gradient,) = torch.autograd.grad(matrix[0, 0], logits)
    share = float(np.exp(-20.0))
    assert float(matrix.detach()[0, 0]) == 1.0 and float(gradient[0, 1]) == pytest.approx(-share, rel=1e-5)
