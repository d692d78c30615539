"""What the recipe can hold, as a table, a JSON schema and an example."""

from __future__ import annotations

from rich.console import Console

from pantheraml.recipe.explain import example, explain, rows, schema
from pantheraml.recipe.keys import SECTIONS, keys
from pantheraml.recipe.load import load_recipe, recipe_from
from pantheraml.recipe.types import Recipe


def test_rows_name_every_field_with_words_and_a_meaning():
    declared = {
        f"{section}.{last}"
        for section in SECTIONS
        for model in (getattr(Recipe.model_fields[section].annotation, "__args__", None) or (Recipe.model_fields[section].annotation,))
        for last in model.model_fields
    }
    assert {row.name for row in rows()} == declared
    for row in rows():
        assert row.description.endswith("."), row.name
        assert row.allowed, row.name
        assert "annotation" not in row.allowed, row.name


def test_rows_show_the_recipe_beside_the_default():
    by_name = {row.name: row for row in rows(recipe_from({"model": "m", "data": ["a", "b"], "adapter": "full"}, ["batch.size=4"]))}
    assert (by_name["batch.size"].value, by_name["batch.size"].default, by_name["batch.size"].changed) == ("4", "16", True)
    assert (by_name["model.name"].value, by_name["model.name"].default) == ("m", "required")
    assert by_name["data.train"].value == '["a", "b"]'
    assert by_name["adapter.rank"].value is None  # full has no rank
    assert not by_name["optim.lr"].changed


def test_explain_prints_every_key():
    console = Console(width=200)
    with console.capture() as captured:
        console.print(explain())
    assert all(name in captured.get() for name in keys())


def test_schema_knows_the_short_forms():
    properties = schema()["properties"]
    assert {"type": "string"} in properties["model"]["anyOf"]
    assert {"type": "array", "items": {"type": "string"}} in properties["data"]["anyOf"]
    assert {"enum": ["lora", "full"], "type": "string"} in properties["adapter"]["anyOf"]
    assert schema()["required"] == ["model", "data"]
    assert schema()["additionalProperties"] is False
    train = schema()["$defs"]["DataSpec"]["properties"]["train"]
    assert {option["type"] for option in train["anyOf"]} == {"string", "array"}


def test_example_is_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(example())
    assert load_recipe(tmp_path / "r.yaml").adapter.kind == "lora"
