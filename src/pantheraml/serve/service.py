"""What is served: a model under one or several names, with all that its answers need."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pantheraml.data.chat import Encoder, Messages
from pantheraml.data.load import UnusableRow
from pantheraml.errors import PantheraError
from pantheraml.serve.engine import Engine
from pantheraml.serve.limits import Limits
from pantheraml.serve.refusal import Refusal
from pantheraml.serve.vectors import Vectors

if TYPE_CHECKING:
    from pantheraml.council.persona import Persona
    from pantheraml.hardware.device import Device
    from pantheraml.memory.store import Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Everything behind the routes. Make it with `open_service`.

    Attributes:
        models: model id -> adapter of the batcher (None: the base, or the model as it is); the first is the default.
        encoder: makes prompts; its tokenizer is nobody else's. tokenizer: another one, for councils.
        device: where answers are computed. dtype: of the weights.
        personas: that councils can name; None: the council's own. keys: of the services that answer for some of them, by variable.
        memory: where councils look things up and keep transcripts.
        key: that clients must show; None: none. hosts: names under which it may be asked; None: any.
    """

    models: Mapping[str, str | None]
    engine: Engine
    encoder: Encoder
    vectors: Vectors
    tokenizer: Any
    device: Device
    dtype: str
    limits: Limits
    personas: Sequence[Persona] | None = None
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    memory: Memory | None = None
    key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """The model that answers where none is named."""
        return next(iter(self.models))

    def adapter(self, model: str | None) -> str | None:
        """The adapter behind a model id. Raises: Refusal if there is none of that name."""
        if model is None:
            return self.models[self.name]
        if model not in self.models:
            known = ", ".join(self.models)
            raise Refusal(404, f"the model {model!r} is not served here; there are: {known}", param="model", code="model_not_found")
        return self.models[model]

    def chat_prompt(self, messages: Messages) -> list[int]:
        """The tokens after which the model answers a conversation. Raises: Refusal. May take long: not in the loop's thread."""
        if self.encoder.format in ("prompt-completion", "text") and len(messages) > 1:
            raise Refusal(
                400,
                "this model has no chat template, so it goes on with one text; send one message, or use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        try:
            return self._fitting(self.encoder.ask(messages), "messages")
        except UnusableRow as error:
            raise Refusal(400, str(error), param="messages") from error
        except PantheraError as error:
            raise Refusal.of(error, param="messages") from error

    def text_prompt(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a text to go on with. Raises: Refusal. May take long."""
        if not isinstance(prompt, str):
            return self._fitting(self._known(prompt, "prompt"), "prompt")
        plain = Encoder(self.encoder.tokenizer, "assistant", "text")
        return self._fitting(plain.ask([{"role": "user", "content": prompt}]), "prompt")

    def text_input(self, text: str | list[int]) -> list[int]:
        """The tokens of a text to be embedded. Raises: Refusal. May take long."""
        tokens = self._known(text, "input") if not isinstance(text, str) else _ids(self.encoder.tokenizer, text)
        if not tokens:
            raise Refusal(400, "a text to be embedded is empty", param="input", code="empty_input")
        return self._fitting(tokens, "input")

    def new_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        """How many tokens an answer may have. Raises: Refusal if it was asked for more than can be."""
        left, most = self.engine.batcher.tokens - prompt_tokens, self.limits.new_tokens
        if asked is not None and most is not None and asked > most:
            raise Refusal(400, f"an answer has at most {most} tokens here, and {asked} were asked for", param="max_tokens")
        wanted = asked if asked is not None else min(left, most or left)
        if wanted > left or left < 1:
            raise Refusal(
                400,
                f"the prompt has {prompt_tokens} tokens, and {max(wanted, 1)} may follow; a prompt and its answer have at most "
                f"{self.engine.batcher.tokens} together here: shorten the prompt, or ask for fewer",
                param="max_tokens" if left >= 1 else None,
                code="context_length_exceeded",
            )
        return wanted

    def _fitting(self, tokens: list[int], param: str) -> list[int]:
        most = self.engine.batcher.tokens
        most = min(most, self.limits.prompt_tokens or most)
        if len(tokens) > most:
            said = f"{param} has {len(tokens)} tokens, and at most {most} are read here; shorten it"
            raise Refusal(400, said, param=param, code="context_length_exceeded")
        if not tokens:
            raise Refusal(400, f"{param} has no token", param=param, code="empty_input")
        return tokens

    def _known(self, tokens: list[int], param: str) -> list[int]:
        vocab = len(self.encoder.tokenizer)
        if any(token >= vocab for token in tokens):
            raise Refusal(400, f"this model knows the tokens 0 to {vocab - 1}", param=param, code="unknown_token")
        return tokens


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])
