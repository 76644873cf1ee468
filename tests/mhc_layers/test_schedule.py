"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from mhc_layers.training.schedule import ScheduleConfig, learning_rate_factor


def factors(config, steps):
    return [learning_rate_factor(config, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_never_zero():
    values = factors(ScheduleConfig(kind="constant", warmup_steps=4), 8)
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cosine_falls_from_one_to_final():
    values = factors(ScheduleConfig(kind="cosine", warmup_steps=0, final=0.1), 1000)
    assert values[0] == 1.0 and values == sorted(values, reverse=True)
    assert values[500] == pytest.approx(0.55, abs=1e-12)
    assert values[-1] == pytest.approx(0.1, abs=1e-4)


def test_step_schedule_is_the_papers():
    values = factors(ScheduleConfig(kind="step", warmup_steps=0), 100)
    assert values[:80] == [1.0] * 80 and values[80:90] == [0.316] * 10 and values[90:] == [0.1] * 10


def test_steps_past_the_end_keep_the_final_factor():
    config = ScheduleConfig(kind="cosine", warmup_steps=0, final=0.2)
    assert learning_rate_factor(config, 5000, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "linear"},
        {"warmup_steps": -1},
        {"final": 1.5},
        {"fractions": (0.9, 0.8)},
        {"fractions": (0.5,), "rates": (0.3, 0.1)},
    ],
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValueError):
        ScheduleConfig(**fields)
