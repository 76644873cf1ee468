"""The log of a run: one JSON object a line, and the same scalars for TensorBoard.

Every line has ``kind`` and ``step`` (steps done so far). Kinds are ``train``, ``eval``, ``monitor`` (per site and over
depth) and ``certificate``. Only times and what is derived from them differ between two identical runs.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mhc_layers.training.checkpoint import write_atomically

__all__ = ["TIMING_KEYS", "MetricsLog", "Throughput", "read_metrics"]

TIMING_KEYS = frozenset({"seconds", "tokens_per_second", "peak_memory_mib", "monitor_seconds"})
"""Keys of a line that depend on the machine and the moment."""


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` and to TensorBoard event files.

    Parameters
    ----------
    folder : pathlib.Path
        The run directory.
    resume_step : int, optional
        Continue a log: lines after this step, written after the checkpoint that is resumed, are dropped.
    enabled : bool
        False makes a log that writes nothing, for processes other than the main one.

    Examples
    --------
    >>> from pathlib import Path
    >>> from mhc_layers.training.metrics import MetricsLog, read_metrics
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with MetricsLog(folder) as log:
    ...     log.write("train", 1, loss=5.5)
    >>> read_metrics(folder)["train"]
    [{'kind': 'train', 'step': 1, 'loss': 5.5}]
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, enabled: bool = True) -> None:
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resume_step is not None and path.exists():
            kept = [line for line in _lines(path) if line["step"] <= resume_step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        purge = None if resume_step is None else resume_step + 1
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line; numbers and short lists also go to TensorBoard (lists as their extremes)."""
        if self._file is None or self._board is None:
            return
        line = {"kind": kind, "step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self._board.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, list) and value and all(isinstance(item, (int, float)) for item in value):
                self._board.add_scalar(f"{kind}/{name}/min", min(value), step)
                self._board.add_scalar(f"{kind}/{name}/max", max(value), step)

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
            self._file = self._board = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Throughput:
    """Tokens per second over the last steps."""

    def __init__(self, window: int = 50) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)

    def add(self, tokens: int) -> None:
        """Note that ``tokens`` more tokens were processed."""
        total = self._marks[-1][1] + tokens if self._marks else tokens
        self._marks.append((time.perf_counter(), total))

    @property
    def tokens_per_second(self) -> float:
        """The rate; 0 before two steps are done."""
        if len(self._marks) < 2:
            return 0.0
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(end - start, 1e-9)


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the log of a run.

    Parameters
    ----------
    folder : pathlib.Path
        A run directory.

    Returns
    -------
    dict
        The lines by kind, in the order they were written. A half-written last line is left out.

    Raises
    ------
    FileNotFoundError
        If there is no ``metrics.jsonl``.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl; give the directory of a run")
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in _lines(path):
        lines.setdefault(line["kind"], []).append(line)
    return lines


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a log."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _plain(value: Any) -> Any:
    """Turn arrays into lists and non-finite numbers, which JSON lacks, into None."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
