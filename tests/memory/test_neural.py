"""The neural codec: what goes in comes out, in bytes that the model's own probabilities allow, or is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import blake3
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory.models import CPU, contents, float_model, model_file

from pantheraml.errors import StorageError
from pantheraml.memory.codec import Codecs
from pantheraml.memory.container import NEURAL, NEURAL_FLOAT, RAW, Payload, pack, unpack
from pantheraml.memory.float_predictor import FloatPredictor
from pantheraml.memory.integer_predictor import IntegerPredictor
from pantheraml.memory.neural import LARGEST_CONTENT, SUFFIX, NeuralCodec
from pantheraml.memory.shared import Shared
from pantheraml.memory.zstd import ZstdCodec
from pantheraml.models.tiny import tiny_tokenizer

ODD = [b"", b"\0", bytes(range(256)), b"\xff" * 80, "中文🙂 e\u0301".encode(), b"<|end|><|pad|>", b"a" * 300, b"\xed\xa0\x80\xf0\x9f"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on several threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared(tmp_path) -> Shared:
    made = Shared(tmp_path / "shared")
    made.put(model_file(), SUFFIX)
    return made


def codec(shared: Shared) -> NeuralCodec:
    return NeuralCodec(shared, shared.put(model_file(), SUFFIX), device=CPU)


def encode_all(made: NeuralCodec, data: Sequence[bytes]) -> list[Payload]:
    """Also what becomes larger, which `encode` leaves to other codecs."""
    predictor = made._predictor(made.model)
    tokens = predictor.tokens.encode(data)
    from pantheraml.memory.range_coder import RangeEncoder

    payloads = []
    for content, intervals in zip(data, predictor.intervals(tokens), strict=True):
        encoder = RangeEncoder()
        for each in intervals.T.tolist():
            encoder.push(*each)
        payloads.append(Payload(predictor.number, 1, len(content), predictor.fingerprint, encoder.finish()))
    return payloads


def likely(predictor: IntegerPredictor, bytes_each: int, count: int) -> list[bytes]:
    """What the model itself would write: such content becomes small."""
    draw = np.random.default_rng(0)
    state, found = predictor.begin(count), [b""] * count
    while min(map(len, found)) < bytes_each:
        targets = (draw.random(count) * state.totals).astype(np.int64)
        tokens, _, _ = state.find(targets)
        found = [each + predictor.tokens.table[token] for each, token in zip(found, tokens.tolist(), strict=True)]
        state.advance(tokens)
    return [each[:bytes_each] for each in found]


def test_what_the_model_expects_becomes_as_small_as_its_probabilities_say(shared):
    made = codec(shared)
    predictor = IntegerPredictor(model_file(), CPU)
    data = likely(predictor, 60, 8)
    payloads = made.encode(data, ["bytes"] * 8, ["x"] * 8)
    assert made.decode([each for each in payloads if each]) == data
    for payload, intervals in zip(payloads, predictor.intervals(predictor.tokens.encode(data)), strict=True):
        assert payload is not None
        assert (payload.codec, payload.form, payload.raw_size) == (NEURAL, 1, 60)
        assert payload.model == blake3.blake3(model_file()).digest(8)
        entropy = float(np.log2(intervals[2] / intervals[1]).sum()) / 8
        assert entropy - 1 <= len(payload.data) <= entropy + 1.01
        assert len(payload.data) < 60
        assert unpack(pack(payload), most_bytes=100) == payload


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=70), st.text(max_size=40).map(str.encode)), min_size=1, max_size=6))
def test_any_bytes_come_back_through_all_codecs(tmp_path_factory, data):
    shared = Shared(tmp_path_factory.mktemp("store") / "shared")
    made = codec(shared)
    assert made.decode(encode_all(made, [each for each in data if each])) == [each for each in data if each]
    codecs = Codecs(ZstdCodec(shared), made)
    payloads = codecs.encode(data, ["bytes"] * len(data), ["x"] * len(data), codec="neural")
    assert codecs.decode(payloads) == data
    assert all(len(pack(payload)) <= len(content) + 64 for payload, content in zip(payloads, data, strict=True))
    assert not codecs.refused


def test_odd_and_long_content_comes_back_in_any_batch(shared):
    made = codec(shared)
    data = [each for each in ODD if each] + [bytes(each.astype(np.uint8)) for each in contents(6, 90)]
    payloads = encode_all(made, data)
    assert made.decode(payloads) == data
    # Encoded together, decoded one by one and in another order; windows are 24 tokens long.
    assert [made.decode([each])[0] for each in payloads[::3]] == data[::3]
    assert made.decode(payloads[::-1]) == data[::-1]
    again = NeuralCodec(shared, made.model, device=CPU)
    assert [encode_all(again, [each])[0] for each in data[::4]] == payloads[::4]


def test_what_is_empty_too_long_or_not_smaller_is_left_to_others(shared):
    made = codec(shared)
    noise = np.random.default_rng(0).bytes(500)
    assert made.encode([b"", noise, b"a" * (LARGEST_CONTENT + 1)], ["bytes"] * 3, ["x"] * 3) == [None, None, None]


def test_models_of_before_decode_what_they_encoded(shared):
    old, new = codec(shared), NeuralCodec(shared, shared.put(model_file("qwen2", False), SUFFIX), device=CPU)
    data = [b"some text", b"and some more"]
    mixed = encode_all(old, data) + encode_all(new, data)
    assert mixed[0].model != mixed[2].model
    assert new.decode(mixed) == data * 2


def test_a_model_that_is_gone_is_named(shared, tmp_path):
    payloads = encode_all(codec(shared), [b"text"])
    elsewhere = NeuralCodec(Shared(tmp_path / "other"), payloads[0].model, device=CPU)
    with pytest.raises(StorageError, match=payloads[0].model.hex()):
        elsewhere.decode(payloads)


def test_damaged_payloads_end_in_an_error_or_other_bytes_and_never_without_end(shared):
    made = codec(shared)
    payload = encode_all(made, [b"a text of some length, which is damaged now"])[0]
    for size in (0, LARGEST_CONTENT + 1):
        with pytest.raises(StorageError, match="cannot be read"):
            made.decode([Payload(NEURAL, 1, size, payload.model, payload.data)])
    draw = np.random.default_rng(0)
    for _ in range(12):
        broken = bytearray(payload.data)
        broken[draw.integers(len(broken))] ^= 1 << int(draw.integers(8))
        try:
            assert len(made.decode([Payload(NEURAL, 1, payload.raw_size, payload.model, bytes(broken))])[0]) == payload.raw_size
        except StorageError as error:
            assert "what is stored is not what was written" in error.why


def test_threads_may_share_it(shared):
    made = codec(shared)
    data = [bytes(each.astype(np.uint8)) for each in contents(12, 60, seed=2)]
    payloads = encode_all(made, data)
    found: dict[int, list[bytes]] = {}

    def work(which: int) -> None:
        found[which] = made.decode(payloads[which::3])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {which: data[which::3] for which in range(3)}


def test_it_says_where_it_computes(shared):
    origin = codec(shared).origin(7)
    assert (origin.kind, origin.name, origin.batch) == ("cpu", "test", 7)
    assert origin.dtype in ("int8", "float32", "float64")


def test_opening_it_imports_no_torch(tmp_path):
    said = "import sys; from pathlib import Path; from pantheraml.memory.neural import NeuralCodec; from pantheraml.memory.shared import Shared;"
    said += f"NeuralCodec(Shared(Path({str(tmp_path)!r})), b'12345678'); print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_any_causal_model_encodes_on_its_own_device(family):
    model = float_model(family, num_hidden_layers=1)
    made = NeuralCodec(None, predictors=[FloatPredictor(model, tiny_tokenizer(), CPU, context=16)])
    data = [b"text", b"longer than a window of sixteen", "中文".encode()]
    payloads = encode_all(made, data)
    assert {each.codec for each in payloads} == {NEURAL_FLOAT}
    assert {len(each.model) for each in payloads} == {16}
    assert made.decode(payloads) == data
    assert made.decode(payloads[1:2]) == data[1:2], "alone as well as beside others"
    assert made.origin(1).dtype == "float32"
    # What it costs is what the model's own probabilities say: torch's, all tokens at once.
    predictor = made._predictor(made.model)
    ids = predictor.tokens.encode([data[0]])[0]
    with torch.no_grad():
        log_probs = model(torch.tensor([[1, *ids[:-1].tolist()]])).logits[0].double().log_softmax(-1)
    expected = -float(log_probs[range(len(ids)), ids.tolist()].sum()) / np.log(2)
    found = predictor.intervals([ids])[0]
    assert float(np.log2(found[2] / found[1]).sum()) == pytest.approx(expected, abs=1e-3)


def test_floats_are_refused_where_they_could_differ(monkeypatch):
    model = float_model(num_hidden_layers=1)
    payloads = encode_all(NeuralCodec(None, predictors=[FloatPredictor(model, tiny_tokenizer(), CPU)]), [b"text"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    elsewhere = NeuralCodec(None, predictors=[FloatPredictor(model, tiny_tokenizer(), CPU)])
    with pytest.raises(StorageError, match="in another way") as error:
        elsewhere.decode(payloads)
    assert "threads" in error.value.why
    assert "memory train" in error.value.fix
    other = NeuralCodec(None, predictors=[FloatPredictor(float_model(seed=5, num_hidden_layers=1), tiny_tokenizer(), CPU)])
    with pytest.raises(StorageError, match="is not here"):
        other.decode(payloads)


def test_codecs_fall_back_where_the_model_does_not_help(shared):
    codecs = Codecs(ZstdCodec(shared), codec(shared))
    text = b"the same words again and again; " * 20
    payload = codecs.encode([text], ["text"], ["x"], codec="neural")[0]
    assert payload.codec != RAW
    assert len(payload.data) < 60, "random weights expect none of it, and zstd finds what repeats"
    assert codecs.decode([payload]) == [text]
