"""Rows into tokens, with a mark on each token that is to be learned.

For chats the marks come from the chat template itself, in one of three ways, the first that applies:

1. The template says it, with `{% generation %}`.
2. The turn is what rendering one message more adds: the text between `render(messages[:i], with prompt)` and
   `render(messages[:i + 1])`, where both begin the full text.
3. The template writes earlier turns differently later on (Qwen3 leaves out their thinking). Then one invisible
   character is put into a message, the conversation is rendered again, and what is found must be the full text
   again once that character is removed. Its place shows where the message ends in the full text.

Where none of them is exact, the row is refused. A mask is never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from pantheraml.data.load import Conversation, PromptCompletion, Row, Text, UnusableRow, normalize
from pantheraml.errors import DataError
from pantheraml.recipe.types import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning, so that no template treats them specially

# Roles as text headings; assistant answers end with the end-of-text token, so that the model learns to stop.
_HEADINGS = (
    "{% if tools %}{{ '### Tools:\\n' + (tools | tojson) + '\\n\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens of one row.

    Attributes:
        tokens: int32 [T].
        loss: bool [T], true where the token itself is to be learned. loss[0] is false: nothing predicts it.
        where: `file:line` of the row.
    """

    tokens: np.ndarray
    loss: np.ndarray
    where: str


@dataclass(frozen=True, slots=True)
class Question:
    """What the model is asked for a row, and what the row answers: for evaluation by generation."""

    prompt_tokens: list[int]
    answer: str
    text: str


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Gives a tokenizer without a chat template a plain one; returns the sentence to announce, or None if it had one.

    Raises: DataError if there is no end-of-text token to end answers with.
    """
    if tokenizer.chat_template:
        return None
    _need_eos(tokenizer)
    begin = "{{ bos_token }}" if _begin(tokenizer) else ""
    tokenizer.chat_template = begin + _HEADINGS
    return "The tokenizer has no chat template: roles are written as text headings (### User:), and answers end with its end-of-text token."


def read_chat_template(path: str) -> str:
    """The Jinja text of `data.chat_template`. Raises: DataError if the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template={path} cannot be read: {error}",
            why="it is used instead of the tokenizer's own template",
            fix="correct the path, or leave data.chat_template out",
        ) from error


def _need_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token (eos_token)",
            why="without one in the training text, the model never learns to stop",
            fix="set tokenizer.eos_token to the token that ends a text in this model",
        )


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token, if this tokenizer puts one before every text."""
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return start if start and start == [tokenizer.bos_token_id] else []


class Encoder:
    """Turns rows of one format into examples, with one tokenizer.

    Args:
        tokenizer: its chat template is used for conversations.
        loss_on: learn all assistant turns, only the last one, or every token. Prompt-completion rows
            learn the completion, and text rows all, unless `all` is asked for.
        format: of the rows; not `auto`.
        chat_template: Jinja text used instead of the tokenizer's own.
    Raises: DataError if the tokenizer has no end-of-text token, or the format needs a chat template and there is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loss_on: Literal["assistant", "last", "all"],
        format: Format,
        chat_template: str | None = None,
    ) -> None:
        _need_eos(tokenizer)
        self.tokenizer = tokenizer
        self.loss_on: Literal["assistant", "last", "all"] = loss_on
        self.format: Format = format
        self._template = chat_template
        self._begin = _begin(tokenizer)
        self._specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        if format in ("messages", "sharegpt", "alpaca") and not (chat_template or tokenizer.chat_template):
            raise DataError(
                "the tokenizer has no chat template",
                why=f"{format} rows are conversations, and the template tells how the model reads one",
                fix="set data.chat_template to a Jinja file, or use the instruct version of the model",
            )

    def encode(self, row: Row) -> Example:
        """The tokens of a row and which of them are learned. Raises: UnusableRow with the reason."""
        match normalize(row, self.format):
            case Conversation() as chat:
                tokens, loss = self._encode_chat(chat)
            case PromptCompletion(prompt, completion):
                before = self._started(self._tokens(prompt))
                after = self._ended(self._tokens(completion))
                tokens = before + after
                loss = np.arange(len(tokens)) >= (0 if self.loss_on == "all" else len(before))
            case Text(text):
                tokens = self._ended(self._started(self._tokens(text)))
                loss = np.ones(len(tokens), dtype=bool)
        loss[:1] = False
        if not loss.any():
            raise UnusableRow("no token is left to learn")
        return Example(np.asarray(tokens, dtype=np.int32), loss, row.where)

    def question(self, row: Row) -> Question:
        """Everything before the last answer as a prompt, and that answer. Raises: UnusableRow, also for plain text rows."""
        match normalize(row, self.format):
            case Conversation() as chat:
                last = _answers(chat.messages)[-1]
                if not last:
                    raise UnusableRow("the conversation begins with its only answer, so there is no question")
                text = self._render(chat, chat.messages[:last], prompt=True)
                message = chat.messages[last]
                answer = message["content"] or json.dumps(message["tool_calls"], ensure_ascii=False)
                return Question(self._tokens(text), answer, text)
            case PromptCompletion(prompt, completion):
                return Question(self._started(self._tokens(prompt)), completion, prompt)
            case Text():
                raise UnusableRow("a plain text has no question and no answer")

    def ask(self, messages: Messages) -> list[int]:
        """The tokens after which the model answers. Rows without roles are continued from the last message's plain text."""
        if self.format in ("prompt-completion", "text"):
            return self._started(self._tokens(messages[-1]["content"]))
        return self._tokens(self._render(Conversation(messages), messages, prompt=True))

    def _tokens(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _started(self, tokens: list[int]) -> list[int]:
        return tokens if tokens[:1] == self._begin else self._begin + tokens

    def _ended(self, tokens: list[int]) -> list[int]:
        end = [cast("int", self.tokenizer.eos_token_id)]
        return tokens if tokens[-1:] == end else tokens + end

    # Conversations. Positions in rendered text are characters until `_mark` turns them into tokens.

    def _encode_chat(self, chat: Conversation) -> tuple[list[int], np.ndarray]:
        full = self._render(chat, chat.messages)
        if self.loss_on == "all":
            tokens = self._tokens(full)
            return tokens, np.ones(len(tokens), dtype=bool)
        answers = _answers(chat.messages)
        first = max(answers[-1] if self.loss_on == "last" else 0, chat.learn_from)
        if _GENERATION.search(self._template_for(chat)):
            spans = self._declared(chat, chat.messages)
            if first > answers[0]:
                spans = spans[len(self._declared(chat, chat.messages[:first])) :]
        else:
            spans = [self._span(chat, full, index) for index in answers if index >= first]
        learned = "\n".join(full[start:end] for start, end in spans)
        for index in answers:
            if index >= first and any(word not in learned for word in _last_words(chat.messages[index])):
                raise UnusableRow(f"the chat template leaves out what messages[{index}] says")
        return self._mark(full, spans)

    def _template_for(self, chat: Conversation) -> str:
        return self.tokenizer.get_chat_template(self._template, tools=chat.tools)

    def _render(self, chat: Conversation, messages: Messages, *, prompt: bool = False) -> str:
        with _refusals():
            return cast(
                "str",
                self.tokenizer.apply_chat_template(
                    messages, tools=chat.tools, chat_template=self._template, add_generation_prompt=prompt, tokenize=False
                ),
            )

    def _declared(self, chat: Conversation, messages: Messages) -> list[Span]:
        """What the template marks with `{% generation %}`; pieces that touch are one."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map}
        with _refusals():
            rendered: Any = render_jinja_template(
                [messages], tools=chat.tools, chat_template=self._template_for(chat), return_assistant_tokens_mask=True, **variables
            )
        found: list[Span] = rendered[1][0]
        spans: list[Span] = []
        for start, end in found:
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, end))
        return spans

    def _span(self, chat: Conversation, full: str, index: int) -> Span:
        """Where the answer in message `index` stands in the full text, its end-of-turn token included."""
        if index:
            asked = self._render(chat, chat.messages[:index], prompt=True)
            if full.startswith(asked):
                answered = self._render(chat, chat.messages[: index + 1])
                if full.startswith(answered) and len(answered) > len(asked):
                    return len(asked), len(answered)
        start, end = self._start(chat, full, index), self._end(chat, full, index)
        if start >= end:
            raise _cannot_locate(index)
        return start, end

    def _start(self, chat: Conversation, full: str, index: int) -> int:
        """Where the answer starts: after what a prompt for generation has, as far as the template writes it here too."""
        mark, other = _unused(chat, full)
        messages = [*chat.messages]
        messages[index] = {"role": "assistant", "content": other}
        if not index:
            # Nothing is before the answer, so what opens an answer is seen after any question.
            before = self._render(chat, messages).partition(other)[0]
            asked = [{"role": "user", "content": other}]
            opening = self._render(chat, asked, prompt=True).removeprefix(self._render(chat, asked))
            if opening and before.endswith(opening) and full.startswith(before):
                return len(before)
            raise _cannot_locate(index)
        place = self._place(chat, full, index - 1, mark)
        messages[index - 1] = _marked(messages[index - 1], mark)
        prompt = self._render(chat, messages[:index], prompt=True).partition(mark)[2]
        written, found, _ = self._render(chat, messages).partition(mark)[2].partition(other)
        # A prompt may open more than the template writes here (DeepSeek-R1: <think>), less (Qwen3: an empty <think>),
        # or something else after the role. It never differs before the role.
        opening = _common(prompt, written)
        agrees = opening in (prompt, written)
        if not agrees:
            closing = self._render(chat, messages[:index]).partition(mark)[2]
            agrees = prompt.startswith(closing) and len(opening) > len(closing)
        if found and agrees and full.startswith(opening, place):
            return place + len(opening)
        raise _cannot_locate(index)

    def _end(self, chat: Conversation, full: str, index: int) -> int:
        """Where the answer ends: after what the template writes behind it when it is the last message."""
        mark, _ = _unused(chat, full)
        place = self._place(chat, full, index, mark)
        messages = [*chat.messages[:index], _marked(chat.messages[index], mark)]
        tail = self._render(chat, messages).partition(mark)[2]
        if full.startswith(tail, place):
            return place + len(tail)
        # A template may end every text with a further token (Phi-3). What stands in both places, up to its last
        # special token, belongs to the turn.
        common = _common(tail, full[place:])
        ends = [common.rfind(token) + len(token) for token in self._specials if token in common]
        if not ends:
            raise _cannot_locate(index)
        return place + max(ends)

    def _place(self, chat: Conversation, full: str, index: int, mark: str) -> int:
        """Where the text of message `index` ends in the full text."""
        messages = [*chat.messages]
        messages[index] = _marked(messages[index], mark)
        rendered = self._render(chat, messages)
        if rendered.count(mark) != 1 or rendered.replace(mark, "") != full:
            raise _cannot_locate(index)
        return rendered.index(mark)

    def _mark(self, text: str, spans: Sequence[Span]) -> tuple[list[int], np.ndarray]:
        """Tokens of the text, and which of them hold a character of a span."""
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except NotImplementedError as error:
            raise DataError(
                f"{type(self.tokenizer).__name__} does not tell where its tokens stand in the text",
                why="without it, the tokens of the answers cannot be told from the others",
                fix="use a fast tokenizer, or set method.loss_on=all",
            ) from error
        starts, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        # Byte-level tokenizers may leave spaces out of offsets, so a token that is only spaces looks empty.
        before = np.minimum(np.concatenate([[0], ends])[:-1], ends - 1)
        starts = np.where(starts == ends, before, starts)
        loss = np.zeros(len(starts), dtype=bool)
        for start, end in spans:
            loss |= (starts < end) & (ends > start)
        return encoded["input_ids"], loss


@contextmanager
def _refusals() -> Iterator[None]:
    """What Jinja raises, as an error about the template or about the row."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: {error.message} (line {error.lineno})",
            why="every conversation is written with it",
            fix="correct the template, or set data.chat_template to another one",
        ) from error
    except (TemplateError, TypeError, ValueError) as error:
        raise UnusableRow(f"the chat template refuses the conversation: {error}") from error


def _answers(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _common(a: str, b: str) -> str:
    """The longest text that both begin with."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _last_words(message: dict[str, Any]) -> list[str]:
    """What must be found in the learned text, however the template trims: the last word, and the names of the calls."""
    calls = message.get("tool_calls", [])
    return message["content"].rpartition("</think>")[2].split()[-1:] + [call["function"]["name"] for call in calls]


def _unused(chat: Conversation, full: str) -> list[str]:
    """Two characters that stand neither in the text nor in what the template left out of it."""
    taken = full + json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
    return [next(free), next(free)]


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with a mark after its last text that every template prints."""
    if calls := message.get("tool_calls"):
        function = {**calls[-1]["function"], "name": calls[-1]["function"]["name"] + mark}
        return {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}
    content = message["content"]
    core = content.rstrip()  # templates may trim what they print
    return {**message, "content": core + mark + content[len(core) :]}


def _cannot_locate(index: int) -> UnusableRow:
    return UnusableRow(
        f"the chat template rewrites the conversation so that the answer in messages[{index}] cannot be located exactly; "
        "use a template with {% generation %} marks, or method.loss_on=all"
    )
