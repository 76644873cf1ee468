"""Timing on the host, and the description of the machine that a report carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["host_machine", "time_host"]


def time_host(calls: Sequence[Callable[[], Any]], *, budget: float = 2.0) -> tuple[float, float]:
    """Seconds of one call, (median, fastest), of functions that do the same work on different inputs, called in turn.

    The fastest says what the code costs, the median what a busy machine made of it.
    """
    for call in calls:
        call()
    seconds: list[float] = []
    spent = 0.0
    while (spent < budget and len(seconds) < 200) or len(seconds) < 3:
        call = calls[len(seconds) % len(calls)]
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        spent += seconds[-1]
    return statistics.median(seconds), min(seconds)


def host_machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, threads, versions, commit and date."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    clean = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode == 0
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
        "commit": (commit or "unknown") + ("" if clean else " with uncommitted changes"),
    }


def command(subject: str, arguments: Sequence[str]) -> str:
    """Return the command that a report names: without where it was written and which commit it was told."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not skip and name not in ("--json", "--markdown", "--plot", "--commit"):
            kept.append(argument)
        skip = not skip and argument in ("--json", "--markdown", "--plot", "--commit")
    return shlex.join(["python", "-m", "benchmarks", subject, *kept])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
