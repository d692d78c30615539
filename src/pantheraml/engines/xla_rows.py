"""The rows of a step in as few shapes as can be: each of them is compiled.

Letters: A micro-batches, B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pantheraml.data.pack import IGNORED, MicroBatch
from pantheraml.engines.xla_arrays import Spread
from pantheraml.hardware.recovery import halvings
from pantheraml.planning.plan import Plan

Shape = tuple[int, int]
"""Rows of a micro-batch over all devices, and tokens of a row."""


def shapes_of(plan: Plan, spread: Spread) -> set[Shape]:
    """Every shape that the plan's packer can lay out, whole or divided."""
    heights = {tokens: max(1, plan.micro_tokens // tokens) for tokens in plan.row_tokens}
    return {(spread.full_rows(-(-height // parts)), tokens) for tokens, height in heights.items() for parts in halvings(height)}


def ladder(micro: Sequence[MicroBatch], spread: Spread) -> tuple[int, ...]:
    """In how many parts micro-batches can be taken, down to a row for each device that takes some."""
    return halvings(max((-(-len(each.input_ids) // spread.shares) for each in micro), default=1))


def stacked(
    micro: Sequence[MicroBatch], parts: int, spread: Spread, *, batch_size: int
) -> Iterator[tuple[Shape, tuple[np.ndarray, ...], int]]:
    """(shape, token ids, positions and labels [A, B, T], how many of the A are there) for each shape among micro-batches.

    Args:
        parts: each micro-batch is taken in so many, or as many as it has rows.
        batch_size: examples of a step; A is the most that one can have, so that it seldom changes.
    """
    shapes: dict[tuple[int, ...], list[MicroBatch]] = {}
    for each in micro:
        shapes.setdefault(each.input_ids.shape, []).append(each)
    for (height, tokens), those in shapes.items():
        at_once = -(-height // parts)
        rows, pieces = spread.full_rows(at_once), -(-height // at_once)
        most = pieces * max(len(those), -(-batch_size // height))
        empty = {"input_ids": 0, "position_ids": np.arange(tokens), "labels": IGNORED}
        arrays = {name: np.full((most, rows, tokens), filler, np.int32) for name, filler in empty.items()}
        for name, array in arrays.items():
            for i, each in enumerate(those):
                for j in range(pieces):
                    piece = getattr(each, name)[j * at_once : (j + 1) * at_once]
                    array[i * pieces + j, : len(piece)] = piece
        yield (rows, tokens), tuple(arrays.values()), pieces * len(those)
