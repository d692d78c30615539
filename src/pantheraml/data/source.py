"""The order of examples: which of them each optimizer step takes, from memory or while reading.

Order is a function of the seed and the step number alone, so that a run that goes on from step k sees
exactly what it would have seen.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import blake3
import numpy as np

from pantheraml.data.chat import Encoder, Example
from pantheraml.data.load import BadRow, BadRows, Row, UnusableRow, fingerprint, read_rows
from pantheraml.errors import DataError
from pantheraml.recipe.types import DataSpec

BUFFER_ROWS = 1024


class Source(Protocol):
    """Where the training loop takes its examples from."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal data in equal order; a checkpoint of other data cannot go on."""
        ...

    def step(self, k: int) -> list[Example]:
        """The examples of step k, from 0. Raises: IndexError past the last step."""
        ...

    def seek(self, k: int) -> None:
        """Makes step k the next one."""
        ...


@dataclass(slots=True)
class Counts:
    """What became of the rows. `split` and `truncated` rows are used, `dropped` and `bad` ones are not."""

    rows: int = 0
    used: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    bad: int = 0
    tokens: int = 0
    label_tokens: int = 0


class Examples(Sequence[Example]):
    """Examples in memory, without an object for each: 5 bytes a token.

    Attributes:
        lengths: int64 [N], tokens of each example.
        fingerprint: hash of all tokens and marks, in order.
        counts: what became of the rows they were made from.
    """

    def __init__(self, examples: Iterable[Example], counts: Counts | None = None) -> None:
        tokens, loss, lengths, lines, files = array("i"), bytearray(), array("q"), array("q"), array("i")
        names: dict[str, int] = {}
        for example in examples:
            tokens.frombytes(example.tokens.astype(np.int32).tobytes())
            loss += example.loss.astype(np.bool_).tobytes()
            lengths.append(len(example.tokens))
            file, _, line = example.where.rpartition(":")
            files.append(names.setdefault(file, len(names)))
            lines.append(int(line))
        self._tokens = np.frombuffer(tokens, dtype=np.int32)
        self._loss = np.frombuffer(loss, dtype=np.bool_)
        self.lengths = np.frombuffer(lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._names, self._files, self._lines = list(names), files, lines
        self.counts = counts or Counts(
            rows=len(self), used=len(self), tokens=len(self._tokens), label_tokens=int(np.count_nonzero(self._loss))
        )
        seen = blake3.blake3()
        for part in (self.lengths, self._tokens, self._loss):
            seen.update(part.tobytes())
        self.fingerprint = seen.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        index = range(len(self))[index]
        end = int(self._ends[index])
        start = end - int(self.lengths[index])
        return Example(self._tokens[start:end], self._loss[start:end], f"{self._names[self._files[index]]}:{self._lines[index]}")


def tokenize(
    rows: Iterable[Row],
    encoder: Encoder,
    spec: DataSpec,
    max_tokens: int,
    bad: BadRows,
    progress: Callable[[int], None] | None = None,
    *,
    needed: bool = True,
) -> Examples:
    """All rows as examples, in memory.

    Args:
        max_tokens: longest example; `spec.too_long` says what happens to longer ones.
        bad: is given each row that cannot be used.
        progress: is called after each row with the number of rows so far.
        needed: rows of which none can be used are an error.
    Raises: DataError by `bad`, for a long row where `spec.too_long` is error, or if no row could be used.
    """
    counts = Counts()
    # Rows that could not even be read were counted in `bad` while reading, so the difference is taken.
    already = len(bad.rows)

    def encoded() -> Iterator[Example]:
        for row in rows:
            yield from _encode(row, encoder, spec, max_tokens, bad, counts)
            if progress is not None:
                progress(counts.rows)

    examples = Examples(encoded(), counts)
    unread = max(0, len(bad.rows) - already - counts.bad)
    counts.rows += unread
    counts.bad += unread
    if needed and counts.rows and not len(examples):
        raise _nothing_to_learn(f"none of the {counts.rows} rows can be used", bad)
    return examples


def _nothing_to_learn(what: str, bad: BadRows) -> DataError:
    return DataError(
        what,
        why=bad.table() or "the others are held out for evaluation, or longer than model.max_tokens where data.too_long is drop",
        fix="correct the rows, set data.format, raise model.max_tokens, or lower data.eval_fraction",
    )


def _encode(row: Row, encoder: Encoder, spec: DataSpec, max_tokens: int, bad: BadRows, counts: Counts) -> list[Example]:
    """The examples of one row: one as a rule, none if it is bad or dropped, several if it is split."""
    counts.rows += 1
    try:
        examples = _shorten(encoder.encode(row), spec, max_tokens, counts)
    except UnusableRow as error:
        counts.bad += 1
        bad(BadRow.of(row, str(error)))
        return []
    counts.used += bool(examples)
    counts.tokens += sum(len(example.tokens) for example in examples)
    counts.label_tokens += sum(int(np.count_nonzero(example.loss)) for example in examples)
    return examples


def _shorten(example: Example, spec: DataSpec, max_tokens: int, counts: Counts) -> list[Example]:
    length = len(example.tokens)
    if length <= max_tokens:
        return [example]
    match spec.too_long:
        case "drop":
            counts.dropped += 1
            return []
        case "error":
            raise DataError(
                f"{example.where} has {length} tokens, and model.max_tokens is {max_tokens}",
                why="data.too_long is error: no row may be cut",
                fix="raise model.max_tokens, shorten the row, or set data.too_long to truncate, drop or split",
            )
        case "truncate":
            if not example.loss[:max_tokens].any():
                raise UnusableRow("the prompt is longer than model.max_tokens, so no token is left to learn")
            counts.truncated += 1
            return [Example(example.tokens[:max_tokens], example.loss[:max_tokens], example.where)]
        case "split":
            # Each piece begins with the last token of the one before, so that every label is learned, once.
            step = max(1, max_tokens - 1)
            pieces: list[Example] = []
            for start in range(0, length - 1, step):
                loss = example.loss[start : start + max_tokens].copy()
                loss[0] = False
                if loss.any():
                    pieces.append(Example(example.tokens[start : start + max_tokens], loss, example.where))
            if not pieces:
                raise UnusableRow("model.max_tokens is too small to learn anything")
            counts.split += 1
            return pieces


def content_key(row: Row) -> bytes:
    """16 bytes that are equal for rows with equal content, wherever they stand."""
    return blake3.blake3(json.dumps(row.record, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")).digest(
        16
    )


def split(rows: Iterable[Row], fraction: float, max_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, eval): about `fraction` of the rows, at most `max_rows`, are held out.

    The choice depends on content and seed alone. Equal rows stay on one side. With ten distinct rows or
    more at least one is held out; at least one distinct row is left to train on.
    """
    rows = list(rows)
    keys = [content_key(row) for row in rows]
    copies = Counter(keys)
    wanted = min(max_rows, max(int(fraction * len(rows)), 1 if fraction > 0 and len(copies) >= 10 else 0))
    held: set[bytes] = set()
    count = 0
    salt = seed.to_bytes(16, "little")
    for key in sorted(copies, key=lambda key: blake3.blake3(salt + key).digest()):
        if count + copies[key] <= wanted and len(held) + 1 < len(copies):
            held.add(key)
            count += copies[key]
    return (
        [row for row, key in zip(rows, keys, strict=True) if key not in held],
        [row for row, key in zip(rows, keys, strict=True) if key in held],
    )


def overlap(train: Sequence[Example], evaluation: Sequence[Example]) -> list[tuple[str, str]]:
    """(place in evaluation, first place in train) of the examples with the same tokens in both."""

    def key(example: Example) -> bytes:
        return blake3.blake3(example.tokens.tobytes()).digest(16)

    places: dict[bytes, str] = {}
    for example in train:
        places.setdefault(key(example), example.where)
    return [(example.where, places[found]) for example in evaluation if (found := key(example)) in places]


def _digest(*parts: object) -> str:
    return blake3.blake3(repr(parts).encode()).hexdigest()


class Shuffled:
    """A `Source` over examples in memory.

    Step k takes the places [k * B, (k + 1) * B) in the endless row of epochs. Each epoch has its own
    permutation, from its number and the seed; without `shuffle` all keep the order of the file.

    Args:
        epochs: passes over the examples; the last step may be smaller. Overruled by `steps`.
        steps: optimizer steps, all of full size.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, seed: int, shuffle: bool = True, *, epochs: float | None, steps: int | None
    ) -> None:
        if not len(examples) or (epochs is None) == (steps is None):
            raise ValueError("needs examples, and either epochs or steps")
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._total = _total(len(examples), batch_size, epochs, steps)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self._total / self._batch_size)

    @property
    def fingerprint(self) -> str:
        """Of the data and its order."""
        return _digest(getattr(self._examples, "fingerprint", ""), self._batch_size, self._seed, self._shuffle)

    def step(self, k: int) -> list[Example]:
        """The examples of step k. Raises: IndexError past the last step."""
        _within(k, self.total_steps)
        places = range(k * self._batch_size, min((k + 1) * self._batch_size, self._total))
        return [self._at(place) for place in places]

    def seek(self, k: int) -> None:
        """Does nothing: every step is found by its number."""

    def _at(self, place: int) -> Example:
        epoch, offset = divmod(place, len(self._examples))
        if not self._shuffle:
            return self._examples[offset]
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._examples)))
        return self._examples[int(self._order[1][offset])]


def _total(examples: int, batch_size: int, epochs: float | None, steps: int | None) -> int:
    """How many examples a run takes."""
    # 0.1 * 30 is a little more than 3 in floating point, and must not become 4.
    return steps * batch_size if steps is not None else math.ceil(round(examples * (epochs or 0), 6))


def _within(k: int, total_steps: int) -> None:
    if not 0 <= k < total_steps:
        raise IndexError(f"step {k} of {total_steps}")


class Streamed:
    """A `Source` that reads and encodes while training, for sets larger than memory.

    Rows are shuffled in a buffer: each row that comes in takes the place of a random one, which goes out. The
    files are read again in each epoch, in a new order. At most `buffer_rows` rows are in memory.

    Args:
        paths: as for `read_rows`.
        epochs: passes over the data. They are counted in a first pass, which encodes only where a row may give
            no example or several. Overruled by `steps`, which needs no first pass.
        without: content keys of rows that are left out, because they are held out for evaluation.
    Raises: DataError as `read_rows` and `bad` do, or if an epoch has no usable row.
    """

    def __init__(
        self,
        paths: Sequence[str],
        encoder: Encoder,
        spec: DataSpec,
        max_tokens: int,
        bad: BadRows,
        *,
        batch_size: int,
        seed: int,
        epochs: float | None,
        steps: int | None,
        buffer_rows: int = BUFFER_ROWS,
        without: frozenset[bytes] = frozenset(),
    ) -> None:
        if (epochs is None) == (steps is None):
            raise ValueError("needs either epochs or steps")
        self._paths = paths
        self._encoder = encoder
        self._spec = spec
        self._max_tokens = max_tokens
        self._bad = bad
        self._batch_size = batch_size
        self._seed = seed
        self._buffer_rows = buffer_rows
        self._without = without
        self.counts = Counts()
        # A row gives exactly one example, or the run stops. Then rows can be counted and skipped without encoding.
        self._one_each = spec.on_bad_row == "fail" and spec.too_long in ("truncate", "error")
        per_epoch = self._count() if steps is None else 0
        if steps is None and not per_epoch:
            raise _nothing_to_learn("no row is left to train on", bad)
        self._total = _total(per_epoch, batch_size, epochs, steps)
        self.seek(0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self._total / self._batch_size)

    @property
    def fingerprint(self) -> str:
        """Of the files' names, sizes, heads and tails, and of the order."""
        return _digest(fingerprint(self._paths), self._batch_size, self._seed, self._spec.shuffle, self._buffer_rows, sorted(self._without))

    def step(self, k: int) -> list[Example]:
        """The examples of step k. Cheap for the step after the last one; any other is sought first."""
        _within(k, self.total_steps)
        if k != self._next:
            self.seek(k)
        self._next = k + 1
        return list(islice(self._stream, min(self._batch_size, self._total - k * self._batch_size)))

    def seek(self, k: int) -> None:
        """Makes step k the next one by going through the data up to there."""
        skipped = k * self._batch_size
        if self._one_each:
            self._stream = self._examples(skip_rows=skipped)
        else:
            self._stream = self._examples()
            next(islice(self._stream, skipped, skipped), None)
        self._next = k

    def _count(self) -> int:
        if self._one_each:
            return sum(1 for _ in self._rows())
        counts = Counts()
        return sum(len(_encode(row, self._encoder, self._spec, self._max_tokens, self._bad, counts)) for row in self._rows())

    def _rows(self) -> Iterator[Row]:
        for row in read_rows(self._paths, on_bad=self._bad):
            if not self._without or content_key(row) not in self._without:
                yield row

    def _examples(self, skip_rows: int = 0) -> Iterator[Example]:
        epoch = 0
        self.counts = Counts()
        while True:
            rows = 0
            usable = False
            for row in self._epoch(epoch):
                rows += 1
                if skip_rows:
                    skip_rows -= 1
                    usable = True
                    continue
                examples = _encode(row, self._encoder, self._spec, self._max_tokens, self._bad, self.counts)
                usable = usable or bool(examples)
                yield from examples
            if not usable:
                raise _nothing_to_learn(f"none of the {rows} rows can be used", self._bad)
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Row]:
        if not self._spec.shuffle:
            yield from self._rows()
            return
        draw = np.random.default_rng([self._seed, epoch])
        buffer: list[Row] = []
        for row in self._rows():
            if len(buffer) < self._buffer_rows:
                buffer.append(row)
                continue
            place = int(draw.integers(len(buffer)))
            buffer[place], row = row, buffer[place]
            yield row
        for place in draw.permutation(len(buffer)):
            yield buffer[place]
