"""A gist says that it is none of what was put, how like it is, and is found again better than the beginning of the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pantheraml.errors import StorageError
from pantheraml.memory.embed import LexicalEmbedder
from pantheraml.memory.gist import PROMPT, GistCodec, summaries_by
from pantheraml.memory.quantise import HEAD_BYTES, decode, from_rows, train_book

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory_gist.py"
TEXTS = [
    "The engine of the ferry failed off Bergen on Friday; forty passengers waited three hours for a tug.",
    "Bake the bread for forty minutes at 220 degrees, then let it rest on a rack.",
    "The council voted nine to two against the new car park beside the library.",
    "",
    "x",
]


def embedded(text: str) -> np.ndarray:
    return LexicalEmbedder().embed([text])[0]


@pytest.mark.parametrize(("kind", "size"), [("float16", 512), ("int8", 256), ("binary", 32)])
def test_without_a_summary_a_gist_is_a_code_and_its_score_that_of_the_code(kind, size):
    for text, gist in zip(TEXTS, GistCodec(LexicalEmbedder(), kind=kind).encode(TEXTS), strict=True):
        assert gist.text == "" and len(gist.vector) == gist.size_bytes == HEAD_BYTES + size
        code = decode(from_rows([gist.vector]))[0].astype(np.float64)
        length = np.linalg.norm(code)
        assert gist.score == pytest.approx(code @ embedded(text) / length if length else 0, abs=1e-5)


def test_with_a_summary_the_score_is_the_likeness_of_the_summary():
    def first_words(texts):
        return [" ".join(text.split()[:6]) for text in texts]

    codec = GistCodec(LexicalEmbedder(), summarise=first_words)
    gists = codec.encode(TEXTS)
    for text, gist in zip(TEXTS[:3], gists, strict=False):
        assert gist.text == first_words([text])[0]
        assert gist.score == pytest.approx(float(embedded(gist.text) @ embedded(text)), abs=1e-5)
        assert 0.2 < gist.score < 0.95
        assert codec.score(gist.text, gist.vector) == pytest.approx(gist.score, abs=2e-3)  # by the code: int8 is within 1e-4 of the vector
    assert gists[4].text == "x" and gists[4].score == pytest.approx(1, abs=1e-5)


def test_a_summary_that_is_longer_than_its_text_is_not_kept_and_none_is_no_text():
    gists = GistCodec(LexicalEmbedder(), summarise=lambda texts: [text * 2 for text in texts]).encode(TEXTS[:2])
    assert [gist.text for gist in gists] == TEXTS[:2] and gists[0].score == pytest.approx(1, abs=1e-5)
    (gist,) = GistCodec(LexicalEmbedder(), summarise=lambda texts: [""]).encode(TEXTS[:1])
    assert gist.text == "" and gist.score > 0.99
    assert GistCodec(LexicalEmbedder()).encode([]) == []


@given(st.lists(st.text(st.characters(codec=None), max_size=80), min_size=1, max_size=5), st.sampled_from(["float16", "int8", "binary"]))
@settings(max_examples=60, deadline=None)
def test_scores_are_shares_and_can_be_measured_again(texts, kind):
    codec = GistCodec(LexicalEmbedder(64), kind=kind, summarise=lambda texts: [text[:10] for text in texts])
    for gist in codec.encode(texts):
        assert 0 <= gist.score <= 1
        # By the code instead of the vector: they are at an angle whose cosine is the code's own score.
        loss = 2 * (1 - codec.score("", gist.vector)) ** 0.5
        assert abs(codec.score(gist.text, gist.vector) - gist.score) <= loss + 0.01 or not gist.text.strip()


def test_a_book_makes_gists_of_a_few_bytes():
    embedder = LexicalEmbedder()
    book = train_book(embedder.embed([f"{text} {i}" for i in range(100) for text in TEXTS]), 16)
    codec = GistCodec(embedder, kind="pq", book=book)
    gists = codec.encode(TEXTS[:3])
    assert all(gist.size_bytes == HEAD_BYTES + 16 and gist.score > 0.5 for gist in gists)
    assert codec.vectors([gist.vector for gist in gists]).shape == (3, 256)
    assert codec.score("", gists[0].vector) == pytest.approx(gists[0].score, abs=1e-5)
    with pytest.raises(ValueError, match="pq takes a book"):
        GistCodec(embedder, kind="pq")
    with pytest.raises(ValueError, match="pq takes a book"):
        GistCodec(embedder, kind="int8", book=book)
    with pytest.raises(StorageError):
        codec.score("", b"damaged")


def test_a_model_writes_summaries_in_batches():
    import torch

    from pantheraml.models.load import load_model, load_tokenizer
    from pantheraml.recipe.types import ModelSpec

    spec = ModelSpec(name="tiny:llama")
    model, tokenizer = load_model(spec, dtype=torch.float32, device=torch.get_default_device()), load_tokenizer(spec)
    summarise = summaries_by(model, tokenizer, max_new_tokens=8)
    long = "A sentence that goes on. " * 200  # more than the 512 tokens that the model can see
    made = summarise([*TEXTS[:2], long])
    assert len(made) == 3 and all(isinstance(each, str) for each in made)
    assert summarise([long])[0] == made[2]
    # What the model was asked is the prompt and the text, as its own template has them.
    from pantheraml.models.generate import generate

    asked = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT + TEXTS[0]}], add_generation_prompt=True, return_dict=False)
    assert made[0] == generate(model, tokenizer, [asked], max_new_tokens=8)[0].strip()
    gists = GistCodec(LexicalEmbedder(), summarise=summarise).encode(TEXTS[:2])
    assert [gist.text for gist in gists] == [each if len(each) < len(text) else text for each, text in zip(made, TEXTS[:2], strict=False)]


@pytest.mark.slow
def test_a_gist_beats_truncation_at_equal_bytes(tmp_path):
    done = subprocess.run([sys.executable, BENCHMARK, "--quick"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is True and result["benchmark"] == "memory_gist" and result["wrong"] == []
    assert {(row["embedder"], row["code"]) for row in result["rows"]} == {
        (embedder, code) for embedder in ("lexical", "static") for code in ("binary", "pq-32", "int8")
    }
    for row in result["rows"]:
        assert row["gist"] > row["truncated"] and row["gist_head"] > row["truncated_head"]
        if row["bytes"] < 64:
            assert row["gist"] > 2 * row["truncated"]
    assert not list(tmp_path.iterdir())
