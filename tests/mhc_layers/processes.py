"""Runs a test's function in processes that form a group, and ends them if they take too long."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from mhc_layers.parallel.mesh import World, end_process, leave_processes


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
    while not context.join(timeout=5.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} is not done after {seconds:.0f} s")


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
