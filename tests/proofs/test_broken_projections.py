"""Test the tests: each claim about a projection rejects code that is wrong in its way, and accepts the right code."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from birkhoff import reference
from birkhoff.solvers import Newton
from proofs import claims, enclosure, runner
from proofs.backends import BACKENDS, Backend
from proofs.measure import sums
from proofs.runner import Profile
from proofs.subjects import Subject, solver_subject
from tests.proofs import broken

# Verdicts only: what shrinking finds is for test_runner.py. The fewer examples suffice, the more a claim rejects.
EFFORT = Profile("test", 20, shrink_budget=0)
# These see some of their breaches in few examples only: 20 missed one of them with at least one seed of twelve.
RARE = ("composite_gain_is_one", "diagonal_gap", "schur_bounds_every_output", "exact_matrices_are_closed")
MORE_EFFORT = {
    **dict.fromkeys((*RARE, "inside_the_enclosure"), Profile("test", 120, shrink_budget=0)),
    "converged_means_within_tolerance": Profile("test", 400, shrink_budget=0),
}

HAS_TORCH = importlib.util.find_spec("torch") is not None

# Which plain functions each claim must reject.
REJECTS: dict[str, tuple[str, ...]] = {
    "last_side_exact": ("rows_and_columns_swapped", "added_eps", "half_a_step_missing", "exponential_of_potentials"),
    "entries_in_unit_interval": ("no_shift", "scaled_up", "negative_entries"),
    "small_logits_converge": ("one_axis_twice", "absolute_value", "column_zero_only"),
    "schur_bounds_every_output": ("no_shift", "negative_entries"),
    "open_side_error_forces_norm_above_one": ("scaled_down", "added_eps"),
    "norm_at_most_sqrt_of_open_sum": ("rows_and_columns_swapped", "half_a_step_missing", "square_root"),
    "norm_is_one_for_small_logits": ("one_axis_twice", "scaled_up", "scaled_down"),
    "composite_gain_is_one": ("added_eps", "scaled_up", "no_shift"),
    "composite_norm_at_most_sqrt_n": ("square_root", "negative_entries"),
    "one_by_one_is_one": ("no_shift", "added_eps", "scaled_down"),
    "rank_one_gives_uniform": ("one_axis_twice", "absolute_value", "favours_the_first_row"),
    "large_diagonal_gives_identity": ("no_shift", "clipped_logits", "half_temperature"),
    "equal_streams_or_mean_kept": ("rows_and_columns_swapped", "transposed_output", "half_a_step_missing"),
    "permutation_equivariance": ("transposed_output", "transposed_input", "favours_the_first_row"),
    "first_side_shift_invariance": ("row_max_shift", "no_shift", "one_axis_twice"),
    "both_sides_shift_invariance": ("one_axis_twice", "absolute_value", "shifted_by_a_constant_table"),
    "doubly_stochastic_is_fixed": ("half_temperature", "transposed_output", "rounded_logits"),
    "two_by_two_closed_form": ("half_temperature", "absolute_value"),
    "circulant_in_one_step": ("transposed_input", "clipped_logits", "half_temperature"),
    "diagonal_gap": ("half_temperature", "clipped_logits"),
    "kl_projection_of_small_logits": ("transposed_output", "absolute_value", "one_axis_twice"),
    "accuracy_of_the_iteration": (
        "one_iteration_short", "row_max_shift", "clamped_sums", "added_eps", "half_a_step_missing", "low_precision",
    ),
    "conformance_vectors": ("one_iteration_short", "transposed_output", "no_shift"),
    "inside_the_enclosure": ("one_iteration_short", "row_max_shift", "added_eps"),
    "half_is_float32_stored": ("low_precision_half", "returns_float64"),
    "items_are_independent": ("normalised_over_the_batch",),
    "one_bad_matrix_poisons_only_itself": ("mean_of_batch", "hides_nan"),
    "input_is_not_written": ("writes_input",),
    "kind_dtype_shape_kept": ("returns_float32", "returns_float64", "drops_nothing_but_kind"),
    "any_batch_shape": ("drops_batch", "fails_on_empty"),
    "any_memory_layout": ("reads_memory_order", "reads_sixteen_bytes_at_a_time", "reads_past_an_expanded_matrix"),
    "same_bits_twice": ("changes_from_call_to_call",),
    "minus_infinity_is_an_exact_zero": ("fills_zeros", "added_eps", "absolute_value"),
}  # fmt: skip


def low_precision_half(logits: np.ndarray) -> np.ndarray:
    """Half inputs are computed in half precision."""
    return broken.low_precision(logits) if logits.dtype == np.float16 else broken.right(logits)


def drops_nothing_but_kind(logits: np.ndarray) -> Any:
    return broken.right(logits).tolist()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **broken.FUNCTIONS,
    "low_precision_half": low_precision_half,
    "drops_nothing_but_kind": drops_nothing_but_kind,
}


def _verdict(name: str, subject: Subject) -> str:
    return runner.run_claim(claims.by_name(name), subject, MORE_EFFORT.get(name, EFFORT)).verdict


@pytest.mark.parametrize("name", sorted(REJECTS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rejects_what_is_broken_and_accepts_what_is_right(name: str) -> None:
    if name == "inside_the_enclosure" and not enclosure.available():
        pytest.skip("python-flint is not installed")
    assert _verdict(name, broken.subject(broken.right)) == "holds"
    for wrong in REJECTS[name]:
        assert _verdict(name, broken.subject(FUNCTIONS[wrong])) == "broken", wrong


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_smallest_example_lies_in_the_domain_of_its_claim() -> None:
    """What is right holds on it, so that a replay after a mend can succeed."""
    for name, (wrong, *_) in REJECTS.items():
        effort = replace(MORE_EFFORT.get(name, EFFORT), shrink_budget=100)
        outcome = runner.run_claim(claims.by_name(name), broken.subject(FUNCTIONS[wrong]), effort)
        assert outcome.failing is not None
        again = runner.replay(claims.by_name(name), broken.subject(broken.right), outcome.failing)
        assert again.verdict == "holds", (name, wrong, again.reason)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_broken_projection_is_rejected_by_some_claim() -> None:
    named = {wrong for group in REJECTS.values() for wrong in group}
    assert named == set(FUNCTIONS)


# Claims about more than a function: iteration counts, reports, gradients.


def _reporting(**lies: Any) -> Subject:
    def project(logits: np.ndarray) -> SimpleNamespace:
        matrix = broken.right(logits)
        finite = np.all(logits < np.inf, axis=(-2, -1))
        pattern = np.isneginf(logits[..., 0, :]).any(-1) | np.isneginf(logits[..., -1, :]).any(-1)
        report = {
            "matrix": matrix,
            "row_error": np.max(np.abs(sums(matrix, "rows") - 1), axis=-1),
            "column_error": np.max(np.abs(sums(matrix, "columns") - 1), axis=-1),
            "status": np.where(~finite, 2, np.where(pattern, 3, 0)),
        }
        return SimpleNamespace(**{**report, **{key: make(report) for key, make in lies.items()}})

    return broken.subject(broken.right, project=project)


def _stopping(change: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Subject:
    """The right projection of 20 iterations, and what it says of a tolerance."""

    def tolerant(tol: float) -> Callable[[np.ndarray], SimpleNamespace]:
        def project(logits: np.ndarray) -> SimpleNamespace:
            matrix = broken.right(logits)
            error = np.max(np.abs(sums(matrix, "columns") - 1), axis=-1)
            status = change(np.where(error <= tol, 0, 1), error, tol)
            return SimpleNamespace(matrix=matrix, status=status)

        return project

    return broken.subject(broken.right, tolerant=tolerant)


def _wrong_after(count: int) -> Callable[[np.ndarray], np.ndarray]:
    """What a kernel does whose grid ends at `count` matrices."""

    def function(logits: np.ndarray) -> np.ndarray:
        matrix = np.array(broken.right(logits[:count]))
        return np.concatenate([matrix, np.zeros_like(logits[count:])])

    return function


def _is_common(logits: np.ndarray) -> bool:
    """What is used most: four streams in float32."""
    return logits.shape[-1] == 4 and logits.dtype == np.float32


class _Watched(Backend):
    """A NumPy with a device whose waits are seen."""

    sees_waiting, forbidden = True, False

    @contextlib.contextmanager
    def forbids_waiting(self) -> Iterator[None]:
        self.forbidden = True
        yield
        self.forbidden = False


_WATCHED = _Watched()


def _watched(function: Callable[[np.ndarray], np.ndarray]) -> Subject:
    return replace(broken.subject(function), backend=_WATCHED)


def _waits(logits: np.ndarray) -> np.ndarray:
    if _WATCHED.forbidden:
        raise RuntimeError("called a synchronizing CUDA operation")
    return broken.right(logits)


def _misbuilt(change: Callable[[int, str], tuple[int, str]]) -> Subject:
    """A family whose options do something else than they say."""
    honest = broken.family()

    def rebuild(*, num_iters: int | None, first: str) -> Subject:
        count, side = change(num_iters or broken.NUM_ITERS, first)
        assert honest.rebuild is not None
        return honest.rebuild(num_iters=count, first=side)

    return replace(honest, rebuild=rebuild)


def _with_vjp(change: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Subject:
    """The right projection with a gradient changed by `change(gradient, logits, grad_matrix)`."""

    def vjp(logits: np.ndarray, grad: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            gradient = reference.gradient(logits, grad, broken.NUM_ITERS)
        return change(gradient, logits, grad).astype(logits.dtype)

    return broken.subject(broken.right, vjp=vjp)


def _with_implicit(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Subject:
    """The right projection and gradient, and a gradient of the limit changed by `change(gradient, matrix)`."""

    def implicit(logits: np.ndarray, grad: np.ndarray) -> np.ndarray:
        gradient = reference.gradient(logits, grad, 60)
        return change(gradient, broken.right(logits).astype(np.float64)).astype(logits.dtype)

    return replace(_with_vjp(lambda gradient, x, g: gradient), implicit=implicit)


def _limit_gradient(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Subject:
    """Newton's implicit gradient changed by `change(gradient, logits)`."""
    honest = solver_subject(Newton(), BACKENDS["numpy"])
    assert honest.implicit is not None
    gradient = honest.implicit
    return replace(honest, implicit=lambda logits, grad: change(gradient(logits, grad), logits).astype(logits.dtype))


def _on(backend: str, function: Callable[..., Any], **facts: Any) -> Subject:
    return replace(broken.subject(broken.right), function=function, backend=BACKENDS[backend], **facts)


def _numpy_right(_: Any) -> Subject:
    return broken.subject(broken.right)


def _strict(nudge: bool) -> Subject:
    strict = pytest.importorskip("array_api_strict")

    def function(logits: Any) -> Any:
        matrix = broken.right(np.asarray(logits))
        return strict.asarray(np.nextafter(matrix, 0) if nudge else matrix)

    return _on("array_api_strict", function, elsewhere=_numpy_right)


def _torch(function: Callable[[np.ndarray], np.ndarray]) -> Subject:
    torch = pytest.importorskip("torch")
    return _on("torch", lambda logits: torch.from_numpy(function(logits.numpy())), elsewhere=_numpy_right)


def _torch_smooth(detach: bool) -> Subject:
    """Sinkhorn in plain torch; with `detach` the second derivative misses the sums."""
    pytest.importorskip("torch")

    def function(logits: Any) -> Any:
        log_matrix = logits
        for step in range(2 * broken.NUM_ITERS):
            total = log_matrix.logsumexp(-1 if step % 2 else -2, keepdim=True)
            log_matrix = log_matrix - total
        return log_matrix.exp()

    def second(logits: Any, grad: Any) -> Any:
        return BACKENDS["torch"].autograd(function, logits, grad)

    class Detached(type(BACKENDS["torch"])):  # type: ignore[misc]
        """Forgets half of the curvature."""

        def second(self, function: Any, logits: Any, grad: Any, direction: Any) -> Any:
            return super().second(function, logits, grad, direction) / 2

    chosen = Detached() if detach else BACKENDS["torch"]
    return replace(broken.subject(broken.right), function=function, backend=chosen, vjp=second)


def _scaled(function: Callable[..., Any], factor: float, **facts: Any) -> Subject:
    return broken.subject(lambda logits: function(logits) * logits.dtype.type(factor), **facts)


def _rounded(complete: bool) -> Callable[[np.ndarray], np.ndarray]:
    from birkhoff.rounding import round_to_nonexpansive, round_to_polytope

    finish = round_to_polytope if complete else round_to_nonexpansive
    return lambda logits: finish(broken.right(logits))


EPS = (1e-6, 1e-6)


def _damped(logits: np.ndarray) -> np.ndarray:
    return reference.sinkhorn_damped(logits, broken.NUM_ITERS, first="columns").astype(logits.dtype)


# claim: (what is right, what is broken)
SPECIAL: dict[str, tuple[Callable[[], Subject], tuple[Callable[[], Subject], ...]]] = {
    "damped_side_below_one": (
        lambda: broken.subject(_damped, eps=EPS),
        (lambda: _scaled(_damped, 1.001, eps=EPS),),
    ),
    "reported_error_is_true": (
        _reporting,
        (
            lambda: _reporting(column_error=lambda report: 0 * report["column_error"]),
            lambda: _reporting(row_error=lambda report: report["row_error"] + 1e-3),
            lambda: _reporting(column_error=lambda report: 0 * report["column_error"] + report["column_error"].mean()),
        ),
    ),
    "status_per_matrix": (
        _reporting,
        (
            lambda: _reporting(status=lambda report: 0 * report["status"]),
            lambda: _reporting(status=lambda report: np.full_like(report["status"], report["status"].max())),
        ),
    ),
    "converged_means_within_tolerance": (
        lambda: _stopping(lambda status, error, tol: status),
        (
            lambda: _stopping(lambda status, error, tol: 0 * status),
            lambda: _stopping(lambda status, error, tol: 0 * status + 1),
            lambda: _stopping(lambda status, error, tol: 0 * status + int(error.mean() > tol)),
            lambda: _stopping(lambda status, error, tol: np.where(error > 0.9 * tol, 1, 0)),
        ),
    ),
    "kl_to_the_limit_never_rises": (broken.family, (lambda: _misbuilt(lambda count, first: (21 - count, first)),)),
    "implicit_equals_unrolled_when_converged": (
        lambda: _with_implicit(lambda gradient, matrix: gradient),
        (
            lambda: _with_implicit(lambda gradient, matrix: 1.01 * gradient),
            lambda: _with_implicit(lambda gradient, matrix: gradient + 1e-3 * matrix),
        ),
    ),
    "limit_gradient_halves_the_norm": (
        lambda: _limit_gradient(lambda gradient, x: gradient),
        (
            lambda: _limit_gradient(lambda gradient, x: 2.5 * gradient),
            lambda: _limit_gradient(lambda gradient, x: gradient + 1e-4),
            lambda: _limit_gradient(lambda gradient, x: np.where(np.abs(x) == np.abs(x).max(), 2048.0, gradient)),
        ),
    ),
    "large_stacks": (
        lambda: broken.subject(broken.right),
        (lambda: broken.subject(lambda logits: _wrong_after(2**16 if _is_common(logits) else 2**20)(logits)),),
    ),
    "last_side_exact": (
        broken.family,
        (lambda: _misbuilt(lambda count, first: (count, "rows" if count == 1 else first)),),
    ),
    "does_not_wait_for_the_device": (lambda: _watched(broken.right), (lambda: _watched(_waits),)),
    "open_side_never_rises": (broken.family, (lambda: _misbuilt(lambda count, first: (21 - count, first)),)),
    "hilbert_contraction": (broken.family, (lambda: _misbuilt(lambda count, first: (1 + count // 3, first)),)),
    "two_by_two_error_below_1_over_2k": (
        broken.family,
        (lambda: _misbuilt(lambda count, first: (max(1, count // 2), first)),),
    ),
    "transpose_duality": (broken.family, (lambda: _misbuilt(lambda count, first: (count, "columns")),)),
    "finish_is_nonexpansive": (
        lambda: broken.subject(_rounded(False), finish="nonexpansive"),
        (
            lambda: broken.subject(broken.right, finish="nonexpansive"),
            lambda: _scaled(_rounded(True), 1.001, finish="exact"),
        ),
    ),
    "exact_matrices_are_closed": (
        lambda: broken.subject(_rounded(True), finish="exact"),
        (lambda: broken.subject(broken.right, finish="exact"), lambda: broken.subject(_rounded(False), finish="exact")),
    ),
    "same_bits_on_the_strict_namespace": (lambda: _strict(False), (lambda: _strict(True),)),
    "agrees_with_numpy": (
        lambda: _torch(broken.right),
        (lambda: _torch(broken.half_temperature), lambda: _torch(broken.added_eps)),
    ),
    "adjoint_identity": (
        lambda: _with_vjp(lambda gradient, x, g: gradient),
        (
            lambda: _with_vjp(lambda gradient, x, g: 0 * gradient),
            lambda: _with_vjp(lambda gradient, x, g: -gradient),
            lambda: _with_vjp(lambda gradient, x, g: reference.gradient(x, g, broken.NUM_ITERS - 1)),
            lambda: _with_vjp(lambda gradient, x, g: np.swapaxes(gradient, -1, -2)),
        ),
    ),
    "gradient_matches_differences": (
        lambda: _with_vjp(lambda gradient, x, g: gradient),
        (
            lambda: _with_vjp(lambda gradient, x, g: 0 * gradient),
            lambda: _with_vjp(lambda gradient, x, g: 1.01 * gradient),
            lambda: _with_vjp(lambda gradient, x, g: np.where(x.dtype == np.float32, 0.9, 1.0) * gradient),
            lambda: _with_vjp(lambda gradient, x, g: np.swapaxes(gradient, -1, -2)),
        ),
    ),
    "gradient_sums_vanish": (
        lambda: _with_vjp(lambda gradient, x, g: gradient),
        (
            lambda: _with_vjp(lambda gradient, x, g: broken.right(x).astype(np.float64) * g),
            lambda: _with_vjp(lambda gradient, x, g: reference.gradient(x, g, broken.NUM_ITERS, first="rows")),
        ),
    ),
    "gradient_halves_the_norm": (
        lambda: _with_vjp(lambda gradient, x, g: gradient),
        (lambda: _with_vjp(lambda gradient, x, g: 4 * gradient), lambda: _with_vjp(lambda gradient, x, g: g)),
    ),
    "gradient_is_finite": (
        lambda: _with_vjp(lambda gradient, x, g: gradient),
        (
            lambda: _with_vjp(
                lambda gradient, x, g: np.where(np.ptp(x, (-2, -1), keepdims=True) > 50, np.nan, gradient)
            ),
        ),
    ),
    "zero_upstream_gives_zero": (
        lambda: _with_vjp(lambda gradient, x, g: gradient),
        (lambda: _with_vjp(lambda gradient, x, g: gradient + 1e-30),),
    ),
    "bad_matrix_spares_other_gradients": (
        lambda: _with_vjp(lambda gradient, x, g: gradient),
        (lambda: _with_vjp(lambda gradient, x, g: gradient + 0 * np.sum(x)),),
    ),
    "double_backward_works": (lambda: _torch_smooth(False), (lambda: _torch_smooth(True),)),
}


@pytest.mark.parametrize("name", sorted(SPECIAL))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rejects_wrong_options_reports_and_gradients(name: str) -> None:
    right, wrong = SPECIAL[name]
    assert _verdict(name, right()) == "holds"
    for number, make in enumerate(wrong):
        assert _verdict(name, make()) == "broken", number


def test_every_claim_about_a_projection_is_tested() -> None:
    covered = set(REJECTS) | set(SPECIAL)
    assert {claim.name for claim in claims.PROJECTION_CLAIMS if claim.family != "euclidean"} == covered
