"""What a prepared launch passes to Triton's launcher; no GPU. Launchers here only write down what they get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from mhc_layers.kernels.triton.launch import Launch


class Launcher:
    """Called as the launchers of Triton 3.6 are, and ends in a function of these arguments as they do."""

    launch_cooperative_grid, launch_pdl = False, True
    profile_scratch_size = 0

    def __init__(self, scratch: int) -> None:
        self.global_scratch_size, self.got, self.calls = scratch, [], 0

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        self.calls += 1
        scratch = "allocated" if self.global_scratch_size else None
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, scratch, None, *args)

    def launch(self, *args: Any) -> None:
        self.got.append(args)


@pytest.mark.parametrize(
    ("version", "scratch", "goes_around"),
    [("3.6.0", 0, True), ("3.5.1", 0, True), ("3.6.0", 64, False), ("3.7.0", 0, False)],
)
def test_a_launch_passes_the_same_arguments_past_the_python_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch, version: str, scratch: int, goes_around: bool
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    run = Launcher(scratch)
    launch = Launch(None, (5, 2), (7, 0.5), {"N": 4, "OVERLAP": True}, 8)
    start = launch._start(SimpleNamespace(run=run, function=99, packed_metadata="metadata"))
    start(3, 256, 512)
    scratch_given = "allocated" if scratch else None
    expected = (
        5,
        2,
        1,
        3,
        99,
        False,
        True,
        scratch_given,
        None,
        "metadata",
        None,
        None,
        None,
        256,
        512,
        7,
        0.5,
        4,
        True,
    )
    assert run.got == [expected]
    assert run.calls == (not goes_around)


def test_other_platforms_keep_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    run = Launcher(0)
    launch = Launch(None, (5,), (), {"OVERLAP": False}, 4)
    launch._start(SimpleNamespace(run=run, function=1, packed_metadata=()))(3, 256)
    assert run.calls == 1
