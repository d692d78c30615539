"""A slice that is not here: its name, what is asked when a step is refused, the cheapest one, and what the TPU's own compiler says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pantheraml.cli import plan
from pantheraml.engines.xla_ahead import Compiled, NoRoom, between_slices
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.tpu import TpuSlice, larger_slices, parse_slice
from pantheraml.hardware.xla import installed
from pantheraml.models.load import read_shape
from pantheraml.recipe.load import recipe_from
from pantheraml.trainer.ahead import fitted, inventory_of, plan_ahead

needs_libtpu = pytest.mark.skipif(not installed("libtpu"), reason="libtpu, the compiler of TPUs, is not installed")
GIB = 2**30


def tiny(*changes):
    return recipe_from(
        {"model": "tiny:llama", "data": "rows.jsonl"},
        ["hardware.kind=tpu", "adapter.rank=4", "model.max_tokens=128", "batch.size=32", *changes],
    )


@pytest.fixture(scope="module")
def shape():
    return read_shape(tiny().model)


def part(peak_bytes, *, phase="gradients", waiting_bytes=0):
    """What a compiler may say."""
    return Compiled(
        phase=phase,
        arguments_bytes=0,
        results_bytes=0,
        temporary_bytes=peak_bytes - waiting_bytes,
        waiting_bytes=waiting_bytes,
        collectives={},
        between_slices={},
        between_slices_bytes=0,
        compile_s=1.0,
    )


class Compiler:
    """Stands where libtpu is asked, and knows no TPU: it refuses what `refuses` says, and remembers what it was asked for."""

    def __init__(self, refuses):
        self._refuses, self.asked, self.slices = refuses, [], []

    def __call__(self, tpu, plan):
        self.asked.append((plan.levels[0], plan.micro_tokens // plan.row_tokens[-1]))
        self.slices.append(str(tpu))
        if self._refuses(tpu, plan):
            raise NoRoom("RESOURCE_EXHAUSTED: no room")
        return (part(GIB), part(GIB // 2, phase="update"))


def ask(recipe, word, shape, compiler, announce=lambda line: None):
    return fitted(recipe, parse_slice(word), shape, compiler, announce)


# ---- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "topology", "chips", "devices"),
    [
        ("v5e-8", "2x4", 8, 8),
        ("v5litepod-8", "2x4", 8, 8),
        ("v6e-16", "4x4", 16, 16),
        ("V5P-128", "4x4x4", 64, 64),  # counts cores, two a chip, which work as one device
        ("v5p-4x4x4", "4x4x4", 64, 64),
        ("v4-8", "2x2x1", 4, 4),
        ("tpu7x-8", "2x2x1", 4, 8),  # counts cores, each of which is a device
        ("v3-8", "2x2", 4, 8),
        ("2*v5e-8", "2x4", 16, 16),
        ("2 * tpu7x-8", "2x2x1", 8, 16),
    ],
)
def test_a_slice_is_named_as_google_does(word, topology, chips, devices):
    tpu = parse_slice(word)
    assert (tpu.topology, tpu.chips, len(inventory_of(tpu).devices)) == (topology, chips, devices)
    assert parse_slice(str(tpu)) == tpu


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("h100-8", "'h100-8' is no name of a TPU slice"),
        ("v5e-7", "choose from v5e-1, v5e-4, v5e-8"),
        ("tpu7x-4", "choose from tpu7x-8, tpu7x-16"),
        ("v5p-2x4", "a slice of v5p has 3 axes"),
    ],
)
def test_what_is_no_slice_is_an_error_that_names_others(word, said):
    with pytest.raises(DeviceError) as caught:
        parse_slice(word)
    assert said in str(caught.value)


def test_a_generation_that_is_not_in_the_catalog_is_an_error():
    with pytest.raises(DeviceError, match="the catalog has no TPU v9z"):
        inventory_of(TpuSlice("v9z", "2x2x1"))


def test_slices_rise():
    chips = [tpu.chips for tpu in larger_slices("v5e")]
    assert chips == sorted(set(chips))


# ---- When a step is refused ------------------------------------------------------------------------------------------


def test_layers_keep_less_and_then_rows_are_halved_down_to_one_a_device(shape):
    compiler = Compiler(lambda tpu, plan: True)
    said = []
    fit = ask(tiny(), "v5e-8", shape, compiler, said.append)
    assert compiler.asked == [("keep", 32), ("cheap", 32), ("all", 32), ("all", 16), ("all", 8)]
    assert not fit.fits and fit.peak_bytes is None
    assert [(each.rows, each.levels) for each in fit.refused] == [
        (32, "4 keep"),
        (32, "4 cheap"),
        (32, "4 all"),
        (16, "4 all"),
        (8, "4 all"),
    ]
    assert len(said) == 4 and all("\n" not in line for line in said)
    assert said[0].endswith("now 32 rows of 128, layers at 4 cheap")


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        (["hardware.checkpointing=cheap"], [("cheap", 32), ("cheap", 16), ("cheap", 8)]),
        (["batch.micro_tokens=2048"], [("keep", 16), ("cheap", 16), ("all", 16)]),
        (["batch.micro_tokens=2048", "hardware.checkpointing=off"], [("keep", 16)]),
        (["batch.micro_tokens=128", "hardware.checkpointing=on"], [("all", 8)]),  # filled up with empty rows, as the engine does
    ],
)
def test_what_the_recipe_fixes_stays(changes, asked, shape):
    compiler = Compiler(lambda tpu, plan: True)
    ask(tiny(*changes), "v5e-8", shape, compiler)
    assert compiler.asked == asked


def test_the_first_step_that_fits_is_the_answer_and_says_how_to_run_it(shape):
    compiler = Compiler(lambda tpu, plan: plan.micro_tokens > 16 * 128)
    fit = ask(tiny(), "v5e-8", shape, compiler)
    assert fit.fits and fit.rows == 16 and set(fit.plan.levels) == {"all"}
    assert fit.settings == ("hardware.checkpointing=on", "batch.micro_tokens=2048")
    table = {choice: (value, why) for choice, value, why in fit.lines()}
    assert table["fits"][0] == "yes" and table["to run it so"][0] == " ".join(fit.settings)
    again = ask(tiny(*fit.settings), "v5e-8", shape, Compiler(lambda tpu, plan: False))
    assert (again.plan.levels, again.plan.micro_tokens, again.plan.cost) == (fit.plan.levels, fit.plan.micro_tokens, fit.plan.cost)


def test_a_step_that_fits_at_once_needs_no_setting(shape):
    fit = ask(tiny(), "v5e-8", shape, Compiler(lambda tpu, plan: False))
    assert fit.fits and not fit.refused and not fit.settings and fit.doubt is None


def test_what_waits_beside_a_program_counts(shape):
    # The compiler of TPUs says 15.75 GiB of a v5e's 16; it knows of one program at a time.
    compiler = Compiler(lambda tpu, plan: False)

    def more_than_there_is(tpu, plan):
        compiler(tpu, plan)
        return (part(16 * GIB, waiting_bytes=GIB),) if plan.levels[0] == "keep" else (part(GIB),)

    fit = ask(tiny(), "v5e-8", shape, more_than_there_is)
    assert compiler.asked == [("keep", 32), ("cheap", 32)]
    assert fit.fits and fit.refused[0].why == "16.0 GiB with what waits on a device, of 15.8 GiB"


def test_where_arithmetic_says_no_the_least_is_asked_for_all_the_same(shape):
    large = replace(shape, parameters=8 * 10**9)  # 16 GB in bfloat16
    compiler = Compiler(lambda tpu, plan: False)
    fit = ask(tiny(), "v5e-1", large, compiler)
    assert compiler.asked == [("all", 1)]
    assert fit.fits and fit.doubt is not None and fit.doubt.startswith("training needs")
    assert fit.plan.device.free_bytes == int(15.75 * GIB)


def test_an_error_that_is_not_about_memory_stays_one(shape):
    with pytest.raises(DeviceError, match="checkpointing=tiled is not possible"):
        ask(tiny("hardware.checkpointing=tiled"), "v5e-8", shape, Compiler(lambda tpu, plan: False))


# ---- The cheapest slice ----------------------------------------------------------------------------------------------


def ahead(compiler, word, *changes, **how):
    return plan_ahead(tiny(*changes), word, announce=lambda line: None, compile_step=compiler, **how)


def test_without_being_asked_the_cheapest_is_found_by_arithmetic_and_says_so():
    compiler = Compiler(lambda tpu, plan: False)
    found = ahead(compiler, "v5p-8")
    assert compiler.slices == ["v5p-2x2x1"]
    assert found.cheapest.fit is None and str(found.cheapest.tpu) == "v5e-1x1"
    assert "the compiler was not asked" in found.lines()[-1][2] and "tpu7x-2x2x1 is not known" in found.lines()[-1][2]


def test_the_cheapest_is_asked_for_and_then_the_next_in_price():
    compiler = Compiler(lambda tpu, plan: tpu.generation == "v5e" or (tpu.generation == "v6e" and tpu.chips == 1))
    found = ahead(compiler, "v5p-8", suggest=True)
    asked = list(dict.fromkeys(compiler.slices))
    assert asked[:4] == ["v5p-2x2x1", "v5e-1x1", "v6e-1x1", "v5e-2x2"]
    cheapest = found.cheapest
    assert (
        cheapest.fit is not None and cheapest.fit.fits and [str(each) for each in cheapest.passed] == ["v5e-1x1", "v6e-1x1", *asked[3:-1]]
    )
    # By hand, from Google's prices of a chip: v5e 1.20, v6e 2.70, v4 3.22, v5p 4.20. After v5e-8 at 9.60 comes v6e-4 at 10.80.
    assert str(cheapest.tpu) == "v6e-2x2" and cheapest.plan.cost.usd_per_hour == pytest.approx(10.80)


def test_what_the_compiler_said_of_the_slice_itself_is_not_asked_again():
    compiler = Compiler(lambda tpu, plan: False)
    found = ahead(compiler, "v5e-1", suggest=True)
    assert compiler.slices == ["v5e-1x1"]
    assert found.cheapest.fit is found.fit


def test_where_every_slice_is_refused_none_is_suggested():
    found = ahead(Compiler(lambda tpu, plan: True), "v5e-8", "batch.micro_tokens=4096", "hardware.checkpointing=on", suggest=True)
    assert found.cheapest.plan is None and parse_slice("v5e-8") in found.cheapest.passed
    assert found.lines()[-1][1] == "none is known"


def test_your_own_price_is_that_of_the_generation_you_ask_for():
    found = ahead(Compiler(lambda tpu, plan: False), "tpu7x-8", "hardware.usd_per_hour=0.01", suggest=True)
    assert str(found.cheapest.tpu) == "tpu7x-2x2x1" and found.cheapest.plan.cost.usd_per_hour == pytest.approx(0.08)
    assert found.cheapest.unpriced == ()


def test_where_it_does_not_fit_a_base_in_eight_bits_is_named_if_that_would(shape):
    refuses = Compiler(lambda tpu, plan: True)
    assert ahead(refuses, "v5e-8").hint == "model.load_in_8bit=true"
    assert ahead(refuses, "v5e-8", "model.load_in_8bit=true").hint is None
    assert ahead(Compiler(lambda tpu, plan: False), "v5e-8").hint is None


def test_a_million_tokens_cost_what_the_hour_and_the_guessed_time_say():
    found = ahead(Compiler(lambda tpu, plan: False), "2*v5e-8")
    values = json.loads(json.dumps(found.to_dict()))
    tokens_per_hour = found.fit.plan.micro_tokens / values["guessed_step_s"] * 3600
    assert values["usd_per_hour"] == pytest.approx(16 * 1.20)
    assert values["guessed_usd_per_million_tokens"] == pytest.approx(16 * 1.20 / tokens_per_hour * 1e6)
    guesses = {choice: why for choice, _, why in found.lines()}
    assert "not measured" in guesses["time"] and "not measured" in guesses["price of tokens"]
    assert "exchanges between slices are not counted" in guesses["time"]


def test_a_suggestion_without_a_slice_is_an_error():
    with pytest.raises(RecipeError, match="--suggest needs --device"):
        plan(["tiny:llama", "rows.jsonl"], suggest=True)


def test_exchanges_between_slices_are_read_from_the_text():
    # Two lines as libtpu 0.0.42 writes them for two slices, shortened.
    text = (
        "  %send.6 = (bf16[1,2,128]{2,1,0:T(2,128)(2,1)}, u32[], token[]) send(%bitcast.2022, %after-all.6), channel_id=2, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %recv.6 = (bf16[1,2,128]{2,1,0:T(2,128)(2,1)}, u32[], token[]) recv(%after-all.6), channel_id=1, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %send.2 = (f32[]{:T(1,128)}, u32[], token[]) send(%all-reduce.128, %after-all.2), channel_id=6, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    )
    assert between_slices(text) == ({"all-reduce": 2}, 2 * 128 * 2 + 4)
    assert between_slices("%send.6 = (bf16[2]{0}, u32[], token[]) send(%a, %b), channel_id=2") == ({}, 0)


# ---- The TPU's own compiler ------------------------------------------------------------------------------------------


@pytest.fixture
def libtpu(monkeypatch):
    """It asks a server for the machine's TPU otherwise, and wants to be alone."""
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)


@needs_libtpu
@pytest.mark.parametrize("word", ["v3-8", "v4-8", "v5e-4", "v6e-4", "v5p-8", "tpu7x-8", "2*v5e-4", "2*v5e-1"])
def test_the_compiler_of_tpus_makes_a_step_for_a_slice(word, libtpu):
    found = plan_ahead(tiny(), word).fit
    assert found.fits and not found.refused
    assert found.plan.world_size == len(inventory_of(found.tpu).devices)
    gradients, update = found.compiled
    assert (gradients.phase, update.phase) == ("gradients", "update")
    # Each device holds at least its part of the base, and the whole is a small model.
    assert found.plan.memory.weights_bytes // found.plan.world_size // 2 < gradients.peak_bytes < GIB
    assert gradients.collectives or gradients.between_slices
    assert bool(gradients.between_slices_bytes) == (found.tpu.slices > 1)
    if found.tpu.slices > 1:
        assert found.plan.mesh["dcn"] == 2 and "between slices" in [choice for choice, _, _ in found.lines()]


@needs_libtpu
def test_the_compiler_of_tpus_refuses_what_does_not_fit(libtpu):
    said = []
    rows = 2**21
    found = plan_ahead(tiny(f"batch.micro_tokens={rows * 128}"), "v5e-1", announce=said.append).fit
    assert not found.fits and found.doubt is not None
    assert [each.rows for each in found.refused] == [rows]
    assert found.refused[0].why.startswith("RESOURCE_EXHAUSTED")
