"""How fast a device multiplies matrices, measured: decides between dtypes and gives the plan its first guess of time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def matmul_seconds(device: torch.device, dtype: torch.dtype, size: int, synchronize: Callable[[], None], *, repeats: int = 5) -> float:
    """Median time of a [size, size] product in seconds, after three that warm up. Also proves that the device answers.

    Raises: RuntimeError if the device computes something that is not finite.
    """
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    right = torch.full((size, size), 0.5, device=device, dtype=dtype)
    product = torch.nn.functional.linear(left, right)
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(2 + repeats):
            synchronize()
            start = time.perf_counter()
            product = torch.nn.functional.linear(left, right)
            synchronize()
            seconds.append(time.perf_counter() - start)
        # Exact in every dtype: a quarter, `size` times.
        if product[0, 0].item() != size / 4:
            raise RuntimeError(f"{device} multiplied {dtype} matrices wrongly")
    return sorted(seconds[2:])[repeats // 2]


def matmul_flops(seconds: float, size: int) -> float:
    """FLOP/s of a [size, size] product that took `seconds`."""
    return 2 * size**3 / seconds
