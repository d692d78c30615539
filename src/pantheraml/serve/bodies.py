"""What clients send, field by field, after OpenAI's API.

A field that is not known is refused, and so is one that is known and would change the result, unless it is set to what happens anyway.
Fields that change nothing here (user, metadata, ...) are taken and ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MOST_MESSAGES = 2048
MOST_CHOICES = 128
_SEED = 2**63

# Fields of OpenAI's API that would change the result, and the values of them that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


def _without(neutral: dict[str, tuple[Any, ...]], given: Any) -> Any:
    """The fields less those that say what happens anyway. Raises: PydanticCustomError for one that says something else."""
    if not isinstance(given, dict):
        return given
    for name in neutral.keys() & given.keys():
        value = given[name]
        if value is not None and not any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in neutral[name]):
            raise PydanticCustomError(
                "unsupported_value", "{field} is not supported here, and would change the answer; leave it out", {"field": name}
            )
    return {name: value for name, value in given.items() if name not in neutral}


def _whole_number(given: Any) -> Any:
    """2.0 is a whole number in JSON."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


Int = Annotated[int, BeforeValidator(_whole_number)]


class Body(BaseModel):
    """Values are taken as they are: no number from a string, no string from a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Whole(Body):
    """A whole body. Half a character, which JSON can say and no tokenizer reads, is refused wherever it stands."""

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, given: Any) -> Any:
        if isinstance(given, bytes):  # FastAPI reads JSON only where the request says that it is some
            raise PydanticCustomError("not_json", "it is read as JSON only with the header Content-Type: application/json")
        try:
            json.dumps(given, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise PydanticCustomError("invalid_text", "a text holds half of a surrogate pair, which is no character") from None
        except RecursionError:
            raise PydanticCustomError("invalid_text", "it is nested too deeply") from None
        return given


class TextPart(Body):
    """A part of a message that is text; there are no others here."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, given: Any) -> Any:
        return _without(_OF_MESSAGES, given)

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = Field(None, description="The last event before [DONE] has the usage.")
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class JsonSchema(Body):
    """A JSON schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Ignored: an answer always satisfies the schema.")


class AsText(Body):
    """Any text."""

    type: Literal["text"]


class AsObject(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class AsSchema(Body):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class Sampling(Whole):
    """What chat and completions have in common."""

    model: str = Field(description="One of /v1/models.")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=0, le=1_000_000, description="Not in OpenAI's API: draw from so many of the likeliest; 0: from all.")
    n: Int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: Int | None = Field(None, ge=-_SEED, lt=_SEED, description="The same request with the same seed has the same answer.")
    stop: Annotated[str, Field(min_length=1, max_length=256)] | list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, max_length=256
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = Field(None, ge=1, le=2**31)

    user: Any = Field(None, description="Ignored.")
    metadata: Any = Field(None, description="Ignored.")
    store: Any = Field(None, description="Ignored: nothing is stored.")
    service_tier: Any = Field(None, description="Ignored.")
    safety_identifier: Any = Field(None, description="Ignored.")
    prompt_cache_key: Any = Field(None, description="Ignored.")
    prompt_cache_retention: Any = Field(None, description="Ignored.")

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, given: Any) -> Any:
        return _without(_NEUTRAL, given)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("unsupported_value", "stream_options needs stream=true", {"field": "stream_options"})
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_at_the_end(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: Int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = Field(None, description="Of the tokens that were drawn; in a stream, with the last event of a choice.")
    top_logprobs: Literal[0] | None = Field(None, description="Of other tokens than the one drawn: not here.")
    response_format: Annotated[AsText | AsObject | AsSchema, Field(discriminator="type")] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, as asked."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Tokens = list[Annotated[Int, Field(ge=0, lt=2**31)]]


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | Tokens | list[Tokens] = Field(description="Text, or the numbers of tokens; one, or several.")
    logprobs: Literal[0] | None = Field(None, description="0: of the tokens that were drawn. Of others: not here.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each on its own."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [[token for token in self.prompt if isinstance(token, int)]]
            case _:
                return [each for each in self.prompt if not isinstance(each, int)]


class EmbeddingsBody(Whole):
    """POST /v1/embeddings."""

    model: str
    input: str | list[str] | Tokens | list[Tokens]
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32.")
    dimensions: Int | None = Field(None, ge=1, le=2**31, description="Only those that the model has.")
    user: Any = Field(None, description="Ignored.")

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each on its own."""
        match self.input:
            case str():
                return [self.input]
            case [int(), *_]:
                return [[token for token in self.input if isinstance(token, int)]]
            case _:
                return [each for each in self.input if not isinstance(each, int)]


PersonaName = Annotated[str, Field(min_length=1, max_length=64)]


class PersonaBody(Body):
    """An advisor of one's own."""

    name: PersonaName
    prompt: str = Field(min_length=1, max_length=16_384)
    model: str | None = Field(None, description="One of /v1/models; default: the first.")
    temperature: float = Field(0.7, ge=0, le=2)
    expertise: list[Annotated[str, Field(max_length=64)]] = Field([], max_length=16)
    weight: float = Field(1.0, gt=0, le=1000)


AnyPersona = Annotated[
    Annotated[PersonaName, Tag("name")] | Annotated[PersonaBody, Tag("persona")],
    Discriminator(lambda given: "name" if isinstance(given, str) else "persona"),
]


class CouncilBody(Whole):
    """POST /v1/council."""

    question: str = Field(min_length=1, max_length=65_536)
    personas: list[AnyPersona] | None = Field(
        None, min_length=1, max_length=16, description="Names of the service's own, or others; default: all of the service's."
    )
    rounds: Int = Field(2, ge=1, le=8)
    samples: Int = Field(0, ge=0, le=32, description="Of each advisor's answer, to see how sure it is.")
    quorum: Literal["majority", "weighted", "supermajority", "unanimous"] = "majority"
    max_tokens: Int = Field(256, ge=1, le=2**31, description="Of each answer.")
    seed: Int = Field(0, ge=0, lt=_SEED)
    stream: bool = Field(False, description="Events while it goes on; the last one has the transcript.")
