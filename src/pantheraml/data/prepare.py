"""All that a run takes from its data: what is learned, what is held out, which questions are asked, and what was said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import blake3

from pantheraml.data.chat import Encoder, Question, ensure_chat_template, read_chat_template
from pantheraml.data.inspect import open_rows
from pantheraml.data.load import HUB, BadRows, Detected, Row, UnusableRow, detect_format, read_rows, rows_of
from pantheraml.data.source import Examples, Shuffled, Source, Streamed, content_key, overlap, split, tokenize
from pantheraml.errors import DataError
from pantheraml.recipe.types import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_MEMORY = "<memory>"  # stands in a recipe where its rows were given by a program
STREAMED_HOLDOUT_ROWS = 100_000  # rows looked at to hold some out, where the data is not read as a whole

Records = Iterable[Mapping[str, Any]]
LossOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The data of one run.

    Attributes:
        train: None where it is streamed. held_out: for the loss; empty if nothing is held out.
        questions: held-out rows to be answered by generation.
        shared: (place in eval, place in train) of equal examples.
        notes: sentences to announce.
    """

    detected: Detected
    encoder: Encoder
    spec: DataSpec
    max_tokens: int
    train: Examples | None
    held_out: Examples
    questions: tuple[Question, ...]
    shared: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    bad: BadRows
    held_keys: frozenset[bytes]

    def source(self, *, batch_size: int, seed: int, epochs: float, steps: int | None) -> Source:
        """The training examples in the order of the run."""
        how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "epochs": None if steps else epochs, "steps": steps}
        if self.train is not None:
            return Shuffled(self.train, shuffle=self.spec.shuffle, **how)
        return Streamed(self.spec.train, self.encoder, self.spec, self.max_tokens, self.bad, without=self.held_keys, **how)


def prepare(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    *,
    max_tokens: int,
    loss_on: LossOn,
    seed: int,
    questions: int,
    memory_bytes: int | None = None,
    train: Records | None = None,
    held_out: Records | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Read, encode and divide the rows.

    Args:
        bad: takes the rows that cannot be used, by its policy.
        questions: how many held-out rows are to be answered by generation.
        memory_bytes: free; files of more than a quarter of it are streamed. None: never.
        train, held_out: rows from memory, instead of those that `spec` names.
        progress: is called with the number of rows encoded so far.
    Raises: DataError for what cannot be read or used.
    """
    notes: list[str] = []
    if train is None and IN_MEMORY in spec.train:
        raise DataError(
            "the rows of this run were given from memory",
            why="they are in no file, so they cannot be read again",
            fix="call pantheraml.train or Trainer again with the same rows and resume, as before",
        )
    if train is None:
        rows, detected = open_rows(spec.train, spec.format, on_bad=bad)
    else:
        kept = list(rows_of(train))
        rows, detected = iter(kept), detect_format(kept) if spec.format == "auto" else Detected(spec.format, "as asked")
    if spec.chat_template:
        tokenizer.chat_template = read_chat_template(spec.chat_template)
    elif detected.format not in ("prompt-completion", "text") and (note := ensure_chat_template(tokenizer)):
        notes.append(note)
    encoder = Encoder(tokenizer, loss_on, detected.format)

    streamed = train is None and _streams(spec, memory_bytes)
    held_rows: list[Row] = []
    if held_out is not None:
        held_rows = list(islice(rows_of(held_out, "<eval>"), spec.max_eval_rows))
    elif spec.eval:
        held_rows = list(islice(read_rows(spec.eval, on_bad=bad), spec.max_eval_rows))
    elif spec.eval_fraction and streamed:
        held_rows = _hold_out(rows, spec, seed)
    elif spec.eval_fraction:
        train_rows, held_rows = split(rows, spec.eval_fraction, spec.max_eval_rows, seed)
        rows = iter(train_rows)

    given = held_out is not None or bool(spec.eval)
    examples = None if streamed else tokenize(rows, encoder, spec, max_tokens, bad, progress)
    held_encoder = _encoder_for(held_rows, encoder, spec) if given else encoder
    if examples is not None and not len(examples):
        raise DataError(
            "there are no rows to train on",
            why=bad.table() or "the data holds none",
            fix="name data with rows, or correct those that cannot be used",
        )
    # Rows taken from train may by chance all be unusable: then nothing is held out, and the bad rows are named like any other.
    held = tokenize(held_rows, held_encoder, spec, max_tokens, bad, needed=given)
    if examples is not None and examples.counts.truncated + examples.counts.dropped + examples.counts.split:
        cut = examples.counts
        notes.append(
            f"Longer than model.max_tokens={max_tokens}: {cut.truncated} rows truncated, {cut.dropped} dropped, {cut.split} split."
        )
    shared = tuple(overlap(examples, held)) if examples is not None else ()
    if shared:
        notes.append(
            f"{len(shared)} of {len(held)} evaluation examples also stand in the training data "
            f"(first: {shared[0][0]} = {shared[0][1]}): the evaluation looks better than it is."
        )
    if bad.rows:
        notes.append(f"{len(bad.rows)} rows cannot be used and are left out:\n{bad.table()}")
    return Prepared(
        detected=detected,
        encoder=encoder,
        spec=spec,
        max_tokens=max_tokens,
        train=examples,
        held_out=held,
        questions=tuple(islice(_questions(held_rows, held_encoder, max_tokens), questions)),
        shared=shared,
        notes=tuple(notes),
        bad=bad,
        held_keys=frozenset(content_key(row) for row in held_rows) if streamed and not given else frozenset(),
    )


def _streams(spec: DataSpec, memory_bytes: int | None) -> bool:
    if spec.streaming != "auto":
        return spec.streaming == "on"
    places = [Path(path) for path in spec.train if not path.startswith(HUB)]
    size = sum(file.stat().st_size for place in places for file in (place.rglob("*") if place.is_dir() else (place,)) if file.is_file())
    return memory_bytes is not None and size > memory_bytes / 4


def _hold_out(rows: Iterator[Row], spec: DataSpec, seed: int) -> list[Row]:
    """Rows chosen by their content alone, so that all copies of a row are left out of training."""
    salt = seed.to_bytes(16, "little")
    bound = int(spec.eval_fraction * 2**32)
    held: dict[bytes, Row] = {}
    for row in islice(rows, STREAMED_HOLDOUT_ROWS):
        key = content_key(row)
        if int.from_bytes(blake3.blake3(salt + key).digest(4), "big") < bound:
            held.setdefault(key, row)
        if len(held) == spec.max_eval_rows:
            break
    return list(held.values())


def _encoder_for(rows: Sequence[Row], encoder: Encoder, spec: DataSpec) -> Encoder:
    """Evaluation files may have another format than the training files."""
    if spec.format != "auto" or not rows:
        return encoder
    return Encoder(encoder.tokenizer, encoder.loss_on, detect_format(rows).format)


def _questions(rows: Iterable[Row], encoder: Encoder, max_tokens: int) -> Iterator[Question]:
    for row in rows:
        try:
            question = encoder.question(row)
        except UnusableRow:
            continue
        if len(question.prompt_tokens) < max_tokens:
            yield replace(question, answer=question.answer.strip())
