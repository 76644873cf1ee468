"""What is particular to one Sinkhorn solver: options, equivalences, and the values that describe them."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest

import birkhoff
from birkhoff import reference, solvers
from birkhoff.solvers import SinkhornDamped, SinkhornKnopp, SinkhornLog
from birkhoff.solvers.protocol import from_text, to_text
from tests.contracts.cases import SOLVERS, solver_id


def test_every_solver_file_is_listed() -> None:
    """A class with a ``method`` in a file of the package must be exported, or the contracts would miss it."""
    found = set()
    for info in pkgutil.iter_modules(solvers.__path__):
        module = importlib.import_module(f"birkhoff.solvers.{info.name}")
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        own = [value for value in classes if value.__module__ == module.__name__]
        found |= {value.__name__ for value in own if _is_public_solver(value)}
    assert found == set(solvers.__all__)


def _is_public_solver(value: type) -> bool:
    return isinstance(getattr(value, "method", None), str) and not value.__name__.startswith("_")


@pytest.mark.parametrize("kind", SOLVERS, ids=solver_id)
def test_solvers_are_values(kind: type) -> None:
    assert kind(num_iters=7) == kind(num_iters=7) != kind(num_iters=8)
    assert hash(kind()) == hash(kind())
    assert from_text(to_text(kind(num_iters=3, first="rows", tol=1e-3))) == kind(num_iters=3, first="rows", tol=1e-3)
    with pytest.raises(AttributeError):
        kind().num_iters = 3


def test_knopp_and_log_are_the_same_iteration(rng: Any) -> None:
    for std in (0.5, 5.0, 50.0):
        values = rng.normal(size=(50, 4, 4)) * std
        for first in ("columns", "rows"):
            knopp = birkhoff.project(values, SinkhornKnopp(first=first)).matrix
            log = birkhoff.project(values, SinkhornLog(first=first)).matrix
            assert np.abs(knopp - log).max() <= 1e-14 * max(1.0, std)


def test_linear_arithmetic_is_safe_up_to_its_stated_range(rng: Any) -> None:
    """The largest range that is still computed linearly, on inputs that push the scalings furthest."""
    for dtype, limit in ((np.float32, 40.0), (np.float32, 80.0), (np.float64, 340.0), (np.float64, 680.0)):
        assert limit in [row[0] for row in SinkhornKnopp().arithmetics(np.dtype(dtype).name)]
        for n in (2, 3, 4, 8, 32):
            corner = np.zeros((6, n, n))
            corner[0, :-1, 0] = limit
            corner[1, 0, 1:] = limit
            corner[2] = limit * np.triu(np.ones((n, n)))
            corner[3] = limit * np.tril(np.ones((n, n)))
            corner[4] = limit * np.eye(n)
            corner[5] = limit * rng.integers(0, 2, size=(n, n))
            for num_iters in (1, 20, 300):
                got = birkhoff.sinkhorn(corner.astype(dtype), num_iters)
                error = np.abs(got - reference.sinkhorn(corner, num_iters)).max()
                assert error <= 4 * n * np.finfo(dtype).eps / 2 * limit / 16


@pytest.mark.parametrize("kind", [SinkhornKnopp, SinkhornLog, SinkhornDamped], ids=solver_id)
def test_range_cap_equals_raising_the_logits(kind: type, rng: Any) -> None:
    values = rng.normal(size=(30, 4, 4)) * 10
    for first, axis in (("columns", -2), ("rows", -1)):
        raised = np.maximum(values, values.max(axis=axis, keepdims=True) - 6.0)
        capped = birkhoff.project(values, kind(first=first, range_cap=6.0)).matrix
        assert np.abs(capped - birkhoff.project(raised, kind(first=first)).matrix).max() <= 1e-15


def test_relaxation_reaches_the_limit_sooner_and_keeps_the_last_side_exact(rng: Any) -> None:
    values = rng.normal(size=(200, 4, 4)) * 3
    plain = birkhoff.project(values, SinkhornLog(num_iters=20_000, tol=1e-6))
    relaxed = birkhoff.project(values, SinkhornLog(num_iters=20_000, tol=1e-6, relaxation=1.5))
    assert np.percentile(relaxed.num_iters, 90) < 0.6 * np.percentile(plain.num_iters, 90)
    assert np.abs(relaxed.matrix - plain.matrix).max() <= 1e-3
    assert relaxed.row_error.max() <= 1e-15 * 5
    assert (
        birkhoff.project(values, SinkhornLog(relaxation=1.0)).matrix == birkhoff.project(values, SinkhornLog()).matrix
    ).all()


def test_relaxation_keeps_zeros(rng: Any) -> None:
    x = rng.normal(size=(20, 4, 4))
    x[3, 0, 1] = x[5, 2, 2] = -np.inf
    result = birkhoff.project(x, SinkhornLog(relaxation=1.4))
    assert np.array_equal(result.matrix == 0.0, np.isneginf(x)) and np.isfinite(result.matrix).all()
    torch = pytest.importorskip("torch")
    logits = torch.tensor(x, requires_grad=True)
    birkhoff.project(logits, SinkhornLog(relaxation=1.4)).matrix.square().sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[3, 0, 1] == 0.0


def test_relaxed_result_does_not_depend_on_first_side_constants(rng: Any) -> None:
    values = rng.normal(size=(20, 3, 3))
    solver = SinkhornLog(num_iters=4, relaxation=1.4)
    moved = values + rng.normal(size=(20, 1, 3)) * 50
    assert np.abs(birkhoff.project(values, solver).matrix - birkhoff.project(moved, solver).matrix).max() <= 1e-12


def test_damped_sums_end_just_below_one(rng: Any) -> None:
    values = rng.normal(size=(100, 4, 4)) * 2
    sums = birkhoff.project(values, SinkhornDamped()).matrix.sum(axis=-2)
    assert (sums < 1.0).all() and (sums > 1.0 - 3e-6).all()


def test_damped_zero_logits_and_zero_epsilon() -> None:
    values = np.array([[0.0, -np.inf], [-np.inf, -np.inf]])
    matrix = birkhoff.project(values, SinkhornDamped(eps_start=0.0, eps_den=0.0)).matrix
    assert np.isfinite(matrix).all() and (matrix[1] == 0).all()
