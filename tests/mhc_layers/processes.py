"""Runs a test's function in processes that form a group, on CPUs or GPUs, and ends them if they take too long."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from mhc_layers.parallel.mesh import World, end_process, leave_processes


def devices(processes: int = 2) -> list[Any]:
    """Parameters of a test: CPU processes with gloo, and as many GPUs with NCCL."""
    found = torch.cuda.device_count()
    enough = pytest.mark.skipif(found < processes, reason=f"needs {processes} GPUs, this machine has {found}")
    return [pytest.param("cpu", marks=pytest.mark.distributed), pytest.param("cuda", marks=[pytest.mark.gpu, enough])]


def torchrun(processes: int, *words: str, seconds: float = 240.0) -> str:
    """Run ``python -m mhc_layers`` with words in several processes; return what they printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    pipe = subprocess.PIPE
    with subprocess.Popen([*launcher, "-m", "mhc_layers", *words], stdout=pipe, stderr=pipe, text=True) as running:
        try:
            output, errors = running.communicate(timeout=seconds)
        except BaseException:
            running.terminate()  # it ends the processes that it started
            raise
    assert running.returncode == 0, errors
    assert "terminate called" not in errors
    return output


def spawn(function: Callable[..., None], *arguments: Any, processes: int = 2, seconds: float = 240.0) -> None:
    """Run ``function(rank, *arguments)`` in processes that ``torchrun`` might have started.

    Raises
    ------
    TimeoutError
        If they are not done after ``seconds``; they are killed then.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(_enter, args=(processes, port, function, arguments), nprocs=processes, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=5.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} is not done after {seconds:.0f} s")
    finally:
        for process in context.processes:
            process.kill()


def _enter(rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes)
    )
    torch.set_num_threads(1)
    try:
        function(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        leave_processes(World(owns_group=True))
    end_process(0)
