"""Timing on the host, and the description of the machine that a report carries."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import provenance

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


def host_machine(packages: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """Processor, cores and load, with what every report says of where it was measured."""
    return {
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        **provenance(packages, commit),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
