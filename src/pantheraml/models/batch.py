"""Answers to many requests at once: new ones take the rows of those that are done, while the others go on.

Each turn reads a piece of the prompts that came last, then computes the next token of every answer that is going on. A service submits
requests from any thread and iterates over what comes; a program gives a list and gets a list.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pantheraml.errors import RecipeError
from pantheraml.hardware.backend import Backend
from pantheraml.models.grammar import Grammars
from pantheraml.models.handle import Handle, Job, Work, not_finite
from pantheraml.models.head import causal_model
from pantheraml.models.request import Answer, Finished, Request
from pantheraml.models.rows import SMALLEST_PIECE, Part, Rows, open_rows
from pantheraml.models.sampling import choose, log_probabilities
from pantheraml.models.slots import Slots, window
from pantheraml.models.stops import Text, stop_tokens
from pantheraml.planning.answers import MOST_ROWS


class Batcher:
    """Answers requests in the rows of one cache. The model is its own while it works: nobody else may call it.

    Args:
        model: a causal language model, on its device. tokenizer: its tokenizer.
        backend: of the device; None: the one of the model's device.
        rows: answers at once; None: as many as fit into the memory that is free (planning/answers.py), up to `most_rows`.
        tokens: of a row, prompt and answer together; None: ROW_TOKENS, or as many as the model was made for.
        chunk: tokens of a prompt that are read at once; None: see models/rows.py.
        steady: an answer does not depend on those beside it, bit for bit, as far as the library allows; see `StaticRows`. Otherwise
            rounding may differ in the last digit with their number, and nothing is computed only to fill a shape.
        adapters: names of adapters of a PEFT model; requests choose among them, and without one the base answers.
        using: rows that something else computes; the arguments from `backend` to `adapters` are then not looked at.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        backend: Backend | None = None,
        rows: int | None = None,
        most_rows: int = MOST_ROWS,
        tokens: int | None = None,
        chunk: int | None = None,
        steady: bool = True,
        adapters: Sequence[str] = (),
        using: Rows | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        if using is None:
            using = open_rows(
                model,
                tokens=tokens,
                backend=backend,
                count=rows,
                most=most_rows,
                chunk=chunk,
                steady=steady,
                adapters=adapters,
            )
        self._rows, self._steady = using, steady
        self.stops = stop_tokens(model, tokenizer)
        self._slots = Slots(using.count, using.block)
        self._going: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing: str | None = None
        self.work = Work()
        """What was computed since the start."""

    @property
    def rows(self) -> int:
        """How many answers are computed at once."""
        return self._rows.count

    @property
    def tokens(self) -> int:
        """How many tokens a prompt and its answer can have together."""
        return self._rows.tokens

    @property
    def fallback(self) -> str | None:
        """Why answers are computed one by one; None: they are computed together."""
        return self._rows.fallback

    @property
    def going(self) -> tuple[int, int]:
        """(answers in work, requests that wait), now."""
        with self._changed:
            return len(self._going), len(self._waiting)

    @property
    def at_work(self) -> bool:
        """Whether its thread takes requests: between `start` and `close`, unless something ended it that was not the device's doing."""
        return self._thread is not None and self._closing is None

    def forget(self) -> None:
        """Prompts that were answered are no longer shared, while nothing is in work: for a measurement, or weights that have changed."""
        with self._changed:
            if self._going or self._waiting:
                raise ValueError("answers are in work")
            self._slots = Slots(self._rows.count, self._rows.block)

    # ---- For a program ------------------------------------------------------------------------------------------

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers, in the order of the requests. Raises: see `submit`; what a request's `on_text` raised, when all are answered."""
        if self._thread is not None:
            handles = [self.submit(request) for request in requests]
            return [handle.result() for handle in handles]
        jobs = [self._job(request) for request in requests]
        self._waiting.extend(jobs)
        with self._rows.ready():
            try:
                while self._going or self._waiting:
                    self._turn()
            except BaseException as error:
                self._give_up(error)
                raise
        return [job.handle.result() for job in jobs]

    # ---- For a service ------------------------------------------------------------------------------------------

    def start(self) -> Batcher:
        """A thread works from here on, until `close`."""
        if self._thread is None:
            self._closing = None
            self._thread = threading.Thread(target=self._serve, name="pantheraml-batcher", daemon=True)
            self._thread.start()
        return self

    def submit(self, request: Request) -> Handle:
        """Put a request into the queue, from any thread, between `start` and `close`.

        Raises: RecipeError if the row is too short for it, or its schema cannot be kept to; MissingExtra for a schema without llguidance;
            ValueError for an adapter that cannot be named, or a batcher that is not at work.
        """
        job = self._job(request)
        with self._changed:
            if self._thread is None or self._closing is not None:
                raise ValueError("the batcher is not at work: call start first, and close last")
            self._waiting.append(job)
            self._changed.notify_all()
        return job.handle

    def close(self, *, drain: bool = False) -> None:
        """Stop working; what is not answered is cancelled, or with `drain` answered first. No more requests are taken."""
        thread = self._thread
        if thread is None:
            return
        with self._changed:
            self._closing = "drain" if drain else "cancel"
            self._changed.notify_all()
        thread.join()
        self._thread = None

    def __enter__(self) -> Batcher:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            with self._rows.ready():
                while self._awaited():
                    try:
                        self._turn()
                    except (RuntimeError, MemoryError) as error:  # of the device; the next requests may fit
                        self._give_up(error, waiting=False)
        except BaseException as error:
            self._give_up(error)
            raise
        finally:
            with self._changed:
                self._closing = self._closing or "cancel"

    def _awaited(self) -> bool:
        """Waits until there is something to do; False: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._going or self._waiting or self._closing)
            if self._closing == "cancel":
                for job in (*self._going, *self._waiting):
                    job.handle.cancel()
            return bool(self._going or self._waiting)

    def _give_up(self, error: BaseException, *, waiting: bool = True) -> None:
        """Answers in work, and those that wait, end with an error."""
        with self._changed:
            lost = [*self._going, *(self._waiting if waiting else ())]
            for job in list(self._going):
                self._leave(job, sound=False)
            if waiting:
                self._waiting.clear()
        for job in lost:
            job.handle.finish(None, error)

    # ---- A turn -------------------------------------------------------------------------------------------------

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._tokenizer, causal_model(self._model).get_input_embeddings().weight.shape[0], self.stops)

    def _job(self, request: Request) -> Job:
        needed = len(request.prompt) + request.max_new_tokens
        if needed > self.tokens:
            raise RecipeError(
                f"the prompt has {len(request.prompt)} tokens, and {request.max_new_tokens} may follow, which is more than {self.tokens}",
                why="so many keys and values of an answer are kept in memory",
                fix=f"set max_new_tokens to {self.tokens - len(request.prompt)} or less"
                if len(request.prompt) < self.tokens
                else "shorten the prompt, or make longer rows",
            )
        adapter = self._rows.adapter(request.adapter)
        grammar = self._grammars.start(request.schema, request.max_new_tokens) if request.schema is not None else None
        text = Text(self._tokenizer, request.stop) if request.stop or request.in_pieces else None
        seed = random.SystemRandom().getrandbits(63) if request.seed is None else request.seed
        return Job(Handle(request), seed, adapter, grammar, text, time.monotonic())

    def _turn(self) -> None:
        begun = time.perf_counter()
        self._admit()
        for job in [job for job in self._going if job.handle.cancelled]:
            self._end(job, "cancelled")
        self._read_prompts()
        self._next_tokens()
        self._count(busy_s=time.perf_counter() - begun)

    def _count(self, **more: float) -> None:
        self.work = Work(**{name: getattr(self.work, name) + more.get(name, 0) for name in Work.__dataclass_fields__})

    def _admit(self) -> None:
        """Requests that wait get the rows that are free."""
        with self._changed:
            for job in [job for job in self._waiting if job.handle.cancelled]:
                self._waiting.remove(job)
                job.started_s = time.monotonic()
                job.handle.finish(self._answer(job, "cancelled"))
            while self._waiting and self._slots.free:
                job = self._waiting.popleft()
                job.started_s = time.monotonic()
                job.held = self._slots.take(job.request.prompt, job.adapter)
                job.shared = job.held.read
                self._going.append(job)

    def _read_prompts(self) -> None:
        """A piece of each of some prompts, those of like length that came first."""
        able: list[Job] = []
        for job in (job for job in self._going if job.reading):
            found = self._slots.copyable(job.row)
            if found is not None:
                source, end = found
                self._rows.copy(source.slot, job.row.slot, job.row.read, end)
                job.shared += end - job.row.read
                job.row.read = end
            if not self._slots.waits(job.row):
                able.append(job)
        if not able:
            return
        width = self._piece(able[0])
        jobs = [job for job in able if self._piece(job) == width][: self._rows.most(width)]
        parts = []
        for job in jobs:
            start = job.row.read
            tokens = job.request.prompt[start : start + self._rows.chunk]
            parts.append(Part(job.row.slot, tokens, start, job.adapter))
            job.row.read += len(tokens)
        self._count(read_tokens=sum(len(part.tokens) for part in parts))
        logits = self._rows.read(parts, width)
        ready = [i for i, job in enumerate(jobs) if not job.reading]
        if ready:
            self._advance([jobs[i] for i in ready], logits[torch.tensor(ready, device=logits.device)])

    def _piece(self, job: Job) -> int:
        """Tokens of the shape in which the next piece of a prompt is read."""
        left = len(job.request.prompt) - job.row.read
        size = max(SMALLEST_PIECE, 1 << (left - 1).bit_length())
        return min(self._rows.chunk, size * 3 // 4 if size > 2 * SMALLEST_PIECE and left <= size * 3 // 4 else size)

    def _next_tokens(self) -> None:
        jobs = [job for job in self._going if job.tokens and not job.reading]
        if not jobs:
            return
        if self._rows.widths:
            others = [job.row.slot for job in self._going if not job.tokens]
            _, moves = window([job.row.slot for job in jobs], others, self.rows, self._rows.widths)
            rows = {job.row.slot: job.row for job in jobs}
            for source, target in moves:
                self._rows.copy(source, target, 0, rows[source].read)
                self._slots.move(rows[source], target)
        parts = [Part(job.row.slot, job.tokens[-1:], job.row.read, job.adapter) for job in jobs]
        for job in jobs:
            job.row.read += 1
        self._count(steps=1)
        self._advance(jobs, self._rows.read(parts, 1))

    def _advance(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """One token more for each, from the logits [N, V] behind it."""
        limited = logits
        if any(job.grammar is not None for job in jobs):
            every = torch.ones(logits.shape[-1], dtype=torch.bool)
            masks = [every if job.grammar is None else job.grammar.allowed() for job in jobs]
            limited = logits.masked_fill(~torch.stack(masks).to(logits.device), -torch.inf)
        drawn = choose(limited, [job.draw() for job in jobs])
        finite = logits.gather(-1, drawn[:, None])[:, 0].isfinite().tolist()
        final = [token if job.grammar is None else job.grammar.take(token) for job, token in zip(jobs, drawn.tolist(), strict=True)]
        said = [0.0] * len(jobs)
        if any(job.request.logprobs for job in jobs):
            said = log_probabilities(logits, torch.tensor(final, device=logits.device)).tolist()
        self._count(new_tokens=len(jobs))
        for i, job in enumerate(jobs):
            job.error = None if finite[i] else not_finite()
            self._take(job, final[i], said[i])

    def _take(self, job: Job, token: int, logprob: float) -> None:
        if job.first_s is None:
            job.first_s = time.monotonic()
        if job.grammar is not None:
            job.error = job.error or job.grammar.trouble
        if token in self.stops:
            self._end(job, "stop")
            return
        job.tokens.append(token)
        job.logprobs.append(logprob)
        if job.text is not None:
            self._give(job, job.text.add(token))
        stopped = (job.text is not None and job.text.stopped) or (job.grammar is not None and job.grammar.ended)
        if stopped or job.error is not None:
            self._end(job, "stop")
        elif len(job.tokens) == job.request.max_new_tokens:
            self._end(job, "length")

    def _give(self, job: Job, piece: str) -> None:
        if job.request.on_text is not None and piece and job.error is None:
            try:
                job.request.on_text(piece)
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends this answer alone, and is raised where that is asked for
                job.error = error
        if job.request.stream:
            job.handle.give(piece)

    def _end(self, job: Job, finished: Finished) -> None:
        if job.text is not None:
            self._give(job, job.text.rest())
        if job.error is not None:
            with self._changed:
                self._leave(job, sound=False)
            job.handle.finish(None, job.error)
            return
        answer = self._answer(job, "stop" if job.text is not None and job.text.stopped else finished)
        if not job.request.stream:
            job.handle.give(answer.text)
        with self._changed:
            self._leave(job)
        self._count(answers=1, shared_tokens=job.shared)
        job.handle.finish(answer)

    def _leave(self, job: Job, *, sound: bool = True) -> None:
        """The row is free. sound: what is in it can be shared."""
        self._going.remove(job)
        block = self._rows.block
        if block is None or not sound:
            self._rows.clear(job.row.slot)
            self._slots.leave(job.row, ())
        else:
            # A step computes the last digits of a key otherwise than a piece of a prompt does.
            known = job.request.prompt if self._steady else (*job.request.prompt, *job.tokens)
            self._slots.leave(job.row, known)

    def _answer(self, job: Job, finished: Finished) -> Answer:
        now = time.monotonic()
        text = job.text.text if job.text is not None else self._tokenizer.decode(job.tokens, skip_special_tokens=True)
        return Answer(
            text=text,
            tokens=tuple(job.tokens),
            logprobs=tuple(job.logprobs) if job.request.logprobs else None,
            finished=finished,
            prompt_tokens=len(job.request.prompt),
            shared_tokens=job.shared,
            waited_s=job.started_s - job.asked_s,
            first_s=None if job.first_s is None else job.first_s - job.started_s,
            total_s=now - job.started_s,
        )
