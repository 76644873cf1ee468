"""Launch tables of the CUDA Sinkhorn kernels: every n has a launch that a device can hold. No GPU needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from birkhoff.kernels.cuda import large, sinkhorn

MULTIPROCESSOR_SHARED = 227 * 1024
REGISTERS = 65_536


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("table", [sinkhorn._FORWARD, sinkhorn._BACKWARD], ids=["forward", "backward"])
def test_every_n_has_a_launch(table, double: bool) -> None:
    for n in range(1, sinkhorn.MAX_SIZE + 1):
        launch = sinkhorn._launch(table, n, double)
        assert launch.lanes <= 32 and launch.lanes & (launch.lanes - 1) == 0
        assert launch.lane_rows <= n and launch.lane_columns <= n
        assert launch.threads % 32 == 0 and launch.threads // launch.lanes >= 1
        assert launch.threads * launch.blocks * 32 <= REGISTERS, "at least 32 registers a thread"


@pytest.mark.parametrize("double", [False, True])
def test_the_history_fits_in_shared_memory(double: bool) -> None:
    for n in range(1, sinkhorn.MAX_SIZE + 1):
        launch = sinkhorn._launch(sinkhorn._BACKWARD, n, double)
        history = sinkhorn._KEPT * sinkhorn._history_bytes(n, launch, 8 if double else 4)
        tiles = 2 * sinkhorn._tile_bytes(n, launch, 8 if double else 4)
        assert launch.threads // 32 * max(history, tiles) <= MULTIPROCESSOR_SHARED, n


@pytest.mark.parametrize("double", [False, True])
def test_tiles_of_the_forward_fit(double: bool) -> None:
    for n in range(1, sinkhorn.MAX_SIZE + 1):
        launch = sinkhorn._launch(sinkhorn._FORWARD, n, double)
        block = launch.threads // 32 * sinkhorn._tile_bytes(n, launch, 8 if double else 4)
        assert launch.blocks * (block + 1024) <= MULTIPROCESSOR_SHARED + 1024, n


def test_every_option_of_the_source_is_given() -> None:
    launch = sinkhorn._launch(sinkhorn._BACKWARD, 4, False)
    flags = sinkhorn.flags(4, 0, launch, backward=True, damped=False, rows_first=False, capped=False)
    given = {flag[2:].partition("=")[0] for flag in flags if flag.startswith("-D")}
    documented = set(re.findall(r"^//   ([A-Z_]+(?:, [A-Z_]+)*) ", sinkhorn.source("sinkhorn.cu"), re.M))
    assert {name for line in documented for name in line.split(", ")} == given


def test_large_passes_hold_their_columns() -> None:
    for double in (False, True):
        for n in (33, 34, 1000, 1001, 4096, 8191, 8192, *((9000, 16384) if not double else ())):
            flags, threads = large.flags(n, double)
            value = {key: int(number) for key, number in (flag[2:].split("=") for flag in flags[1:])}
            assert value["THREADS"] == threads
            assert value["COLUMNS"] % value["VECTOR"] == 0 and n % value["VECTOR"] == 0
            assert threads * value["COLUMNS"] >= n
            assert value["GROUP"] in (1, 2, 4, 8)


def test_sources_ship_with_the_package() -> None:
    folder = Path(sinkhorn.__file__).parent
    assert {path.name for path in folder.glob("*.cu*")} >= {"tile.cuh", "sinkhorn.cu", "large.cu"}
