"""The front doors: what they return, in which dtype, and with which status."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import array_api_strict
import numpy as np
import pytest

import birkhoff
from birkhoff import Status, reference
from birkhoff._project import matrix
from birkhoff.solvers import Newton, SinkhornDamped, SinkhornKnopp, SinkhornLog
from tests.backends import BACKENDS, Backend, to_numpy


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_sinkhorn_is_the_oracle(backend: Backend, rng: Any) -> None:
    for n, std in ((1, 1.0), (4, 1.0), (4, 100.0), (12, 30.0), (50, 5.0)):
        values = rng.normal(size=(3, n, n)) * std
        for first in ("columns", "rows"):
            got = to_numpy(birkhoff.sinkhorn(backend.asarray(values), 7, first=first))
            assert np.abs(got - reference.sinkhorn(values, 7, first=first)).max() <= 1e-13


def test_one_matrix_without_a_batch_and_the_default_of_project(rng: Any) -> None:
    values = rng.normal(size=(4, 4))
    result = birkhoff.project(values)
    assert (result.matrix == birkhoff.sinkhorn(values)).all()
    assert result.status.shape == () and int(result.num_iters) == 20
    assert (matrix(values, SinkhornKnopp()) == result.matrix).all()
    assert (matrix(values, Newton()) == birkhoff.project(values, Newton()).matrix).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4, 4), (0, 0), (5, 0, 0)], ids=str)
def test_empty_input_gives_empty_output(shape: tuple[int, ...]) -> None:
    for solver in (SinkhornKnopp(), SinkhornLog(tol=1e-3), Newton()):
        result = birkhoff.project(np.zeros(shape, dtype=np.float32), solver, finish="exact")
        assert result.matrix.shape == shape and result.matrix.dtype == np.float32
        assert result.status.shape == shape[:-2] and (result.status == 0).all()


def test_strides_of_every_kind(rng: Any) -> None:
    values = rng.normal(size=(20, 6, 8, 8))
    for view in (
        values[:, ::-2, ::2, 1::2],
        values.transpose(1, 0, 3, 2),
        np.broadcast_to(values[:1, :1], (20, 6, 8, 8)),
    ):
        before = view.copy()
        assert (birkhoff.sinkhorn(view) == birkhoff.sinkhorn(np.ascontiguousarray(view))).all()
        assert (view == before).all()


def test_finite_logits_of_any_size_give_no_nan(rng: Any) -> None:
    for dtype in (np.float32, np.float64):
        largest = np.finfo(dtype).max
        stack = rng.choice(np.array([0, 1, -largest, largest, 1e-40], dtype=dtype), size=(400, 3, 3))
        with np.errstate(all="raise"):
            got = birkhoff.sinkhorn(stack)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("device", ["no_float64", "no_x64"])
def test_devices_without_double_precision(device: str, rng: Any) -> None:
    where = array_api_strict.Device(device)
    values = np.concatenate([rng.normal(size=(10, 4, 4)) * std for std in (1, 20, 100)]).astype(np.float32)
    for solver in (SinkhornKnopp(), SinkhornLog(tol=1e-3, num_iters=2000), Newton()):
        result = birkhoff.project(array_api_strict.asarray(values, device=where), solver)
        assert result.matrix.device == result.status.device == where
        expected = birkhoff.project(values, solver).matrix
        assert np.abs(to_numpy(result.matrix) - expected).max() <= (5e-6 if solver.tol is None else 2e-2)


def test_status_without_a_tolerance_judges_the_matrix(rng: Any) -> None:
    easy, hard = np.eye(3), 60.0 * np.triu(np.ones((3, 3)))
    assert birkhoff.project(np.stack([easy, hard])).status.tolist() == [Status.converged, Status.max_iters_reached]


def test_the_damping_is_allowed_for(rng: Any) -> None:
    """Sums end eps_den below one, in float64 too: that is convergence, and a failure to converge still shows."""
    for eps in (1e-6, 1e-3, 0.2):
        solver = SinkhornDamped(num_iters=300, eps_den=eps)
        result = birkhoff.project(rng.normal(size=(50, 4, 4)), solver)
        assert (result.status == Status.converged).all()
        assert abs(result.row_error.max() - eps) <= 1e-12 and abs(result.column_error.max() - eps) <= 1e-12
    slow = birkhoff.project(4.0 * np.triu(np.ones((3, 3))), SinkhornDamped(num_iters=2))
    assert Status(int(slow.status)) is Status.max_iters_reached


def test_precision_is_obeyed(rng: Any) -> None:
    values = (rng.normal(size=(50, 4, 4)) * 30).astype(np.float32)
    oracle = reference.sinkhorn(values)
    double = birkhoff.project(values, precision=birkhoff.precision.DOUBLE).matrix
    assert double.dtype == np.float32 and np.abs(double - oracle).max() <= 2.0**-24
    stored = birkhoff.project(values, precision=birkhoff.Precision(compute="float64", store="float64")).matrix
    assert stored.dtype == np.float64 and np.abs(stored - oracle).max() <= 1e-13
    sums = birkhoff.sinkhorn(values, precision=birkhoff.precision.DOUBLE_SUMS)
    assert np.abs(sums.astype(np.float64).sum(axis=-1) - 1).max() <= 3 * 2.0**-24
    half = values.astype(np.float16)
    result = birkhoff.project(half)
    assert result.matrix.dtype == np.float16 and result.row_error.dtype == np.float32
    assert result.row_error.max() <= 2 * 2.0**-11


def test_errors_are_of_the_stored_matrix() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = birkhoff.project(logits, Newton())
    exact = result.matrix.double()
    assert (result.row_error.double() - (exact.sum(-1) - 1).abs().amax(-1)).abs().max() <= 1e-6
    assert 1e-3 < result.row_error.max() < 8e-3
    assert (result.status == 0).all()  # the cast is not the solver's fault


def test_a_finish_rounds_once(rng: Any) -> None:
    values = (rng.normal(size=(100, 4, 4)) * 8).astype(np.float16)
    matrix_ = birkhoff.project(values, finish="exact").matrix.astype(np.float64)
    assert np.abs(matrix_.sum(axis=-1) - 1).max() <= 4 * 2.0**-11


def test_two_by_two_error_falls_like_one_over_k() -> None:
    """[[1, 1], [0, 1]]: after k iterations the first side is off by exactly 1 / (2k + 1)."""
    values = np.array([[0.0, 0.0], [-np.inf, 0.0]])
    for k in (1, 5, 20):
        result = birkhoff.project(values, SinkhornLog(num_iters=k))
        assert abs(float(result.column_error) - 1 / (2 * k + 1)) <= 1e-14
        assert Status(int(result.status)) is Status.no_total_support


def test_import_needs_numpy_alone_and_is_quick() -> None:
    probe = (
        "import sys, time, numpy; start = time.perf_counter(); import birkhoff; seconds = time.perf_counter() - start;"
        "heavy = set(sys.modules) & {'torch', 'scipy', 'cupy', 'triton', 'hypothesis'};"
        "birkhoff.sinkhorn(numpy.zeros((2, 2))); print(seconds, sorted(heavy))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split(" ", 1)
        for _ in range(3)
    ]
    assert runs[0][1].strip() == "[]"
    assert min(float(seconds) for seconds, _ in runs) < 0.3
