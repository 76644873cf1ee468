"""Packing of kernel arguments, without a GPU."""

import ctypes

import numpy as np
import pytest
import torch

from birkhoff.kernels.cuda.launcher import pack


def test_words_hold_addresses_and_scalars() -> None:
    tensor = torch.zeros(3)
    words, addresses = pack((tensor, np.int32(-7), np.float32(1.5), np.int64(-(2**40)), np.float64(0.1)))
    assert words[0] == tensor.data_ptr()
    values = [
        ctypes.cast(address, ctypes.POINTER(kind)).contents.value
        for address, kind in zip(
            addresses[1:], (ctypes.c_int32, ctypes.c_float, ctypes.c_int64, ctypes.c_double), strict=True
        )
    ]
    assert values == [-7, 1.5, -(2**40), 0.1]


def test_a_python_number_is_refused_with_the_fix() -> None:
    with pytest.raises(TypeError, match=r"numpy\.int32\(3\)"):
        pack((3,))
