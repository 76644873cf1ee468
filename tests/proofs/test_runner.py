"""The runner: what counts as a breach, how examples shrink, and that runs repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proofs import claims, pool, runner
from proofs._claim import Observation, Sample, same_bits, worst
from proofs.backends import Backend
from proofs.runner import PROFILES, Profile
from proofs.selection import Selection
from proofs.subjects import user_subject
from tests.proofs import broken

EFFORT = Profile("test", 10, shrink_budget=200)


def test_observation_is_never_kind_to_nan() -> None:
    assert not Observation(float("nan"), 1.0).holds
    assert Observation(float("nan"), 1.0).ratio == np.inf
    assert Observation(0.0, 0.0).holds and Observation(0.0, 0.0).ratio == 0
    # what is allowed without a limit allows nothing
    assert not Observation(1.0, float("inf")).holds and Observation(1.0, float("inf")).ratio == np.inf
    assert not worst(np.ones(3), np.array([2.0, np.inf, 2.0])).holds
    assert not Observation(1e-300, 0.0).holds and Observation(1e-300, 0.0).ratio == np.inf


def test_worst_finds_the_item() -> None:
    seen = np.zeros((4, 3))
    seen[2, 1] = 5.0
    assert worst(seen, 10.0).item == 2 and worst(seen, 10.0).seen == 5.0
    seen[1, 0] = np.nan
    assert worst(seen, 10.0).item == 1 and not worst(seen, 10.0).holds
    assert worst(np.zeros((0, 3)), 1.0).holds


def test_the_same_bits_are_more_than_equal_numbers() -> None:
    one = np.array([[0.0, np.nan], [1.0, np.inf]])
    assert same_bits(one, one.copy(), "").holds
    assert not same_bits(one, -one, "").holds
    assert not same_bits(one, np.where(one == 0, -0.0, one), "").holds
    assert not same_bits(one, np.nan_to_num(one), "").holds


def test_an_exception_is_a_breach_with_its_text() -> None:
    def fails(logits: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError("not today")

    outcome = runner.run_claim(claims.by_name("last_side_exact"), broken.subject(fails), EFFORT)
    assert outcome.verdict == "broken" and outcome.reason == "ZeroDivisionError: not today"


def test_an_exit_is_a_breach_and_does_not_end_the_run() -> None:
    outcome = runner.run_claim(claims.by_name("last_side_exact"), broken.subject(broken.exits), EFFORT)
    assert outcome.verdict == "broken" and outcome.reason == "SystemExit: 0"


def test_a_breach_that_does_not_repeat_keeps_what_was_seen_first() -> None:
    calls: list[int] = []

    def fails_at_first(logits: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("no context")
        return broken.right(logits)

    outcome = runner.run_claim(claims.by_name("last_side_exact"), broken.subject(fails_at_first), EFFORT)
    assert outcome.verdict == "broken" and outcome.worst is not None and not outcome.worst.holds
    assert outcome.reason.startswith("RuntimeError: no context (not when")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda logits: broken.right(logits)[..., 0], "returned shape"),
        (lambda logits: broken.right(logits).tolist(), "returned a list, not an array"),
        (lambda logits: (broken.right(logits), 20), "returned a tuple, not an array"),
        (lambda logits: None, "returned a NoneType, not an array"),
    ],
)
def test_what_is_no_array_of_the_shape_is_named(wrong: Callable[[np.ndarray], Any], reason: str) -> None:
    for name in ("last_side_exact", "norm_at_most_sqrt_of_open_sum", "any_batch_shape"):
        outcome = runner.run_claim(claims.by_name(name), broken.subject(wrong), EFFORT)
        assert outcome.verdict == "broken" and reason in outcome.reason, outcome.reason


def test_a_torch_function_without_a_gradient_is_told_so() -> None:
    pytest.importorskip("torch")
    subject = user_subject(lambda logits: logits.detach().softmax(-1), name="detached", backend_name="torch")
    outcome = runner.run_claim(claims.by_name("gradient_is_finite"), subject, EFFORT)
    assert outcome.verdict == "broken" and "no gradient flows through it" in outcome.reason


def test_shrinking_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_SHRINK_SECONDS", 0.0)
    outcome = runner.run_claim(claims.by_name("last_side_exact"), broken.subject(broken.half_a_step_missing), EFFORT)
    assert outcome.verdict == "broken" and outcome.failing is not None
    assert len(outcome.failing.logits) == 16  # the example as it was drawn


def test_nothing_is_said_of_a_device_that_is_lost() -> None:
    class Losing(Backend):
        """Answers until it was asked for a 1 x 1."""

        lost = False

        def asarray(self, values: np.ndarray, dtype: str) -> Any:
            if self.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().asarray(values, dtype)

    backend = Losing()

    def function(logits: np.ndarray) -> np.ndarray:
        backend.lost = logits.shape[-1] == 1
        return broken.right(logits)

    chosen = claims.select(["one_by_one_is_one", "two_by_two_closed_form", "circulant_in_one_step"])
    subject = replace(broken.subject(function), backend=backend)
    outcomes = runner.run(chosen, [subject], EFFORT)
    assert [outcome.verdict for outcome in outcomes] == ["broken", "not tried", "not tried"]
    assert "illegal memory access" in outcomes[0].reason


def test_failing_examples_are_small() -> None:
    claim = claims.by_name("last_side_exact")
    outcome = runner.run_claim(claim, broken.subject(broken.half_a_step_missing), EFFORT)
    assert outcome.failing is not None
    count, n, _ = outcome.failing.logits.shape
    assert count == 1 and n == 2
    # one entry is enough to unbalance a 2 x 2 matrix, and the entries left are short numbers
    assert np.count_nonzero(outcome.failing.logits) <= 3
    assert all(len(f"{value:g}") <= 4 for value in outcome.failing.logits.ravel())
    assert runner.replay(claim, broken.subject(broken.half_a_step_missing), outcome.failing).verdict == "broken"
    assert runner.replay(claim, broken.subject(broken.right), outcome.failing).verdict == "holds"


def test_the_same_seed_gives_the_same_examples() -> None:
    def examples(seed: int | None) -> list[bytes]:
        seen: list[bytes] = []

        def record(logits: np.ndarray) -> np.ndarray:
            seen.append(logits.tobytes())
            return broken.right(logits)

        runner.run_claim(claims.by_name("small_logits_converge"), broken.subject(record), EFFORT, seed_value=seed)
        return seen

    assert examples(None) == examples(None)
    assert examples(7) == examples(7)
    assert examples(7) != examples(None)


def test_a_claim_that_is_not_made_says_why() -> None:
    claim = claims.by_name("open_side_never_rises")
    outcome = runner.run_claim(claim, broken.subject(broken.right), EFFORT)
    assert outcome.verdict == "not claimed" and "not ours to choose" in outcome.reason


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_samples_survive_json_bit_for_bit(dtype: str) -> None:
    values = np.array([[[np.pi, -np.inf], [np.nan, 5e-324 if dtype == "float64" else 1e-45]]], dtype=dtype)
    sample = Sample(values, dtype, 12, "by hand")
    again = Sample.from_record(json.loads(json.dumps(sample.as_record())))
    assert again.logits.dtype == values.dtype and again.logits.tobytes() == values.tobytes()
    assert (again.dtype, again.seed, again.note) == (dtype, 12, "by hand")


def test_examples_of_one_size_and_dtype_are_checked_in_one_call() -> None:
    calls: list[tuple[tuple[int, ...], str]] = []

    def record(logits: np.ndarray) -> np.ndarray:
        calls.append((logits.shape, str(logits.dtype)))
        return broken.right(logits)

    joined, apart = claims.by_name("small_logits_converge"), claims.by_name("same_bits_twice")
    outcome = runner.run_claim(joined, broken.subject(record), EFFORT)
    kinds = [(shape[-1], dtype) for shape, dtype in calls]
    assert len(kinds) == len(set(kinds)) and outcome.examples == sum(shape[0] for shape, _ in calls) == 160
    calls.clear()
    assert runner.run_claim(apart, broken.subject(record), EFFORT).examples == 40
    assert len(calls) == 10 and {shape[0] for shape, _ in calls} == {8}


def test_a_breach_in_a_joined_stack_is_one_example_with_its_own_seed() -> None:
    claim = claims.by_name("small_logits_converge")
    outcome = runner.run_claim(claim, broken.subject(broken.one_axis_twice), EFFORT)
    assert outcome.failing is not None and outcome.failing.note.startswith("small n=")
    # what only a large stack shows is shown by that stack
    outcome = runner.run_claim(claim, broken.subject(_wrong_on_large_stacks), EFFORT)
    assert outcome.failing is not None and len(outcome.failing.logits) > 16
    assert outcome.failing.note == "examples joined"


def _wrong_on_large_stacks(logits: np.ndarray) -> np.ndarray:
    return broken.right(logits) * (1.01 if len(logits) > 16 else 1.0)


def test_processes_give_the_same_outcomes_in_the_same_order() -> None:
    selection = Selection(projection="tests.proofs.broken:half_a_step_missing")
    chosen = claims.select(["last_side_exact", "composite_gain_is_one", "certificate", "one_by_one_is_one"])
    alone = runner.run(chosen, selection.subjects(), PROFILES["quick"])
    shared = pool.run(chosen, selection, PROFILES["quick"], jobs=2)

    def facts(outcomes: list[runner.Outcome]) -> list[object]:
        return [
            (o.claim.name, o.subject, o.verdict, o.examples, o.worst, o.failing and o.failing.as_record())
            for o in outcomes
        ]

    assert [outcome.verdict for outcome in shared] == ["broken", "broken", "holds"]
    assert facts(shared) == facts(alone)


def test_only_sizes_that_a_function_takes_are_tried() -> None:
    seen: set[int] = set()

    def powers_of_two(logits: np.ndarray) -> np.ndarray:
        seen.add(logits.shape[-1])
        return broken.scaled_up(logits)

    subject = broken.subject(powers_of_two, sizes=(4, 8))
    outcome = runner.run_claim(claims.by_name("last_side_exact"), subject, EFFORT)
    assert outcome.verdict == "broken" and outcome.failing is not None
    assert seen <= {4, 8} and outcome.failing.logits.shape[-1] in (4, 8)
    outcome = runner.run_claim(claims.by_name("two_by_two_closed_form"), subject, EFFORT)
    assert outcome.verdict == "not claimed" and "size that it takes" in outcome.reason
