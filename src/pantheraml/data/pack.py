"""Examples into a few static shapes: rows of a fixed length, filled as well as it goes.

One static shape means one compilation. Examples that share a row stay apart: positions restart at 0
with each of them, and no label reaches from one into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from pantheraml.data.chat import Example

IGNORED = -100
# Attention computes about 4 * n * hidden FLOPs per token and layer in rows of n tokens, the linear layers 24 * hidden^2:
# as much at n = 6 * hidden, so 4096 stands for small models. It only orders row lengths that waste about equally.
ATTENTION_TOKENS = 4096
# Rows are cut to multiples of this. Each new width costs a CPU new machine code for bfloat16 products (oneDNN keeps up to
# a thousand such kernels), and it would be a new one nearly every step.
TRIM_TOKENS = 32
# Where a shape shall come again, a length is one of so many between a power of two and the next: at most an eighth is added.
LENGTHS_AN_OCTAVE = 8

Bins = list[list[int]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What the device takes at once: int64 arrays [B, T].

    Attributes:
        input_ids: tokens; the pad token where there is none.
        position_ids: restart at 0 with each example. Padding goes on counting from the last example of its row, so
            that it is not one more sequence, and a row with one example is a plain 0..T-1.
        labels: the token to predict at this place, already shifted; -100 where nothing is learned.
        real_tokens: tokens that are not padding.
        label_count: labels that are not -100.
        starts, longest: see `segments`.
        labelled: see `labelled_tokens`.
        filler: its loss counts for nothing: it is computed because other processes meet this one there.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    real_tokens: int
    label_count: int
    filler: bool = False
    starts: np.ndarray = field(init=False)
    longest: int = field(init=False)
    labelled: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        starts, longest = segments(self.position_ids)
        for name, value in (("starts", starts), ("longest", longest), ("labelled", labelled_tokens(self.labels))):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All examples of one optimizer step, each exactly once; the mean loss is over its `label_count`."""

    micro: tuple[MicroBatch, ...]
    label_count: int
    tokens: int
    where: tuple[str, ...]


def segments(position_ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Where the S examples of positions [B, T] begin in the B*T tokens one after the other, and the tokens of the longest.

    int32 [S + 1], from 0 to B*T. Padding belongs to the last example of its row; an empty row is one of its own.
    """
    begins = position_ids == 0
    begins[:, 0] = True
    starts = np.append(np.flatnonzero(begins), position_ids.size).astype(np.int32)
    return starts, int(np.diff(starts).max())


def labelled_tokens(labels: np.ndarray) -> np.ndarray:
    """Which of the B*T tokens, one row after the other, have a label that is not -100: int64, rising."""
    return np.flatnonzero(labels.ravel() != IGNORED).astype(np.int64)


def pieces(micro: MicroBatch) -> int:
    """Into how many parts a micro-batch can be divided: its rows, or the examples of the only one."""
    return len(micro.input_ids) if len(micro.input_ids) > 1 else len(micro.starts) - 1


def divided(micro: MicroBatch, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(input_ids, position_ids, labels) of at most `parts` pieces of about the same size; an example is never cut."""
    arrays = (micro.input_ids, micro.position_ids, micro.labels)
    rows, tokens = micro.input_ids.shape
    if rows > 1:
        at_once = -(-rows // parts)
        for start in range(0, rows, at_once):
            ids, positions, labels = (array[start : start + at_once] for array in arrays)
            yield ids, positions, labels
        return
    wanted = tokens * np.arange(1, parts) / parts
    nearest = {int(micro.starts[np.abs(micro.starts - at).argmin()]) for at in wanted}
    for start, end in pairwise(sorted({0, tokens} | nearest)):
        ids, positions, labels = (array[:, start:end] for array in arrays)
        yield ids, positions, labels


def lengthened(
    input_ids: np.ndarray, position_ids: np.ndarray, labels: np.ndarray, *, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A single row [1, T], so long that the same length comes again soon; more rows as they are. What is added is an example without labels.

    Args:
        most: tokens up to which a row is lengthened.
    """
    rows, tokens = input_ids.shape
    more = min(next_length(tokens), most) - tokens
    return (input_ids, position_ids, labels) if rows > 1 else _with_more(input_ids, position_ids, labels, max(0, more))


def in_one_row(
    input_ids: np.ndarray, position_ids: np.ndarray, labels: np.ndarray, *, multiple: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [B, T] one after the other, as [1, N] with N a multiple. What is added for that is an example without labels."""
    ids, positions, all_labels = (array.reshape(1, -1) for array in (input_ids, position_ids, labels))
    return _with_more(ids, positions, all_labels, -input_ids.size % multiple)


def _with_more(input_ids: np.ndarray, position_ids: np.ndarray, labels: np.ndarray, more: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A single row with an example of so many tokens behind it, which has no labels."""
    if not more:
        return input_ids, position_ids, labels
    added = (np.zeros((1, more), np.int64), np.arange(more)[None], np.full((1, more), IGNORED))
    ids, positions, all_labels = (np.concatenate(pair, axis=1) for pair in zip((input_ids, position_ids, labels), added, strict=True))
    return ids, positions, all_labels


def next_length(number: int) -> int:
    """`number`, or the next of the points that divide each octave evenly into LENGTHS_AN_OCTAVE."""
    step = max(1, (1 << (number - 1).bit_length()) // 2 // LENGTHS_AN_OCTAVE) if number > 1 else 1
    return -(-number // step) * step


def pack_step(
    examples: Sequence[Example], *, row_tokens: tuple[int, ...], micro_tokens: int, packing: bool, pad_id: int, trim: bool
) -> StepBatch:
    """Lays the examples of one step into micro-batches; the same examples give the same arrays.

    Args:
        row_tokens: allowed row lengths, rising. A micro-batch has max(1, micro_tokens // n) rows of n tokens.
        packing: several examples may share a row. Otherwise each has its own.
        trim: for devices without static shapes: leave out empty rows, and cut rows to the longest in use, in TRIM_TOKENS.
    Raises: ValueError if there are no examples, or one is longer than the longest row.
    """
    layout = _layout([len(example.tokens) for example in examples], row_tokens, micro_tokens, packing, trim)
    micro = tuple(_fill([[examples[i] for i in row] for row in rows], n, height, pad_id, trim) for n, height, rows in layout)
    return StepBatch(
        micro,
        label_count=sum(batch.label_count for batch in micro),
        tokens=sum(batch.real_tokens for batch in micro),
        where=tuple(examples[i].where for _, _, rows in layout for row in rows for i in row),
    )


def share_step(
    examples: Sequence[Example], pack: Callable[[Sequence[Example]], StepBatch], *, rank: int, size: int, in_step: bool
) -> StepBatch:
    """This process's share of the examples of one step, packed; all processes together take each example exactly once.

    The counts are those of the whole step, so that losses add up to its mean.

    Args:
        pack: lays examples into micro-batches.
        rank, size: of this process among those that share the examples.
        in_step: all have as many micro-batches, each with a label; those that are added count for nothing. Otherwise each has at least one.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    # The longest first, each to who has least, so that all are done at about the same time.
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens)):
        least = min(range(size), key=lambda each: tokens[each])
        shares[least].append(i)
        tokens[least] += len(examples[i].tokens)
    packed = [pack([examples[i] for i in sorted(share)]) if share else None for share in shares]
    most = max(len(each.micro) for each in packed if each is not None)
    own = packed[rank]
    micro = () if own is None else own.micro
    model = next(each for each in packed if each is not None).micro[-1]
    if in_step or not any(each.label_count for each in micro):
        micro = tuple(each if each.label_count else _filler(each) for each in micro)
    missing = (most if in_step else 1) - len(micro)
    return StepBatch(
        micro + (_filler(model),) * max(0, missing),
        label_count=sum(each.label_count for each in packed if each is not None),
        tokens=sum(each.tokens for each in packed if each is not None),
        where=tuple(where for each in packed if each is not None for where in each.where),
    )


def _filler(like: MicroBatch) -> MicroBatch:
    """A micro-batch of the same shape with a single label, for its first token."""
    labels = np.full_like(like.labels, IGNORED)
    labels[0, 0] = like.input_ids[0, 0]
    return MicroBatch(like.input_ids, like.position_ids, labels, real_tokens=0, label_count=0, filler=True)


def efficiency(
    lengths: Sequence[int], *, batch_size: int, row_tokens: tuple[int, ...], micro_tokens: int, packing: bool, trim: bool = False
) -> float:
    """Real tokens over all tokens computed, for examples of these lengths taken `batch_size` at a time."""
    computed = 0
    for start in range(0, len(lengths), batch_size):
        step = [int(length) for length in lengths[start : start + batch_size]]
        for n, height, rows in _layout(step, row_tokens, micro_tokens, packing, trim):
            computed += _trimmed(n, max(sum(step[i] for i in row) for row in rows)) * len(rows) if trim else n * height
    return float(sum(int(length) for length in lengths) / computed) if computed else 0.0


def _layout(
    lengths: Sequence[int], row_tokens: tuple[int, ...], micro_tokens: int, packing: bool, trim: bool
) -> list[tuple[int, int, Bins]]:
    """(row length, rows of the shape, examples of each used row) for each micro-batch."""
    if not lengths:
        raise ValueError("a step needs at least one example")
    if max(lengths) > row_tokens[-1]:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit into rows of {row_tokens[-1]}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    fits = [n for n in row_tokens if n >= max(lengths)]
    layout: list[tuple[int, int, Bins]] = []
    if packing:
        candidates = [(n, _first_fit(order, lengths, n)) for n in fits]
        n, rows = min(candidates, key=lambda candidate: _cost(candidate[0], len(candidate[1]), micro_tokens, trim))
        height = max(1, micro_tokens // n)
        return [(n, height, rows[start : start + height]) for start in range(0, len(rows), height)]
    while order:
        n = next(n for n in row_tokens if n >= lengths[order[0]])
        height = max(1, micro_tokens // n)
        layout.append((n, height, [[i] for i in order[:height]]))
        order = order[height:]
    return layout


def _first_fit(order: Sequence[int], lengths: Sequence[int], n: int) -> Bins:
    """First-fit decreasing: the longest example first, each into the first row that has room."""
    rows: Bins = []
    room: list[int] = []
    for i in order:
        row = next((row for row, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(n)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def _cost(n: int, rows: int, micro_tokens: int, trim: bool) -> float:
    height = max(1, micro_tokens // n)
    computed = rows if trim else -(-rows // height) * height
    return computed * n * (1 + n / ATTENTION_TOKENS)


def _trimmed(n: int, longest: int) -> int:
    """The length to which rows of n tokens are cut where the longest in use has so many."""
    return min(n, -(-longest // TRIM_TOKENS) * TRIM_TOKENS)


def _fill(rows: Sequence[Sequence[Example]], n: int, height: int, pad_id: int, trim: bool) -> MicroBatch:
    if trim:
        height = len(rows)
        n = _trimmed(n, max(sum(len(example.tokens) for example in row) for row in rows))
    input_ids = np.full((height, n), pad_id, dtype=np.int64)
    position_ids = np.tile(np.arange(n, dtype=np.int64), (height, 1))
    labels = np.full((height, n), IGNORED, dtype=np.int64)
    real_tokens = 0
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.tokens)
            input_ids[r, start:end] = example.tokens
            position_ids[r, start:] = np.arange(n - start)
            labels[r, start : end - 1] = np.where(example.loss[1:], example.tokens[1:], IGNORED)
            start = end
        real_tokens += start
    return MicroBatch(input_ids, position_ids, labels, real_tokens, int((labels != IGNORED).sum()))
