"""What a person sees while a run goes on: a live bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["ProgressView"]


class ProgressView:
    """Shows a run's step, loss, bits per byte, tokens per second and composite gain.

    Parameters
    ----------
    total_steps : int
        Steps of the whole run.
    start_step : int
        Steps that are done already.
    console : rich.console.Console, optional
        Where to write; standard output by default.
    every_seconds : float
        Least time between two plain lines.
    enabled : bool
        False shows nothing, for processes other than the main one.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        every_seconds: float = 5.0,
        enabled: bool = True,
    ) -> None:
        self.console = console or Console()
        self.enabled = enabled
        self._total = total_steps
        self._every = every_seconds
        self._last_line = -float("inf")
        self._fields: dict[str, Any] = {"loss": "  -  ", "bits": "  -  ", "rate": "-", "gain": "-"}
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=8),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("[cyan]{task.fields[bits]} bits/byte"),
                TextColumn("{task.fields[rate]} tok/s"),
                TextColumn("[magenta]gain {task.fields[gain]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, **self._fields)

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show_gain(self, forward: float, backward: float) -> None:
        """Set the composite gain, forward/backward: largest row sum and column sum of the whole depth's operator."""
        self._fields["gain"] = f"{forward:.3f}/{backward:.3f}"

    def update(self, step: int, *, loss: float, bits_per_byte: float, tokens_per_second: float) -> None:
        """Show the numbers after ``step`` steps."""
        if not self.enabled:
            return
        rate = f"{tokens_per_second / 1e3:.1f}k" if tokens_per_second > 0.0 else "-"  # not known before two steps
        self._fields.update(loss=f"{loss:.4f}", bits=f"{bits_per_byte:.3f}", rate=rate)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, **self._fields)
            return
        now = time.monotonic()
        if step >= self._total or now - self._last_line >= self._every:
            self._last_line = now
            self.console.print(
                f"step {step}/{self._total}  loss {self._fields['loss']}  {self._fields['bits']} bits/byte  "
                f"{self._fields['rate']} tok/s  gain {self._fields['gain']}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, message: str) -> None:
        """Print one line above the bar."""
        if self.enabled:
            self.console.print(message, highlight=False, soft_wrap=True)
