"""The chat templates that models publish are the reference for the forms, and Ollama's quoting rule for the texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantheraml.errors import PantheraError, RecipeError
from pantheraml.export.ollama import FORMS, form_of, write_modelfile
from pantheraml.models.tiny import tiny_tokenizer

TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set r = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + r + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "phi": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    "mistral-spaced": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    "tiny": tiny_tokenizer().chat_template,
}


def tokenizer_with(template: str | None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_are_recognised(name: str):
    found = form_of(tokenizer_with(TEMPLATES[name]))
    assert found is not None and found[0] == name


def test_modelfile_of_the_tiny_chat(tmp_path: Path):
    path = write_modelfile(
        tmp_path / "m.gguf", tmp_path / "Modelfile", tiny_tokenizer(), system="Be kind.\nBe short.", parameters={"temperature": 0.2}
    )
    assert path.read_text() == (
        "FROM ./m.gguf\n"
        "# Chat form: tiny\n"
        'TEMPLATE """<|begin|>{{ range $i, $_ := .Messages }}'
        '{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>{{ end }}{{ end }}<|assistant|>"""\n'
        'SYSTEM """Be kind.\nBe short."""\n'
        'PARAMETER stop """<|end|>"""\n'
        "PARAMETER temperature 0.2\n"
    )


def test_prompt_does_not_end_with_the_space_of_the_answer():
    go = FORMS["mistral-spaced"].go_template("")
    assert go.endswith("{{ end }}{{ end }}") and "[/INST]" in go


def test_unknown_template_is_left_to_the_file(tmp_path: Path):
    strange = tokenizer_with("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    text = write_modelfile(tmp_path / "m.gguf", tmp_path / "Modelfile", strange).read_text()
    assert "TEMPLATE" not in text and "reads the template that is in the GGUF file" in text


@pytest.mark.parametrize("system", ['a"""\nFROM /etc/passwd', 'ends with """', "a\rFROM x", "a\x00b"])
def test_text_cannot_become_a_directive(tmp_path: Path, system: str):
    with pytest.raises(PantheraError, match="cannot hold the text"):
        write_modelfile(tmp_path / "m.gguf", tmp_path / "Modelfile", tiny_tokenizer(), system=system)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../m.gguf", "a\nSYSTEM x.gguf", "-m.gguf", 'm".gguf', "m.bin", "sub/m.gguf"])
def test_names_with_tricks_are_refused(tmp_path: Path, name: str):
    with pytest.raises(PantheraError, match="cannot be named in"):
        write_modelfile(tmp_path / name, tmp_path / "Modelfile", tiny_tokenizer())


@pytest.mark.parametrize(("name", "value"), [("stop", 1), ("temperature", "0.1\nFROM x"), ("top_k", True)])
def test_parameters_are_known_numbers(tmp_path: Path, name: str, value: object):
    with pytest.raises(RecipeError, match="only numbers"):
        write_modelfile(tmp_path / "m.gguf", tmp_path / "Modelfile", tiny_tokenizer(), parameters={name: value})
