"""Learning-rate schedules: a factor of the base rate as a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["ScheduleConfig", "learning_rate_factor"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate changes during a run.

    Parameters
    ----------
    kind : {"cosine", "step", "constant"}
        ``cosine``: half a cosine from 1 down to ``final``. ``step``: multiply by ``rates[i]`` from the fraction
        ``fractions[i]`` of the run on (the mHC paper's schedule, its Table 5). ``constant``: 1 after the warm-up.
    warmup_steps : int
        Steps of linear warm-up from 0 (exclusive) to 1.
    final : float
        The factor at the end of ``cosine``.
    fractions, rates : tuple of float
        The steps of ``step``.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    kind: Literal["cosine", "step", "constant"] = "cosine"
    warmup_steps: int = 100
    final: float = 0.1
    fractions: tuple[float, ...] = (0.8, 0.9)
    rates: tuple[float, ...] = (0.316, 0.1)

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "step", "constant"):
            raise ValueError(f"schedule kind is {self.kind!r}; accepted are 'cosine', 'step' and 'constant'")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if not 0.0 <= self.final <= 1.0:
            raise ValueError(f"final is {self.final}; it is a factor between 0 and 1")
        if len(self.fractions) != len(self.rates) or list(self.fractions) != sorted(self.fractions):
            raise ValueError(
                f"fractions {self.fractions} and rates {self.rates} must be of one length, with rising fractions"
            )


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the factor of the base learning rate at a step.

    Parameters
    ----------
    config : ScheduleConfig
        The schedule.
    step : int
        Number of the step about to be done, from 0.
    total_steps : int
        Number of steps of the whole run.

    Returns
    -------
    float
        A factor in (0, 1].

    Examples
    --------
    >>> from mhc_layers.training.schedule import ScheduleConfig, learning_rate_factor
    >>> config = ScheduleConfig(kind="cosine", warmup_steps=2, final=0.1)
    >>> [round(learning_rate_factor(config, step, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    if config.kind == "step":
        passed = [
            rate
            for fraction, rate in zip(config.fractions, config.rates, strict=True)
            if step >= fraction * total_steps
        ]
        return passed[-1] if passed else 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
