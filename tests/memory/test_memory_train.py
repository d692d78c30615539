"""A model made of texts by the trainer, calibrated and kept; small enough for seconds."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from tests.memory.models import CPU

from pantheraml.errors import DataError
from pantheraml.memory.integer_model import SUFFIX
from pantheraml.memory.integer_predictor import IntegerPredictor
from pantheraml.memory.neural import NeuralCodec
from pantheraml.memory.shared import Shared
from pantheraml.memory.train import Size, Trained, _balanced, _split, train_model
from pantheraml.recipe.types import HardwareAsk

SMALL = Size(vocabulary=320, hidden=32, layers=1, heads=2, groups=1, inner=64, context=64)
ONE_THREAD = HardwareAsk(kind="cpu", threads=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The trainer sets the number for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def logs(count: int, seed: int = 0) -> list[str]:
    """Lines of a made-up service: words that return, and numbers that do not."""
    draw = random.Random(seed)

    def line() -> str:
        what = draw.choice(["GET /items 200", "connection returned to pool", "retry of job", "login of user"])
        return f"2025-01-{draw.randint(1, 28):02} INFO {what} {draw.randint(0, 9999)} in {draw.randint(1, 99)}ms\n"

    return ["".join(line() for _ in range(8)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Trained, Path, list[str]]:
    folder = tmp_path_factory.mktemp("train")
    said: list[str] = []
    texts = logs(160)
    made = train_model(
        texts,
        folder / "model",
        Shared(folder / "shared"),
        documents=[str(i // 8) for i in range(160)],
        steps=60,
        size=SMALL,
        hardware=ONE_THREAD,
        announce=said.append,
    )
    return made, folder, said


def test_whole_numbers_lose_less_than_two_percent_and_it_has_learned(trained):
    made, _, said = trained
    measured = made.measured
    assert measured.loss < 0.02
    # A token of 320 at random is 8.3 bits, and these are 3 bytes long or less; what has learned nothing needs more than 3 bits.
    assert measured.bits < 2.6
    assert (measured.documents, measured.texts) == (1, 8), "a twentieth of twenty documents, whole"
    assert made.steps == 60
    assert made.tokens > 60 * 6 * 50
    assert any("152 texts" in each and "8 of other documents" in each for each in said)
    assert any(f"{measured.bits:.3f} bits a byte" in each for each in said)


def test_what_is_measured_is_what_the_codec_needs(trained):
    made, folder, _ = trained
    shared = Shared(folder / "shared")
    codec = NeuralCodec(shared, made.id, device=CPU)
    data = [each.encode() for each in logs(8, seed=1)]
    payloads = codec.encode(data, ["text"] * 8, ["log"] * 8)
    assert codec.decode([each for each in payloads if each]) == data
    bits = 8 * sum(len(each.data) for each in payloads if each) / sum(map(len, data))
    assert bits == pytest.approx(made.measured.bits, rel=0.15), "other lines of the same service"
    assert len(shared.get(made.id, SUFFIX)) == made.file_bytes
    assert IntegerPredictor(shared.get(made.id, SUFFIX), CPU).model.measured["bits"] == round(made.measured.bits, 4)
    level = zstandard.ZstdCompressor(level=19)
    assert bits < 8 * sum(len(level.compress(each)) for each in data) / sum(map(len, data)), "smaller than zstd alone"


def test_the_folder_is_a_model_for_other_uses(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, _, _ = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made.folder), AutoTokenizer.from_pretrained(made.folder)
    assert sum(each.numel() for each in model.parameters()) == made.parameters
    ids: Any = tokenizer("2025-01-02 INFO GET /items 200", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_the_number_of_steps_follows_the_time(tmp_path):
    said: list[str] = []
    made = train_model(
        logs(60), tmp_path / "model", Shared(tmp_path / "shared"), minutes=0.001, size=SMALL, hardware=ONE_THREAD, announce=said.append
    )
    # Less time than a few steps take: the few that measure the speed are the least.
    assert made.steps == 12
    assert not (tmp_path / "model" / "pilot").exists()


def test_too_little_text_is_refused_with_its_numbers(tmp_path):
    for texts, documents in ((logs(3), None), (logs(100), ["same"] * 100)):
        with pytest.raises(DataError, match="too little") as error:
            train_model(texts, tmp_path / "model", Shared(tmp_path / "shared"), documents=documents)
        assert "held out" in error.value.why
    assert not (tmp_path / "model").exists()


def test_documents_stay_whole_and_rare_kinds_return():
    names = [f"d{i // 5}" for i in range(200)]
    learned, held = _split(names, 0)
    assert sorted(learned + held) == list(range(200))
    assert {names[i] for i in learned}.isdisjoint(names[i] for i in held)
    assert len(held) == 10
    kinds = ["rare"] * 4 + ["usual"] * 196
    places = _balanced(range(200), ["x" * 10] * 200, kinds)
    assert places.count(0) == 4
    assert places.count(100) == 1
    assert _balanced([3, 1], ["", "a", "", "b"], None) == [3, 1]
    assert math.isclose(len(places), 212)
