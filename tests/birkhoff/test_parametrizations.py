"""Parametrizations: their stated sums in units of roundoff, their starts, their gradients, on every library."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch

import birkhoff.parametrizations as room
from birkhoff.errors import DtypeError, OptionError, ShapeError
from birkhoff.parametrizations.protocol import Parametrization
from tests.backends import BACKENDS, Backend, to_numpy

ALL = [getattr(room, name)() for name in room.__all__]
ORDERS = (1, 2, 3, 4, 5, 8)
CASES = [
    (parametrization, n)
    for parametrization in ALL
    for n in ORDERS
    if not (isinstance(parametrization, room.Permutations) and n > 5)
]
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def name_of(value: object) -> str:
    return type(value).__name__ if not isinstance(value, int) else str(value)


def random_parameters(parametrization: Parametrization, n: int, std: float, count: int = 50) -> np.ndarray:
    return np.random.default_rng(n).normal(0, std, (count, parametrization.num_parameters(n)))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("parametrization", "n"), CASES, ids=name_of)
def test_stated_sums(backend: Backend, dtype: str, parametrization: Parametrization, n: int) -> None:
    for std in (1.0, 30.0, 1000.0):
        parameters = random_parameters(parametrization, n, std).astype(dtype)
        result = parametrization.matrix(backend.asarray(parameters), n)
        matrix = to_numpy(result)
        assert matrix.dtype == dtype
        assert matrix.shape == (50, n, n)
        wide = matrix.astype(np.longdouble)
        rows, columns = np.abs(wide.sum(-1) - 1).max(), np.abs(wide.sum(-2) - 1).max()
        allowed = (n + 4) * UNIT[dtype]
        if parametrization.sums in ("both", "rows"):
            assert rows <= allowed
        if parametrization.sums in ("both", "columns"):
            assert columns <= allowed
        if parametrization.sums == "none":
            assert np.abs(np.swapaxes(wide, -1, -2) @ wide - np.eye(n)).max() <= allowed
        else:
            assert matrix.min() >= 0.0


def test_the_other_side_is_free_where_it_is_said_to_be() -> None:
    """The statement `rows` or `columns` is not weaker than it needs to be."""
    for parametrization, axis in ((room.RowStochastic(), -2), (room.ColumnStochastic(), -1)):
        sums = parametrization.matrix(random_parameters(parametrization, 4, 1.0), 4).sum(axis=axis)
        assert np.abs(sums - 1).max() > 0.5


@pytest.mark.parametrize(("parametrization", "n"), CASES, ids=name_of)
@pytest.mark.parametrize("mass", [0.001, 0.1])
def test_initial_parameters_are_near_the_identity(parametrization: Parametrization, n: int, mass: float) -> None:
    parameters = parametrization.initial_parameters(n, mass=mass)
    assert parameters.shape == (parametrization.num_parameters(n),)
    matrix = parametrization.matrix(parameters, n)
    off = 1.0 - np.diag(matrix)
    if isinstance(parametrization, (room.Identity, room.Cayley)):
        np.testing.assert_array_equal(matrix, np.eye(n))
    elif n > 1:
        assert off.max() <= 1.2 * mass
        assert off.min() >= 0.5 * mass


@pytest.mark.parametrize(("parametrization", "n"), [case for case in CASES if case[1] <= 4], ids=name_of)
def test_gradients(parametrization: Parametrization, n: int) -> None:
    parameters = torch.tensor(random_parameters(parametrization, n, 0.7, 2), requires_grad=True)
    if parameters.numel():
        assert torch.autograd.gradcheck(lambda p: parametrization.matrix(p, n), (parameters,))
    start = torch.tensor(parametrization.initial_parameters(n), requires_grad=True)
    if start.numel() and n > 1:
        # Training can move away from the start: the derivative there is not zero.
        weight = torch.tensor(np.random.default_rng(0).normal(size=(n, n)))
        (grad,) = torch.autograd.grad((parametrization.matrix(start, n) * weight).sum(), start)
        assert grad.abs().max() > 1e-4


def test_orthostochastic_has_no_gradient_at_the_identity() -> None:
    """Why its start is not the identity."""
    zero = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda p: room.Orthostochastic().matrix(p, 4), zero)
    assert jacobian.abs().max() == 0.0


def test_permutations_are_all_of_them() -> None:
    for n in (1, 2, 3, 4):
        parametrization = room.Permutations()
        corners = parametrization.matrix(1000.0 * np.eye(parametrization.num_parameters(n)), n)
        expected = np.array([np.eye(n)[list(p)] for p in itertools.permutations(range(n))])
        np.testing.assert_array_equal(corners, expected)


def test_kronecker_is_the_kronecker_product() -> None:
    parameters = np.array([0.3, -1.2])
    small = [room.Kronecker().matrix(parameters[k : k + 1], 2) for k in range(2)]
    np.testing.assert_allclose(room.Kronecker().matrix(parameters, 4), np.kron(*small), rtol=1e-15)
    six = np.random.default_rng(0).normal(size=7)
    expected = np.kron(room.Permutations().matrix(six[:6], 3), room.Kronecker().matrix(six[6:], 2))
    np.testing.assert_allclose(room.Kronecker().matrix(six, 6), expected, rtol=1e-14)


def test_circulants_commute() -> None:
    first, second = room.Circulant().matrix(np.random.default_rng(0).normal(size=(2, 5)), 5)
    np.testing.assert_allclose(first @ second, second @ first, atol=1e-15)
    np.testing.assert_array_equal(first[1], np.roll(first[0], 1))


@pytest.mark.parametrize("parametrization", ALL, ids=name_of)
def test_half_precision_and_batches(parametrization: Parametrization) -> None:
    parameters = torch.tensor(random_parameters(parametrization, 4, 1.0, 6)).reshape(2, 3, -1)
    matrix = parametrization.matrix(parameters.bfloat16(), 4)
    assert matrix.dtype == torch.bfloat16
    assert matrix.shape == (2, 3, 4, 4)
    expected = parametrization.matrix(parameters.bfloat16().float(), 4).bfloat16()
    assert torch.equal(matrix, expected)
    assert parametrization.matrix(parameters[:0], 4).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("parametrization", ALL, ids=name_of)
def test_traced_without_graph_breaks(parametrization: Parametrization) -> None:
    parameters = torch.tensor(random_parameters(parametrization, 4, 1.0, 3))
    traced = torch.compile(lambda p: parametrization.matrix(p, 4), backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(parameters), parametrization.matrix(parameters, 4))


@pytest.mark.parametrize("parametrization", ALL, ids=name_of)
def test_misuse(parametrization: Parametrization) -> None:
    count = parametrization.num_parameters(4)
    with pytest.raises(ShapeError, match=r"num_parameters"):
        parametrization.matrix(np.zeros(count + 1), 4)
    with pytest.raises(DtypeError):
        parametrization.matrix(np.zeros(count, dtype=int), 4)
    for n in (0, -1, 2.0, True):
        with pytest.raises(OptionError, match="integer"):
            parametrization.num_parameters(n)


def test_orders_and_masses_that_are_refused() -> None:
    with pytest.raises(OptionError, match="at most 5"):
        room.Permutations().num_parameters(6)
    with pytest.raises(OptionError, match="prime factor"):
        room.Kronecker().num_parameters(14)
    for parametrization in (room.Permutations(), room.Kronecker(), room.Circulant(), room.Orthostochastic()):
        for mass in (1.5, 0, -1, "a"):
            with pytest.raises(OptionError, match=f"mass must be .* got {mass!r}"):
                parametrization.initial_parameters(4, mass=mass)  # type: ignore[arg-type]


def test_every_public_class_is_a_parametrization() -> None:
    for parametrization in ALL:
        assert parametrization == type(parametrization)()
        assert parametrization.sums in ("both", "rows", "columns", "none")
        for method in ("num_parameters", "initial_parameters", "matrix"):
            assert inspect.getdoc(getattr(type(parametrization), method))
