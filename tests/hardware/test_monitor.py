from __future__ import annotations

import threading
from collections.abc import Sequence

import psutil
import pytest
from tests.fakes import FakeBackend

from pantheraml.hardware.backend import MemoryUse, Telemetry
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.hardware.monitor import Monitor

NEVER_AGAIN_S = 3600.0  # the sample at the start and the one at the end


class Driver(FakeBackend):
    """Tells one value after another, each when the test lets it; an error is raised."""

    def __init__(self, answers: Sequence[Telemetry | Exception], used: Sequence[int | None] = ()) -> None:
        super().__init__()
        self.asked = 0
        self._answers, self._used = list(answers), list(used)
        self._allowed, self._asking = threading.Semaphore(0), threading.Semaphore(0)
        self._free = threading.Event()

    def let(self, count: int) -> None:
        """Allow so many samples, and come back when the last of them is kept (the next is being asked for) or the thread ended."""
        for _ in range(count):
            self._allowed.release()
            assert self._asking.acquire(timeout=60)

    def let_all(self) -> None:
        """From here on nothing waits, so that the block can be left."""
        self._free.set()
        self._allowed.release()

    def began(self) -> None:
        assert self._asking.acquire(timeout=60)

    def telemetry(self, index: int) -> Telemetry:
        self._asking.release()
        assert self._free.is_set() or self._allowed.acquire(timeout=60)
        answer = self._answers[self.asked % len(self._answers)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    def memory(self, index: int) -> MemoryUse:
        used = self._used[(self.asked - 1) % len(self._used)] if self._used else None
        return MemoryUse(total_bytes=100, free_bytes=50, used_bytes=used, reserved_bytes=None, peak_bytes=None)


def test_means_and_peaks_since_the_last_take_and_over_the_whole_block():
    driver = Driver(
        [
            Telemetry(utilization=0.5, temperature_c=40.0),
            Telemetry(utilization=1.0, temperature_c=60.0),
            Telemetry(utilization=0.0, temperature_c=50.0),
            Telemetry(utilization=0.25, temperature_c=50.0),
        ],
        used=[10, 30, 20, 20],
    )
    with Monitor(driver, 0, 1e-6) as monitor:
        driver.began()
        driver.let(2)
        first = monitor.take()
        assert first and first.samples == 2
        assert first.mean == {"utilization": 0.75, "temperature_c": 50.0, "memory_used_bytes": 20.0}
        assert first.peak == {"utilization": 1.0, "temperature_c": 60.0, "memory_used_bytes": 30}
        assert monitor.take() is None
        driver.let(1)
        second = monitor.take()
        assert second and second.samples == 1 and second.mean == {"utilization": 0.0, "temperature_c": 50.0, "memory_used_bytes": 20.0}
        assert monitor.peaks() == {"utilization": 1.0, "temperature_c": 60.0, "memory_used_bytes": 30}
        driver.let_all()


def test_what_nobody_tells_is_absent_and_what_is_known_now_and_then_is_averaged_over_those_times():
    driver = Driver([Telemetry(), Telemetry(power_w=100.0), Telemetry(power_w=300.0)])
    with Monitor(driver, 0, 1e-6) as monitor:
        driver.began()
        driver.let(1)
        nothing = monitor.take()
        assert nothing and (nothing.samples, nothing.mean, nothing.peak) == (1, {}, {})
        driver.let(2)
        some = monitor.take()
        assert some and some.mean == {"power_w": 200.0} and some.peak == {"power_w": 300.0}
        assert monitor.whole().mean == {"power_w": 200.0} and monitor.whole().samples == 3
        driver.let_all()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure\nmore"), OSError(5, "Input/output error")])
def test_a_driver_that_begins_to_fail_ends_the_sampling_and_nothing_else(error: Exception):
    driver = Driver([Telemetry(power_w=7.0), error])
    driver._allowed.release(2)
    with Monitor(driver, 0, 1e-6) as monitor:
        thread = monitor._thread
        assert thread is not None
        thread.join(60)
        assert monitor.trouble == f"the device is no longer watched: its driver failed ({str(error).splitlines()[0]})"
        assert not thread.is_alive() and driver.asked == 2
        assert monitor.peaks() == {"power_w": 7.0}


def test_a_mistake_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch):
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    driver = Driver([TypeError("wrong argument")])
    driver._allowed.release()
    with Monitor(driver, 0, 1.0) as monitor:
        pass
    assert seen == [TypeError] and monitor.trouble is None


def test_zero_seconds_asks_nobody():
    driver = Driver([RuntimeError("asked")])
    with Monitor(driver, 0, 0.0) as monitor:
        assert monitor.take() is None
    assert driver.asked == 0 and monitor.peaks() == {} and monitor.whole().samples == 0 and monitor.trouble is None


def test_this_processor_is_watched_from_the_first_moment_to_the_last():
    before = psutil.cpu_times()
    with Monitor(CpuBackend(), 0, NEVER_AGAIN_S) as monitor:
        while sum(psutil.cpu_times()) - sum(before) < 0.5:  # the kernel counts in ticks of 0.01 s
            sum(range(10_000))
    seen = monitor.whole()
    assert seen.samples == 2
    assert 0 < seen.peak["utilization"] <= 1
    assert seen.peak["memory_used_bytes"] > 50 << 20  # torch alone is more
    assert "memory_reserved_bytes" not in seen.peak  # no such thing on a CPU
