from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.data.chat import Example
from pantheraml.data.pack import efficiency, pack_step


def example(length: int, name: int = 0, first: int = 1) -> Example:
    tokens = np.arange(first, first + length, dtype=np.int32)
    loss = np.arange(length) >= length // 2
    loss[0] = False
    return Example(tokens, loss, f"f:{name}")


def test_the_arrays_of_a_packed_row_by_hand():
    a = Example(np.array([11, 12, 13], np.int32), np.array([False, False, True]), "f:1")
    b = Example(np.array([21, 22], np.int32), np.array([False, True]), "f:2")
    step = pack_step([b, a], row_tokens=(8,), micro_tokens=16, packing=True, pad_id=9, trim=False)
    (batch,) = step.micro
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 9, 9, 9], [9] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.labels.tolist() == [[-100, 13, -100, 22, -100, -100, -100, -100], [-100] * 8]
    assert (batch.real_tokens, batch.label_count) == (5, 2)
    assert (step.tokens, step.label_count, step.where) == (5, 2, ("f:1", "f:2"))
    assert {array.dtype for array in (batch.input_ids, batch.position_ids, batch.labels, batch.labelled)} == {np.dtype(np.int64)}
    # The padding is of b's segment, and the empty row is one of its own.
    assert (batch.starts.tolist(), batch.starts.dtype, batch.longest) == ([0, 3, 8, 16], np.dtype(np.int32), 8)
    assert batch.labelled.tolist() == [1, 3]


def test_trim_leaves_out_what_is_empty():
    step = pack_step([example(3), example(5)], row_tokens=(64, 128), micro_tokens=256, packing=False, pad_id=0, trim=True)
    assert [batch.input_ids.shape for batch in step.micro] == [(2, 32)]
    assert step.micro[0].position_ids.tolist() == [list(range(32))] * 2
    # No more than the row, and one step further where an example needs it.
    for longest, row, n in ((5, 8, 8), (33, 64, 64), (65, 128, 96), (97, 100, 100)):
        step = pack_step([example(longest)], row_tokens=(row,), micro_tokens=row, packing=False, pad_id=0, trim=True)
        assert step.micro[0].input_ids.shape == (1, n)


def test_without_packing_each_micro_batch_takes_the_least_shape_that_fits():
    lengths = [3, 30, 7, 8, 9, 2]
    step = pack_step([example(n) for n in lengths], row_tokens=(8, 16, 32), micro_tokens=32, packing=False, pad_id=0, trim=False)
    assert [batch.input_ids.shape for batch in step.micro] == [(1, 32), (2, 16), (4, 8)]


def test_packing_takes_the_cheapest_row_length():
    def shapes(lengths, micro_tokens):
        step = pack_step(
            [example(n) for n in lengths], row_tokens=(16, 32, 64), micro_tokens=micro_tokens, packing=True, pad_id=0, trim=False
        )
        return [batch.input_ids.shape for batch in step.micro]

    assert shapes([16, 16, 16, 16], 64) == [(4, 16)]  # no waste anywhere: short rows have less attention
    assert shapes([11, 11, 10], 32) == [(1, 32)]  # 16 would hold one each, in two micro-batches of two rows
    assert shapes([20], 64) == [(2, 32)]  # the longest decides which lengths are possible
    assert shapes([40], 16) == [(1, 64)]  # one row at least, even over micro_tokens


def test_what_does_not_fit_is_the_callers_mistake():
    shape = {"row_tokens": (8,), "micro_tokens": 8, "packing": True, "pad_id": 0, "trim": False}
    with pytest.raises(ValueError, match="9 tokens does not fit into rows of 8"):
        pack_step([example(9)], **shape)
    with pytest.raises(ValueError, match="at least one example"):
        pack_step([], **shape)


def test_an_example_without_labels_is_only_context():
    silent = Example(np.array([1, 2], np.int32), np.zeros(2, bool), "f:1")
    step = pack_step([silent], row_tokens=(4,), micro_tokens=4, packing=True, pad_id=0, trim=False)
    assert step.label_count == 0 and step.tokens == 2


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=24),
    row_tokens=st.sampled_from([(64,), (16, 64), (8, 16, 32, 64)]),
    micro_tokens=st.sampled_from([8, 64, 200]),
    packing=st.booleans(),
    trim=st.booleans(),
)
def test_every_example_stands_exactly_once(lengths, row_tokens, micro_tokens, packing, trim):
    examples = [example(n, name=i, first=1000 * i + 1) for i, n in enumerate(lengths)]
    shape = {"row_tokens": row_tokens, "micro_tokens": micro_tokens, "packing": packing, "trim": trim}
    step = pack_step(examples, pad_id=0, **shape)
    seen = []
    for batch in step.micro:
        height, n = batch.input_ids.shape
        begins = []
        if not trim:
            assert n in row_tokens and height == max(1, micro_tokens // n)
        for r, (ids, positions, labels) in enumerate(zip(batch.input_ids, batch.position_ids, batch.labels, strict=True)):
            used = int(np.flatnonzero(ids)[-1]) + 1 if ids.any() else 0
            assert (labels[used:] == -100).all() and (used or not trim)
            starts = np.flatnonzero(positions == 0).tolist()
            begins += [r * n + start for start in starts]
            # Between restarts positions count up by one, through the padding to the end of the row.
            assert np.array_equal(np.flatnonzero(np.diff(positions) != 1) + 1, starts[1:])
            assert packing or len(starts) == 1
            for start, end in zip(starts, [*starts[1:], used], strict=True):
                if not used:
                    continue
                found = examples[int(ids[start]) // 1000]
                assert ids[start:end].tolist() == found.tokens.tolist()
                wanted = [int(t) if loss else -100 for t, loss in zip(found.tokens[1:], found.loss[1:], strict=True)]
                assert labels[start:end].tolist() == [*wanted, -100]
                seen.append(found.where)
        assert batch.starts.tolist() == [*begins, height * n]
        assert batch.longest == max(end - start for start, end in zip(begins, [*begins[1:], height * n], strict=True))
        # Token by token, with the definition instead of numpy's search.
        assert batch.labelled.tolist() == [i for i, label in enumerate(batch.labels.flatten().tolist()) if label != -100]
    assert sorted(seen) == sorted(e.where for e in examples) == sorted(step.where)
    assert step.tokens == sum(lengths) == sum(batch.real_tokens for batch in step.micro)
    assert step.label_count == sum(int(e.loss.sum()) for e in examples) == sum(batch.label_count for batch in step.micro)
    again = pack_step(examples, pad_id=0, **shape)
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(step.micro, again.micro, strict=True))
    computed = sum(batch.input_ids.size for batch in step.micro)
    assert efficiency(lengths, batch_size=len(lengths), **shape) == pytest.approx(sum(lengths) / computed)


def test_efficiency_over_several_steps():
    assert efficiency([8, 8, 4], batch_size=2, row_tokens=(8,), micro_tokens=8, packing=True) == pytest.approx(20 / 24)
    assert efficiency([], batch_size=2, row_tokens=(8,), micro_tokens=8, packing=True) == 0.0
