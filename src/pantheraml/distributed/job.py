"""The processes of one start of a run on this machine: started together, watched, and ended together."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pantheraml.distributed.heartbeat import GRACE_S, alive_file, log_file, lost_file
from pantheraml.distributed.torch_world import ANOTHER_GAVE_UP
from pantheraml.errors import DeviceError

RESUME = "--resume"
_STOPPED = (75, 130)
_ITS_OWN_WORDS = (2, 3, 4, 5, 6)
"""Exit codes of errors that the process has explained; see errors.py. All but 4, a device, come again at each start."""
_LOOK_S, _SOON_S, _STACKS_S, _SETTLE_S, _CAUSE_S = 0.05, 0.5, 2.0, 2.0, 10.0
_LAST_LINES = 8


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended: with a code, or an error.

    Attributes:
        said: which process ended it, and how. tail: the last that it printed, if nobody has seen that.
        again: another start may do better. rank: of the process that is to blame; None: it is not known.
    """

    code: int = 0
    error: DeviceError | None = None
    said: str = ""
    tail: str = ""
    again: bool = False
    rank: int | None = None


@dataclass(slots=True)
class Asked:
    """Signals to this process: those that the job has not heard of, and all."""

    waiting: list[int] = field(default_factory=list[int])
    numbers: list[int] = field(default_factory=list[int])

    def note(self, number: int) -> None:
        """One more."""
        self.waiting.append(number)
        self.numbers.append(number)


class Job:
    """The processes of one start. When its block is left, none of them lives.

    Args:
        devices: the index of the device of each; none: they share one, or look for themselves.
    """

    def __init__(self, words: list[str], processes: int, folder: Path, environment: Mapping[str, str], devices: Sequence[int] = ()) -> None:
        self.words, self.size, self.folder, self.environment, self.devices = words, processes, folder, environment, devices
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.codes: dict[int, int] = {}
        """Of those that have ended, in that order."""
        # Of this job alone: whoever starts the same run once more, which is then refused, must not take them away.
        self.signs = folder.resolve() / f".signs-{secrets.token_hex(4)}"
        self.pulses = [_Pulse(alive_file(self.signs, rank)) for rank in range(processes)]
        self.before: list[int] = []  # bytes of the logs

    def __enter__(self) -> Job:
        reading, self._held = os.pipe()  # the processes see the other end close when this process ends, however it does
        try:
            self.signs.mkdir()
            port = _free_port()
            for rank in range(self.size):
                self._start(rank, port, reading)
        except OSError as error:
            self.__exit__()
            raise DeviceError(
                f"process {len(self.ranks)} of {self.size} could not be started: {error.strerror or error}",
                why=f"the command was {' '.join(self.words[:4])}",
                fix="end other programs, or set hardware.devices to fewer",
            ) from error
        finally:
            os.close(reading)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        finally:
            os.close(self._held)
            shutil.rmtree(self.signs, ignore_errors=True)

    def _start(self, rank: int, port: int, reading: int) -> None:
        said = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.size,
            "LOCAL_WORLD_SIZE": self.size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONUNBUFFERED": 1,  # what one has printed before it is killed, stands in its log
            "PANTHERAML_LOGS": self.folder.resolve(),
            "PANTHERAML_SIGNS": self.signs,
            "PANTHERAML_LAUNCHER": f"{reading}:{os.fstat(reading).st_ino}",
            "PANTHERAML_DEVICES": json.dumps(self.devices),
        }
        environment = {**self.environment, **{name: str(value) for name, value in said.items()}}
        with log_file(self.folder, rank).open("ab") as log:
            self.before.append(log.tell())
            self.ranks.append(
                subprocess.Popen(
                    self.words,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log if rank else None,
                    stderr=log if rank else None,
                    pass_fds=(reading,),
                    process_group=0,  # Ctrl-C reaches this process only, which passes it on: twice would mean "at once"
                )
            )

    def watched(self, hang_s: float, asked: Asked) -> End:
        """Wait until all have ended, or one has failed or hangs."""
        looked = time.monotonic()
        while len(self._look()) < self.size:
            while asked.waiting:
                self._signal(asked.waiting.pop(0))
            if self._failed(asked):
                return self._failure(asked)
            if time.monotonic() > looked + min(1.0, hang_s / 10):
                looked = time.monotonic()
                if behind := self._behind(hang_s):
                    return self._hang(behind, hang_s)
            time.sleep(_LOOK_S)
        if self._failed(asked):
            return self._failure(asked)
        codes = [self.codes[rank] for rank in range(self.size)]
        code = next((code for code in codes if code), 0)
        return End(code if code >= 0 else 128 - code)

    def _look(self) -> dict[int, int]:
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes and (code := process.poll()) is not None:
                self.codes[rank] = code
        return self.codes

    def _failed(self, asked: Asked) -> list[int]:
        """The processes that ended otherwise than they should, the one that is to blame first.

        One that was killed has not said why; one that has explained itself goes before one with a traceback, which may be what the end of
        another one's connection looks like from here; one that only heard of another one comes last.
        """
        fine = {0, *_STOPPED, *(-number for number in asked.numbers)}
        failed = [rank for rank, code in self.codes.items() if code not in fine]

        def blame(rank: int) -> int:
            code = self.codes[rank]
            return 0 if code < 0 else 1 if code in _ITS_OWN_WORDS else 3 if code == ANOTHER_GAVE_UP else 2

        return sorted(failed, key=blame)

    def _failure(self, asked: Asked) -> End:
        """Who is to blame may still be on its way out, when others have lost the connection to it."""
        started = time.monotonic()
        while len(self._look()) < self.size:
            code = self.codes[self._failed(asked)[0]]
            wait_s = 0.0 if code < 0 or code in _ITS_OWN_WORDS else _CAUSE_S if code == ANOTHER_GAVE_UP else _SETTLE_S
            if time.monotonic() >= started + wait_s:
                break
            time.sleep(_LOOK_S)
        rank = self._failed(asked)[0]
        code = self.codes[rank]
        if code not in _ITS_OWN_WORDS or code == DeviceError.exit_code:
            self._show_stacks(_SOON_S)
        self._end(f"{rank} it ended with {ending(code)}")
        said, tail = f"process {rank} of {self.size} ended with {ending(code)}", self._tail(rank)
        if code == ANOTHER_GAVE_UP:  # of a process that nothing is known of
            return End(DeviceError.exit_code, said=said, tail=tail, again=True)
        if code in _ITS_OWN_WORDS:
            return End(code, said=said, tail=tail, again=code == DeviceError.exit_code, rank=rank)
        forced = ", and the system ends one so when memory runs out" if code == -signal.SIGKILL else ""
        where = f"see {log_file(self.folder, rank)}" if rank else "see above what it printed"
        error = DeviceError(
            said,
            why=f"all work on the same steps, so the others were ended{forced}{'.' if tail else ''}{tail}",
            fix=f"{where}; go on from the last checkpoint with {RESUME}, or let hardware.restarts say how often that is done by itself",
        )
        return End(error=error, said=said, tail=tail, again=True, rank=rank)

    def _behind(self, hang_s: float) -> list[int]:
        """The processes without a sign of life, that with the fewest first."""
        now = time.monotonic()
        silent = [rank for rank, pulse in enumerate(self.pulses) if rank not in self.codes and pulse.silent_s(now) > hang_s]
        return sorted(silent, key=lambda rank: (self.pulses[rank].beats, self.pulses[rank].since))

    def _hang(self, behind: list[int], hang_s: float) -> End:
        self._show_stacks(_STACKS_S)
        # Of those that have done as little, nobody knows which one holds up the others.
        least = [rank for rank in behind if self.pulses[rank].beats == self.pulses[behind[0]].beats]
        who = f"process {least[0]}" if len(least) == 1 else f"the processes {', '.join(map(str, sorted(least)))}"
        self._end(f"{behind[0]} {'it gives' if len(least) == 1 else f'{who} give'} no sign of life")
        beats = ", ".join(f"process {rank} after {pulse.beats}" for rank, pulse in enumerate(self.pulses) if pulse.beats)
        said = f"{who} of {self.size} gave no sign of life for {hang_s:.0f} s"
        error = DeviceError(
            said,
            why=f"one that hangs holds up all of them; signs of life so far: {beats}",
            fix=f"see the stacks of each in {self.folder}/rank-*.log; go on from the last checkpoint with {RESUME}; if a step may take so "
            "long, raise hardware.timeout_s",
        )
        alone = all(pulse.beats > self.pulses[behind[0]].beats for rank, pulse in enumerate(self.pulses) if rank != behind[0])
        return End(error=error, said=said, again=True, rank=behind[0] if alone else None)

    def _signal(self, number: int) -> None:
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes:
                process.send_signal(number)

    def _show_stacks(self, within_s: float) -> None:
        """Of all that live and have attended: to another one this signal would be the end."""
        asked = [rank for rank, pulse in enumerate(self.pulses) if rank not in self._look() and pulse.path.exists()]
        for rank in asked:
            self.ranks[rank].send_signal(signal.SIGUSR1)
        if asked:
            self._wait(within_s)

    def _end(self, lost: str = "") -> None:
        """Of those that live: asked first, with their children at last by force. lost: whom they need not wait for, and why."""
        if len(self._look()) < len(self.ranks):
            if lost:
                with suppress(OSError):  # a full disk; then they are ended by force
                    lost_file(self.signs).write_text(lost, "utf-8")
            self._signal(signal.SIGTERM)
            self._wait(GRACE_S)
        for rank, process in enumerate(self.ranks):
            if rank not in self._look():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._look()

    def _wait(self, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while len(self._look()) < len(self.ranks) and time.monotonic() < until:
            time.sleep(_LOOK_S)

    def _tail(self, rank: int) -> str:
        """The last lines that a process printed. The first one's were seen."""
        if not rank:
            return ""
        log = log_file(self.folder, rank)
        lines = log.read_bytes()[self.before[rank] :].decode(errors="replace").splitlines()
        last = [f"\n    {line}" for line in lines if line.strip()][-_LAST_LINES:]
        return f" {log} ends with:{''.join(last)}" if last else f" {log} is empty."


@dataclass(slots=True)
class _Pulse:
    """What is seen of a process's heartbeat; `since` is when it last changed, by this process's clock."""

    path: Path
    beats: int = 0
    since: float = 0.0

    def silent_s(self, now: float) -> float:
        """For how long it has been so; 0 before the first beat, and while it rests."""
        try:
            beats = int(self.path.read_bytes() or 0)
        except FileNotFoundError:
            beats = 0
        if beats != self.beats or not beats:
            self.beats, self.since = beats, now
        return now - self.since


def ending(code: int) -> str:
    """In words: exit code 1, or SIGKILL."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
