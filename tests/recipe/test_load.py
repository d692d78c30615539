"""Recipes from files, mappings and the command line, and the words of each mistake."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pantheraml.errors import RecipeError
from pantheraml.recipe.keys import SYNONYMS, keys, nearest
from pantheraml.recipe.load import dump_recipe, load_recipe, recipe_from
from pantheraml.recipe.types import Full, LoRA, OptimSpec, Recipe

SMALL = {"model": "tiny:llama", "data": "a.jsonl"}
UNKNOWN = "a key that nothing reads changes nothing, so the run would not be the one you asked for"


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What is said about a recipe with this text and these overrides."""
    monkeypatch.chdir(tmp_path)

    def say(text: str | bytes, *overrides: str) -> str:
        data = textwrap.dedent(text).encode() if isinstance(text, str) else text
        Path("recipe.yaml").write_bytes(data)
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path("recipe.yaml"), overrides)
        assert "pydantic" not in str(caught.value)
        return str(caught.value)

    return say


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from(SMALL, overrides)
    return str(caught.value)


# ---- What is accepted -------------------------------------------------------------------------------------------


def test_load_reads_short_and_long_forms(tmp_path):
    (tmp_path / "short.yaml").write_text("model: tiny:llama\ndata: a.jsonl\nadapter: full\nmethod: sft\n")
    (tmp_path / "long.yaml").write_text("model: {name: tiny:llama}\ndata: {train: [a.jsonl]}\nadapter: {kind: full}\nmethod: {kind: sft}\n")
    short, long = load_recipe(tmp_path / "short.yaml"), load_recipe(tmp_path / "long.yaml")
    assert short == long
    assert short.adapter == Full()
    assert recipe_from({**SMALL, "adapter": {"rank": 8}}).adapter == LoRA(rank=8)


def test_load_reads_yaml_1_2(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: tiny:llama\ndata: {train: a.jsonl, packing: on}\noptim: {lr: 2e-4, eps: 1E-6}\nrun: {name: 2026-01-02}\neval:\n"
    )
    recipe = load_recipe(path)
    # PyYAML alone reads these as True, "2e-4", "1E-6" and a date.
    assert (recipe.data.packing, recipe.optim.lr, recipe.optim.eps, recipe.run.name) == ("on", 2e-4, 1e-6, "2026-01-02")


def test_load_accepts_a_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffmodel: tiny:llama\r\ndata: a.jsonl\r\n".encode())
    assert load_recipe(path) == recipe_from(SMALL)


def test_load_keeps_paths_as_written(tmp_path):
    (tmp_path / "r.yaml").write_text("model: ./base\ndata: ../x/a.jsonl\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.model.name, recipe.data.train) == ("./base", ("../x/a.jsonl",))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=2e-4", "optim", "lr", 2e-4),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("data.train=[a.jsonl,b.jsonl]", "data", "train", ("a.jsonl", "b.jsonl")),
        ("data.train=hub:org/set:train", "data", "train", ("hub:org/set:train",)),
        ("data.train=*.jsonl", "data", "train", ("*.jsonl",)),
        ("data=b.jsonl", "data", "train", ("b.jsonl",)),
        ("export.gguf=q8_0", "export", "gguf", ("q8_0",)),
        ("export.gguf=[q8_0, q4_k_m]", "export", "gguf", ("q8_0", "q4_k_m")),
        ("eval.prompts=What is 2: two?", "eval", "prompts", ("What is 2: two?",)),
        ("run.name=", "run", "name", None),
        ('run.name="3"', "run", "name", "3"),
        ("run.name=a=b", "run", "name", "a=b"),
        ("data.shuffle=false", "data", "shuffle", False),
        ("data.packing=off", "data", "packing", "off"),
        ("adapter={rank: 4}", "adapter", "rank", 4),
    ],
)
def test_override_sets_one_key(override, section, key, value):
    got = getattr(getattr(recipe_from(SMALL, [override]), section), key)
    assert got == value
    assert type(got) is type(value)


def test_override_changes_the_file_and_the_last_one_wins(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: tiny:llama\ndata: a.jsonl\nadapter: {rank: 8}\nbatch: {size: 4}\n")
    recipe = load_recipe(path, ["model.max_tokens=64", "batch.size=2", "batch.size=3", "adapter=full"])
    assert (recipe.model.name, recipe.model.max_tokens, recipe.batch.size, recipe.adapter) == ("tiny:llama", 64, 3, Full())


def test_override_mends_a_mistake_of_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: tiny:llama\ndata: a.jsonl\nbatch: {size: ten}\n")
    assert load_recipe(path, ["batch.size=10"]).batch.size == 10


# ---- The main messages, word by word ----------------------------------------------------------------------------


def test_unknown_key_names_its_line_and_the_nearest(said):
    text = """\
        model: tiny:llama
        data: a.jsonl
        optim:
          learning_rate: 2e-4
        """
    assert said(text) == f"recipe.yaml:4: unknown key optim.learning_rate\n  why: {UNKNOWN}\n  fix: did you mean optim.lr?"


def test_wrong_value_names_what_is_allowed(said):
    assert said("model: tiny:llama\ndata: a.jsonl\nbatch:\n  size: ten\n") == (
        'recipe.yaml:4: batch.size must be a whole number above 0, got "ten"\n'
        "  why: a value is never guessed, and this one decides: "
        "Examples in one optimizer step, over all devices. Changes what is learned.\n"
        "  fix: leave it out to have the default, 16"
    )


def test_all_mistakes_are_said_at_once_in_the_order_of_the_lines(said):
    text = """\
        model: tiny:llama
        data: {train: [a.jsonl, 3]}
        optim: {epochs: "3"}
        bach: {size: 3}
        steps: 50
        """
    assert said(text, "optim.lrr=1e-3") == (
        "1. recipe.yaml:2: data.train[1] must be text, got 3\n"
        '2. recipe.yaml:3: optim.epochs must be a number above 0, got "3"\n'
        "3. recipe.yaml:4: unknown key bach\n"
        "4. recipe.yaml:5: unknown key steps\n"
        "5. command line: unknown key optim.lrr\n"
        "  why: nothing runs until all 5 are settled, so that a typo costs seconds and not hours\n"
        '  fix: 1. put it in quotes if it is meant as text: data.train[1]: "3"\n'
        "       2. write the number without quotes: optim.epochs: 3\n"
        "       3. did you mean batch:?\n"
        "       4. did you mean optim.steps?\n"
        "       5. did you mean optim.lr=1e-3?"
    )


def test_missing_model_and_data_come_with_an_example(said):
    assert said("optim: {lr: 1e-3}\n") == (
        "1. recipe.yaml: the recipe names no model\n"
        "2. recipe.yaml: the recipe names no data\n"
        "  why: nothing runs until all 2 are settled, so that a typo costs seconds and not hours\n"
        "  fix: 1. add a line such as model: Qwen/Qwen3-0.6B\n"
        "       2. add a line such as data: examples.jsonl"
    )
    assert said("model: tiny:llama\ndata: {eval: b.jsonl}\n").startswith("recipe.yaml:2: data.train is missing\n")
    assert said("model: {max_tokens: 8}\ndata: a\n").startswith("recipe.yaml:1: model.name is missing\n")


def test_duplicate_key_names_both_lines(said):
    assert said("model: tiny:llama\ndata: a.jsonl\noptim: {lr: 1}\noptim: {lr: 2}\n") == (
        "recipe.yaml:4: optim is given twice, first on line 3\n"
        "  why: only one of them can count, and which one is not said\n"
        "  fix: keep one of the two lines"
    )
    assert said("model: tiny:llama\ndata: a.jsonl\noptim:\n  lr: 1\n  lr: 1\n").startswith(
        "recipe.yaml:5: optim.lr is given twice, first on line 4\n"
    )


def test_rule_between_sections_names_both_keys(said):
    assert said("model: {name: tiny:llama, load_in_4bit: true}\ndata: a.jsonl\nadapter: full\n") == (
        "recipe.yaml:1: model.load_in_4bit freezes the base, so adapter.kind must be lora\n"
        "  why: both cannot be had in one run\n"
        "  fix: change model.load_in_4bit or adapter.kind"
    )


def test_rule_that_names_values_names_the_keys_to_change():
    assert refused("hardware.devices=2", "hardware.min_devices=4") == (
        "command line: hardware.min_devices=4 is more than hardware.devices=2\n"
        "  why: both cannot be had in one run\n"
        "  fix: change hardware.min_devices or hardware.devices"
    )


def test_key_of_another_kind_says_which_kind_reads_it():
    assert refused("adapter=full", "adapter.rank=3") == (
        "command line: adapter.rank does not go with adapter.kind=full\n"
        "  why: only lora would read it\n"
        "  fix: leave it out, or set adapter.kind to lora"
    )


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("", "recipe.yaml is empty", "start with two lines such as: model: tiny:llama and data: examples.jsonl"),
        ("# nothing\n", "recipe.yaml is empty", "start with two lines"),
        ("- a\n", "recipe.yaml:1: a recipe is made of lines such as model: NAME, and this is not", "start with two lines"),
        ("hello\n", "recipe.yaml:1: a recipe is made of lines such as model: NAME, and this is not", "start with two lines"),
        ("a: b: c\n", "recipe.yaml:1:5: this is not YAML: mapping values are not allowed here", "check the line"),
        (
            "model: a\n\tx: 3\n",
            "recipe.yaml:2:1: this is not YAML: found character '\\t' that cannot start any token",
            "indent with spaces: YAML does not allow tabs",
        ),
        (b"\xff\xfea\0", "recipe.yaml is not UTF-8 text (byte 0)", "save it again as UTF-8"),
        ("model: &a x\ndata: *a\n", "recipe.yaml:2:7: this is not YAML: *a stands for another place, which a recipe cannot do", "write"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2:1: this is not YAML: found another document", "keep one recipe in a file"),
        (b"[" * 5000, "recipe.yaml: brackets inside brackets, too deep to read", "write section: {key: value}"),
        (b"model: \x07\n", "recipe.yaml: character 7 at position 7 is not allowed in YAML", "remove the character"),
        ("model: !!python/object:a.b x\ndata: a\n", "recipe.yaml:1: model has the YAML tag !!python/object:a.b", "remove the tag"),
        ("model: a\ndata: a\n? [a]\n: 3\n", "recipe.yaml:3: the recipe has a key that is a list", "write key: value"),
        ("model: a\ndata: a\noptim.lr: 3\n", "recipe.yaml:3: unknown key optim.lr", "write lr as a line of its own under optim:"),
        (
            "model: a\ndata: a\noptim: adamw\n",
            'recipe.yaml:3: optim must be a section with keys of its own, got "adamw"',
            "write optim: {lr",
        ),
        ("model: a\ndata: a\noptim: [1]\n", "recipe.yaml:3: optim must be a section with keys of its own, got [1]", "write optim: {lr"),
        ("model: a\ndata: a\nzzz: 1\n", "recipe.yaml:3: unknown key zzz", "leave it out, or find its name with: pantheraml recipe explain"),
        (b"#" * (1 << 21), "recipe.yaml has 2,097,152 bytes, which is too large for a recipe", "give the recipe's path"),
    ],
)
def test_broken_file_says_where_and_what_to_do(said, text, what, fix):
    lines = said(text).splitlines()
    assert lines[0] == what
    assert lines[2].startswith(f"  fix: {fix}")


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("steps=50", "unknown key steps", "did you mean optim.steps=50?"),
        ("lr=1e-3", "unknown key lr", "did you mean optim.lr=1e-3?"),
        ("optim.lr", '"optim.lr" is not of the form key=value', "write optim.lr=VALUE"),
        ("foo", '"foo" is not of the form key=value', "write it as in batch.size=8, or leave it out"),
        ("data.train.0=a", "unknown key data.train.0", "did you mean data.train=a?"),
        ("batch.size=3.0", "batch.size must be a whole number above 0, got 3.0", "write batch.size=3"),
        ("batch.size=true", "batch.size must be a whole number above 0, got true", "leave it out to have the default, 16"),
        ("batch.size=0", "batch.size must be a whole number above 0, got 0", "leave it out to have the default, 16"),
        ('batch.size="3"', 'batch.size must be a whole number above 0, got "3"', "write the number without quotes: batch.size=3"),
        ("optim.lr=true", "optim.lr must be a number, 0 or more, or auto, got true", 'leave it out to have the default, "auto"'),
        ("optim.lr=-1", "optim.lr must be a number, 0 or more, or auto, got -1", 'leave it out to have the default, "auto"'),
        ("optim.eps=1e999", "optim.eps must be a number above 0, got Infinity", "leave it out to have the default, 1e-08"),
        ("optim.warmup=1", "optim.warmup must be a number from 0 to below 1, got 1", "leave it out to have the default, 0.03"),
        ("optim.lr=", "optim.lr must be a number, 0 or more, or auto, got null", 'leave it out to have the default, "auto"'),
        ("run.name=123", "run.name must be text, or null, got 123", "put it in quotes if it is meant as text: 'run.name=\"123\"'"),
        ("model.dtype=bf16", 'model.dtype must be one of auto, float32, bfloat16, float16, got "bf16"', "did you mean bfloat16?"),
        (
            "hardware.kind=npu",
            'hardware.kind must be one of auto, gpu, tpu, torch_tpu, cuda, xpu, mps, cpu, got "npu"',
            'leave it out to have the default, "auto"',
        ),
        ("adapter=ful", 'adapter.kind must be one of lora, full, got "ful"', "did you mean full?"),
        ("data.packing=true", "data.packing must be one of auto, on, off, got true", "did you mean on?"),
        ("data.shuffle=no", 'data.shuffle must be true or false, got "no"', "write data.shuffle=false"),
        ("data.train=[]", "data.train must be text, or a list of texts, not empty, got []", "write it as in data: examples.jsonl"),
        ("model.name=", "model.name must be text, not empty, got null", "write it as in model: Qwen/Qwen3-0.6B"),
        ("eval.every=never", 'eval.every must be a whole number above 0, or one of auto, end, got "never"', "leave it out to have"),
        ("export.gguf=[q8]", 'export.gguf[0] must be one of f32, f16, bf16, q8_0, q4_k_m, q5_k_m, q6_k, got "q8"', "leave it out"),
        (
            "export.gguf=q8_0,q4_k_m",
            'export.gguf must be one of f32, f16, bf16, q8_0, q4_k_m, q5_k_m, q6_k, or a list of them, got "q8_0,q4_k_m"',
            "write export.gguf=[q8_0,q4_k_m]",
        ),
        (
            "eval.prompts=[a",
            "eval.prompts=[a is not YAML: expected ',' or ']', but got '<stream end>'",
            "write a list as 'eval.prompts=[first, second]', in quotes for the shell",
        ),
    ],
)
def test_broken_override_says_what_is_allowed(override, what, fix):
    lines = refused(override).splitlines()
    assert lines[0] == f"command line: {what}"
    assert lines[2].startswith(f"  fix: {fix}")


def test_missing_file_suggests_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fix(path: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(path))
        return f"{caught.value.what} -> {caught.value.fix}"

    assert fix("recpie.yaml") == f"there is no file recpie.yaml -> check the path: {tmp_path} holds no recipe"
    Path("recipe.yaml").write_text("model: a\n")
    assert fix("recpie.yaml") == "there is no file recpie.yaml -> did you mean recipe.yaml?"
    assert fix("no/recipe.yaml") == f"there is no file no/recipe.yaml -> check the path: there is no folder no in {tmp_path}"
    assert fix(".") == ". is a folder -> did you mean recipe.yaml?"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read every file")
def test_unreadable_file_says_so(said, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "recipe.yaml").chmod(0)
    with pytest.raises(RecipeError, match="cannot be read: Permission denied"):
        load_recipe(tmp_path / "recipe.yaml")


def test_mistakes_exit_with_2():
    with pytest.raises(RecipeError) as caught:
        recipe_from({})
    assert caught.value.exit_code == 2


# ---- Strictness, names, round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", ["3", "2e-4", True, float("nan"), float("inf"), None, [1.0]])
def test_types_coerce_nothing(lr):
    with pytest.raises(ValidationError):
        OptimSpec(lr=lr)


@pytest.mark.parametrize("name", SYNONYMS)
def test_synonyms_lead_to_known_keys(name):
    assert set(SYNONYMS[name]) <= set(keys())
    assert SYNONYMS[name][0] in nearest(name)
    assert SYNONYMS[name][0] in nearest(f"{SYNONYMS[name][0].split('.')[0]}.{name}")


@pytest.mark.parametrize(
    ("written", "meant"), [("optim.learningRate", "optim.lr"), ("Optim.LR", "optim.lr"), ("run.log-every", "run.log_every")]
)
def test_nearest_forgives_case_and_hyphens(written, meant):
    assert nearest(written)[0] == meant


LETTERS = st.sampled_from("abcdefghijklmnopqrstuvwxyz_0123456789")


@st.composite
def typos(draw) -> tuple[str, str]:
    """A known key, and the same with one letter more, less, or other, or two neighbours swapped."""
    name = draw(st.sampled_from(sorted(keys())))
    i = draw(st.integers(0, len(name) - 1))
    match draw(st.sampled_from(["more", "less", "other", "swapped"])):
        case "more":
            typo = name[:i] + draw(LETTERS) + name[i:]
        case "less":
            typo = name[:i] + name[i + 1 :]
        case "other":
            typo = name[:i] + draw(LETTERS) + name[i + 1 :]
        case _:
            typo = name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]
    return name, typo


@given(typos())
def test_one_slip_in_a_key_is_reported_with_that_key(pair):
    name, typo = pair
    assume(typo not in keys())
    message = refused(f"{typo}=1")
    assert f"unknown key {typo}" in message
    assert f"{name}=1" in message.split("fix:")[1]


LINE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
RECIPES = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"name": LINE}, optional={"revision": LINE, "load_in_4bit": st.booleans()})},
    optional={
        "adapter": st.fixed_dictionaries({}, optional={"rank": st.integers(1, 256), "targets": st.lists(LINE, max_size=3)}),
        "optim": st.fixed_dictionaries(
            {}, optional={"lr": st.floats(0, 1) | st.just("auto"), "eps": st.floats(1e-12, 1), "steps": st.none() | st.integers(1, 10**15)}
        ),
        "eval": st.fixed_dictionaries({}, optional={"prompts": st.lists(LINE, max_size=3)}),
        "run": st.fixed_dictionaries({}, optional={"name": st.none() | LINE, "best": st.booleans(), "folder": LINE}),
        "export": st.fixed_dictionaries({}, optional={"gguf": st.lists(st.sampled_from(["q8_0", "f16"]), max_size=2)}),
    },
)


@given(values=RECIPES, train=st.lists(LINE, min_size=1, max_size=3), full=st.booleans())
def test_dump_loads_back_to_an_equal_recipe(tmp_path_factory, values, train, full):
    recipe = recipe_from({**values, "data": {"train": train}})
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe, full=full), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "text", ["on", "no", "1e5", "2e-4", "010", "1:30", "2026-01-01", "null", "~", "1_000", "=", "<<", "3", " a ", "#a"]
)
def test_dump_quotes_what_either_yaml_would_misread(text, tmp_path):
    recipe = recipe_from({**SMALL, "run": {"name": text}})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert yaml.safe_load(dump_recipe(recipe))["run"]["name"] == text


def test_dump_is_short_by_default_and_complete_in_full():
    recipe = recipe_from(SMALL, ["adapter.rank=8", "optim.lr=2e-4"])
    assert dump_recipe(recipe) == "model: tiny:llama\ndata: a.jsonl\nadapter:\n  kind: lora\n  rank: 8\noptim:\n  lr: 0.0002\n"
    full = yaml.safe_load(dump_recipe(recipe, full=True))
    assert {f"{section}.{last}" for section, values in full.items() for last in values} == set(keys())


SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load(path):
    assert isinstance(load_recipe(path), Recipe)
