"""Compile ahead: run commands in parallel processes that leave compiled code in the caches on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["compile_ahead"]


def compile_ahead(commands: Sequence[Sequence[str]], jobs: int, seconds: float) -> str:
    """Run ``python -m benchmarks`` with each list of arguments, ``jobs`` at a time; return what happened in a sentence.

    A failure here is no error: the measurement meets it again and reports it.
    """
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ}
    stop = time.monotonic() + seconds

    def run(arguments: Sequence[str]) -> bool:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks", *arguments]
        left = stop - time.monotonic()
        if left <= 0:
            return False
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(run, commands))
    return f"{done.count(True)} of {len(done)} jobs compiled ahead, {time.monotonic() - start:.0f} s"
