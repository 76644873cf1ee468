"""Compile ahead: run commands in parallel processes that leave compiled code in the caches on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["compile_ahead"]


def compile_ahead(commands: Sequence[Sequence[str]], jobs: int, seconds: float, *, module: str = "benchmarks") -> str:
    """Run ``python -m module`` with each list of arguments, ``jobs`` at a time; return what happened in a sentence.

    A process that still runs after ``seconds`` is ended. A failure here is no error: the measurement meets it again and
    reports it.
    """
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", **os.environ}
    stop = time.monotonic() + seconds

    def run(arguments: Sequence[str]) -> bool:
        command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
        left = stop - time.monotonic()
        if left <= 0:
            return False
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            return subprocess.run(command, env=environment, timeout=left, check=False, **quiet).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    start = time.monotonic()
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        done = list(pool.map(run, commands))
    return f"{done.count(True)} of {len(done)} jobs compiled ahead, {time.monotonic() - start:.0f} s"
