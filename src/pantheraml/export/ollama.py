"""A Modelfile for Ollama beside a GGUF file: where the weights are, how a chat is written, where an answer ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pantheraml.errors import PantheraError, RecipeError
from pantheraml.export.safetensors import atomic_file

PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "num_ctx", "num_predict")


@dataclass(frozen=True)
class Form:
    """A way to write a chat: what stands before and after the words of each role, and what ends an answer."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    stop: str
    system: tuple[str, str] | None = None  # None: what the system says opens the first user turn

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for an answer to `messages`, as the Go template would write it."""
        turns = {"user": self.user, "assistant": self.assistant, "system": self.system}
        return "".join(f"{turns[m['role']][0]}{m['content']}{turns[m['role']][1]}" for m in messages) + self._opening

    def go_template(self, start: str) -> str:
        """The same for Ollama, after `start`."""
        if self.system:
            system = f'{{{{ if eq .Role "system" }}}}{self.system[0]}{{{{ .Content }}}}{self.system[1]}{{{{ else if eq .Role "user" }}}}'
            opening = ""
        else:
            system = '{{ if eq .Role "user" }}'
            # Ollama counts the system message too, so the first user turn is number 0 or, after one, number 1.
            opening = "{{ if and $.System (le $i 1) }}{{ $.System }}\n\n{{ end }}"
        return (
            f"{start}{{{{ range $i, $_ := .Messages }}}}{system}{self.user[0]}{opening}{{{{ .Content }}}}{self.user[1]}"
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}{{{{ end }}}}'
            f"{{{{ end }}}}{self._opening}"
        )

    @property
    def _opening(self) -> str:
        """What an answer begins after: without the space that belongs to its first word."""
        return self.assistant[0].rstrip(" ")


def _heads(start: str, end: str, stop: str, assistant: str = "assistant", system: bool = True) -> Form:
    """Forms whose turns differ in the name only."""
    user, answer, said = ((start.format(name), end) for name in ("user", assistant, "system"))
    return Form(user, answer, stop, said if system else None)


FORMS: dict[str, Form] = {
    "chatml": _heads("<|im_start|>{}\n", "<|im_end|>\n", "<|im_end|>"),
    "llama-3": _heads("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
    "gemma": _heads("<start_of_turn>{}\n", "<end_of_turn>\n", "<end_of_turn>", assistant="model", system=False),
    "phi": _heads("<|{}|>\n", "<|end|>\n", "<|end|>"),
    "tiny": _heads("<|{}|>", "<|end|>", "<|end|>"),
    "mistral": Form(("[INST] ", " [/INST]"), ("", "</s>"), "</s>"),
    "mistral-spaced": Form(("[INST] ", "[/INST]"), (" ", "</s>"), "</s>"),
}


def form_of(tokenizer: Any) -> tuple[str, Form] | None:
    """The form that writes two chats exactly as the tokenizer's template does (begin token aside), or None."""
    from jinja2 import TemplateError

    if not isinstance(tokenizer.chat_template, str):
        return None
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    led = [{"role": "system", "content": "Be kind"}, *talk]
    bos = tokenizer.bos_token or ""

    def rendered(messages: list[dict[str, str]]) -> str | None:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).removeprefix(bos)
        except TemplateError:  # templates refuse roles that they do not know
            return None

    for name, form in FORMS.items():
        written = [form.render(talk), *([form.render(led)] if form.system else [])]
        if written == [rendered(talk), *([rendered(led)] if form.system else [])]:
            return name, form
    return None


def write_modelfile(
    gguf: Path, out: Path, tokenizer: Any, *, system: str | None = None, parameters: Mapping[str, float] | None = None
) -> Path:
    """Write the Modelfile `out` beside `gguf`; then `ollama create NAME -f out` makes the model.

    Where the chat template is none of FORMS, the Modelfile says so and Ollama reads the template in the GGUF file.

    Raises: PantheraError for a name or a text that could say something else than meant, RecipeError for a parameter.
    """
    if gguf.resolve().parent != out.resolve().parent or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*\.gguf", gguf.name):
        raise PantheraError(
            f"{str(gguf)!r} cannot be named in {out}",
            why="a Modelfile names a file beside it, and other letters could be read as a path or as another directive",
            fix="put both into one folder, and name the file with letters, digits, '.', '_' and '-', ending in .gguf",
        )
    lines = [f"FROM ./{gguf.name}"]
    found = form_of(tokenizer)
    stops = [tokenizer.eos_token]
    if found is None:
        lines.append("# No known form of chat: Ollama reads the template that is in the GGUF file.")
    else:
        name, form = found
        # Ollama's engine puts the begin token where the tokenizer does; only a template that brings it itself needs it here.
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        opens = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        start = tokenizer.bos_token if tokenizer.bos_token and opens.startswith(tokenizer.bos_token) and not adds_bos else ""
        lines += [f"# Chat form: {name}", f"TEMPLATE {_quoted(form.go_template(start))}"]
        stops.append(form.stop)
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops) if stop]
    lines += [f"PARAMETER {name} {_number(name, value)}" for name, value in (parameters or {}).items()]
    with atomic_file(out) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", "utf-8")
    return out


def _quoted(text: str) -> str:
    '''Between `"""`, where a Modelfile has no escapes: what could end the quotation early is refused.'''
    if '"""' in text or re.search(r"[\x00-\x08\x0b-\x1f\x7f\u0085\u2028\u2029]", text):
        raise PantheraError(
            f"a Modelfile cannot hold the text {text[:60]!r}",
            why="three quotation marks or control characters would end it early, and what follows would be read as directives",
            fix="take them out of the text",
        )
    return f'"""{text}"""'


def _number(name: str, value: float) -> str:
    if name not in PARAMETERS or isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(
            f"PARAMETER {name} {value!r} cannot be written",
            why="only numbers for known parameters are taken over",
            fix="use numbers for " + ", ".join(PARAMETERS),
        )
    return repr(value)
