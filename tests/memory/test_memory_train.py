"""A model made of texts by the trainer, calibrated and kept; small enough for seconds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
from pantheraml.memory.stages import BATCH, Stages, Texts
from pantheraml.memory.train import Size, Trained, _pieces, _split, train_model
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
    assert made.tokens > 60 * 6 * 30, "pieces of 192 characters at most"
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
    # Less time than a few steps take: as many as measure the speed are the least.
    assert made.steps == 12
    assert any("12 steps in" in each for each in said)
    assert not (tmp_path / "model" / "pilot").exists()


def test_too_little_text_is_refused_with_its_numbers(tmp_path):
    for texts, documents in ((logs(3), None), (logs(100), ["same"] * 100)):
        with pytest.raises(DataError, match="too little") as error:
            train_model(texts, tmp_path / "model", Shared(tmp_path / "shared"), documents=documents)
        assert "held out" in error.value.why
    assert not (tmp_path / "model").exists()


def test_documents_stay_whole():
    names = [f"d{i // 5}" for i in range(200)]
    learned, held = _split(names, 0)
    assert sorted(learned + held) == list(range(200))
    assert {names[i] for i in learned}.isdisjoint(names[i] for i in held)
    assert len(held) == 10


def test_long_texts_are_learned_in_pieces():
    text = "ab cd" * 100
    assert "".join(_pieces(text, 96)) == text
    assert {len(piece) for piece in _pieces(text, 96)[:-1]} == {96}
    assert _pieces("short", 96) == ["short"]
    assert _pieces(" " * 100 + "x", 50) == ["x"]


def test_every_text_of_a_kind_comes_before_one_comes_again():
    texts = [f"{i} of its kind" for i in range(40)]
    stream = Texts(texts, ["a"] * 30 + ["b"] * 10, seed=1)
    taken = stream.take(400)
    for kind in (set(texts[:30]), set(texts[30:])):
        drawn = [text for text in taken if text in kind]
        for epoch in range(len(drawn) // len(kind)):
            assert set(drawn[epoch * len(kind) : (epoch + 1) * len(kind)]) == kind
    assert Texts(texts, ["a"] * 30 + ["b"] * 10, seed=1).take(400) == taken
    assert Texts(texts, ["a"] * 30 + ["b"] * 10, seed=2).take(400) != taken


def test_kinds_that_say_more_are_seen_more_and_rare_ones_too():
    draw = random.Random(0)
    told = ["".join(draw.choices("abcdefgh", k=1000)) for _ in range(50)]
    repeated = ["the same line again and again\n" * 33] * 50
    rare = [f"rare {i} {draw.random()}" for i in range(20)]
    weights = Texts([*told, *repeated, *rare], ["told"] * 50 + ["repeated"] * 50 + ["rare"] * 20, seed=0).weights
    # One of eight letters is three bits of a byte, and zlib needs a little more.
    assert 0.375 < weights["told"] < 0.5
    assert weights["repeated"] < 0.1 * weights["told"]
    assert weights["rare"] > weights["told"]


class Machine:
    """Stands for the trainer: a step takes 0.1 s with all threads and 0.05 s with one, and a run 2 s before its first.

    Attributes:
        now: seconds. runs: (name, steps, schedule, rate, threads) of each. slow: names of those in which others use the machine.
    """

    def __init__(self) -> None:
        self.now, self.runs, self.slow = 0.0, list[tuple[str, int, str, float, int | None]](), set[str]()

    def train(self, folder: Path, name: str, steps: int, schedule: str, rate: float, threads: int | None) -> Any:
        """As `Stages._train`."""
        each = (0.05 if threads == 1 else 0.1) * (3 if name in self.slow else 1)
        self.runs.append((name, steps, schedule, rate, threads))
        self.now += 2 + steps * each
        (folder / name).mkdir(parents=True)
        line = f'{{"step": 1, "tokens": 1000, "tokens_per_s": {1000 / each}}}\n'
        (folder / name / "metrics.jsonl").write_text(line * steps)
        said = {"tokens": 1000 * steps, "train_s": steps * each, "tokens_per_s": 1000 / each}
        return SimpleNamespace(folder=folder / name, report={"train": said})


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """Two cores."""
    made = Machine()
    monkeypatch.setattr("pantheraml.memory.stages.time.monotonic", lambda: made.now)
    monkeypatch.setattr("pantheraml.hardware.cpu.usable_cores", lambda: 2)
    monkeypatch.setattr(Stages, "_train", lambda self, name, base, *how: made.train(self._folder, name, *how))
    return made


def stages(folder: Path, count: int) -> Stages:
    """Of so many texts that do not matter."""
    texts, cpu = Texts(["one"], ["kind"], 0), HardwareAsk(kind="cpu")
    return Stages(folder, folder / "base", texts, count=count, context=64, hardware=cpu, seed=0, console=None, announce=lambda said: None)


def test_the_time_is_kept_though_the_machine_becomes_slower(tmp_path, machine):
    machine.slow = {"stage7", "stage6", "stage5"}
    done = stages(tmp_path, 10**6).for_minutes(10)
    assert 590 < machine.now < 610
    assert [(name, threads) for name, *_, threads in machine.runs[:2]] == [("pilot", None), ("pilot", 1)]
    real = machine.runs[2:]
    assert done.steps == sum(steps for _, steps, *_ in real)
    assert done.tokens == 1000 * done.steps
    assert real[0][4] == 1, "one thread is faster"
    rates = [rate for *_, rate, _ in real]
    assert rates == sorted(rates, reverse=True)
    assert 0.9 * 3e-3 < rates[0] < 3e-3
    assert [schedule for _, _, schedule, _, _ in real] == ["constant"] * 7 + ["linear"]
    assert [each.name for each in tmp_path.iterdir()] == [done.folder.name], "of all others nothing stays"


def test_few_texts_end_before_the_time(tmp_path, machine):
    assert stages(tmp_path, 400).for_minutes(60).steps == 12 * 400 / BATCH
    assert machine.now < 120


def test_no_time_is_a_few_steps(tmp_path, machine):
    assert stages(tmp_path, 10**6).for_minutes(0.001).steps == 12
    assert [(name, schedule) for name, _, schedule, _, _ in machine.runs] == [("pilot", "constant")] * 2 + [("stage1", "linear")]
