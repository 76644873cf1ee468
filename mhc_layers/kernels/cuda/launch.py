"""Compile the stream kernels for one (n, C), and shape their grids.

The compiled code is specialised to the number of streams n and of channels C; the number of tokens M is an argument, so
a new batch size never compiles anything. Sources lie beside this file.
"""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import torch

from birkhoff.kernels.cuda import compiler
from birkhoff.kernels.cuda.launcher import PreparedLaunch
from mhc_layers.kernels.replay import Start, note

__all__ = ["SHARED_BYTES_LIMIT", "kernels", "refuse", "start", "token_splits"]

#: Shared memory of a block on compute capability 9.0 and above.
SHARED_BYTES_LIMIT = 232448


@functools.cache
def _source(name: str) -> str:
    folder = Path(__file__).parent
    return "".join((folder / file).read_text() for file in ("ptx.cuh", "streams.cuh", f"{name}.cu"))


@functools.lru_cache(maxsize=256)
def kernels(name: str, num_streams: int, dim: int, macros: tuple[str, ...], device: int) -> compiler.Module:
    """Compile ``<name>.cu`` for n streams of C channels, or take it from the caches."""
    options = (f"-DNUM_STREAMS={num_streams}", f"-DDIM={dim}", *macros)
    with torch.cuda.device(device):
        return compiler.load(_source(name), options)


def start(launch: PreparedLaunch, *tensors: torch.Tensor) -> None:
    """Launch on the current stream of the tensors' device.

    Kernels copy 16 bytes at a time, so an input that begins elsewhere is copied first; outputs must not.
    """
    note(functools.partial(_start_on, launch), tensors)
    index = tensors[0].get_device()
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            start(launch, *tensors)
        return
    addresses = tuple(map(torch.Tensor.data_ptr, tensors))
    if functools.reduce(operator.or_, addresses) & 15:
        tensors = tuple(tensor.clone() if tensor.data_ptr() % 16 else tensor for tensor in tensors)
        addresses = tuple(map(torch.Tensor.data_ptr, tensors))
    launch(addresses, torch._C._cuda_getCurrentRawStream(index))


def _start_on(launch: PreparedLaunch, index: int) -> Start:
    """What launches on the device that it was prepared for."""

    def begin(stream: int, *addresses: int) -> None:
        launch(addresses, stream)

    return begin


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@functools.lru_cache(maxsize=1024)
def token_splits(num_tokens: int, tile: int, groups: int, start_tiles: int, device: int) -> int:
    """How many blocks share the tokens of one group of channels.

    One block lives on a multiprocessor. Splits are chosen for the fewest tiles on the busiest one, where each block
    also pays ``start_tiles`` for filling shared memory; few splits win ties, because each writes a slab.
    """
    multiprocessors, _ = _multiprocessors(device)
    tiles = -(-num_tokens // tile)
    most = max(1, min(tiles, -(-4 * multiprocessors // groups)))

    def busiest(splits: int) -> int:
        waves = -(-groups * splits // multiprocessors)
        return waves * (-(-tiles // splits) + start_tiles)

    return min(range(1, most + 1), key=lambda splits: (busiest(splits), splits))


def refuse(x: torch.Tensor, supported: tuple[int, ...], what: str) -> str | None:
    """Return the reason why a CUDA C++ kernel does not run on streams ``x (..., n, C)``, or None if it does."""
    if x.device.type != "cuda":
        return f"{what} needs a CUDA device, the streams are on {x.device}"
    if torch.version.hip is not None:
        return f"{what} is CUDA C++ with PTX; this is a ROCm build"
    if x.dtype != torch.bfloat16:
        return f"{what} takes bfloat16 streams, got {x.dtype}"
    if x.shape[-2] not in supported:
        return f"{what} takes n in {supported}, got {x.shape[-2]} (registers and shared memory)"
    _, shared = _multiprocessors(x.get_device())
    if shared < SHARED_BYTES_LIMIT:
        return f"{what} needs {SHARED_BYTES_LIMIT} bytes of shared memory a block, this device has {shared}"
    if compiler.available() is None:
        return f"{what} needs CuPy or cuda.bindings to compile, neither is installed"
    return None
