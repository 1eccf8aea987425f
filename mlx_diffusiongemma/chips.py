"""What a chip can do at most: bytes and arithmetic per second, from a table or measured here.

The table holds nominal numbers unless its basis says otherwise; of Apple's chips it has the largest GPU of each name.
Nothing here knows the model.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

SECONDS_PER_MEASUREMENT = 0.3
MATMUL_SIZE_CPU, MATMUL_SIZE_GPU = 1024, 4096
COPY_BYTES_CPU, COPY_BYTES_GPU = 1 << 27, 1 << 30  # beyond every cache


@dataclass(frozen=True)
class Chip:
    """A device's ceilings."""

    name: str
    gigabytes_per_second: float  # of memory
    teraflops: float  # of matrix multiplication in 16 bits
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)


# Shares that real matrix multiplications reach of these: 57 to 64 % on an M3 Pro, 72 % on an M3 Ultra, 80 to 87 % on an
# M5 Max, by other people's measurements.
CHIPS = tuple(
    Chip(*row)
    for row in (
        ("M1", 68, 2.6, "nominal, 8-core GPU"),
        ("M1 Pro", 200, 5.2, "nominal, 16-core GPU"),
        ("M1 Max", 400, 10.4, "nominal, 32-core GPU"),
        ("M1 Ultra", 800, 20.8, "twice M1 Max"),
        ("M2", 100, 3.6, "nominal, 10-core GPU"),
        ("M2 Pro", 200, 6.8, "nominal, 19-core GPU"),
        ("M2 Max", 400, 13.6, "nominal, 38-core GPU"),
        ("M2 Ultra", 800, 27.2, "nominal, 76-core GPU"),
        ("M3", 100, 3.6, "a quarter of M3 Max, 10-core GPU"),
        ("M3 Pro", 150, 6.4, "nominal, 18-core GPU"),
        ("M3 Max", 400, 14.3, "nominal, 40-core GPU"),
        ("M3 Ultra", 819, 28.6, "twice M3 Max, 80-core GPU"),
        ("M4", 120, 4.3, "a quarter of M4 Max, 10-core GPU"),
        ("M4 Pro", 273, 8.6, "half of M4 Max, 20-core GPU"),
        ("M4 Max", 546, 17.2, "13.74 of 32 cores x 40/32, 40-core GPU"),
        ("M5", 153, 15.4, "matrix units as measured by others (mlx issue 3925), 10-core GPU"),
        ("M5 Pro", 307, 30.8, "twice M5, 20-core GPU"),
        ("M5 Max", 614, 61.6, "four times M5, 40-core GPU; others measured 49 to 53"),
        ("H100 PCIe", 2000, 756, "nominal, dense bfloat16"),
        ("H100 NVL", 3900, 835, "nominal, dense bfloat16"),
        ("H100", 3350, 989, "nominal, SXM5, dense bfloat16"),
        ("H200", 4800, 989, "nominal, SXM5, dense bfloat16"),
    )
)
CHIP_NAMES = tuple(chip.name for chip in CHIPS)


def chip_in(text: str) -> Chip | None:
    """Return the chip that a device's name speaks of ("Apple M3 Max", "NVIDIA H100 80GB HBM3"); None for no one known.

    The longest name counts: "M3 Max" has "M3" in it.
    """
    found = [chip for chip in CHIPS if re.search(rf"\b{re.escape(chip.name)}\b", text, re.IGNORECASE)]
    return max(found, key=lambda chip: len(chip.name), default=None)


def find_chip(name: str) -> Chip:
    """Return a chip of the table by its name. Raise `ValueError` for an unknown name."""
    for chip in CHIPS:
        if chip.name.lower() == " ".join(name.split()).lower():
            return chip
    raise ValueError(f"chip: got {name!r}, expected one of {', '.join(CHIP_NAMES)}")


def device_name() -> str:
    """Return the name of the device that MLX computes on."""
    if mx.default_device() == mx.Device(mx.cpu):
        return f"{mx.device_info(mx.Device(mx.cpu)).get('device_name', platform.machine())} (CPU)"
    name = str(mx.device_info().get("device_name", ""))
    if not name and platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return name or str(mx.default_device())


def this_chip(dtype: mx.Dtype) -> Chip:
    """Return the ceilings of the default device: the table's, or measured ones where it does not have the device.

    Args:
        dtype: to measure the matrix multiplication in.
    """
    name = device_name()
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    known = None if on_cpu else chip_in(name)
    return known or measure_chip(name, dtype)


def measure_chip(name: str, dtype: mx.Dtype) -> Chip:
    """Measure matrix multiplication and copying here; both are what MLX reaches, not what the device could do."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    size = MATMUL_SIZE_CPU if on_cpu else MATMUL_SIZE_GPU
    flops = matmul_flops(size, dtype)
    basis = f"measured here: a {size} x {size} matrix multiplication in {str(dtype).removeprefix('mlx.core.')}, a copy"
    return Chip(name, copy_speed(COPY_BYTES_CPU if on_cpu else COPY_BYTES_GPU) / 1e9, flops / 1e12, basis)


def matmul_flops(size: int = MATMUL_SIZE_CPU, dtype: mx.Dtype = mx.float32) -> float:
    """Return the best FLOP/s of square matrix multiplications on the default device."""
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    mx.eval(a, b)
    return 2 * size**3 / _best_seconds(lambda: a @ b)


def copy_speed(nbytes: int) -> float:
    """Return the best bytes/s, read and written, of adding 1 to an array of so many bytes."""
    array = mx.zeros((nbytes // 4,), mx.float32)
    mx.eval(array)
    return 2 * array.nbytes / _best_seconds(lambda: array + 1)


def _best_seconds(compute: Any) -> float:
    best, end = float("inf"), time.perf_counter() + SECONDS_PER_MEASUREMENT
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        mx.eval(compute())
        best = min(best, time.perf_counter() - started)
    return best


def describe_machine() -> dict[str, Any]:
    """Return what measurements here depend on."""
    return {
        "device": device_name(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "ld_preload": os.environ.get("LD_PRELOAD"),
    }
