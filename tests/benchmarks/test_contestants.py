"""The trainers that the speed benchmarks compare get the same rows, and useful work is counted by its definition."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def contestants():
    spec = importlib.util.spec_from_file_location("contestants", BENCHMARKS / "contestants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["contestants"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["contestants"]


def test_full_rows(contestants, tmp_path):
    data = contestants.Data(longest=64, step_rows=2, micro_rows=2, mixed=False)
    contestants.write_rows(tmp_path / "rows.jsonl", data, steps=3, vocab=512)
    rows = contestants.read_rows(tmp_path / "rows.jsonl")
    assert [len(row["input_ids"]) for row in rows] == [64] * 6
    assert all(row["labels"] == row["input_ids"] and contestants.label_count(row) == 63 for row in rows)
    assert all(contestants.FIRST_WORD <= token < 512 for row in rows for token in row["input_ids"][:-1])


def test_length_mix(contestants, tmp_path):
    data = contestants.Data(longest=1024, step_rows=16, micro_rows=4, mixed=True)
    contestants.write_rows(tmp_path / "rows.jsonl", data, steps=125, vocab=512)
    rows = contestants.read_rows(tmp_path / "rows.jsonl")
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(rows) == 2000 and max(lengths) == 1024 and min(lengths) == 16
    # The lognormal's mean is 204.8 and its standard deviation 228, so that of the mean of 2000 is 5.1; clipping moves it a little.
    assert 185 < sum(lengths) / len(lengths) < 220
    masked = [row["labels"].count(contestants.IGNORED) for row in rows]
    # Half of the words, rounded up, are the prompt; the end of the text belongs to the answer.
    assert masked == [length // 2 for length in lengths]
    contestants.write_rows(tmp_path / "fewer.jsonl", data, steps=2, vocab=512)
    assert contestants.read_rows(tmp_path / "fewer.jsonl") == rows[:32]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_all_trainers_read_the_same_tokens(family, contestants, tmp_path, monkeypatch):
    """Ours tokenises the words; what comes out is what the others are given as numbers."""
    from rich.console import Console

    from pantheraml.recipe.load import recipe_from
    from pantheraml.trainer import survey

    monkeypatch.setattr(survey, "load_tokenizer", survey.load_tokenizer)
    monkeypatch.setitem(contestants.SHAPES, "tiny", contestants.SHAPES["tiny"] | {"family": family})
    contestants.write_weights("tiny", tmp_path / "model")
    contestants.read_words()
    for mixed in (False, True):
        data = contestants.Data(longest=64, step_rows=4, micro_rows=4, mixed=mixed)
        contestants.write_rows(tmp_path / "rows.jsonl", data, steps=2, vocab=512)
        rows = contestants.read_rows(tmp_path / "rows.jsonl")
        recipe = recipe_from(
            {
                "model": {"name": str(tmp_path / "model"), "max_tokens": 64},
                "data": {"train": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.0},
                "hardware": {"kind": "cpu"},
            }
        )
        examples = survey.survey(recipe, console=Console(quiet=True)).data.train
        assert len(examples) == len(rows) == 8
        for example, row in zip(examples, rows, strict=True):
            assert example.tokens.tolist() == row["input_ids"]
            learned = [label != contestants.IGNORED for label in row["labels"][1:]]
            assert example.loss[1:].tolist() == learned


def test_useful_flops_are_those_of_the_definition(contestants):
    """Counted on the modules of the real model, with torch's own counter for the products of its forward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(contestants.SHAPES["tiny"])
    config = AutoConfig.for_model(sizes.pop("family"), **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    length = 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # Eager attention computes the whole square, of which half is causal.
    square = config.num_hidden_layers * 4 * config.hidden_size * length**2
    head = 2 * config.hidden_size * config.vocab_size * length
    base = counter.get_total_flops() - square - head
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    lora = contestants.RANK * sum(m.in_features + m.out_features for m in linears)
    row = {"input_ids": [3] * length, "labels": [contestants.IGNORED] * 48 + [3] * 48}
    # Twice the forward for the frozen base and for the labelled rows of the head, three times for LoRA.
    expected = 2 * base + 3 * (2 * lora * length) + 2 * head * 48 / length + 3.5 * square / 2
    # Some versions of transformers compute the angles of the rotation as a product of matrices, 1 / 25,000 of all.
    assert contestants.flops_per_token("tiny", [row]) * length == pytest.approx(expected, rel=1e-4)
