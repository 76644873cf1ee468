"""Each kernel of the fused site alone, against the bytes that it has to move itself.

Every row of the table of leaves that serves the streams is timed, so that CUDA C++ and Triton stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.device import time_calls
from benchmarks.layer_measure import Inputs, random_parameters
from benchmarks.report import survives
from mhc_layers import PAPER
from mhc_layers.kernels.options import options_key, site_options
from mhc_layers.kernels.table import LEAVES, leaf, restricted_to

__all__ = ["compile_kernels", "measure_kernels", "streams_moved"]


def streams_moved(n: int) -> dict[str, int | None]:
    """How many streams E each leaf reads and writes; None where it moves none but coefficients and slabs."""
    return {
        "project": n,
        "finish": None,
        "read_forward": n + 1,
        "read_norm_forward": n + 1,
        "write_forward": 2 * n + 1,
        "boundary_forward": 2 * n + 1,
        "write_backward": 2 * n + 2,
        "read_backward": n + 1,
        "read_norm_backward": n + 2,
        "finish_backward": None,
        "streams_backward": 3 * n + 1,
        "streams_backward_chained": 4 * n + 3,
        "reduce_slabs": None,
    }


class Leaves:
    """What each leaf is called with: one set of streams, and the results of the leaves before it."""

    def __init__(self, inputs: Inputs, n: int, c: int) -> None:
        self.x, self.f = inputs.x.detach(), inputs.f.detach()
        self.y = self.x.flip(0)  # streams before these, in other memory: the same lines would come from the cache
        self.g, self.gu = inputs.gx, inputs.gu
        parameters = random_parameters(n, c)
        self.phi, self.bias, self.alphas = parameters.phi, parameters.bias, tuple(parameters.alpha.unbind())
        self.options, self.k = site_options(options_key(PAPER)), n * c
        self.slabs, self.squares = self.project()
        self.coef, self.proj, self.rstd = self.finish()
        self.gain = self.bias.new_ones(c)
        _, self.inverse = self.read_norm_forward()
        self.df, self.dcoef = self.write_backward()
        self.dots = self.read_backward()
        self.mix, self.dz, self.partials = self.finish_backward()
        self.dx, self.dphi = self.streams_backward()

    def project(self) -> Any:
        return leaf("project", self.x)(self.x, self.phi)

    def finish(self) -> Any:
        arguments = (self.slabs, self.squares, self.alphas, self.bias, self.options, self.k, self.x.shape[:-2])
        return leaf("finish", self.x)(*arguments)

    def read_forward(self) -> Any:
        return leaf("read_forward", self.x)(self.x, self.coef)

    def read_norm_forward(self) -> Any:
        return leaf("read_norm_forward", self.x)(self.x, self.coef, self.gain, 1e-6)

    def write_forward(self) -> Any:
        return leaf("write_forward", self.x)(self.x, self.f, self.coef)

    def boundary_forward(self) -> Any:
        return leaf("boundary_forward", self.x)(self.x, self.f, self.coef, self.phi)

    def write_backward(self) -> Any:
        run = leaf("write_backward", self.x)
        return run(self.g, self.x, self.f, self.proj, self.alphas[1], self.bias, self.options)

    def read_backward(self) -> Any:
        return leaf("read_backward", self.x)(self.gu, self.x)

    def read_norm_backward(self) -> Any:
        before = (self.gain, self.inverse, self.proj, self.alphas[0], self.bias, self.options)
        return leaf("read_norm_backward", self.x)(self.gu, self.x, *before)

    def finish_backward(self) -> Any:
        coefficients = (self.proj, self.rstd, self.dcoef, self.dots, self.alphas, self.bias)
        return leaf("finish_backward", self.x)(*coefficients, self.options, self.k, self.x.dtype, None)

    def streams_backward(self) -> Any:
        run = leaf("streams_backward", self.x, optional=(self.g, self.gu))
        return run(self.x, self.g, self.gu, self.mix, self.dz, self.phi)

    def streams_backward_chained(self) -> Any:
        here = (self.x, self.g, self.gu, self.mix, self.dz, self.phi)
        before = (self.y, self.f, self.proj, self.alphas[1], self.bias, self.options.post_multiplier)
        return leaf("streams_backward_chained", self.x)(*here, *before)

    def reduce_slabs(self) -> Any:
        return leaf("reduce_slabs", self.x)(self.dphi, self.partials)


def _rows_that_serve(name: str, x: Tensor) -> list[str]:
    """Rows of a leaf that take these streams, plain torch left out, by preference and once each."""
    names: list[str] = []
    for row in LEAVES[name].rows:
        if row.name in names or row.name == "plain":
            continue
        with restricted_to(row.name):
            if leaf(name, x, required=False) is not None:
                names.append(row.name)
    return names


def compile_kernels(m: int, n: int, c: int) -> None:
    """Call every leaf of every row once, so that the compiled code lands in the caches on disk."""
    one = Leaves(Inputs.random(m, n, c, 0), n, c)
    for name in streams_moved(n):
        for how in _rows_that_serve(name, one.x):
            with restricted_to(how), survives({}):
                getattr(one, name)()


def measure_kernels(m: int, n: int, c: int) -> list[dict[str, Any]]:
    """Time every leaf at one shape in a CUDA graph over two input sets, and the whole backward."""
    sets = [Leaves(Inputs.random(m, n, c, seed), n, c) for seed in range(2)]
    found: list[dict[str, Any]] = []

    def one(name: str, how: str, streams: int | None, call: Callable[[Leaves], Any]) -> None:
        row: dict[str, Any] = {"name": name, "row": how, "streams": streams}
        with survives(row):
            row["us"] = time_calls([lambda each=each: call(each) for each in sets], budget_ms=30.0).best
        found.append(row)

    for name, streams in streams_moved(n).items():
        for how in _rows_that_serve(name, sets[0].x):
            with restricted_to(how):
                one(name, how, streams, lambda each, name=name: getattr(each, name)())

    def backward(each: Leaves) -> None:
        each.write_backward()
        each.read_backward()
        each.finish_backward()
        each.streams_backward()
        each.reduce_slabs()

    one("backward of a site", "as chosen", 6 * n + 4, backward)
    return found
