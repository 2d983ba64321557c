"""Which NVIDIA GPUs there are, asked of the driver itself.

An engine's list of providers says what it was compiled with, not what this machine has; so does a CUDA runtime that is
installed without a driver. ``libcuda`` comes with the driver, and needs no package.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from mteo_deploy.errors import EngineError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
COMPUTE_CAPABILITY = (75, 76)
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR`` of the CUDA driver API."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


def gpus() -> list[Gpu]:
    """The GPUs that programs may use here, in CUDA's order; at least one.

    Raises:
        EngineError: why there is none.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        raise EngineError(f"found no NVIDIA driver ({LIBRARY} cannot be loaded)") from None
    count = ctypes.c_int()
    for function, *args in (("cuInit", 0), ("cuDeviceGetCount", ctypes.byref(count))):
        if code := getattr(driver, function)(*args):
            raise EngineError(f"found no NVIDIA GPU ({function} of the driver failed with error {code})")
    if not count.value:
        raise EngineError("found no NVIDIA GPU (the driver sees none; see CUDA_VISIBLE_DEVICES)")
    return [_gpu(driver, index) for index in range(count.value)]


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, name, values = ctypes.c_int(), ctypes.create_string_buffer(256), (ctypes.c_int * 2)()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    for place, attribute in enumerate(COMPUTE_CAPABILITY):
        driver.cuDeviceGetAttribute(ctypes.byref(values, place * ctypes.sizeof(ctypes.c_int)), attribute, device)
    return Gpu(name.value.decode(), (values[0], values[1]))
