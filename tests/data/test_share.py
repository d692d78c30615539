"""The shares of a step that several processes take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.data.chat import Example
from pantheraml.data.pack import IGNORED, StepBatch, pack_step, share_step


def example(i: int, length: int, learned: bool) -> Example:
    return Example(np.full(length, i + 1, np.int32), np.full(length, learned), f"rows:{i}")


def packed(examples: Any) -> StepBatch:
    return pack_step(list(examples), row_tokens=(32,), micro_tokens=64, packing=True, pad_id=0, trim=True)


def learned_tokens(batch: StepBatch) -> Counter[int]:
    """How often each example's number is a label that counts."""
    found: Counter[int] = Counter()
    for micro in batch.micro:
        if not micro.filler:
            found.update(int(label) for label in micro.labels.ravel() if label != IGNORED)
    return found


@given(
    lengths=st.lists(st.tuples(st.integers(2, 32), st.booleans()), min_size=1, max_size=20),
    size=st.integers(1, 5),
    in_step=st.booleans(),
)
def test_all_shares_together_are_the_step(lengths: list[tuple[int, bool]], size: int, in_step: bool) -> None:
    examples = [example(i, length, learned) for i, (length, learned) in enumerate(lengths)]
    whole = packed(examples)
    shares = [share_step(examples, packed, rank=rank, size=size, in_step=in_step) for rank in range(size)]
    assert sum((learned_tokens(share) for share in shares), Counter()) == learned_tokens(whole)
    for share in shares:
        assert (share.label_count, share.tokens) == (whole.label_count, whole.tokens)
        assert sorted(share.where) == sorted(whole.where)
        assert share.micro
        # Nothing that is added counts: neither as a label nor as a token that was read.
        assert all(micro.label_count == micro.real_tokens == 0 for micro in share.micro if micro.filler)
    if in_step:
        assert len({len(share.micro) for share in shares}) == 1
        assert all((micro.labels != IGNORED).any() for share in shares for micro in share.micro)


def test_shares_are_about_equal_and_always_the_same() -> None:
    drawn = np.random.default_rng(0)
    examples = [example(i, int(length), True) for i, length in enumerate(drawn.integers(2, 32, 64))]

    def tokens(rank: int) -> int:
        return sum(micro.real_tokens for micro in share_step(examples, packed, rank=rank, size=4, in_step=True).micro)

    counts = [tokens(rank) for rank in range(4)]
    assert max(counts) - min(counts) <= 32
    assert counts == [tokens(rank) for rank in range(4)]


def test_more_processes_than_examples_leaves_some_with_filler_alone() -> None:
    shares = [share_step([example(0, 9, True)], packed, rank=rank, size=3, in_step=False) for rank in range(3)]
    assert [[micro.filler for micro in share.micro] for share in shares] == [[False], [True], [True]]


def test_a_step_without_examples_is_refused() -> None:
    with pytest.raises(ValueError):
        share_step([], packed, rank=0, size=2, in_step=False)
