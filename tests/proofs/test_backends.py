"""Backends: which implementations of the library a backend is about."""

from __future__ import annotations

import pytest

from birkhoff import _dispatch
from birkhoff._registry import PROJECTIONS, Facts
from proofs.backends import BACKENDS, with_dtypes


def _facts(method: str, n: int) -> Facts:
    single = ("float32", "float32", "float32")
    return Facts(method=method, library="torch", device="cuda", dtype="float32", n=n, precision=single)


@pytest.mark.parametrize("name", ["triton", "cuda", "torch"])
def test_a_backend_leaves_rows_out_while_it_is_in_use(name: str) -> None:
    left_out = set(BACKENDS[name].leaves_out)
    with BACKENDS[name].kernels():
        assert {row.name for row in _dispatch.PROJECTIONS.rows} == {row.name for row in PROJECTIONS.rows} - left_out
        for method in ("log", "newton"):
            found = _dispatch.PROJECTIONS.resolve(_facts(method, 4))
            assert not left_out & {found.row.name, *(refusal.row for refusal in found.refusals)}
    assert _dispatch.PROJECTIONS is PROJECTIONS


def test_a_failure_inside_brings_the_whole_table_back() -> None:
    with pytest.raises(ZeroDivisionError), BACKENDS["cuda"].kernels():
        raise ZeroDivisionError
    assert _dispatch.PROJECTIONS is PROJECTIONS


def test_cuda_and_triton_share_no_kernel() -> None:
    kernels = {row.name for row in PROJECTIONS.rows if row.targets}
    assert kernels - set(BACKENDS["cuda"].leaves_out) == {"cuda"}
    assert kernels - set(BACKENDS["triton"].leaves_out) == {"triton", "triton-newton"}


def test_dtypes_are_narrowed_on_a_copy() -> None:
    narrowed = with_dtypes(BACKENDS["torch"], ["bfloat16"])
    assert narrowed.dtypes == ("bfloat16",) and narrowed.halves == ("bfloat16",)
    assert BACKENDS["torch"].dtypes == ("float64", "float32")
    with pytest.raises(ValueError, match="give a list of float64"):
        with_dtypes(BACKENDS["torch"], ["float8"])
