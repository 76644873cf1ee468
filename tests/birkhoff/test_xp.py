"""What the library asks of an array: names of libraries, devices and dtypes, and memory order."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import pytest

from birkhoff import _xp


def views(values: Any) -> list[Any]:
    """Layouts that a kernel must not take for dense: strided batches (of single numbers too), transposed, offset."""
    return [values[::2], values[:, :1, :1], values[1::3, 1:, 1:], values[:, ::2, ::2], values[3:4]]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_contiguous_copies_exactly_what_has_gaps(library: str) -> None:
    values: Any = np.arange(10 * 4 * 4, dtype=np.float64).reshape(10, 4, 4)
    if library == "torch":
        values = pytest.importorskip("torch").tensor(values)
    for view in views(values):
        dense = _xp.contiguous(view)
        assert (dense == view).all()
        flat = _xp.to_numpy(dense)
        assert flat.flags.c_contiguous and flat.strides == np.empty(flat.shape).strides
    assert _xp.contiguous(values) is values or _xp.contiguous(values).data_ptr() == values.data_ptr()


def test_names() -> None:
    assert _xp.library_name(_xp.array_namespace(np.zeros(1))) == "numpy"
    assert _xp.library_name(_xp.array_namespace(array_api_strict.zeros(1))) == "array_api_strict"
    for dtype in (np.float32, np.dtype("float32"), array_api_strict.float32, "float32"):
        assert _xp.dtype_name(dtype) == "float32"
    assert _xp.device_kind(np.zeros(1)) == _xp.device_kind(array_api_strict.zeros(1)) == "cpu"


def test_to_numpy_leaves_every_device() -> None:
    for device in ("CPU_DEVICE", "device1", "no_float64"):
        array = array_api_strict.ones((2, 2), dtype=array_api_strict.float32, device=array_api_strict.Device(device))
        assert (_xp.to_numpy(array) == 1).all()
    torch = pytest.importorskip("torch")
    assert _xp.to_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).dtype == np.float32
