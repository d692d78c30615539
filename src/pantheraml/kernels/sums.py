"""Sums and exchanges over processes, and how long this one waited for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from pantheraml.recipe.kinds import in_host_memory


class Sums:
    """All-reduces and all-to-alls of this process, timed by the clock of its device.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._host_s = device, 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def over(self, tensor: Tensor, group: Any = None) -> Tensor:
        """The same tensor, with the sum of what the processes of a group have in it; None: of all."""
        with self._timed():
            dist.all_reduce(tensor, group=group)
        return tensor

    def exchanged(self, tensor: Tensor, group: Any = None) -> Tensor:
        """What the processes of a group have for this one, in their order: each cuts its contiguous tensor into equal parts, one for each."""
        came = torch.empty_like(tensor)
        with self._timed():
            dist.all_to_all_single(came, tensor, group=group)
        return came

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if in_host_memory(self._device.type):
            began = time.perf_counter()
            yield
            self._host_s += time.perf_counter() - began
            return
        begin, end = torch.Event(self._device, enable_timing=True), torch.Event(self._device, enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def take_s(self) -> float:
        """Seconds since the last call that went by from the beginning of sums and exchanges to their end: sending, and waiting for slower processes.

        To be asked when the device has done what it was given.
        """
        device_s = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        host_s, self._host_s = self._host_s, 0.0
        self._events.clear()
        return host_s + device_s
