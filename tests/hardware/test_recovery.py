"""Work that is really taken again. Memory that runs out is a real refusal: more is asked for than any machine has."""

from __future__ import annotations

import gc
import itertools
import logging
import subprocess
import sys
import weakref

import pytest
import torch
from tests.fakes import FakeBackend

from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import MemoryUse
from pantheraml.hardware.recovery import Recovery, TPUErrorHandler, even_halvings, halvings, handle_device_oom

ROW_BYTES = 1 << 50  # a row of the work below; no machine has room for two


def needs(rows: int) -> int:
    """Fits up to one row."""
    torch.empty((rows - 1) * ROW_BYTES, dtype=torch.uint8)
    return rows


def refused(*_: object) -> None:
    torch.empty(1 << 52, dtype=torch.uint8)


def gone(*_: object) -> None:
    raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [18.25.6.30]:28048")


class Device(FakeBackend):
    """Notes what is asked of it; has 7 MiB free, and 9 once its caches are cleared."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.cleared = 0

    def empty_cache(self) -> None:
        self.cleared += 1

    def memory(self, index: int) -> MemoryUse:
        return MemoryUse(
            total_bytes=16 << 20, free_bytes=(9 if self.cleared else 7) << 20, used_bytes=None, reserved_bytes=None, peak_bytes=None
        )


def test_the_numbers_of_parts():
    assert [halvings(rows) for rows in (1, 2, 3, 8, 9)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16)]
    assert [even_halvings(size) for size in (1, 2, 6, 7, 8, 12)] == [(1,), (1, 2), (1, 2, 6), (1, 7), (1, 2, 4, 8), (1, 2, 4, 12)]


@pytest.mark.parametrize("size", range(1, 65))
def test_parts_of_equal_size_are_at_most_half_of_those_before(size: int):
    parts = even_halvings(size)
    assert parts[0] == 1 and parts[-1] == size and all(size % each == 0 for each in parts)
    assert all(size // after <= size // before / 2 for before, after in itertools.pairwise(parts))


# ---- As a context ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tried"), [(8, [8, 4, 2, 1]), (6, [6, 3, 1]), (1, [1])])
def test_attempts_halve_until_it_fits_and_the_batch_stays(size: int, tried: list[int], caplog: pytest.LogCaptureFixture):
    seen, done = [], []
    handler = handle_device_oom(micro_batch=size, accumulation=3)
    for attempt in handler:
        with attempt:
            seen.append((attempt.micro_batch, attempt.accumulation))
            done.append(needs(attempt.micro_batch))
    assert [micro for micro, _ in seen] == tried and done == [1]
    assert {micro * accumulation for micro, accumulation in seen} == {3 * size}
    assert handler.counts == ({"out of memory": len(tried) - 1} if len(tried) > 1 else {})
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * (len(tried) - 1)  # each once


def test_the_original_error_is_raised_with_what_was_tried():
    attempts = 0
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory") as caught:
        for attempt in handle_device_oom(micro_batch=8, max_retries=2, announce=lambda text: None):
            with attempt:
                attempts += 1
                refused()
    assert attempts == 3 and type(caught.value) is RuntimeError and caught.value.__cause__ is None
    notes = caught.value.__notes__
    assert len(notes) == 3 and "from here on in 2 parts" in notes[0] and "taken in 2 parts (" in notes[1]
    assert notes[2].startswith("Out of memory in this step, taken in 4 parts: [enforce fail at alloc_cpu.cpp")


def test_one_row_is_not_divided():
    attempts = 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        for attempt in handle_device_oom(micro_batch=2, announce=lambda text: None):
            with attempt:
                attempts += 1
                refused()
    assert attempts == 2


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("shapes do not match"), KeyboardInterrupt()])
def test_anything_else_is_raised_at_once_and_as_it_is(error: BaseException):
    attempts = 0
    with pytest.raises(type(error)) as caught:
        for attempt in handle_device_oom(micro_batch=8):
            with attempt:
                attempts += 1
                raise error
    assert caught.value is error and attempts == 1 and not hasattr(error, "__notes__")


def test_the_second_round_begins_with_what_fitted():
    handler = handle_device_oom(micro_batch=8, announce=lambda text: None)
    for attempt in handler:
        with attempt:
            torch.empty((attempt.micro_batch // 4) * ROW_BYTES if attempt.micro_batch > 3 else 1, dtype=torch.uint8)
    sizes = []
    for attempt in handler:
        with attempt:
            sizes.append(attempt.micro_batch)
    assert sizes == [2]


@pytest.mark.parametrize("size", [0, -2])
def test_a_micro_batch_has_rows(size: int):
    with pytest.raises(ValueError, match="at least 1"):
        handle_device_oom(micro_batch=size)


def test_without_a_size_there_is_nothing_to_divide():
    with pytest.raises(ValueError, match="none to divide"):
        for attempt in handle_device_oom():
            with attempt:
                needs(attempt.micro_batch)


# ---- As a decorator ----------------------------------------------------------------------------------------------


def test_a_decorated_step_is_called_again_with_half(caplog: pytest.LogCaptureFixture):
    calls = []

    @handle_device_oom
    def step(micro_batch: int, accumulation: int, name: str = "x") -> str:
        """What it does."""
        calls.append((micro_batch, accumulation, name))
        needs(micro_batch)
        return f"{micro_batch} x {accumulation}"

    assert step(4, 2, name="y") == "1 x 8"
    assert calls == [(4, 2, "y"), (2, 4, "y"), (1, 8, "y")]
    assert step(4, 1) == "1 x 4" and len(calls) == 4  # it begins with what fitted
    assert step.__name__ == "step" and step.__doc__ == "What it does."
    assert "Out of memory in step" in caplog.text


def test_a_decorated_step_need_not_know_of_accumulation():
    calls = []

    @handle_device_oom(max_retries=1, announce=lambda text: None)
    def step(micro_batch: int) -> None:
        calls.append(micro_batch)
        needs(micro_batch)

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        step(4)
    assert calls == [4, 2]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        step(4)  # the threshold is for all calls, and the size stays
    assert calls == [4, 2, 2]


def test_a_step_without_a_micro_batch_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match="has no parameter micro_batch"):
        handle_device_oom(lambda batch: None)


# ---- What is let go, measured and said -----------------------------------------------------------------------------


def test_caches_are_cleared_and_memory_is_measured_where_somebody_measures():
    device, said = Device(), []
    recovery = Recovery({"out of memory": 1}, device=lambda: (device, 0), announce=said.append)
    for attempt in recovery.attempts("step 7", halvings(2)):
        with attempt:
            needs(2 // attempt.parts)
    (failure,) = recovery.history
    assert (failure.kind, failure.parts, failure.next_parts) == ("out of memory", 1, 2)
    assert (failure.free_before_bytes, failure.free_after_bytes, device.cleared) == (7 << 20, 9 << 20, 1)
    assert said == recovery.said == [str(failure)]
    assert str(failure) == (
        "Out of memory in step 7 (free at that moment: 7 MiB, then 9 MiB): it is taken again, from here on in 2 parts; "
        "the batch and its mean loss stay the same"
    )


def test_what_nobody_measures_is_unknown():
    recovery = Recovery({"out of memory": 1}, announce=lambda text: None)
    for attempt in recovery.attempts("step 7", halvings(2)):
        with attempt:
            needs(2 // attempt.parts)
    assert recovery.history[0].free_before_bytes is None and recovery.history[0].free_after_bytes is None
    assert "free at that moment: unknown, then unknown" in recovery.said[0]


def test_what_a_failed_attempt_held_is_gone_before_the_next():
    """A tensor in the frame that failed, and one in a cycle, as autograd's hooks make them."""
    held: list[weakref.ref] = []

    def work(parts: int) -> None:
        assert not any(each() is not None for each in held)
        here, round_ = torch.ones(3), torch.ones(4)
        round_.itself = round_
        held.extend([weakref.ref(here), weakref.ref(round_)])
        if parts < 4:
            refused(here)

    gc.disable()
    try:
        for attempt in Recovery({"out of memory": 2}, announce=lambda text: None).attempts("work", halvings(8)):
            with attempt:
                work(attempt.parts)
    finally:
        gc.enable()
    assert len(held) == 6


def test_a_device_that_cannot_be_asked_does_not_hide_the_failure():
    class Silent(FakeBackend):
        def memory(self, index: int) -> MemoryUse:
            raise RuntimeError("the driver is gone")

    recovery = Recovery({}, device=lambda: (Silent(), 0))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        for attempt in recovery.attempts("step 1", halvings(2)):
            with attempt:
                refused()
    assert recovery.history[0].free_before_bytes is None


def test_a_recovery_that_goes_on_begins_where_the_other_was():
    recovery = Recovery({"out of memory": 2}, announce=lambda text: None)
    recovery.restore(2, ["said before"])
    parts = []
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        for attempt in recovery.attempts("step 1", halvings(64)):
            with attempt:
                parts.append(attempt.parts)
                refused()
    assert parts == [2, 4]  # one halving had been used up
    assert recovery.said[0] == "said before" and len(recovery.said) == 2


def test_a_smaller_piece_in_between_does_not_undo_it():
    recovery = Recovery({"out of memory": 3})
    recovery.restore(4, [])
    seen = []
    for rows in (8, 2, 1, 8):
        for attempt in recovery.attempts("piece", halvings(rows)):
            with attempt:
                seen.append(attempt.parts)
    assert seen == [4, 2, 1, 4]


# ---- Every kind --------------------------------------------------------------------------------------------------


def handler(**options) -> tuple[TPUErrorHandler, list[float], list[str]]:
    slept, said = [], []
    made = TPUErrorHandler(device="cpu", announce=said.append, sleep=slept.append, **options)
    return made, slept, said


def test_communication_is_tried_again_after_a_pause_and_memory_halves():
    made, slept, said = handler(micro_batch=4, pause_s=0.5)
    failures = iter([gone, gone, refused, gone])
    sizes = []
    for attempt in made:
        with attempt:
            sizes.append(attempt.micro_batch)
            next(failures, lambda: None)()
    assert sizes == [4, 4, 4, 2, 2]
    assert slept == [0.5, 1.0, 2.0]
    assert made.counts == {"communication": 3, "out of memory": 1} and len(made.history) == 4
    assert said[0] == (
        "Communication in this step ([../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [18.25.6.30]:28048): "
        "it is tried again"
    )


def test_communication_has_a_threshold_of_its_own():
    made, slept, _ = handler(communication_retries=2)
    calls = []

    @made
    def fetch(what: str) -> str:
        calls.append(what)
        if len(calls) != 3:
            gone()
        return what

    assert fetch("a") == "a" and len(calls) == 3
    with pytest.raises(RuntimeError, match="Connection closed by peer") as caught:
        fetch("b")  # three failures in a row, and those before are forgiven
    assert calls == ["a"] * 3 + ["b"] * 3 and len(slept) == 4
    assert made.counts == {"communication": 5} and len(caught.value.__notes__) == 5


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("INTERNAL: Mosaic failed to compile TPU kernel: Target does not support this comparison", "compilation"),
        ("INTERNAL: Core halted unexpectedly: No error message available as no compiler metadata was provided.", "device lost"),
        ("Inference tensors do not track version counter.", "version counter"),
        ("shapes do not match", "other"),
    ],
)
def test_the_others_are_counted_and_raised_at_once(text: str, kind: str):
    made, slept, said = handler(micro_batch=4)
    with pytest.raises(RuntimeError, match=text[:20]):
        for attempt in made:
            with attempt:
                raise RuntimeError(text)
    assert made.counts == {kind: 1} and not slept and not said


def test_memory_that_runs_out_of_a_step_that_cannot_be_halved_is_raised():
    made, _, _ = handler()

    @made
    def fetch() -> None:
        refused()

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        fetch()
    assert made.counts == {"out of memory": 1}


def test_a_device_that_is_none_is_refused_before_the_work():
    with pytest.raises(DeviceError, match="no name of a device"):
        handle_device_oom(device="gpux")


def test_importing_it_imports_no_torch():
    code = "import sys, pantheraml.hardware.recovery; print('torch' in sys.modules, 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


def test_relief_is_asked_before_anything_is_divided():
    """Work of four rows that holds as much as three rows more, until it is told twice to hold less."""
    held, said = 3, []

    def relief() -> str | None:
        nonlocal held
        if held == 1:
            return None
        held -= 1
        return f"holding {held}"

    recovery = Recovery({"out of memory": 6}, announce=said.append)
    tried = []
    for attempt in recovery.attempts("step 1", halvings(4), relief=relief):
        with attempt:
            tried.append((attempt.parts, held))
            needs(4 // attempt.parts + held - 1)
    assert tried == [(1, 3), (1, 2), (1, 1), (2, 1), (4, 1)]
    assert [("holding" in line, "in 2 parts" in line or "in 4 parts" in line) for line in said] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]
    assert "it is taken again, from here on holding 2; the result stays the same" in said[0]
    assert recovery.parts == 4 and recovery.history[0].relief == "holding 2"


def test_relief_is_not_asked_where_nothing_is_to_be_tried_again():
    with pytest.raises(RuntimeError):
        for attempt in Recovery().attempts("step 1", (1,), relief=lambda: pytest.fail("asked")):
            with attempt:
                refused()
