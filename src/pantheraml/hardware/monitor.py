"""A device watched in the background while it works: what its driver tells every few seconds, as means and peaks."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import TracebackType

from pantheraml.errors import PantheraError
from pantheraml.hardware.backend import Backend

LAST_WAIT_S = 15.0
"""The run's end waits so long for a sample that is being taken; a driver that hangs is left behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What was seen in a while. A value that nobody tells is no key here: never zero, never None.

    Attributes:
        samples: how often the device was asked. mean, peak: by name with its unit: utilization (0 to 1), temperature_c,
            power_w, memory_used_bytes, memory_reserved_bytes; each over the samples in which it was known.
    """

    samples: int
    mean: dict[str, float]
    peak: dict[str, float]


@dataclass(slots=True)
class _Tally:
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        self.samples += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
            self.peak[name] = max(value, self.peak.get(name, value))

    def sampled(self) -> Sampled:
        mean = {name: total / self.counts[name] for name, total in self.sums.items()}
        return Sampled(samples=self.samples, mean=mean, peak=dict(self.peak))


class Monitor:
    """Asks a device in a thread of its own, from entering the block to leaving it.

    Args:
        interval_s: seconds between samples; the first is taken at once, the last at the end. 0: never asks.
    A driver that fails ends the sampling, never the run: `trouble` says so from then on.
    """

    def __init__(self, backend: Backend, index: int, interval_s: float) -> None:
        self.interval_s = interval_s
        self.trouble: str | None = None
        self._backend, self._index = backend, index
        self._lock, self._end = threading.Lock(), threading.Event()
        self._recent, self._whole = _Tally(), _Tally()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Monitor:
        if self.interval_s > 0:
            self._thread = threading.Thread(target=self._watch, name="device monitor", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(LAST_WAIT_S)

    def take(self) -> Sampled | None:
        """Since the last call; None if the device was not asked since."""
        with self._lock:
            taken, self._recent = self._recent, _Tally()
        return taken.sampled() if taken.samples else None

    def whole(self) -> Sampled:
        """Since the block was entered."""
        with self._lock:
            return self._whole.sampled()

    def peaks(self) -> dict[str, float]:
        """The highest values since the block was entered, of what is known."""
        return self.whole().peak

    def _watch(self) -> None:
        last = False
        while True:
            try:
                values = self._sample()
            except (RuntimeError, OSError, PantheraError) as error:  # what drivers raise; a mistake of ours is to be seen
                words = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.trouble = f"the device is no longer watched: its driver failed ({words})"
                return
            with self._lock:
                self._recent.add(values)
                self._whole.add(values)
            if last:
                return
            last = self._end.wait(self.interval_s)

    def _sample(self) -> dict[str, float]:
        told, memory = self._backend.telemetry(self._index), self._backend.memory(self._index)
        values = {
            "utilization": told.utilization,
            "temperature_c": told.temperature_c,
            "power_w": told.power_w,
            "memory_used_bytes": memory.used_bytes,
            "memory_reserved_bytes": memory.reserved_bytes,
        }
        return {name: value for name, value in values.items() if value is not None}
