from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pantheraml.data.chat import Encoder, Example
from pantheraml.data.load import BadRow, BadRows, Row, read_rows, rows_of
from pantheraml.data.source import Examples, Shuffled, Streamed, content_key, overlap, split, tokenize
from pantheraml.errors import DataError
from pantheraml.recipe.types import DataSpec


def spec(**values) -> DataSpec:
    return DataSpec(train=("x.jsonl",), **values)


def pairs(count: int):
    return [{"prompt": f"question {i}: ", "completion": "answer " * (i % 5 + 1)} for i in range(count)]


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, "assistant", "prompt-completion")


def texts(tokenizer, examples) -> list[str]:
    return [tokenizer.decode(example.tokens) for example in examples]


def test_tokenize_stores_what_the_encoder_gives(tokenizer, encoder):
    rows = list(rows_of(pairs(7)))
    seen: list[int] = []
    examples = tokenize(rows, encoder, spec(), 100, BadRows("fail", 0), seen.append)
    assert len(examples) == 7 and seen == [1, 2, 3, 4, 5, 6, 7]
    for row, stored in zip(rows, examples, strict=True):
        wanted = encoder.encode(row)
        assert stored.tokens.tolist() == wanted.tokens.tolist() and stored.loss.tolist() == wanted.loss.tolist()
        assert stored.where == wanted.where and stored.tokens.dtype == np.int32
    assert examples.lengths.tolist() == [len(e.tokens) for e in examples]
    assert examples.counts.tokens == examples.lengths.sum()
    assert examples.counts.label_tokens == sum(int(e.loss.sum()) for e in examples)
    assert (examples.counts.rows, examples.counts.used, examples.counts.bad) == (7, 7, 0)
    assert examples[-1].where == "<memory>:7"
    with pytest.raises(IndexError):
        examples[7]


def test_no_rows_are_no_examples(encoder):
    examples = tokenize([], encoder, spec(), 100, BadRows("fail", 0))
    assert len(examples) == 0 and examples.lengths.tolist() == [] and examples.counts.rows == 0


def test_fingerprint_is_of_tokens_and_marks(encoder):
    made = [tokenize(rows_of(pairs(n)), encoder, spec(), 100, BadRows("fail", 0)).fingerprint for n in (5, 5, 6)]
    assert made[0] == made[1] != made[2]
    a = Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]), "f:1")
    b = Example(a.tokens, np.array([False, False, True]), "f:1")
    assert Examples([a]).fingerprint != Examples([b]).fingerprint


def test_bad_rows_are_counted_whether_broken_or_unusable(tmp_path, encoder):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "completion": "a"}\nbroken\n{"prompt": "q", "completion": ""}\n')
    bad = BadRows("skip", 10)
    examples = tokenize(read_rows([str(path)], on_bad=bad), encoder, spec(), 100, bad)
    assert (examples.counts.rows, examples.counts.used, examples.counts.bad) == (3, 1, 2)
    assert [b.line for b in bad.rows] == [2, 3]
    with pytest.raises(DataError, match=r"a\.jsonl:2 cannot be used"):
        tokenize(read_rows([str(path)], on_bad=(fail := BadRows("fail", 0))), encoder, spec(), 100, fail)
    with pytest.raises(DataError, match="none of the 1 rows can be used") as caught:
        tokenize(rows_of([{"prompt": "q"}]), encoder, spec(), 100, BadRows("skip", 10))
    assert "completion is missing" in caught.value.why


LONG = {"prompt": "abcd", "completion": "efgh"}  # 9 tokens with the end


def test_truncate(tokenizer, learned, encoder):
    examples = tokenize(rows_of([LONG, {"prompt": "a", "completion": "b"}]), encoder, spec(), 6, BadRows("fail", 0))
    assert learned(examples[0]) == ["ef"] and len(examples[0].tokens) == 6
    assert (examples.counts.truncated, examples.counts.used) == (1, 2)
    bad = BadRows("skip", 5)
    assert len(tokenize(rows_of([LONG, {"prompt": "a", "completion": "b"}]), encoder, spec(), 4, bad)) == 1
    assert bad.rows[0].reason == "the prompt is longer than model.max_tokens, so no token is left to learn"


def test_drop(encoder):
    examples = tokenize(rows_of([LONG, {"prompt": "a", "completion": "b"}]), encoder, spec(too_long="drop"), 6, BadRows("fail", 0))
    assert (examples.counts.dropped, examples.counts.used, examples.counts.bad, len(examples)) == (1, 1, 0, 1)
    with pytest.raises(DataError, match="none of the 1 rows") as caught:
        tokenize(rows_of([LONG]), encoder, spec(too_long="drop"), 6, BadRows("fail", 0))
    assert "longer than model.max_tokens" in caught.value.why


def test_split_learns_every_label_once(tokenizer, learned, encoder):
    examples = tokenize(rows_of([LONG]), encoder, spec(too_long="split"), 4, BadRows("fail", 0))
    assert texts(tokenizer, examples) == ["defg", "gh<|end|>"]  # "abcd" has nothing to learn
    assert [learned(e) for e in examples] == [["efg"], ["h<|end|>"]]
    assert examples.counts.split == 1 and examples.counts.label_tokens == 5
    assert all(not e.loss[0] for e in examples)


def test_error(encoder):
    with pytest.raises(DataError) as caught:
        tokenize(rows_of([LONG]), encoder, spec(too_long="error"), 6, BadRows("skip", 5))
    assert caught.value.what == "<memory>:1 has 9 tokens, and model.max_tokens is 6"
    assert "data.too_long" in caught.value.why and "truncate, drop or split" in caught.value.fix


def test_split_into_train_and_eval_is_disjoint_by_content():
    rows = list(rows_of([{"text": str(i % 40)} for i in range(100)]))
    train, held = split(rows, 0.1, 200, seed=1)
    assert len(train) + len(held) == 100 and 8 <= len(held) <= 10
    assert not {content_key(r) for r in train} & {content_key(r) for r in held}
    assert [r.line for r in train] == sorted(r.line for r in train)
    assert split(rows, 0.1, 200, seed=1) == (train, held)
    assert split(rows, 0.1, 200, seed=2)[1] != held
    assert len(split(rows, 0.5, 7, seed=1)[1]) <= 7
    # Content decides, not place.
    assert {content_key(r) for r in split(rows[::-1], 0.1, 200, seed=1)[1]} == {content_key(r) for r in held}


@pytest.mark.parametrize(("count", "fraction", "held"), [(10, 0.01, 1), (9, 0.01, 0), (100, 0.0, 0), (1, 0.9, 0), (2, 0.9, 1)])
def test_split_of_few_rows(count, fraction, held):
    train, evaluation = split(list(rows_of([{"text": str(i)} for i in range(count)])), fraction, 200, seed=0)
    assert len(evaluation) == held and len(train) == count - held


def test_content_key_ignores_the_order_of_fields():
    assert content_key(Row({"a": 1, "b": 2}, "f", 1)) == content_key(Row({"b": 2, "a": 1}, "g", 9))


def test_overlap_names_both_places(encoder):
    train = tokenize(rows_of(pairs(5)), encoder, spec(), 100, BadRows("fail", 0))
    held = tokenize(rows_of([pairs(9)[8], pairs(3)[2]]), encoder, spec(), 100, BadRows("fail", 0))
    assert overlap(train, held) == [("<memory>:2", "<memory>:3")]


def numbered(count: int) -> Examples:
    return Examples(Example(np.array([i, i], np.int32), np.array([False, True]), f"f:{i + 1}") for i in range(count))


def test_shuffled_epochs_are_permutations_from_the_seed():
    source = Shuffled(numbered(10), 4, seed=7, epochs=2.5, steps=None)
    assert source.total_steps == math.ceil(25 / 4) == 7
    flat = [int(e.tokens[0]) for k in range(7) for e in source.step(k)]
    assert len(flat) == 25 and len(source.step(6)) == 1
    for epoch in range(2):
        assert flat[10 * epoch : 10 * epoch + 10] == np.random.default_rng([7, epoch]).permutation(10).tolist()
    assert [int(e.tokens[0]) for e in source.step(3)] == flat[12:16]  # any step, in any order
    with pytest.raises(IndexError):
        source.step(7)
    plain = Shuffled(numbered(3), 2, seed=7, shuffle=False, epochs=None, steps=4)
    assert [[int(e.tokens[0]) for e in plain.step(k)] for k in range(4)] == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert Shuffled(numbered(10), 4, seed=8, epochs=1, steps=None).fingerprint != source.fingerprint
    assert Shuffled(numbered(30), 1, seed=0, epochs=0.1, steps=None).total_steps == 3
    with pytest.raises(ValueError, match="either epochs or steps"):
        Shuffled(numbered(3), 2, seed=7, epochs=None, steps=None)


@pytest.fixture
def file(tmp_path):
    def write(records) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
        return str(path)

    return write


def streamed(path, encoder, spec, bad=None, **values) -> Streamed:
    values = {"batch_size": 4, "seed": 3, "epochs": 2, "steps": None, "buffer_rows": 8} | values
    return Streamed([path], encoder, spec, 100, bad or BadRows(spec.on_bad_row, spec.max_bad_rows), **values)


def test_a_stream_gives_each_epoch_the_same_rows_as_memory_does(tokenizer, encoder, file):
    path = file(pairs(30))
    source = streamed(path, encoder, spec())
    assert source.total_steps == 15
    flat = [text for k in range(15) for text in texts(tokenizer, source.step(k))]
    whole = texts(tokenizer, tokenize(rows_of(pairs(30)), encoder, spec(), 100, BadRows("fail", 0)))
    assert Counter(flat[:30]) == Counter(flat[30:]) == Counter(whole)
    assert flat[:30] != whole and flat[:30] != flat[30:]
    again = streamed(path, encoder, spec())
    assert [text for k in range(15) for text in texts(tokenizer, again.step(k))] == flat
    ordered = streamed(path, encoder, spec(shuffle=False))
    assert [text for k in range(15) for text in texts(tokenizer, ordered.step(k))] == whole * 2
    with pytest.raises(IndexError):
        source.step(15)


MIXED = [*pairs(9), "broken", {"prompt": "q", "completion": ""}, {"prompt": "long", "completion": "x" * 250}, *pairs(20)[9:]]


@pytest.mark.parametrize("too_long", ["truncate", "drop", "split"])
@pytest.mark.parametrize("buffer_rows", [1, 8, 1024])
def test_a_stream_goes_on_exactly_where_it_stopped(encoder, file, too_long, buffer_rows):
    path = file(MIXED)
    skipping = spec(on_bad_row="skip", too_long=too_long)
    source = streamed(path, encoder, skipping, buffer_rows=buffer_rows)
    steps = [[(e.where, e.tokens.tolist()) for e in source.step(k)] for k in range(source.total_steps)]
    per_epoch = {"truncate": 21, "drop": 20, "split": 23}[too_long]
    assert sum(map(len, steps)) == 2 * per_epoch and all(len(step) == 4 for step in steps[:-1])
    for k in (0, 3, len(steps) - 1):
        resumed = streamed(path, encoder, skipping, buffer_rows=buffer_rows)
        resumed.seek(k)
        assert [[(e.where, e.tokens.tolist()) for e in resumed.step(i)] for i in range(k, len(steps))] == steps[k:]
    assert [(e.where, e.tokens.tolist()) for e in source.step(2)] == steps[2]  # backwards too


def test_seeking_encodes_nothing_where_each_row_is_one_example(encoder, file, monkeypatch):
    path = file(pairs(30))
    steps = [[e.where for e in streamed(path, encoder, spec()).step(k)] for k in range(15)]
    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, row: encoded.append(row) or encode(self, row))
    resumed = streamed(path, encoder, spec())
    resumed.seek(11)
    assert [[e.where for e in resumed.step(k)] for k in range(11, 15)] == steps[11:]
    assert len(encoded) == 16


def test_a_stream_leaves_out_what_is_held_out(tokenizer, encoder, file):
    path = file([*pairs(10), pairs(1)[0]])
    held = frozenset(content_key(row) for row in rows_of(pairs(2)))
    source = streamed(path, encoder, spec(), epochs=1, without=held)
    flat = [text for k in range(source.total_steps) for text in texts(tokenizer, source.step(k))]
    assert len(flat) == 8 and not any("question 0" in text or "question 1" in text for text in flat)
    assert source.fingerprint != streamed(path, encoder, spec()).fingerprint


def test_steps_need_no_first_pass_and_an_epoch_of_nothing_ends(encoder, file):
    source = streamed(file(pairs(3)), encoder, spec(), epochs=None, steps=5)
    assert source.total_steps == 5 and [len(source.step(k)) for k in range(5)] == [4] * 5
    with pytest.raises(DataError, match="none of the 1 rows can be used") as caught:
        streamed(file([{"prompt": "q"}]), encoder, spec(on_bad_row="skip"), epochs=None, steps=5).step(0)
    assert "completion is missing" in caught.value.why
    with pytest.raises(DataError, match="cannot be used: completion is missing"):
        streamed(file([{"prompt": "q"}]), encoder, spec(), epochs=None, steps=5).step(0)


def test_a_row_that_is_bad_in_each_epoch_is_counted_once(encoder, file):
    bad = BadRows("skip", 2)
    source = streamed(file(MIXED), encoder, spec(on_bad_row="skip"), bad, epochs=4)
    for k in range(source.total_steps):
        source.step(k)
    assert [b.reason for b in bad.rows] == ["the line is not valid JSON: Expecting value at column 1", "completion is empty"]


def test_a_stream_holds_only_its_buffer_in_memory(encoder, tmp_path):
    """32 MB of rows, a buffer of 16 rows: less than 4 MB at any time (100 rows would be 1.6 MB)."""
    path = tmp_path / "big.jsonl"
    line = json.dumps({"prompt": "p", "completion": "c", "extra": "x" * 16_000})
    path.write_text((line + "\n") * 2000)
    source = streamed(str(path), encoder, spec(), epochs=1, buffer_rows=16)
    tracemalloc.start()
    for k in range(source.total_steps):
        source.step(k)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 32_000_000 and peak_bytes < 4_000_000


def test_bad_row_text_is_cut_and_can_be_written(tmp_path):
    bad = BadRows("skip", 1)
    bad(BadRow.of(Row({"text": "a\ud800"}, "f", 1), "r"))
    bad.write(tmp_path / "bad_rows.jsonl")
    assert json.loads((tmp_path / "bad_rows.jsonl").read_text())["text"] == '{"text": "a?"}'
    assert len(BadRow.of(Row({"text": "x" * 1000}, "f", 1), "r").text) == 203
