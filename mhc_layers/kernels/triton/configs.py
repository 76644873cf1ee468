"""Launch shapes of the fused kernels: a small fixed table, no autotuning.

The token count M only picks a bucket here; it is never a compile-time constant, so a new batch size never compiles a
kernel. A bucket is (streams n, channels C, tokens M, stream item size); ``docs/explanation/measured/layer_kernels.md``
holds the sweeps that the numbers come from.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

__all__ = [
    "FinishConfig",
    "ProjectConfig",
    "RowConfig",
    "StreamsBackwardConfig",
    "capability",
    "cdiv",
    "finish_config",
    "is_interpreting",
    "lane_values",
    "next_power_of_2",
    "num_sms",
    "overlaps",
    "project_config",
    "row_config",
    "streams_backward_config",
    "token_splits",
]

# Triton reads the variable when a kernel is decorated; the launchers ask once, in the same way.
_INTERPRETING: bool | None = None
_NUM_SMS: dict[int, int] = {}
_CAPABILITY: dict[int, int] = {}


def is_interpreting() -> bool:
    """Whether Triton runs kernels in its CPU interpreter in this process."""
    global _INTERPRETING
    if _INTERPRETING is None:
        import triton

        _INTERPRETING = bool(triton.knobs.runtime.interpret)
    return _INTERPRETING


def num_sms(device: torch.device) -> int:
    """Number of multiprocessors of a device (8 for the interpreter, where it only shapes the grid)."""
    if device.type != "cuda":
        return 8
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _NUM_SMS:
        _NUM_SMS[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _NUM_SMS[index]


def cdiv(a: int, b: int) -> int:
    """Smallest integer that is at least a / b."""
    return -(-a // b)


def capability(device: torch.device) -> int:
    """Compute capability times ten: 80, 90, 100; 90 where there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 90
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _CAPABILITY:
        major, minor = torch.cuda.get_device_capability(index)
        _CAPABILITY[index] = 10 * major + minor
    return _CAPABILITY[index]


def overlaps(device: torch.device) -> bool:
    """Whether kernels use programmatic dependent launch there (compute capability 9.0 and above)."""
    return not is_interpreting() and torch.version.hip is None and capability(device) >= 90


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least ``value``."""
    return 1 << max(0, value - 1).bit_length()


#: Streams' worth of memory (E) that the slabs of the gradient of phi should not exceed.
LARGEST_SLABS = 0.31


@dataclass(frozen=True)
class RowConfig:
    """Tile of a kernel that streams rows: tokens x channels, warps."""

    block_tokens: int
    block_channels: int
    num_warps: int


@dataclass(frozen=True)
class ProjectConfig:
    """Tile of the projection: tokens x contraction, splits of the contraction, warps and pipeline stages."""

    block_tokens: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class StreamsBackwardConfig:
    """Tile of the last backward kernel: tokens x channels, streams per program, token splits, warps, stages."""

    block_tokens: int
    block_channels: int
    group: int
    num_splits: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=4096)
def row_config(num_streams: int, dim: int, item_size: int, reducing: bool) -> RowConfig:
    """Tile of read, write, and of the reducing kernels A and B1 (full row per program)."""
    if is_interpreting():
        return RowConfig(16, max(16, min(256, next_power_of_2(dim))), 4)
    lane = 8 if item_size == 2 else 4
    if reducing and num_streams > 4:
        lane = 4 if item_size == 2 else 2
    block_channels = 32 * lane
    if dim <= block_channels // 2:
        block_channels = max(32, next_power_of_2(dim))
    if reducing and num_streams <= 4:
        return RowConfig(1, block_channels, 1)
    return RowConfig(4, block_channels, 4)


@functools.lru_cache(maxsize=4096)
def project_config(
    num_tokens: int, num_streams: int, dim: int, item_size: int, sms: int, capability: int
) -> ProjectConfig:
    """Tile of the projection: 64-token tiles reach wgmma; splits of K fill the machine when tokens are few."""
    k = num_streams * dim
    if is_interpreting():
        return ProjectConfig(32, 64, min(2, max(1, k // 64)), 4, 1)
    wide = num_streams * (num_streams + 2) > 32
    block_k = 128 if item_size == 2 and not wide else 64
    if item_size == 4 or (wide and capability < 90):
        block_k = 32
    block_tokens = 64 if num_tokens > 32 else 16
    tiles = max(1, cdiv(num_tokens, block_tokens))  # no tokens: the shapes of the empty slabs
    # about two programs a multiprocessor, at least four k-steps a program
    num_splits = max(1, min(round(2 * sms / tiles), k // (4 * block_k), 32))
    if item_size == 4:
        return ProjectConfig(block_tokens, block_k, num_splits, 8, 3)
    return ProjectConfig(block_tokens, block_k, num_splits, 4, 3 if num_streams > 6 else 4)


@functools.lru_cache(maxsize=4096)
def streams_backward_config(
    num_tokens: int, num_streams: int, dim: int, item_size: int, sms: int, capability: int
) -> StreamsBackwardConfig:
    """Tile of B2; the token splits fill one wave of programs, each with a few tiles at least."""
    if is_interpreting():
        group = {1: 1, 2: 2, 3: 3, 4: 4, 6: 3, 8: 2}.get(num_streams, 1)
        return StreamsBackwardConfig(16, max(16, min(64, next_power_of_2(dim))), group, 2, 4, 1)
    group = {1: 1, 2: 2, 3: 3, 4: 4, 6: 2}.get(num_streams, 1)
    if item_size == 4:
        group, block_tokens, block_channels, num_warps, num_stages = 1, 16, 64, 4, 2
    elif capability < 90:
        # without wgmma the accumulators and both operands share the registers
        block_tokens, block_channels = (32, 64) if num_streams <= 4 else (16, 32)
        group, num_warps, num_stages = 1, 4, 2
    else:
        block_tokens, block_channels, num_warps, num_stages = 16, 128, 8, 3

    def config(block_tokens: int, group: int) -> StreamsBackwardConfig:
        columns = cdiv(dim, block_channels) * (num_streams // group)
        num_splits = token_splits(cdiv(num_tokens, block_tokens), columns, sms)
        return StreamsBackwardConfig(block_tokens, block_channels, group, num_splits, num_warps, num_stages)

    whole = config(block_tokens, group)
    if item_size == 2 and capability >= 90 and num_streams == 4 and num_tokens:
        # half the accumulators in a program are half the slabs; 2 n^2 (n + 2) / M: a slab in streams of M tokens
        halves, slab = config(32, 2), 192 / num_tokens
        if halves.num_splits * slab <= LARGEST_SLABS < whole.num_splits * slab:
            return halves
    return whole


def token_splits(tiles: int, columns: int, sms: int) -> int:
    """How many programs share the token tiles of one column of channels: the fewest tiles on the busiest processor.

    A program also pays about four tiles to fill its pipeline and to write its slab; few splits win ties.
    """

    def busiest(splits: int) -> int:
        return cdiv(columns * splits, sms) * (cdiv(tiles, splits) + 4)

    return min(range(1, max(1, min(tiles, cdiv(4 * sms, columns))) + 1), key=lambda splits: (busiest(splits), splits))


@dataclass(frozen=True)
class FinishConfig:
    """Shape of a finish kernel: tokens, warps, one token a lane or a tile of lanes, iterations in registers."""

    block_tokens: int
    num_warps: int
    lane: bool
    length: int


@functools.lru_cache(maxsize=4096)
def finish_config(num_tokens: int, num_streams: int, sms: int) -> FinishConfig:
    """One token a lane up to n = 4, a tile of lanes beyond; ten iterations of the backward in registers."""
    if is_interpreting():
        return FinishConfig(64, 1, num_streams <= 4, 5)
    if num_streams <= 4:
        # half of the lanes, twice as many programs, where there are multiprocessors for them
        return FinishConfig(16 if num_tokens <= 32 * sms else 32, 1, True, 10)
    return FinishConfig(4, 4, False, 10)


def lane_values(config: RowConfig) -> int:
    """Neighbouring channels that one lane of a reducing kernel holds (warps part the tile among them)."""
    return max(1, config.block_tokens * config.block_channels // (32 * config.num_warps))
