"""What was seen of the device stands in metrics.jsonl and in the report, and changes nothing that was learned."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.fakes import FakeBackend
from tests.tiny import chats, losses, quiet, tiny_recipe, written

from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import Telemetry
from pantheraml.hardware.monitor import Monitor, Sampled
from pantheraml.trainer.report import monitored, plot_loss
from pantheraml.trainer.run import train
from pantheraml.trainer.watch import StepRecord, Watch, read_metrics


class Seen(Monitor):
    """Hands out what the test puts in; asks no device."""

    def __init__(self, *taken: Sampled | None) -> None:
        super().__init__(FakeBackend(), 0, 0.0)
        self.left = list(taken)

    def take(self) -> Sampled | None:
        return self.left.pop(0) if self.left else None


class Curves:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))

    def close(self) -> None:
        return


def record(step: int) -> StepRecord:
    return StepRecord(step=step, lr=0.1, tokens=10, labels=5, loss=1 / step, grad_norm=0.5)


HOT = Sampled(samples=2, mean={"temperature_c": 70.0, "power_w": 600.0}, peak={"temperature_c": 71.0, "power_w": 640.0})


def watch(folder: Path, monitor: Monitor | None, start: int = 0, **more: Any) -> tuple[Watch, Any]:
    console, printed = quiet()
    return Watch(folder, console, total=9, start=start, memory_bytes=lambda: None, monitor=monitor, **more), printed


def test_a_log_interval_gets_one_line_of_what_was_seen_and_none_if_nothing_was(tmp_path: Path):
    shown, _ = watch(tmp_path, Seen(HOT, None))
    shown.steps([record(1), record(2)], 1.0, 20)
    shown.steps([record(3)], 1.0, 10)
    shown.evaluation(3, 0.5, True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 3]
    assert [line for line in lines if "device" in line] == [
        {
            "step": 2,
            "device": {"temperature_c": 70.0, "power_w": 600.0},
            "device_peak": {"temperature_c": 71.0, "power_w": 640.0},
            "device_samples": 2,
        }
    ]
    plot_loss(lines, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_going_on_cuts_what_was_seen_after_the_checkpoint(tmp_path: Path):
    shown, _ = watch(tmp_path, Seen(HOT, HOT))
    shown.steps([record(1)], 1.0, 10)
    shown.steps([record(2)], 1.0, 10)
    watch(tmp_path, None, start=1)
    assert [(line["step"], "device" in line) for line in read_metrics(tmp_path / "metrics.jsonl")] == [(1, False), (1, True)]


def test_curves_get_the_means(tmp_path: Path):
    curves = Curves()
    shown, _ = watch(tmp_path, Seen(HOT), reporters=[curves])
    shown.steps([record(4)], 2.0, 10)
    ((step, values),) = curves.logged
    assert step == 4
    assert {name: value for name, value in values.items() if name.startswith("device")} == {
        "device/temperature_c": 70.0,
        "device/power_w": 600.0,
    }


def test_a_driver_that_failed_is_announced_once(tmp_path: Path):
    monitor = Seen(HOT)
    shown, printed = watch(tmp_path, monitor)
    shown.steps([record(1)], 1.0, 10)
    monitor.trouble = "the device is no longer watched: its driver failed (GPU is lost)"
    for step in (2, 3):
        shown.steps([record(step)], 1.0, 10)
    assert printed().count("From here on the device is no longer watched: its driver failed (GPU is lost).") == 1


def test_nothing_is_reported_of_a_device_that_was_not_looked_at():
    assert monitored(Seen(), since_step=0) is None


# ---- A run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("data") / "faq.jsonl", chats(24))


def trained(folder: Path, data: str, every_s: float) -> Any:
    recipe = tiny_recipe(
        folder, data, run={"monitor_every_s": every_s, "log_every": 1}, eval={"generate_rows": 0, "every": "end"}, optim={"steps": 4}
    )
    return train(recipe, console=quiet()[0])


def test_a_run_that_is_watched_learns_the_same_and_leaves_what_was_seen(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch):
    def steps(watch: Watch, *args: Any) -> None:
        monitor = watch._monitor
        while monitor and monitor.interval_s and not monitor.whole().samples:
            time.sleep(0.001)  # the run is over in a moment; the first sample may come later on a busy machine
        real(watch, *args)

    real = Watch.steps
    monkeypatch.setattr(Watch, "steps", steps)
    run, plain = trained(tmp_path / "watched", data, 0.005), trained(tmp_path / "plain", data, 0.0)
    lines = [line for line in read_metrics(run.folder / "metrics.jsonl") if "device" in line]
    assert lines and all(line["device"]["memory_used_bytes"] > 50 << 20 for line in lines)  # torch alone is more
    assert None not in [value for line in lines for value in line["device"].values()]
    seen = run.report["monitor"]
    assert (seen["every_s"], seen["since_step"]) == (0.005, 0)
    assert seen["samples"] >= sum(line["device_samples"] for line in lines)
    for name in lines[0]["device"]:
        assert seen["peak"][name] >= max(line["device_peak"][name] for line in lines if name in line["device_peak"])
    page = (run.folder / "report.md").read_text()
    assert f"| device, looked at {seen['samples']} times after step 0 | mean | peak |" in page and "| memory used |" in page
    assert "| power |" not in page or "power_w" in seen["peak"]

    assert plain.report["monitor"] is None and "| device, looked" not in (plain.folder / "report.md").read_text()
    assert not [line for line in read_metrics(plain.folder / "metrics.jsonl") if "device" in line]
    for key in ("loss", "grad_norm", "eval_loss"):
        assert losses(run.folder, key) == losses(plain.folder, key)


def test_a_driver_that_fails_in_the_middle_ends_no_run_and_stands_in_the_report(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch):
    from pantheraml.hardware.cpu import CpuBackend

    def telemetry(self: CpuBackend, index: int) -> Telemetry:
        raise DeviceError("no answer", why="it is a test", fix="none")

    monkeypatch.setattr(CpuBackend, "telemetry", telemetry)
    run = trained(tmp_path, data, 0.005)
    assert run.report["train"]["steps"] == 4 and run.report["monitor"] is None
    (note,) = [note for note in run.report["notes"] if "watched" in note]
    assert note == "the device is no longer watched: its driver failed (no answer)"
    assert note in (run.folder / "report.md").read_text()
    assert json.loads((run.folder / "report.json").read_text())["notes"].count(note) == 1
