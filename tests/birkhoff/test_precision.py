"""Precision: names, presets and units of roundoff."""

from __future__ import annotations

import numpy as np
import pytest

from birkhoff.errors import OptionError
from birkhoff.precision import DEFAULT, DOUBLE, Precision, unit_roundoff


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("float32", ("float32", "float32", "float32")),
        ("float64", ("float64", "float64", "float64")),
        ("float16", ("float32", "float32", "float16")),
        ("bfloat16", ("float32", "float32", "bfloat16")),
    ],
)
def test_default_follows_the_input(given: str, expected: tuple[str, str, str]) -> None:
    settled = DEFAULT.resolve(given)
    assert (settled.compute, settled.accumulate, settled.store) == expected


def test_accumulation_follows_the_compute_dtype() -> None:
    settled = Precision(compute="float64").resolve("float16")
    assert (settled.compute, settled.accumulate, settled.store) == ("float64", "float64", "float16")
    assert DOUBLE.resolve(np.float32).store == "float32"


def test_dtypes_of_any_library_name_themselves() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (np.float32, np.dtype("float32"), torch.float32):
        precision = Precision(compute=dtype, store=dtype)
        assert precision == Precision(compute="float32", store="float32") and type(precision.store) is str
    with pytest.raises(OptionError, match=r"compute must be None or one of .* got <class 'numpy.float16'>"):
        Precision(compute=np.float16)  # type: ignore[arg-type]


def test_unit_roundoff_is_half_the_gap_above_one() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (np.float16, np.float32, np.float64, np.dtype("float32")):
        assert unit_roundoff(dtype) == np.finfo(dtype).eps / 2
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert unit_roundoff(dtype) == torch.finfo(dtype).eps / 2
