"""Packing of kernel arguments, without a GPU."""

import ctypes
import threading
import types

import numpy as np
import pytest
import torch

from birkhoff.kernels.cuda import launcher
from birkhoff.kernels.cuda.launcher import DriverKernel, PreparedLaunch, pack


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


class RecordingDriver:
    """``cuLaunchKernel`` and ``cuFuncSetAttribute`` that note what they were given; a context for each thread."""

    def __init__(self, words: int, code: int = 0) -> None:
        self.words, self.code = words, code
        self.launches: list[tuple[list[int], list[int], int]] = []
        self.attributes: list[int] = []
        self.current = threading.local()

    def cuCtxGetCurrent(self, place):
        place._obj.value = getattr(self.current, "context", None)
        return 0

    def cuCtxSetCurrent(self, context):
        self.current.context = context.value
        return 0

    def cuLaunchKernel(self, handle, *rest):
        *shape, stream, places, extra = rest
        assert extra is None
        words = [ctypes.cast(places[i], ctypes.POINTER(ctypes.c_uint64)).contents.value for i in range(self.words)]
        self.launches.append(([size.value for size in shape], words, stream.value))
        return self.code

    def in_context(self, handle, *rest):
        """``cuLaunchKernel`` of a driver that knows the contexts of threads."""
        if getattr(self.current, "context", None) != 0xC0:
            return 201
        return type(self).cuLaunchKernel(self, handle, *rest)

    def cuFuncSetAttribute(self, handle, attribute, value):
        self.attributes.append(value)
        return 0

    def cuGetErrorString(self, code, text):
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> RecordingDriver:
    recording = RecordingDriver(3)
    monkeypatch.setattr(launcher, "_driver", lambda: recording)
    return recording


def test_a_prepared_launch_fills_in_the_addresses(driver: RecordingDriver) -> None:
    start = PreparedLaunch(7, (5, 2), (128,), (None, np.int32(-1), None), 64)
    start((0x1000, 2**63), 9)
    start((0x2000, 0x3000), 10)
    assert driver.launches == [
        ([5, 2, 1, 128, 1, 1, 64], [0x1000, 2**32 - 1, 2**63], 9),
        ([5, 2, 1, 128, 1, 1, 64], [0x2000, 2**32 - 1, 0x3000], 10),
    ]
    with pytest.raises(ValueError, match="shorter"):
        start((0x1000,), 9)


def test_a_failed_launch_raises(driver: RecordingDriver) -> None:
    driver.code = 201
    with pytest.raises(RuntimeError, match="no CUDA context"):
        PreparedLaunch(7, (1,), (32,), (None, None, None))((1, 2, 3), 0)


def test_more_shared_memory_is_allowed_once(driver: RecordingDriver) -> None:
    kernel = DriverKernel(7)
    for size in (1024, 60000, 60000, 50000):
        kernel.prepare((1,), (32,), (None,), shared_bytes=size)
    assert driver.attributes == [60000]
    with pytest.raises(ValueError, match="cooperative"):
        DriverKernel(7, cooperative=True).prepare((1,), (32,), (None,))


def test_a_thread_without_a_context_launches_in_the_kernel_s(
    driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reuses cached memory makes no call of the runtime before the launch, so none is current in it."""
    driver.words = 1
    monkeypatch.setattr(driver, "cuLaunchKernel", driver.in_context, raising=False)
    driver.current.context = 0xC0
    kernel = DriverKernel(7)
    prepared = kernel.prepare((1,), (32,), (None,))

    def launches() -> None:
        prepared((0x1000,), 3)
        driver.current.context = None
        kernel._launch((1,), (32,), (np.int64(0x2000),), 0, 4)

    thread = threading.Thread(target=launches)
    thread.start()
    thread.join()
    assert [(words, stream) for _, words, stream in driver.launches] == [([0x1000], 3), ([0x2000], 4)]
    driver.current.context = 0xDD  # another device's: that is an error of the caller, not a missing context
    with pytest.raises(RuntimeError, match="201"):
        prepared((0x1000,), 3)


def test_threads_that_allow_shared_memory_end_with_the_larger_amount(driver: RecordingDriver) -> None:
    kernel = DriverKernel(7)
    arrived = threading.Event()

    def allow(handle, attribute, value):
        arrived.set()
        driver.attributes.append(value)
        return 0

    driver.cuFuncSetAttribute = allow
    with kernel._allowing:
        smaller = threading.Thread(target=kernel._allow, args=(60000,))
        smaller.start()
        assert not arrived.wait(0.05)
        kernel._shared_bytes = 100000  # what another thread has allowed meanwhile
    smaller.join()
    assert driver.attributes == []


def test_threads_have_words_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second launch during the first one must not change the first one's arguments."""
    seen = []
    inside, go_on = threading.Event(), threading.Event()

    def launch(handle, *rest):
        places = rest[-2]
        if not inside.is_set():
            inside.set()
            go_on.wait(10)
        seen.append(ctypes.cast(places[0], ctypes.POINTER(ctypes.c_uint64)).contents.value)
        return 0

    monkeypatch.setattr(launcher, "_driver", lambda: types.SimpleNamespace(cuLaunchKernel=launch))
    start = PreparedLaunch(7, (1,), (32,), (None,))
    thread = threading.Thread(target=start, args=((111,), 0))
    thread.start()
    inside.wait(10)
    start((222,), 0)
    go_on.set()
    thread.join()
    assert seen == [222, 111]
