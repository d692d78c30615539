"""What people see while a run goes on: one line that moves on a terminal, plain lines in a file, and metrics.jsonl.

A line of metrics.jsonl belongs to a "step" and has "loss" (a step, see StepRecord), "eval_loss" (an evaluation), or "device":
means since the last log line, "device_peak" the highest values, and "device_samples" how often it was asked (see Sampled);
with several processes also "team", see Team.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from pantheraml.errors import MissingExtra
from pantheraml.export.safetensors import atomic_file
from pantheraml.hardware.monitor import Monitor
from pantheraml.planning.memory import format_bytes

METRICS = "metrics.jsonl"
BEHIND = 0.1
"""Share by which a process must be slower than the others to be named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl. `loss` is the mean over `labels`; `tokens` are those read, without padding."""

    step: int
    lr: float
    tokens: int
    labels: int
    loss: float = math.nan
    grad_norm: float = math.nan

    def measured(self, loss: float, grad_norm: float) -> StepRecord:
        """The record with what was measured."""
        return replace(self, loss=loss, grad_norm=grad_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """How the processes of a run kept up with each other since the last log line.

    Attributes:
        processes: how many there are.
        waiting: share of the time from the beginning of their sums to the end, a mean over all; weights that FSDP brings are not in it.
        slowest: rank of the one that was at its own work longest. behind: by how much longer than the mean, as a share.
    """

    processes: int
    waiting: float
    slowest: int
    behind: float


class Reporter(Protocol):
    """A library that draws curves."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the values of a step."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class Watch:
    """Shows and keeps what the loop measured.

    Args:
        folder: of the run; metrics.jsonl is cut back to `start` steps, so that a resumed run has each step once.
        memory_bytes: what the process uses now.
        monitor: looks at the device; what it saw since the last line is written beside the steps.
        team: for the seconds of the last steps, how all processes kept up; asked by each of them. None: there is one.
        console: where people read; a terminal gets one line that moves.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        total: int,
        start: int,
        memory_bytes: Callable[[], int | None],
        reporters: Sequence[Reporter] = (),
        monitor: Monitor | None = None,
        team: Callable[[float], Team] | None = None,
    ) -> None:
        self._team = team
        self._console, self._total, self._memory_bytes, self._reporters = console, total, memory_bytes, reporters
        self._monitor, self._said_trouble = monitor, False
        self._path = folder / METRICS
        self._moving = False
        self._began = time.perf_counter()
        self._per_step: float | None = None
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        if start or self._path.exists():
            # A kill in between must not take the curve of the steps before with it.
            with atomic_file(self._path) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

    def say(self, text: str, style: str | None = None) -> None:
        """A line that stays."""
        self._settle()
        self._console.print(text, style=style, markup=False, highlight=False)

    def steps(self, records: Sequence[StepRecord], seconds: float, tokens: int) -> None:
        """Steps since the last call, which took so long and read so many tokens."""
        if not records:
            return
        speed = tokens / seconds if seconds else None
        self._write([{**asdict(record), "tokens_per_s": None if speed is None else round(speed, 1)} for record in records])
        last = records[-1]
        seen = self._device(last.step)
        team = self._team(seconds) if self._team is not None and seconds else None
        if team is not None:
            self._write([{"step": last.step, "team": {name: round(value, 4) for name, value in asdict(team).items()}}])
        labels = sum(record.labels for record in records)
        loss = sum(record.loss * record.labels for record in records) / labels if labels else math.nan
        each = seconds / len(records)
        self._per_step = each if self._per_step is None else 0.7 * self._per_step + 0.3 * each
        left = clock((self._total - last.step) * self._per_step)
        for reporter in self._reporters:
            reporter.log(last.step, {"train/loss": loss, "train/lr": last.lr, "train/tokens_per_s": speed or math.nan, **seen})
        width = len(str(self._total))
        line = (
            f"step {last.step:>{width}}/{self._total}  loss {loss:.4f}  lr {last.lr:.1e}  "
            f"{'-' if speed is None else f'{speed:,.0f}'} tokens/s  memory {format_bytes(self._memory_bytes())}  left {left}"
        )
        if team is not None and speed is not None:
            line += f"  {team.processes} processes, {speed / team.processes:,.0f} tokens/s each, {team.waiting:.0%} waiting"
            line += f", {team.slowest} is {team.behind:.0%} behind" if team.behind >= BEHIND else ""
        if self._console.is_terminal:
            # Past rich, which takes control characters out of text.
            self._console.file.write("\r\x1b[2K" + line[: self._console.width - 1])
            self._console.file.flush()
            self._moving = True
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def evaluation(self, step: int, loss: float, better: bool) -> None:
        """A held-out loss."""
        self._write([{"step": step, "eval_loss": loss}])
        for reporter in self._reporters:
            reporter.log(step, {"eval/loss": loss})
        width = len(str(self._total))
        self.say(f"step {step:>{width}}/{self._total}  held-out loss {loss:.4f}{'  (best so far)' if better and step else ''}")

    def close(self) -> None:
        """End the moving line and the reporters."""
        self._settle()
        for reporter in self._reporters:
            reporter.close()

    def _device(self, step: int) -> dict[str, float]:
        """Write what was seen of the device, and say once if nothing is any more. Returns the means, as curves are called."""
        if self._monitor is None:
            return {}
        if self._monitor.trouble and not self._said_trouble:
            self._said_trouble = True
            self.say(f"From here on {self._monitor.trouble}.", style="yellow")
        seen = self._monitor.take()
        if seen is None:
            return {}
        self._write([{"step": step, "device": seen.mean, "device_peak": seen.peak, "device_samples": seen.samples}])
        return {f"device/{name}": value for name, value in seen.mean.items()}

    def _settle(self) -> None:
        if self._moving:
            self._console.print()
            self._moving = False

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill cut off is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text("utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def open_reporters(names: Sequence[str], folder: Path, values: dict[str, Any]) -> list[Reporter]:
    """The reporters asked for, through their own libraries. Raises: MissingExtra for one that is not installed."""
    return [_REPORTERS[name](folder, values) for name in names]


class _TensorBoard:
    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", needed_for="run.reporters=tensorboard", install="tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports] - optional
        except ImportError as error:
            raise MissingExtra("trackio", needed_for="run.reporters=trackio", install="trackio") from error
        self._library: Any = trackio
        self._library.init(project="pantheraml", name=folder.name, config=values)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._library.log(values, step=step)

    def close(self) -> None:
        self._library.finish()


class _Wandb:
    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] - optional
        except ImportError as error:
            raise MissingExtra("wandb", needed_for="run.reporters=wandb", install="wandb") from error
        self._run: Any = wandb.init(project="pantheraml", name=folder.name, dir=str(folder), config=values, resume="allow", id=folder.name)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_REPORTERS: dict[str, Callable[[Path, dict[str, Any]], Reporter]] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}
