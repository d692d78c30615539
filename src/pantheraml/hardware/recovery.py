"""Going on after a device failed: smaller pieces when memory runs out, a pause when another host did not answer.

    @handle_device_oom                                      for attempt in handle_device_oom(micro_batch=8):
    def step(micro_batch, accumulation, batch): ...             with attempt:
    step(8, 1, batch)                                               step(attempt.micro_batch, attempt.accumulation, batch)

Both take the work again from its start, with half of the micro-batch, until it fits. The training loop uses the same
`Recovery`. Needs no torch.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, overload

from pantheraml.hardware.backend import Backend, open_backend
from pantheraml.hardware.device import parse_device
from pantheraml.hardware.failures import FailureKind, classify
from pantheraml.recipe.kinds import kind_of, kinds_meant

if TYPE_CHECKING:
    from types import TracebackType

OOM_RETRIES = 6  # down to a 64th
COMMUNICATION_RETRIES = 3
PAUSE_S = 1.0

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger("pantheraml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failure, and what was done about it.

    Attributes:
        doing: "step 7". parts: in how many parts each micro-batch was taken when it failed.
        next_parts: in how many it was taken then; None: it was not tried again.
        message: the first line of the error.
        free_before_bytes, free_after_bytes: what the device had left at the failure, and when the failed attempt had let go
            of everything; None: unknown, or not measured.
        relief: how the work needs less memory from then on, where that was not taking more parts.
    """

    kind: FailureKind
    doing: str
    parts: int
    next_parts: int | None
    message: str
    free_before_bytes: int | None = None
    free_after_bytes: int | None = None
    relief: str | None = None

    def __str__(self) -> str:
        free = f"free at that moment: {_size(self.free_before_bytes)}, then {_size(self.free_after_bytes)}"
        said = f"{self.kind.capitalize()} in {self.doing}" + (f", taken in {self.parts} parts" if self.parts > 1 else "")
        if self.next_parts is None:
            return f"{said}: {self.message}"
        if self.relief is not None:
            return f"{said} ({free}): it is taken again, from here on {self.relief}; the result stays the same but for rounding"
        if self.next_parts == self.parts:
            return f"{said} ({self.message}): it is tried again"
        return f"{said} ({free}): it is taken again, from here on in {self.next_parts} parts; the batch and its mean loss stay the same"


class Recovery:
    """Counts failures, decides which are tried again, and remembers in how many parts the work fits.

    Args:
        retries: kind of failure -> how often it is tried again. For out of memory in all, as each time halves what is taken
            at once; for the other kinds in a row.
        device: the backend whose caches are cleared and whose free memory is measured, and the index; asked at a failure.
        announce: hears of each failure that is tried again, once.
        pause_s: before the first repetition after another kind than out of memory; twice as long each time.
    """

    def __init__(
        self,
        retries: Mapping[FailureKind, int] | None = None,
        *,
        device: Callable[[], tuple[Backend, int] | None] = lambda: None,
        announce: Callable[[str], None] = _log.warning,
        pause_s: float = PAUSE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.retries = dict(retries or {})
        self.announce = announce
        self.parts = 1
        """In how many parts each micro-batch is taken from here on."""
        self.reliefs = 0
        """How often the work came to need less memory instead."""
        self.counts: Counter[FailureKind] = Counter()
        self.history: list[Failure] = []
        self.said: list[str] = []
        """What was announced, here and in the run that this one goes on from: for a report."""
        self._device, self._pause_s, self._sleep = device, pause_s, sleep
        self._halvings = 0
        self._relief: Callable[[], str | None] = lambda: None

    def restore(self, parts: int, said: Sequence[str], reliefs: int = 0) -> None:
        """Go on like a recovery that had come to `parts`, a power of two; its halvings count. The reliefs are the caller's to repeat."""
        self.parts, self.said, self.reliefs, self._halvings = parts, list(said), reliefs, parts.bit_length() - 1

    def note(self, text: str) -> None:
        """Say something that belongs into the report, too."""
        self.said.append(text)
        self.announce(text)

    def attempts(
        self,
        doing: str,
        ladder: Sequence[int],
        *,
        whole: int | None = None,
        accumulation: int = 1,
        relief: Callable[[], str | None] = lambda: None,
    ) -> Iterator[Attempt]:
        """Attempts at one piece of work until one succeeds: `for attempt in recovery.attempts(...): with attempt: ...`.

        What a failed attempt leaves behind is for the body to throw away. An error that is not tried again is raised as it
        is, with the history as notes.

        Args:
            doing: how messages name it.
            ladder: the numbers of parts that can be tried, rising.
            whole, accumulation: what `micro_batch` and `accumulation` are in one part.
            relief: asked first when memory runs out: makes the work need less, and says how; None: it cannot.
        """
        in_a_row: Counter[FailureKind] = Counter()
        self._relief = relief
        while True:
            parts = next((parts for parts in ladder if parts >= self.parts), ladder[-1])
            attempt = Attempt(self, doing, parts, ladder, in_a_row, whole, accumulation)
            yield attempt
            if attempt.failure is None:
                return
            # The error is gone by now, and with it the frames that held tensors; what refers to itself is let go by hand.
            gc.collect()
            failure = replace(attempt.failure, free_after_bytes=self._cleared())
            self.history[-1] = failure
            self.note(str(failure))
            if failure.kind == "out of memory":
                self.parts = failure.next_parts or self.parts
            else:
                self._sleep(self._pause_s * 2 ** (in_a_row[failure.kind] - 1))

    def failed(self, error: Exception, doing: str, parts: int, ladder: Sequence[int], in_a_row: Counter[FailureKind]) -> Failure:
        """Record an error; `next_parts` of what is returned says whether it is tried again."""
        kind = classify(error)
        self.counts[kind] += 1
        in_a_row[kind] += 1
        next_parts: int | None = None
        said: str | None = None
        if kind != "out of memory":
            next_parts = parts if in_a_row[kind] <= self.retries.get(kind, 0) else None
        elif self.retries.get(kind, 0) and (said := self._relief()) is not None:
            next_parts, self.reliefs = parts, self.reliefs + 1
        elif self._halvings < self.retries.get(kind, 0):
            next_parts = next((more for more in ladder if more > parts), None)
            self._halvings += next_parts is not None
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = Failure(
            kind=kind, doing=doing, parts=parts, next_parts=next_parts, message=message, free_before_bytes=self._free(), relief=said
        )
        self.history.append(failure)
        return failure

    def _free(self) -> int | None:
        try:
            found = self._device()
            return found and found[0].memory(found[1]).free_bytes
        except (ImportError, MemoryError, OSError, RuntimeError):
            return None  # what cannot be asked is unknown; the failure itself must not be hidden

    def _cleared(self) -> int | None:
        """Clear the caches; the free bytes after it."""
        try:
            found = self._device()
        except ImportError:
            return None
        if found:
            with suppress(RuntimeError):  # a recording that failed may still hold the allocator
                found[0].empty_cache()
        return self._free()


class Attempt:
    """One attempt: a context that swallows an error which is tried again.

    Attributes:
        parts: in how many parts each micro-batch is to be taken.
        failure: why there is another attempt after this one, if there is.
    """

    def __init__(
        self,
        recovery: Recovery,
        doing: str,
        parts: int,
        ladder: Sequence[int],
        in_a_row: Counter[FailureKind],
        whole: int | None,
        accumulation: int,
    ) -> None:
        self.parts = parts
        self.failure: Failure | None = None
        self._recovery, self._doing, self._ladder, self._in_a_row = recovery, doing, ladder, in_a_row
        self._whole, self._accumulation = whole, accumulation

    @property
    def micro_batch(self) -> int:
        """What to take at once. Raises: ValueError if no size was given that could be divided."""
        if self._whole is None:
            raise ValueError("no micro_batch was given, so there is none to divide")
        return self._whole // self.parts

    @property
    def accumulation(self) -> int:
        """How many micro-batches make one batch of the optimizer: `micro_batch * accumulation` is the same in each attempt."""
        return self._accumulation * self.parts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        failure = self._recovery.failed(error, self._doing, self.parts, self._ladder, self._in_a_row)
        if failure.next_parts is not None:
            self.failure = failure
            return True
        if failure.kind != "other":
            for each in self._recovery.history:
                error.add_note(str(each))
        return False


def halvings(rows: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the first that leaves one row of `rows` to each part."""
    parts = [1]
    while parts[-1] < rows:
        parts.append(2 * parts[-1])
    return tuple(parts)


def even_halvings(micro_batch: int) -> tuple[int, ...]:
    """As `halvings`, but in parts of equal size: each number divides `micro_batch` (6: 1, 2, 6)."""
    parts = [1]
    while parts[-1] < micro_batch:
        parts.append(next(more for more in range(min(2 * parts[-1], micro_batch), micro_batch + 1) if micro_batch % more == 0))
    return tuple(parts)


class DeviceErrorHandler:
    """Repeats work after failures of a device: an iterable of attempts, and a decorator.

    Args:
        retries: kind of failure -> how often it is tried again; see `Recovery`.
        micro_batch: rows that the first attempt takes at once. A decorated function gets it with each call instead.
        accumulation: how many of them make a batch of the optimizer.
        device: whose caches are cleared and whose memory is measured ("cuda:1"). None: torch's current accelerator, or the CPU.
        announce: hears of each failure that is tried again; by default the logger "pantheraml".
        pause_s: before the first repetition after a failed communication; twice as long each time.
    """

    def __init__(
        self,
        retries: Mapping[FailureKind, int],
        *,
        micro_batch: int | None = None,
        accumulation: int = 1,
        device: str | None = None,
        announce: Callable[[str], None] = _log.warning,
        pause_s: float = PAUSE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch is a number of rows, at least 1, not {micro_batch}")
        kind, index = parse_device(device or "auto")
        found = _current if kind in ("auto", "gpu") else lambda: (open_backend(kinds_meant(kind)[0]), index or 0)
        self.recovery = Recovery(retries, device=found, announce=announce, pause_s=pause_s, sleep=sleep)
        self._micro_batch, self._accumulation = micro_batch, accumulation

    @property
    def counts(self) -> dict[FailureKind, int]:
        """Failures so far by kind, whether or not they were tried again."""
        return dict(self.recovery.counts)

    @property
    def history(self) -> tuple[Failure, ...]:
        """Each failure so far."""
        return tuple(self.recovery.history)

    def __iter__(self) -> Iterator[Attempt]:
        """Attempts until one succeeds. Raises: what the last one raised, with the history as notes."""
        return self._attempts("this step", self._micro_batch, self._accumulation)

    def __call__(self, step: Callable[P, R]) -> Callable[P, R]:
        """`step`, repeated: it gets `micro_batch`, and `accumulation` if it has such a parameter, as each attempt has them.

        The next call begins with what fitted. Raises: ValueError if it has no micro_batch that could be halved.
        """
        parameters = inspect.signature(step).parameters
        if "micro_batch" not in parameters and not set(self.recovery.retries) - {"out of memory"}:
            raise ValueError(f"{step} has no parameter micro_batch, so there is nothing to halve")

        @functools.wraps(step)
        def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = inspect.signature(step).bind(*args, **kwargs)
            bound.apply_defaults()
            whole, accumulation = bound.arguments.get("micro_batch"), bound.arguments.get("accumulation", 1)
            for attempt in self._attempts(getattr(step, "__name__", "this step"), whole, accumulation):
                if whole is not None:
                    bound.arguments["micro_batch"] = attempt.micro_batch
                if "accumulation" in parameters:
                    bound.arguments["accumulation"] = attempt.accumulation
                with attempt:
                    return step(*bound.args, **bound.kwargs)
            raise AssertionError("an attempt returns, raises, or has another one after it")

        return repeated

    def _attempts(self, doing: str, whole: Any, accumulation: int) -> Iterator[Attempt]:
        ladder = (1,) if whole is None else even_halvings(whole)
        return self.recovery.attempts(doing, ladder, whole=whole, accumulation=accumulation)


class TPUErrorHandler(DeviceErrorHandler):
    """Out of memory halves the micro-batch, a failed communication is tried again after a pause, anything else is raised at once.

    For a TPU unless another device is named. `counts` has every kind.
    """

    def __init__(
        self,
        *,
        micro_batch: int | None = None,
        accumulation: int = 1,
        oom_retries: int = OOM_RETRIES,
        communication_retries: int = COMMUNICATION_RETRIES,
        device: str = "tpu",
        announce: Callable[[str], None] = _log.warning,
        pause_s: float = PAUSE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(
            {"out of memory": oom_retries, "communication": communication_retries},
            micro_batch=micro_batch,
            accumulation=accumulation,
            device=device,
            announce=announce,
            pause_s=pause_s,
            sleep=sleep,
        )


@overload
def handle_device_oom(step: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def handle_device_oom(
    *,
    micro_batch: int | None = None,
    accumulation: int = 1,
    max_retries: int = OOM_RETRIES,
    device: str | None = None,
    announce: Callable[[str], None] = _log.warning,
) -> DeviceErrorHandler: ...
def handle_device_oom(
    step: Callable[P, R] | None = None,
    /,
    *,
    micro_batch: int | None = None,
    accumulation: int = 1,
    max_retries: int = OOM_RETRIES,
    device: str | None = None,
    announce: Callable[[str], None] = _log.warning,
) -> Callable[P, R] | DeviceErrorHandler:
    """Take work again with half of the micro-batch when memory runs out; anything else is raised at once.

    A decorator, with or without arguments, of a function with a parameter `micro_batch`; or, with `micro_batch` given, an
    iterable of attempts. The work must be repeatable: a step that throws its old gradients away first.

    Args:
        max_retries: halvings, over all calls. The others: see `DeviceErrorHandler`.
    Raises: the original error where nothing more can be halved, with what was tried in its notes.
    """
    handler = DeviceErrorHandler(
        {"out of memory": max_retries}, micro_batch=micro_batch, accumulation=accumulation, device=device, announce=announce
    )
    return handler if step is None else handler(step)


def _current() -> tuple[Backend, int] | None:
    """The device that torch computes on by default; none before somebody has imported torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = None if accelerator is None else kind_of(accelerator.type)
    if kind is None:
        return open_backend("cpu"), 0
    return open_backend(kind), torch.accelerator.current_device_index()


def _size(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 2**20:,.0f} MiB"
