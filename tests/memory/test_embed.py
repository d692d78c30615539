"""Vectors say how alike texts are: hashing is what its definition says, the learned part finds what singular values find, models give means."""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.errors import DataError, RecipeError, StorageError
from pantheraml.memory.embed import LexicalEmbedder, StaticEmbedder
from pantheraml.memory.features import MOST_CHARACTERS, chunks, features, hashed, rotation
from pantheraml.memory.latent import Counts, singular_vectors

ANY_TEXT = st.text(st.characters(codec=None), max_size=200)


@functools.cache
def docstrings() -> list[str]:
    """Six hundred of the standard library, in the order of its files."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and len(text := ast.get_docstring(node) or "") >= 250:
                found.append(text)
        if len(found) >= 600:
            break
    return found[:600]


def words_by_hand(text: str) -> Counter[str]:
    return Counter(re.findall(r"[^\W_]+", text.lower()))


# Features.


def test_words_are_those_that_a_plain_reading_finds():
    text = "The cat, the CAT and 12 x_y naïve dogs; über-cats"
    found = features([text])
    counts = sorted(found.count[found.letters > 0].tolist())
    assert counts == sorted(words_by_hand(text).values())
    lengths = sorted(found.letters[found.letters > 0].tolist())
    assert lengths == sorted(len(word) for word in words_by_hand(text))


def test_pieces_are_the_runs_of_four_characters_with_letters_inside():
    text = "cats, at"
    padded = f" {text} "
    by_hand = {
        tuple(c if c.isalnum() else " " for c in padded[i : i + 4])
        for i in range(len(padded) - 3)
        if padded[i + 1].isalnum() and padded[i + 2].isalnum()
    }
    found = features([text])
    assert int((found.letters == 0).sum()) == len(by_hand)


def test_scripts_without_spaces_are_read_by_characters_and_pairs():
    found = features(["東京大学 東京"])
    words = found.count[found.letters > 0]
    assert sorted(words.tolist()) == [1, 1, 2, 2]  # 大 学 東 東 京 京
    assert int((found.letters == 0).sum()) == 3  # 東京 twice, 京大, 大学
    embed = LexicalEmbedder().embed
    assert embed(["東京大学の学生"])[0] @ embed(["東京大学"])[0] > 0.5 > abs(embed(["東京大学の学生"])[0] @ embed(["猫と犬"])[0])


@given(st.lists(ANY_TEXT, max_size=8))
@settings(max_examples=60, deadline=None)
def test_features_depend_on_the_text_alone(texts):
    """Not on the others in its batch."""
    together = features(texts)
    for i, text in enumerate(texts):
        alone, mine = features([text]), together.text == i
        assert sorted(zip(alone.hash, alone.count, alone.letters, strict=True)) == sorted(
            zip(together.hash[mine], together.count[mine], together.letters[mine], strict=True)
        )


def test_the_same_word_has_one_hash_wherever_it_stands_and_others_have_others():
    texts = [f"word{i} and the rest" for i in range(20_000)]
    seen = np.concatenate([found.hash[found.letters > 0] for _, found in chunks(texts)])
    assert len(np.unique(seen)) == 20_000 + 3


def test_ways_to_write_one_text_are_one_text():
    embed = LexicalEmbedder().embed
    a, b, c = embed(["Café ﬁne", "CAFE\u0301 fine", "cafe fine"])
    assert a @ b == pytest.approx(1)
    assert a @ c < 0.9


def test_hashes_are_those_of_earlier_versions():
    """Vectors are stored, so a change of any of this needs another fingerprint."""
    found = features(["Hello, wörld 42"])
    assert hex(int(np.bitwise_xor.reduce(found.hash))) == "0x2b84106c36db649"
    row = LexicalEmbedder(64).embed(["Hello, wörld 42"])[0]
    assert row[:4].tolist() == pytest.approx([-0.0219794, 0.1373709, -0.1675926, 0.0082423], abs=1e-6)
    assert LexicalEmbedder(64).fingerprint == "3bca90d9b7c62241"


def test_rotation_is_orthogonal_and_takes_powers_of_two():
    turn = rotation(64).astype(np.float64)
    assert np.allclose(turn @ turn.T, np.eye(64), atol=1e-6)
    for wrong in (0, 1, 96):
        with pytest.raises(ValueError, match="power of two"):
            rotation(wrong)


def test_hashing_keeps_dot_products_on_average():
    """Over many words: the mean error is far below one, and the spread is that of the theory, sqrt((1 + cos^2) / D)."""
    rng = np.random.default_rng(0)
    words = [f"w{i}x" for i in range(400)]
    errors = []
    for _ in range(60):
        shared, own = rng.choice(400, 30, replace=False).tolist(), rng.choice(400, 60, replace=False).tolist()
        a = features([" ".join(words[i] for i in {*shared, *own[:30]}), " ".join(words[i] for i in {*shared, *own[30:]})])
        only = a.letters > 0
        kept = type(a)(a.text[only], a.hash[only], a.count[only], a.letters[only])
        rows = hashed(kept, np.ones(len(kept.hash)), 2, 256)
        first, second = set(kept.hash[kept.text == 0].tolist()), set(kept.hash[kept.text == 1].tolist())
        length = np.sqrt(len(first) * len(second))
        errors.append((rows[0] @ rows[1] - len(first & second)) / length)
    assert abs(np.mean(errors)) < 0.03
    assert 0.04 < np.std(errors) < 0.1


# Lexical.


@given(st.lists(ANY_TEXT, max_size=6))
@settings(max_examples=60, deadline=None)
def test_rows_are_of_length_one_or_zero(texts):
    rows = LexicalEmbedder(64).embed(texts)
    assert rows.shape == (len(texts), 64) and rows.dtype == np.float32
    lengths = np.linalg.norm(rows, axis=1)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))
    assert all(length == 0 for text, length in zip(texts, lengths, strict=True) if not text.strip())


def test_a_text_without_end_is_read_to_a_limit():
    rows = LexicalEmbedder(64).embed(["ab " * (MOST_CHARACTERS // 3) + "cd ef", "ab " * (MOST_CHARACTERS // 3)])
    assert rows[0] @ rows[1] == pytest.approx(1, abs=1e-3)


def test_lexical_finds_the_text_that_a_sentence_is_from_and_is_fast():
    texts = docstrings()
    queries = [text[len(text) // 3 : 2 * len(text) // 3] for text in texts]
    embedder = LexicalEmbedder()
    rows = embedder.embed(texts)
    best = (embedder.embed(queries) @ rows.T).argsort(axis=1)[:, -10:]
    assert np.mean([i in row for i, row in enumerate(best)]) > 0.85
    short = [text[:100] for text in texts] * 10
    began = time.process_time()
    embedder.embed(short)
    # 50,000 a second on one idle core; processor time, and a wide margin for a machine that others use.
    assert len(short) / (time.process_time() - began) > 5_000


# Static.


def test_singular_vectors_are_those_of_the_dense_matrix():
    import torch

    rng = np.random.default_rng(0)
    dense = (rng.random((200, 120)) < 0.1) * rng.random((200, 120))
    dense += 3 * np.outer(rng.random(200), rng.random(120)) * (rng.random((200, 120)) < 0.3)
    text, word = np.nonzero(dense)
    counts = Counts(text, word, dense[text, word].astype(np.float32), 200, 120)
    values, vectors = singular_vectors(counts, 16, device=torch.get_default_device())
    _, expected, right = np.linalg.svd(dense)
    # Algorithm 4.4 with three rounds; the last of sixteen values differ from the seventeenth by a few percent only.
    assert values == pytest.approx(expected[:16], rel=5e-3)
    assert np.abs(vectors[:, 0] @ right[0]) == pytest.approx(1, abs=1e-4)
    assert np.allclose(vectors.T @ vectors, np.eye(16), atol=1e-3)


def test_singular_vectors_of_a_matrix_of_low_rank_are_as_many_as_it_has():
    import torch

    dense = np.outer(np.arange(1.0, 9), np.ones(6)) + np.outer(np.ones(8), np.arange(6.0))
    text, word = np.nonzero(dense)
    values, vectors = singular_vectors(Counts(text, word, dense[text, word].astype(np.float32), 8, 6), 6, device=torch.get_default_device())
    assert len(values) == vectors.shape[1] == 2
    assert values == pytest.approx(np.linalg.svd(dense)[1][:2], rel=1e-4)


def trained(texts: list[str]) -> StaticEmbedder:
    return StaticEmbedder.train(texts, vocabulary=8192)


@pytest.fixture(scope="module")
def static():
    return trained(docstrings())


def test_static_learns_which_words_go_together(static):
    """It finds a text by its first sentence, which is cut from it, better than hashing does."""
    texts = docstrings()
    heads = [re.split(r"(?<=[.!?])\s|\n\s*\n", text, maxsplit=1) for text in texts]
    pairs = [each for each in heads if len(each) == 2 and len(each[0]) > 30 and len(each[1]) > 200]
    found = {}
    for embedder in (static, LexicalEmbedder()):
        best = (embedder.embed([a for a, _ in pairs]) @ embedder.embed([b for _, b in pairs]).T).argsort(axis=1)[:, -10:]
        found[embedder.name] = np.mean([i in row for i, row in enumerate(best)])
    assert found["static-256"] > found["lexical-256"] + 0.05
    assert found["static-256"] > 0.5


def test_static_gives_unit_rows_for_words_it_never_saw_too(static):
    rows = static.embed(["", "   ", "zxqv wvut", "zxqv wvut 17", "list"])
    assert np.linalg.norm(rows, axis=1) == pytest.approx([0, 0, 1, 1, 1], abs=1e-5)
    assert rows[2] @ rows[3] > 0.5


def test_static_is_its_bytes(static):
    data = static.to_bytes()
    again = StaticEmbedder.from_bytes(data)
    assert again.to_bytes() == data and again.fingerprint == static.fingerprint
    assert np.array_equal(again.embed(["how to sort a list"]), static.embed(["how to sort a list"]))
    assert trained(docstrings()).fingerprint == static.fingerprint  # one seed, one machine
    assert trained(docstrings()[:500]).fingerprint != static.fingerprint
    for wrong in (b"", b"abc", data[:-5], data[: len(data) // 2]):
        with pytest.raises(StorageError, match="no embedder"):
            StaticEmbedder.from_bytes(wrong)


def test_static_says_when_there_is_nothing_to_learn():
    with pytest.raises(DataError, match="no two of 2 texts"):
        StaticEmbedder.train(["ab", "cd"])
    few = StaticEmbedder.train(["red apple pie", "red apple tree", "green pear tree"])
    assert few.embed(["apple"]).shape == (1, 256)


def test_vectors_of_a_text_do_not_depend_on_its_batch(static):
    texts = docstrings()[:60]
    for embedder in (static, LexicalEmbedder()):
        alone = np.concatenate([embedder.embed([text]) for text in texts])
        assert embedder.embed(texts) == pytest.approx(alone, abs=1e-5)


# Models.


@pytest.fixture(scope="module")
def cpu():
    from pantheraml.hardware.find import find
    from pantheraml.recipe.types import HardwareAsk

    return find(HardwareAsk(kind="cpu"), training=False).device


@pytest.fixture(scope="module")
def tiny(cpu):
    from pantheraml.memory.model_embed import ModelEmbedder

    return ModelEmbedder("tiny:llama", cpu, dtype="float32", max_tokens=100)


def test_a_model_gives_the_mean_of_its_last_hidden_states(tiny):
    """By hand, text by text and window by window, from the model of transformers itself."""
    import torch
    from transformers import AutoModel

    from pantheraml.models.load import load_tokenizer, read_config
    from pantheraml.recipe.types import ModelSpec

    spec = ModelSpec(name="tiny:llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(read_config(spec)).eval()
    tokenizer = load_tokenizer(spec)
    texts = ["hello", "a text of more than one window " * 9, " \n", "", "größer \ud800"]
    for text, row in zip(texts, tiny.embed(texts), strict=True):
        if not text.strip():
            assert not row.any()
            continue
        ids = tokenizer(text.encode("utf-8", "replace").decode())["input_ids"]
        states = []
        for begin in range(0, len(ids), 100):
            with torch.no_grad():
                states.append(model(torch.tensor([ids[begin : begin + 100]])).last_hidden_state[0])
        mean = torch.cat(states).mean(dim=0).numpy()
        assert row == pytest.approx(mean / np.linalg.norm(mean), abs=2e-6)


def test_a_model_says_where_it_computed(tiny, cpu):
    tiny.embed(["one", "two", "three"])
    assert (tiny.origin.kind, tiny.origin.dtype, tiny.origin.batch) == (cpu.kind, "float32", 3)
    assert tiny.origin.name == cpu.name
    assert tiny.dimensions == 128


def test_a_batch_that_does_not_fit_is_taken_in_parts(tiny):
    texts = [f"text {i}" for i in range(40)]
    expected, run, sizes = tiny.embed(texts), tiny._run, []

    def short_of_memory(ids, mask):
        sizes.append(len(ids))
        if len(ids) > 10:
            raise MemoryError("no room")
        return run(ids, mask)

    tiny._run = short_of_memory
    try:
        assert tiny.embed(texts) == pytest.approx(expected, abs=1e-6)
    finally:
        tiny._run = run
        tiny._recovery.parts = 1
    assert sizes[:2] == [40, 20] and max(sizes[2:]) == 10
    assert len(tiny._recovery.history) == 2


def test_a_model_serves_several_threads(tiny):
    texts = [f"text number {i}" for i in range(30)]
    expected, wrong = tiny.embed(texts), []

    def ask(i):
        if not np.allclose(tiny.embed(texts[i : i + 3]), expected[i : i + 3], atol=1e-5):
            wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(0, 30, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fingerprints_tell_models_apart(cpu, tiny, tmp_path):
    from pantheraml.memory.model_embed import ModelEmbedder

    assert ModelEmbedder("tiny:llama", cpu, dtype="float32", max_tokens=100).fingerprint == tiny.fingerprint
    assert ModelEmbedder("tiny:llama", cpu, dtype="bfloat16", max_tokens=100).fingerprint == tiny.fingerprint
    assert ModelEmbedder("tiny:qwen2", cpu, dtype="float32", max_tokens=100).fingerprint != tiny.fingerprint


def test_an_encoder_from_a_folder_serves_as_well(cpu, tmp_path):
    import torch
    from transformers import BertConfig, BertModel

    from pantheraml.memory.model_embed import ModelEmbedder
    from pantheraml.models.tiny import tiny_tokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=263, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    embedder = ModelEmbedder(str(tmp_path), cpu, dtype="float32")
    ids = torch.tensor([tiny_tokenizer()("hello")["input_ids"]])
    with torch.no_grad():
        mean = model(ids).last_hidden_state[0].mean(dim=0).numpy()
    assert embedder.embed(["hello", "a longer one"])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=2e-6)


def test_a_model_that_is_not_there_is_named(cpu, tmp_path):
    from pantheraml.memory.model_embed import ModelEmbedder

    with pytest.raises(RecipeError, match="no-such-folder"):
        ModelEmbedder(str(tmp_path / "no-such-folder"), cpu)
