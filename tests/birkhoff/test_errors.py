"""Misuse raises the stated error, and its message names what was got, what is accepted and what to do."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import array_api_strict
import numpy as np
import pytest

import birkhoff
from birkhoff import errors
from birkhoff.diagnostics import diagnose
from birkhoff.large import project_large
from birkhoff.rounding import round_to_nonexpansive
from birkhoff.solvers import Euclidean, Newton, SinkhornDamped, SinkhornKnopp, SinkhornLog
from birkhoff.solvers.protocol import from_text, to_text
from birkhoff.sparse import project_sparse
from tests.backends import BACKENDS, Backend

FRONT_DOORS = [birkhoff.sinkhorn, birkhoff.project]


@pytest.mark.parametrize("door", FRONT_DOORS)
@pytest.mark.parametrize("bad", [[[0.0, 1.0], [1.0, 0.0]], ((1.0,),), 3.0, "logits", None], ids=repr)
def test_what_is_not_an_array(door: Any, bad: Any) -> None:
    with pytest.raises(errors.ArrayTypeError, match=r"expected arrays .* got .*convert with numpy\.asarray"):
        door(bad)
    with pytest.raises(TypeError):
        door(bad)


@pytest.mark.parametrize("door", FRONT_DOORS)
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex64, np.complex128])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_what_is_not_real_floating(door: Any, dtype: Any, backend: Backend) -> None:
    with pytest.raises(errors.DtypeError, match=rf"real floating .* got {np.dtype(dtype).name}.*astype"):
        door(backend.asarray(np.zeros((2, 2), dtype=dtype)))


@pytest.mark.parametrize("door", FRONT_DOORS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (5, 2, 3), (3, 3, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_what_is_not_square(door: Any, shape: tuple[int, ...], backend: Backend) -> None:
    with pytest.raises(errors.ShapeError, match=r"shape \(\.\.\., n, n\), got \("):
        door(backend.asarray(np.zeros(shape)))


def test_mixed_libraries() -> None:
    torch = pytest.importorskip("torch")
    for other in (torch.zeros(2, 2, dtype=torch.float64), array_api_strict.zeros((2, 2))):
        with pytest.raises(errors.ArrayTypeError, match="same library"):
            birkhoff.adjoints.Unrolled().vjp(np.zeros((2, 2)), other, SinkhornKnopp())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinkhornKnopp(num_iters=0), "num_iters must be an integer >= 1, got 0"),
        (lambda: SinkhornLog(num_iters=2.5), "num_iters must be an integer"),
        (lambda: Newton(num_iters=True), "num_iters must be an integer"),
        (lambda: SinkhornKnopp(tol=0.0), "tol must be None .* got 0.0"),
        (lambda: SinkhornKnopp(tol=float("nan")), "tol must be None"),
        (lambda: SinkhornKnopp(first="cols"), "first must be 'columns' or 'rows', got 'cols'"),
        (lambda: SinkhornDamped(range_cap=-1.0), "range_cap must be None or a number > 0"),
        (lambda: SinkhornDamped(eps_den=-1e-6), "eps_den must be >= 0"),
        (lambda: SinkhornLog(relaxation=2.0), "relaxation must lie between 0 and 2"),
        (lambda: Euclidean(num_iters=-3), "num_iters must be an integer"),
        (lambda: birkhoff.Precision(compute="float16"), "Precision.compute must be None or one of"),
        (lambda: birkhoff.project(np.eye(2), finish="round"), "finish must be one of .* got 'round'"),
        (lambda: birkhoff.sinkhorn(np.eye(2), 0), "num_iters"),
    ],
)
def test_options_outside_their_domain(make: Any, message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        make()
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("kind", [SinkhornKnopp, SinkhornLog, SinkhornDamped, Newton, Euclidean])
def test_numbers_of_array_libraries_become_python_s(kind: Any) -> None:
    solver = kind(num_iters=np.int64(7), tol=np.float64(0.5))
    assert (type(solver.num_iters), type(solver.tol)) == (int, float)
    assert solver == kind(num_iters=7, tol=0.5) and from_text(to_text(solver)) == solver
    assert kind(tol=1) == kind(tol=1.0) and type(kind(tol=1).tol) is float
    for bad in (float("inf"), float("nan"), "1e-3", 1j, -1):
        with pytest.raises(errors.OptionError, match="tol must be"):
            kind(tol=bad)
    with pytest.raises(errors.OptionError, match="num_iters must be an integer >= 1"):
        kind(num_iters=5.0)


def test_numbers_of_array_libraries_work_on_torch() -> None:
    torch = pytest.importorskip("torch")
    solver = SinkhornDamped(eps_den=np.float64(1e-3), eps_start=np.float32(0.5), range_cap=np.int64(3))
    assert birkhoff.project(torch.eye(2), solver).matrix.shape == (2, 2)
    for options in ({"eps_den": float("inf")}, {"eps_start": float("nan")}, {"range_cap": float("inf")}):
        with pytest.raises(errors.OptionError, match=next(iter(options))):
            SinkhornDamped(**options)
    assert birkhoff.project(torch.eye(2), SinkhornLog(relaxation=np.float64(1.25))).matrix.shape == (2, 2)


@pytest.mark.parametrize("value", [None, True, "1"])
def test_numbers_that_a_solver_needs_are_numbers(value: Any) -> None:
    for kind, option in ((SinkhornDamped, "eps_den"), (SinkhornDamped, "eps_start"), (SinkhornLog, "relaxation")):
        with pytest.raises(errors.OptionError, match=f"{kind.__name__}: {option} must be a number"):
            kind(**{option: value})


def test_iteration_counts_of_a_gradient_are_integers_of_the_batch() -> None:
    """Counts that are not would give the gradients of other matrices, or none."""
    stack, solver = np.zeros((4, 2, 2)), SinkhornKnopp()
    vjp = birkhoff.adjoints.Unrolled().vjp
    for wrong in (3, np.array([3]), np.array([3, 3, 3, 3, 3]), np.full((2, 2), 3)):
        with pytest.raises(errors.ShapeError, match=r"num_iters must be an array of the batch's shape \(4,\)"):
            vjp(stack, stack, solver, num_iters=wrong)
    with pytest.raises(errors.DtypeError, match="num_iters must hold integers, got float64"):
        vjp(stack, stack, solver, num_iters=np.array([2.0, 2.5, 3.0, 3.0]))
    torch = pytest.importorskip("torch")
    with pytest.raises(errors.ArrayTypeError, match="same library"):
        vjp(stack, stack, solver, num_iters=torch.full((4,), 3))


def test_numbers_of_other_values_are_numbers() -> None:
    bound = birkhoff.adjoints.Implicit(bound=np.float64(1e-3))
    assert type(bound.bound) is float and bound.trusts(np.eye(2))
    with pytest.raises(errors.OptionError, match="Implicit: bound must be a number"):
        birkhoff.adjoints.Implicit(bound="1")  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="mass must be a number"):
        birkhoff.parametrizations.RowStochastic().initial_parameters(2, mass=None)  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="finish must be one of"):
        birkhoff.project(np.eye(2), finish=["none"])  # type: ignore[arg-type]


def test_what_is_no_precision_is_refused_everywhere() -> None:
    square, solver = np.eye(2), SinkhornKnopp()
    for call in (
        lambda: birkhoff.sinkhorn(square, precision="float64"),
        lambda: birkhoff.project(square, precision="float64"),
        lambda: birkhoff.explain(square, solver, precision="float64"),
        lambda: birkhoff.adjoints.Unrolled().vjp(square, square, solver, precision="float64"),
        lambda: birkhoff.adjoints.Implicit().vjp(square, square, solver, precision="float64"),
    ):
        with pytest.raises(errors.OptionError, match=r"precision must be None or a birkhoff.Precision, got 'float64'"):
            call()


def test_functions_that_iterate_take_the_same_options() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    for run, matrix in ((project_large, np.eye(3)), (project_sparse, sparse.csr_array(np.ones((3, 3))))):
        assert int(run(matrix, num_iters=np.int64(5), tol=np.float32(0.5)).num_iters) == 1
        for options in (
            {"num_iters": 0}, {"num_iters": 2.5}, {"tol": 0}, {"tol": "1"}, {"tol": float("nan")}, {"first": "column"},
            {"progress": 3},
        ):  # fmt: skip
            with pytest.raises(errors.OptionError, match=next(iter(options)) + " must be"):
                run(matrix, **options)


def test_an_unknown_dtype_has_no_roundoff() -> None:
    with pytest.raises(errors.DtypeError, match="got int8"):
        birkhoff.precision.unit_roundoff("int8")


def test_the_order_of_a_parametrization_may_be_numpy_s() -> None:
    assert birkhoff.parametrizations.Circulant().num_parameters(np.int64(3)) == 3
    for bad in (0, 2.0, True, None):
        with pytest.raises(errors.OptionError, match="Circulant: n must be an integer >= 1"):
            birkhoff.parametrizations.Circulant().num_parameters(bad)


def test_a_sparse_tensor_is_refused_with_what_to_do() -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: the CSR layout is in beta state
        for sparse in (torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr()):
            with pytest.raises(errors.ArrayTypeError, match=r"dense array, got a sparse tensor; use to_dense\(\)"):
                birkhoff.sinkhorn(sparse)


def test_gradient_rules_that_do_not_fit_their_solver() -> None:
    square = np.eye(2)
    for solver in (Newton(), Euclidean()):
        with pytest.raises(errors.OptionError, match="converges and has no iteration"):
            birkhoff.adjoints.Unrolled().vjp(square, square, solver)
        with pytest.raises(errors.OptionError, match=r"adjoint must be None or Implicit\(\)"):
            birkhoff.project(square, solver, adjoint=birkhoff.adjoints.Unrolled())
        assert birkhoff.project(square, solver, adjoint=birkhoff.adjoints.Implicit()).matrix.shape == (2, 2)
    for adjoint in (birkhoff.adjoints.Unrolled(), birkhoff.adjoints.Implicit()):
        with pytest.raises(errors.OptionError, match="solver must be"):
            adjoint.vjp(square, square, SinkhornLog)
        for wrong in (np.eye(2, dtype=int), np.eye(2) + 1j):
            with pytest.raises(errors.DtypeError, match="grad_matrix must be real floating"):
                adjoint.vjp(square, wrong, SinkhornKnopp())


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        SinkhornKnopp(20)
    with pytest.raises(TypeError):
        birkhoff.sinkhorn(np.eye(2), 20, "rows")


def test_a_dtype_that_the_library_lacks() -> None:
    with pytest.raises(errors.DtypeError, match="numpy has no dtype 'bfloat16'"):
        birkhoff.project(np.eye(2), precision=birkhoff.Precision(store="bfloat16"))


def test_throw_names_the_matrices_and_the_advice() -> None:
    values = np.zeros((3, 2, 2, 2))
    values[1, 0, 0, 0] = np.nan
    with pytest.raises(
        errors.ProjectionError, match=r"1 of 6 matrices: nonfinite_input \(batch index \(1, 0\)\)"
    ) as got:
        birkhoff.project(values, throw=True)
    assert birkhoff.Status.nonfinite_input.advice in str(got.value)
    assert got.value.status[1, 0] == birkhoff.Status.nonfinite_input
    wide = np.array([[0.0, 50.0], [0.0, 0.0]])
    birkhoff.project(wide, throw=True)  # without a tolerance, the iterations asked for are what is given
    with pytest.raises(errors.ProjectionError, match=r"max_iters_reached.*Newton"):
        birkhoff.project(wide, SinkhornLog(num_iters=5, tol=1e-9), throw=True)
    zeros = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    with pytest.raises(errors.ProjectionError, match="no_total_support"):
        birkhoff.project(zeros, throw=True)


def test_every_error_is_documented_and_one_family() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.BirkhoffError) and kind.__doc__
    missing = errors.MissingPackageError("scipy", needed_by="sparse matrices")
    assert isinstance(missing, ImportError) and "pip install scipy" in str(missing)


@pytest.mark.parametrize(
    "error",
    [
        errors.MissingPackageError("scipy", needed_by="sparse matrices"),
        errors.ProjectionError("1 of 2 matrices", status=3),
        errors.ShapeError("got (2, 3)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_the_process_that_waits(error: Any) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)


def test_options_of_the_wrong_kind_are_named() -> None:
    logits, kind = np.zeros((2, 2)), birkhoff.solvers.SinkhornLog
    with pytest.raises(birkhoff.errors.OptionError, match="precision must be"):
        birkhoff.sinkhorn(logits, precision="float32")  # type: ignore[arg-type]
    for option in (
        {"solver": kind}, {"solver": "log"}, {"adjoint": "implicit"}, {"precision": "float32"}, {"trace": 3},
    ):  # fmt: skip
        with pytest.raises(birkhoff.errors.OptionError, match=next(iter(option)) + " must be"):
            birkhoff.project(logits, **option)  # type: ignore[arg-type]
    with pytest.raises(birkhoff.errors.ArrayTypeError, match="list"):
        birkhoff.explain([[0.0]], kind())
    with pytest.raises(birkhoff.errors.ShapeError, match=r"got \(\)"):
        birkhoff.explain(np.zeros(()), kind())
    with pytest.raises(birkhoff.errors.OptionError, match="solver must be"):
        birkhoff.explain(logits, kind)


@pytest.mark.parametrize("door", [*FRONT_DOORS, birkhoff.certify, birkhoff.decompose, birkhoff.round_to_polytope])
def test_arrays_that_mean_something_else_are_refused(door: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        legacy = np.matrix(np.eye(2))
    for other in (legacy, np.ma.masked_array(np.eye(2), mask=np.eye(2) > 0)):
        with pytest.raises(
            errors.ArrayTypeError, match=r"got numpy\.(matrix|MaskedArray); convert with numpy\.asarray"
        ):
            door(other)


ANSWERS = [birkhoff.certify, birkhoff.decompose, diagnose, lambda matrix: birkhoff.certify_product([matrix])]
MAPS = [*FRONT_DOORS, birkhoff.round_to_polytope, round_to_nonexpansive, project_large]


@pytest.mark.parametrize("function", [*MAPS, *ANSWERS])
def test_every_function_that_takes_matrices_refuses_the_same_arrays(function: Any) -> None:
    with pytest.raises(errors.DtypeError, match=r"real floating .* got int64; convert with astype"):
        function(np.eye(2, dtype=np.int64))
    for shape in ((), (3,), (2, 3)):
        with pytest.raises(errors.ShapeError, match=r"shape \(\.\.\., n, n\), got \("):
            function(np.zeros(shape))
    with pytest.raises(errors.ArrayTypeError):
        function("logits")


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0)])
def test_maps_return_the_empty_matrix_and_questions_refuse_it(shape: tuple[int, ...]) -> None:
    empty = np.zeros(shape, dtype=np.float32)
    for function in MAPS:
        result = function(empty)
        matrix = getattr(result, "matrix", result)
        assert matrix.shape == shape and matrix.dtype == np.float32
        assert getattr(result, "status", np.zeros(shape[:-2])).shape == shape[:-2]
    for function in ANSWERS:
        with pytest.raises(errors.ShapeError, match="must not be empty"):
            function(empty)
