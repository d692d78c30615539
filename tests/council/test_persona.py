"""Who debates, from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantheraml.council import DEFAULT_PERSONAS, Endpoint, Persona, load_personas
from pantheraml.council.persona import personas_from
from pantheraml.errors import RecipeError

EXAMPLE = Path(__file__).parents[2] / "recipes" / "council" / "personas.yaml"


def written(folder: Path, text: str) -> Path:
    place = folder / "who.yaml"
    place.write_text(text, "utf-8")
    return place


def test_a_file_says_who_debates(tmp_path: Path) -> None:
    place = written(
        tmp_path,
        "personas:\n  - name: a\n    prompt: |\n      One.\n      Two.\n    expertise: [x, y]\n    weight: 2\n    adapter: runs/a\n"
        "  - {name: b, prompt: p, temperature: 0, endpoint: {url: 'http://h:1/v1', model: m, key_env: K, timeout_s: 5}}\n",
    )
    assert load_personas(place) == (
        Persona(name="a", prompt="One.\nTwo.\n", expertise=("x", "y"), weight=2, adapter="runs/a"),
        Persona(name="b", prompt="p", temperature=0, endpoint=Endpoint(url="http://h:1/v1", model="m", key_env="K", timeout_s=5)),
    )
    assert load_personas(written(tmp_path, "- {name: a, prompt: p}"))[0].temperature == 0.7


def test_ours_are_five_different_ones_and_the_example_can_be_read() -> None:
    assert len({each.name for each in DEFAULT_PERSONAS}) == len({each.prompt for each in DEFAULT_PERSONAS}) == 5
    assert len(load_personas(EXAMPLE)) >= 3
    assert "You know: logic, numbers." in DEFAULT_PERSONAS[0].system


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        ("- name: a\n  promt: p", "who.yaml:2: unknown key promt", "did you mean prompt?"),
        ("- name: a\n  prompt: p\n  endpoint:\n    url: http://h\n    modle: m", "who.yaml:5: unknown key modle", "did you mean model?"),
        ("persona:\n- name: a", "who.yaml:1: unknown key persona", "did you mean personas?"),
        ("- name: a\n  prompt: p\n- name: a\n  prompt: q", "who.yaml:3: two personas are called 'a'", "rename"),
        ("- name: a\n  prompt: p\n  temperature: hot", "who.yaml:3: temperature is 'hot'", "correct it"),
        ("- name: a\n  prompt: 5", "who.yaml:2: prompt is 5", "quotes"),
        ("- name: a\n\n- prompt: p", "who.yaml:1: persona has no prompt", "add prompt"),
        ("- name: a\n  prompt: p\n  weight: 0", "who.yaml:1: temperature is at least 0, and weight above 0", "correct it"),
        (
            "- name: a\n  prompt: p\n  endpoint: {url: 'http://u:p@h', model: m}",
            "who.yaml:3: an endpoint's url holds no name",
            "correct it",
        ),
        ("- name: a\n  prompt: p\n  endpoint: {url: 'ftp://h', model: m}", "who.yaml:3: an endpoint's url begins with http", "correct it"),
        ("- name: a\n  name: b\n  prompt: p", "who.yaml:2: name stands there twice", "remove one"),
        (
            "- name: a\n  prompt: p\n  adapter: x\n  endpoint: {url: 'http://h', model: m}",
            "who.yaml:1: an adapter is one of the local",
            "correct",
        ),
        ("- a", "who.yaml:1: persona is not a mapping", "write name"),
        ("personas: []", "there are no personas", "write a list"),
        ("- {name: [", "this is not YAML", "brackets"),
        ("", "there are no personas", "write a list"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, said: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        load_personas(written(tmp_path, text))
    assert said in raised.value.what and fix in raised.value.fix


def test_without_a_file_the_number_of_the_persona_is_said() -> None:
    with pytest.raises(RecipeError, match=r"unknown key nome \(persona 2\)"):
        personas_from([{"name": "a", "prompt": "p"}, {"nome": "b", "prompt": "p"}])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_personas(tmp_path / "none.yaml")
