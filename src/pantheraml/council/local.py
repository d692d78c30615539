"""The local model as the voice of advisors: all of them in one batch, each with its adapter, temperature and seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pantheraml.council.reply import Ask, CancelledError, Failed, Heard, Message, Reply, means
from pantheraml.errors import DataError, DeviceError, RecipeError

if TYPE_CHECKING:
    from pantheraml.hardware.device import Device
    from pantheraml.models.batch import Batcher
    from pantheraml.models.request import Answer, Request
    from pantheraml.recipe.types import HardwareAsk

ROWS = 32
"""Answers at once, where they fit and nobody says otherwise: of eight advisors with three samples each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A model that is ready to answer. Make it with `open` or `of`, or around a batcher that serves others as well.

    Attributes:
        batcher: computes the answers, started or not. tokenizer: its own. name: of the model, for the transcript.
        adapter: that answers where a persona names none; None: the base, or the model as it is.
        called: what the model calls an adapter of personas, where that is another name. device, dtype: None: the transcript says unknown.
    """

    batcher: Batcher
    tokenizer: Any
    name: str
    adapter: str | None = None
    called: Mapping[str, str] = field(default_factory=dict[str, str])
    device: Device | None = None
    dtype: str | None = None

    @classmethod
    def open(
        cls,
        model_or_run: str,
        adapters: Mapping[str, str] | None = None,
        rows: int | None = None,
        tokens: int | None = None,
        *,
        wanted: int = ROWS,
        ask: HardwareAsk | None = None,
    ) -> Self:
        """Load a model: a run folder, a model folder, a Hub id, or tiny:llama.

        Args:
            adapters: what personas call an adapter -> the folder of a LoRA adapter or of a run that trained one.
            rows: answers at once; None: `wanted`, or as many as fit into the memory that is free. tokens: of a prompt and its answer;
                None: what the model was made for, at most 4096. ask: where, for a model that is no run.
        Raises: RecipeError, StorageError if there is no such model or adapter; DeviceError if not even one answer fits.
        """
        from pantheraml.hardware.find import find
        from pantheraml.recipe.types import ModelSpec
        from pantheraml.trainer.folder import is_run
        from pantheraml.trainer.runs import Run, load_target

        run = Run(model_or_run) if is_run(Path(model_or_run)) else None
        where = run.recipe.hardware if run is not None else ask
        loaded = run.loaded if run is not None else load_target(ModelSpec(name=model_or_run), ask=where)
        model, own, called = _adapted(loaded.model, adapters or {})
        device = find(where).device
        return cls.of(
            model, loaded.tokenizer, model_or_run, rows=rows, tokens=tokens, wanted=wanted, adapter=own, called=called, device=device
        )

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        rows: int | None = None,
        tokens: int | None = None,
        wanted: int = ROWS,
        adapter: str | None = None,
        called: Mapping[str, str] | None = None,
        device: Device | None = None,
    ) -> Self:
        """A model that is loaded, on its device. See `open` for rows and tokens, and the attributes for the rest.

        Args:
            called: what personas call an adapter -> its name in the PEFT model; with any, `adapter` must be one of these or None.
        """
        from pantheraml.models.batch import Batcher
        from pantheraml.models.head import causal_model

        others = list((called or {}).values())
        names = others if adapter is None or adapter in others else [adapter, *others]
        batcher = Batcher(model, tokenizer, rows=rows, most_rows=wanted, tokens=tokens, adapters=names)
        dtype = str(causal_model(model).dtype).removeprefix("torch.")
        return cls(batcher=batcher, tokenizer=tokenizer, name=name, adapter=adapter, called=called or {}, device=device, dtype=dtype)

    def speaker(self) -> Speaker:
        """Who asks it for one debate. Raises: DataError for a tokenizer that cannot write a conversation."""
        return Speaker(self)


class Speaker:
    """Asks a local model for one debate.

    Attributes:
        notes: what is to be known of how it is asked.
    """

    def __init__(self, local: Local) -> None:
        from pantheraml.data.chat import Encoder, ensure_chat_template

        self.local = local
        tokenizer = copy.copy(local.tokenizer)  # a template is given to the copy, since others use the tokenizer as it is
        announced = ensure_chat_template(tokenizer)
        self._encoder = Encoder(tokenizer, "assistant", "messages")
        self.notes = [announced] if announced else []
        if local.batcher.fallback is not None:
            self.notes.append(f"{local.name} answers one prompt at a time: {local.batcher.fallback}")

    @property
    def tokens(self) -> int:
        """Of a row: a prompt and its answer together."""
        return self.local.batcher.tokens

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.local.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens after which the model answers. Where its template has no system role, that stands before the first question.

        Raises: DataError for a template that refuses the conversation otherwise.
        """
        from pantheraml.data.load import UnusableRow

        try:
            return tuple(self._encoder.ask([dict(each) for each in messages]))
        except UnusableRow as refused:
            merged = _without_system(messages)
            try:
                tokens = tuple(self._encoder.ask([dict(each) for each in merged]))
            except UnusableRow:
                raise DataError(
                    str(refused),
                    why="the advisors' conversation cannot be written as this model reads it",
                    fix="choose a model for conversations, or give its tokenizer another chat template",
                ) from refused
            said = "The chat template has no system role: what a persona is told stands before the question."
            self.notes += [] if said in self.notes else [said]
            return tokens

    def ask(self, asks: Sequence[Ask], heard: Heard | None = None, cancelled: Callable[[], bool] = lambda: False) -> list[Reply | Failed]:
        """The answers, all in one batch, in the order of the asks. One that fails takes no other with it.

        Raises: RecipeError for a prompt that is too long, a schema that cannot be kept to, or an adapter that is not there; CancelledError.
        """
        requests = [self._request(each, heard, cancelled) for each in asks]
        try:
            try:
                answers = self.local.batcher.run(requests)
            except ValueError as error:  # an adapter, or a service that has ended
                raise RecipeError(
                    f"{self.local.name} cannot answer: {error}", why="an advisor asks for it", fix="correct the persona's adapter"
                ) from error
            except DeviceError:
                if len(requests) == 1:
                    raise
                return [answer for each in asks for answer in self.ask([each], heard, cancelled)]
        except DeviceError as error:
            return [Failed(why=error.what)]
        return [self._reply(each) for each in answers]

    def _request(self, ask: Ask, heard: Heard | None, cancelled: Callable[[], bool]) -> Request:
        from pantheraml.models.request import Request

        named = ask.persona.adapter
        return Request(
            prompt=self.prompt(ask.messages),
            max_new_tokens=ask.max_new_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            adapter=self.local.adapter if named is None else self.local.called.get(named, named),
            schema=ask.schema,
            logprobs=True,
            on_text=partial(_hear, ask, heard, cancelled),
        )

    def _reply(self, answer: Answer) -> Reply:
        logprobs = answer.logprobs or ()
        mean, of_answer = means(answer.text, logprobs, lambda place: self._token_at(answer.tokens, place))
        return Reply(
            text=answer.text,
            tokens=len(answer.tokens),
            mean_logprob=mean,
            answer_logprob=of_answer,
            finished=answer.finished,
            seconds=answer.waited_s + answer.total_s,
            prompt_tokens=answer.prompt_tokens,
            shared_tokens=answer.shared_tokens,
        )

    def _token_at(self, tokens: Sequence[int], place: int) -> int:
        """The first token with which the text goes beyond a character."""
        low, high = 0, len(tokens) - 1
        while low < high:
            middle = (low + high) // 2
            if len(self.local.tokenizer.decode(tokens[: middle + 1], skip_special_tokens=True)) > place:
                high = middle
            else:
                low = middle + 1
        return low


def _hear(ask: Ask, heard: Heard | None, cancelled: Callable[[], bool], piece: str) -> None:
    if cancelled():
        raise CancelledError
    if heard is not None:
        heard(ask, piece)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    first, second, *rest = messages
    if first["role"] != "system":
        return list(messages)
    return [{"role": second["role"], "content": f"{first['content']}\n\n{second['content']}"}, *rest]


def _adapted(model: Any, adapters: Mapping[str, str]) -> tuple[Any, str | None, dict[str, str]]:
    """The model with more adapters; the one that it had before, and what each is called in it."""
    if not adapters:
        return model, None, {}
    from peft import PeftModel

    from pantheraml.models.adapters import add_adapter
    from pantheraml.trainer.folder import adapter_folder

    own = str(model.active_adapter) if isinstance(model, PeftModel) else None
    called = {said: f"advisor{number}" for number, said in enumerate(adapters)}  # a name in a model has no dots, and a path may
    for said, place in adapters.items():
        model = add_adapter(model, called[said], adapter_folder(Path(place)))
    return model, own, called
