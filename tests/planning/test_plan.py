from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from tests.fakes import decoder_shape, fake_device, h100s, laptop, llama_8b

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import Inventory
from pantheraml.planning.compile import choose_compile, choose_graphs
from pantheraml.planning.levels import rungs
from pantheraml.planning.memory import estimate_memory, format_bytes
from pantheraml.planning.plan import Plan, format_seconds, make_plan
from pantheraml.recipe.types import Recipe


def recipe(**parts: Any) -> Recipe:
    return Recipe.model_validate({"model": {"name": "fake"}, "data": "rows.jsonl", **parts})


def plan(**parts: Any) -> Plan:
    return make_plan(recipe(**parts), h100s(), decoder_shape())


def test_lora_of_8b_on_an_h100_needs_no_checkpointing() -> None:
    made = make_plan(recipe(), h100s(), llama_8b(), train_tokens=10_000_000, train_rows=20_000)
    assert (made.dtype, made.base_dtype, made.lr, made.checkpointing) == ("bfloat16", "bfloat16", 2e-4, False)
    assert made.memory.total_bytes < 80 << 30
    # Weights: 8.03e9 in two bytes, the adapter's 41.9e6 in four.
    assert made.memory.weights_bytes == pytest.approx(8.03e9 * 2 + 41.9e6 * 4, rel=0.01)
    assert made.row_tokens[-1] == made.max_tokens == 2048
    assert made.cost.time_s is not None


def test_full_training_keeps_everything_that_trains_in_float32() -> None:
    made = plan(adapter="full")
    parameters = decoder_shape().parameters
    assert (made.dtype, made.base_dtype, made.lr) == ("bfloat16", "float32", 2e-5)
    assert made.memory.weights_bytes == made.memory.gradients_bytes == 4 * parameters
    assert made.memory.optimizer_bytes == 8 * parameters
    for states in ("8bit", "paged"):
        few = plan(adapter="full", optim={"states": states}).memory
        # Two of one byte, and a float32 for each 256 of both.
        assert few.optimizer_bytes == pytest.approx((2 + 8 / 256) * parameters, abs=1)
        assert few.weights_bytes + few.gradients_bytes == 8 * parameters


def test_activations_of_8b_agree_with_an_independent_count() -> None:
    # 27.5 GiB for two rows of 2048 with stock modules and LoRA, counted on paper by somebody else; masks add a little.
    made = make_plan(recipe(batch={"size": 16, "micro_tokens": 4096}), h100s(), llama_8b())
    assert made.memory.activations_bytes / (1 << 30) == pytest.approx(27.5, rel=0.1)


def test_a_laptop_computes_in_the_dtype_that_is_faster_there() -> None:
    small = decoder_shape(layers=8, hidden=512, intermediate=1536, heads=8, vocab=32000)
    assert make_plan(recipe(), laptop(), small).dtype == "float32"
    assert make_plan(recipe(), laptop(dtypes=("bfloat16", "float32")), small).dtype == "bfloat16"
    old = Inventory(devices=(fake_device("cuda", dtypes=("float16", "float32")),))
    assert make_plan(recipe(), old, small).dtype == "float32"  # float16 is never a choice of ours


def test_more_memory_never_means_fewer_tokens_or_more_checkpointing() -> None:
    made = [make_plan(recipe(), h100s(1, memory_gib=gib), llama_8b()) for gib in range(28, 200, 4)]
    tokens = [one.micro_tokens for one in made if not one.checkpointing]
    assert tokens == sorted(tokens)
    assert [one.checkpointing for one in made] == sorted((one.checkpointing for one in made), reverse=True)
    assert made[0].checkpointing and not made[-1].checkpointing


def test_a_step_is_not_taken_in_one_piece_larger_than_itself() -> None:
    made = make_plan(recipe(batch={"size": 4}), h100s(), decoder_shape(), train_tokens=100_000, train_rows=1000, longest_example=190)
    assert made.row_tokens[-1] == 768  # four of the longest, rounded up
    assert made.micro_tokens == 768  # 4 examples of 100 tokens are less than one row
    alone = make_plan(recipe(data={"train": "rows.jsonl", "packing": "off"}), h100s(), decoder_shape(), longest_example=190)
    assert alone.row_tokens == (64, 96, 128, 192)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"model": {"name": "fake", "dtype": "float16"}}, DeviceError, "model.dtype=float16 does not train on cuda:0 (Fake H100)"),
        ({"model": {"name": "fake", "attention": "flash_attention_2"}}, DeviceError, "model.attention=flash_attention_2 is not offered"),
        ({"model": {"name": "fake", "load_in_4bit": True}}, DeviceError, "cannot hold a base in 4 bits"),
        ({"model": {"name": "fake", "max_tokens": 200_000}}, RecipeError, "model.max_tokens=200000, but fake/1b was made for 131072"),
        ({"batch": {"micro_tokens": 512}}, RecipeError, "batch.micro_tokens=512 is less than the longest row, 2048 tokens"),
        ({"hardware": {"kind": "xpu"}}, DeviceError, "no xpu device answered"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_why_and_fix(parts: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        plan(**parts)
    lines = str(caught.value).splitlines()
    assert message in lines[0]
    assert lines[1].startswith("  why: ")
    assert lines[2].startswith("  fix: ")


def test_packing_is_off_where_the_model_carries_state() -> None:
    hybrid = decoder_shape("fake/hybrid", family="falcon_h1", packs=False)
    made = make_plan(recipe(), h100s(), hybrid)
    assert not made.packing
    assert "carries state" in made.reasons["packing"]
    assert "not counted" in made.reasons["memory"]
    with pytest.raises(RecipeError, match=r"data\.packing=on, but fake/hybrid"):
        make_plan(recipe(data={"train": "rows.jsonl", "packing": "on"}), h100s(), hybrid)


def test_what_does_not_fit_is_refused_with_remedies_that_would_fit() -> None:
    with pytest.raises(DeviceError) as caught:
        make_plan(recipe(adapter="full"), h100s(), llama_8b())
    assert "training needs" in caught.value.what and "80.0 GiB free" in caught.value.what
    assert caught.value.fix == "set adapter.kind to lora"
    make_plan(recipe(adapter="lora"), h100s(), llama_8b())

    # 14 GiB: the weights alone are more, so shorter rows would not help; four bits would.
    with pytest.raises(DeviceError) as caught:
        make_plan(recipe(), h100s(1, memory_gib=14), llama_8b(), quantizers=("nf4",))
    assert caught.value.fix == "set model.load_in_4bit to true"
    made = make_plan(recipe(model={"name": "fake", "load_in_4bit": True}), h100s(1, memory_gib=14), llama_8b(), quantizers=("nf4",))
    assert made.quantizer == "nf4"

    with pytest.raises(DeviceError) as caught:
        make_plan(recipe(hardware={"checkpointing": "off"}), h100s(1, memory_gib=28), llama_8b())
    assert "set hardware.checkpointing to auto" in caught.value.fix

    # What is asked for at once is too much whatever holds the weights.
    with pytest.raises(DeviceError) as caught:
        make_plan(recipe(batch={"micro_tokens": 10_000_000}), h100s(1), llama_8b(), quantizers=("nf4", "int8"))
    assert caught.value.fix == "set batch.micro_tokens to auto"
    make_plan(recipe(), h100s(1), llama_8b())

    with pytest.raises(DeviceError, match="fix: choose a smaller model"):
        make_plan(recipe(), laptop(8), llama_8b())


def test_it_says_what_attention_and_time_are_of() -> None:
    made = make_plan(
        recipe(model={"name": "fake", "attention": "eager"}, hardware={"compile": "on"}),
        h100s(1),
        replace(llama_8b(), fused=True),
        train_tokens=10_000,
        train_rows=100,
    )
    assert made.reasons["attention"] == "the recipe asks for it, where answers are written; in training the kernels compute it"
    assert made.reasons["time"] == "for the whole run, without loading, compiling and evaluation"
    plain = make_plan(recipe(), h100s(1), llama_8b(), train_tokens=10_000, train_rows=100)
    assert plain.reasons["attention"] == "the first that the device and the model offer"
    assert plain.reasons["time"] == "for the whole run, without loading and evaluation"


def test_what_is_asked_is_never_overridden() -> None:
    made = plan(
        model={"name": "fake", "dtype": "float32", "attention": "eager", "max_tokens": 300},
        batch={"size": 3, "micro_tokens": 1000},
        optim={"lr": 0.5},
        hardware={"kind": "cuda", "index": 3, "threads": 7, "checkpointing": "on"},
        data={"train": "rows.jsonl", "packing": "off"},
    )
    assert (made.dtype, made.attention, made.max_tokens, made.micro_tokens) == ("float32", "eager", 300, 1000)
    assert (str(made.device), made.threads, made.checkpointing, made.packing, made.lr) == ("cuda:3", 7, True, False, 0.5)
    # The device was measured in bfloat16, so nothing is known about its speed in float32.
    assert made.cost.tokens_per_s is None


def test_every_choice_has_a_reason_and_prints() -> None:
    made = plan()
    lines = made.lines()
    assert all(reason for _, _, reason in lines)
    choices = [choice for choice, _, _ in lines]
    assert {"device", "dtype", "attention", "max_tokens", "packing", "micro_tokens", "checkpointing", "lr", "threads"} <= set(choices)
    values = {choice: value for choice, value, _ in lines}
    assert "simulated" in values["device"]
    assert values["time"] == "unknown"  # the data was not read
    assert json.loads(json.dumps(made.to_dict()))["memory"]["total_bytes"] == made.memory.total_bytes


def test_unknown_speed_prints_as_unknown() -> None:
    made = make_plan(recipe(), Inventory(devices=(fake_device("xpu"),)), decoder_shape(), train_tokens=10)
    assert {choice: value for choice, value, _ in made.lines()}["speed"] == "unknown"


def test_steps_times_batch_gives_the_tokens_of_the_run() -> None:
    made = make_plan(recipe(optim={"steps": 10}, batch={"size": 4}), h100s(), decoder_shape(), train_tokens=1000, train_rows=10)
    assert made.cost.total_tokens == 10 * 4 * 100
    made = make_plan(recipe(optim={"epochs": 3}), h100s(), decoder_shape(), train_tokens=1000)
    assert made.cost.total_tokens == 3000


def test_a_token_of_8b_costs_what_the_literature_counts() -> None:
    # 4 N for LoRA is 32.1 GFLOP at N = 8.03e9 with causal attention at 2048 (ours counts the masked half too).
    flops = make_plan(recipe(), h100s(), llama_8b()).cost.flops_per_token
    assert flops == pytest.approx(32.1e9, rel=0.1)


def test_numbers_print_for_people() -> None:
    assert [format_bytes(n) for n in (None, 512, 3 << 20, (3 << 30) + (1 << 29))] == ["unknown", "0 KiB", "3 MiB", "3.5 GiB"]
    assert [format_seconds(n) for n in (None, 0.2, 59, 125, 7500)] == [
        "unknown",
        "about 1 s",
        "about 59 s",
        "about 2 min",
        "about 2 h 5 min",
    ]


def test_planning_imports_no_torch_and_leaves_the_environment_alone() -> None:
    program = (
        "import os, sys; before = dict(os.environ)\n"
        "import pantheraml.planning.plan, pantheraml.recipe.types, pantheraml.hardware.select, pantheraml.hardware.device\n"
        "assert dict(os.environ) == before\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("kind", "fused", "asked", "steps", "compiles", "said"),
    [
        ("cuda", True, "auto", 5000, False, "kernels compute the layers"),
        ("cuda", False, "auto", 500, True, "500 steps earn back the compiling, which takes about a minute"),
        ("xpu", False, "auto", 500, True, "earn back"),
        ("cuda", False, "auto", 499, False, "499 steps are few"),
        ("cuda", False, "auto", None, False, "not known"),
        ("cpu", False, "auto", 5000, False, "seldom pays on cpu"),
        ("tpu", False, "auto", 5000, False, "XLA compiles whole steps"),
        ("cpu", True, "on", 1, True, "asks for it; compiling takes about a minute"),
        ("cuda", False, "off", 5000, False, "asks for it"),
    ],
)
def test_layers_are_compiled_where_it_pays(kind: str, fused: bool, asked: str, steps: int | None, compiles: bool, said: str) -> None:
    found, reason = choose_compile(asked, fake_device(kind), fused=fused, steps=steps)
    assert found == compiles and said in reason


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "cpu"])
def test_each_level_needs_less_than_the_one_before_it(kind: str) -> None:
    device, shape = fake_device(kind), replace(llama_8b(), fused=True)
    levels = rungs(device, "auto", fused=True)
    needs = [
        estimate_memory(
            shape,
            trainable_parameters=shape.lora_parameters(16),
            base_bytes_each=2,
            micro_tokens=8192,
            row_tokens=8192,
            levels=(level,) * shape.layers,
            fused=True,
            attention="sdpa",
            compute_bytes_each=2,
            lora_rank=16,
        ).total_bytes
        for level in levels
    ]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(levels) > 2
    # What works in the host's memory, or in the same as the host, has nowhere else to put what does not fit.
    assert ("offload" in levels) == (kind in ("cuda", "xpu"))
    if "offload" not in levels:
        with pytest.raises(DeviceError, match="works in ordinary memory"):
            rungs(device, "offload", fused=True)


CAN: dict[str, Any] = {"fused": True, "lora": True, "levels": ("keep",) * 30, "compiled": False, "fits": True, "micro_batch_s": 0.01}


@pytest.mark.parametrize(
    ("kind", "change", "records", "said"),
    [
        ("cuda", {}, True, "to tell the GPU of a micro-batch may take 30 ms, and to compute it 10 ms"),
        ("cuda", {"micro_batch_s": 0.031}, False, "computed in about 31 ms, which leaves time"),
        ("cuda", {"micro_batch_s": None}, False, "not measured"),
        ("cuda", {"fused": False}, False, "random numbers"),
        ("cuda", {"lora": False}, False, "every weight trains"),
        ("cuda", {"compiled": True}, False, "torch compiles"),
        ("cuda", {"fits": False}, False, "no room"),
        ("cuda", {"levels": ("all", "offload")}, False, "ordinary memory"),
        ("xpu", {}, False, "nothing is recorded on xpu"),
        ("cpu", {}, False, "nothing is recorded on cpu"),
    ],
)
def test_steps_are_recorded_where_telling_takes_longer_than_computing(kind: str, change: Any, records: bool, said: str) -> None:
    given = {**CAN, **change}
    found, reason = choose_graphs("auto", fake_device(kind), **given)
    assert found == records and said in reason
    assert choose_graphs("off", fake_device(kind), **given) == (False, "the recipe asks for it")
    if records or "micro_batch_s" in change:
        assert choose_graphs("on", fake_device(kind), **given)[0]
    else:
        with pytest.raises(RecipeError, match=r"hardware\.graphs=on, but"):
            choose_graphs("on", fake_device(kind), **given)


def test_a_small_model_on_a_large_gpu_is_recorded_and_a_large_one_is_not() -> None:
    small = replace(decoder_shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=49152), fused=True)
    made = make_plan(recipe(batch={"micro_tokens": 2048}), h100s(), small)
    assert made.graphs and {choice: value for choice, value, _ in made.lines()}["graphs"] == "on"
    assert not make_plan(recipe(), h100s(), replace(llama_8b(), fused=True)).graphs
    assert not make_plan(recipe(), laptop(), small).graphs


def test_the_length_of_a_run_is_counted_in_steps() -> None:
    stock = decoder_shape("fake/stock")
    long, short = (make_plan(recipe(), h100s(), stock, train_tokens=rows * 100, train_rows=rows) for rows in (500 * 16, 499 * 16))
    assert long.compile and not short.compile and {choice: value for choice, value, _ in long.lines()}["compile"] == "on"
    older = {name: value for name, value in long.to_dict().items() if name != "compile"}
    with pytest.raises(ValueError, match="compile"):  # a run that is resumed makes a new one
        Plan.from_dict(older)


@pytest.mark.parametrize("packing", ["on", "off"])
def test_rows_are_no_longer_than_what_is_asked_for_at_once_as_long_as_examples_fit(packing: str) -> None:
    for asked in (100, 131, 600, 5000):
        made = make_plan(
            recipe(batch={"micro_tokens": asked}, data={"train": "rows.jsonl", "packing": packing}),
            h100s(),
            decoder_shape(),
            longest_example=100,
        )
        assert made.micro_tokens == asked and 100 <= made.row_tokens[-1] <= asked
    with pytest.raises(RecipeError, match="less than the longest row, 100 tokens"):
        make_plan(recipe(batch={"micro_tokens": 99}), h100s(), decoder_shape(), longest_example=100)
