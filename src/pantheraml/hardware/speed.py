"""How fast a device really is: a short look when it is probed, and a longer measurement on request, which is kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from pantheraml.errors import StorageError
from pantheraml.hardware.backend import Backend
from pantheraml.hardware.device import Device
from pantheraml.recipe.kinds import in_host_memory

LONG_ENOUGH_S = 0.05
"""A product or copy that takes so long is timed well by the clock, and by then the processor has left its caches."""
LARGEST_MATRIX = 16384
LARGEST_COPY_BYTES = 4 << 30
LAUNCHES = 200
CACHE = "speed.json"


Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a device did, and how it was measured.

    Attributes:
        flops_per_s: of one product of two random [matrix_size, matrix_size] matrices in `dtype`.
        copy_bytes_per_s: bytes read plus bytes written by a copy of `copy_bytes` on the device.
        host_bytes_per_s: to the device from ordinary memory; None where the device works in it.
        launch_s: of the smallest operation, one of LAUNCHES after each other.
        threads: of torch on the CPU. torch: its version. date: of the measurement, ISO 8601.
    """

    device: str
    name: str
    dtype: str
    flops_per_s: Amount
    matrix_size: int
    copy_bytes_per_s: Amount
    copy_bytes: int
    host_bytes_per_s: Amount | None
    launch_s: Amount
    threads: int
    torch: str
    date: str


def median_seconds(function: Callable[[], object], synchronize: Callable[[], None], *, repeats: int = 5, warmups: int = 2) -> float:
    """Median time of a call in seconds, the device idle before and after each."""
    seconds: list[float] = []
    for _ in range(warmups + repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[warmups:])[repeats // 2]


def matmul_seconds(device: torch.device, dtype: torch.dtype, size: int, synchronize: Callable[[], None], *, repeats: int = 5) -> float:
    """Median time of a [size, size] product in seconds. Also proves that the device answers.

    Raises: RuntimeError if the device computes something else than it should.
    """
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    right = torch.full((size, size), 0.5, device=device, dtype=dtype)
    with torch.inference_mode():
        seconds = median_seconds(lambda: torch.nn.functional.linear(left, right), synchronize, repeats=repeats)
        # Exact in every dtype: a quarter, `size` times.
        if torch.nn.functional.linear(left, right)[0, 0].item() != size / 4:
            raise RuntimeError(f"{device} multiplied {dtype} matrices wrongly")
    return seconds


def matmul_flops(seconds: float, size: int) -> float:
    """FLOP/s of a [size, size] product that took `seconds`."""
    return 2 * size**3 / seconds


def measure(backend: Backend, device: Device) -> Measured:
    """A matrix product, copies and a launch, each grown until it takes LONG_ENOUGH_S. Takes a few seconds.

    Raises: DeviceError if torch does not reach the device.
    """
    where = backend.torch_device(device.index)
    dtype = getattr(torch, device.dtypes[0])
    free = backend.memory(device.index).free_bytes
    room = (free if free is not None else device.free_bytes or 0) // 4  # nobody tells: the smallest sizes only
    with torch.inference_mode():
        size, seconds = 1024, 0.0
        while True:
            left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
            seconds = median_seconds(lambda a=left, b=right: a @ b, backend.synchronize)
            # A matrix is made in float32 first; three of the next size must find room.
            if seconds >= LONG_ENOUGH_S or size >= LARGEST_MATRIX or 3 * (2 * size) ** 2 * 4 > room:
                break
            size *= 2
        del left, right
        copy_bytes, copy_s, host_s = 64 << 20, 0.0, None
        while True:
            source = torch.ones(copy_bytes, dtype=torch.uint8, device=where)
            target = torch.empty_like(source)
            copy_s = median_seconds(lambda a=target, b=source: a.copy_(b), backend.synchronize)
            if copy_s >= LONG_ENOUGH_S or copy_bytes >= LARGEST_COPY_BYTES or 4 * copy_bytes > room:
                break
            copy_bytes *= 2
        if where.type != "cpu":
            host = torch.ones(64 << 20, dtype=torch.uint8)
            host_s = median_seconds(lambda a=target[: 64 << 20]: a.copy_(host), backend.synchronize)
        del source, target
        one = torch.ones((), device=where)

        def launches() -> None:
            for _ in range(LAUNCHES):
                one.add_(1)

        launch_s = median_seconds(launches, backend.synchronize) / LAUNCHES
    backend.empty_cache()
    return Measured(
        device=str(device),
        name=device.name,
        dtype=device.dtypes[0],
        flops_per_s=matmul_flops(seconds, size),
        matrix_size=size,
        copy_bytes_per_s=2 * copy_bytes / copy_s,
        copy_bytes=copy_bytes,
        host_bytes_per_s=None if host_s is None else (64 << 20) / host_s,
        launch_s=launch_s,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


_CACHED = TypeAdapter(Measured)


def remember(measured: Measured, folder: Path) -> Path:
    """Keep a measurement in a folder, in place of an older one of the same device. Raises: StorageError if it cannot be written."""
    file = _file(folder)
    kept = [each for each in _read(file) if not _same(each, measured)]
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps([asdict(each) for each in (*kept, measured)], indent=1) + "\n", "utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise StorageError(
            f"the measured speed cannot be kept in {file}: {error.strerror or error}",
            why="choosing a device by time reads it from there",
            fix="set PANTHERAML_CACHE to a folder that you may write to",
        ) from error
    return file


def remembered(device: Device, folder: Path) -> Measured | None:
    """What was measured of this device before, with this torch, in its first dtype and, on a CPU, with as many threads; None: nothing."""
    found = [
        each
        for each in _read(_file(folder))
        if (each.device, each.name, each.torch) == (str(device), device.name, torch.__version__)
        and each.dtype in device.dtypes[:1]
        and (each.threads == torch.get_num_threads() or not in_host_memory(device.kind))
    ]
    return found[-1] if found else None


def _same(one: Measured, other: Measured) -> bool:
    return (one.device, one.name, one.dtype, one.torch, one.threads) == (other.device, other.name, other.dtype, other.torch, other.threads)


def _file(folder: Path) -> Path:
    try:
        return folder.expanduser() / CACHE
    except RuntimeError:  # a user without a home, as containers have
        return folder / CACHE


def _read(file: Path) -> list[Measured]:
    """What is kept; a file that is not there, or is no list, holds nothing, and a row that is no measurement is left out."""
    try:
        rows = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    kept: list[Measured] = []
    for row in rows if isinstance(rows, list) else ():
        with suppress(ValidationError):
            kept.append(_CACHED.validate_python(row))
    return kept
