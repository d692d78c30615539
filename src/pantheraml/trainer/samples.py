"""Questions that a model answers before and after training, and how many answers are exactly right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pantheraml.data.chat import Encoder, Question
from pantheraml.engines.engine import Engine


@dataclass(frozen=True, slots=True)
class Sample:
    """One question. `expected` is None for a prompt of the user's own; answers are None until given."""

    prompt: str
    expected: str | None
    before: str | None = None
    after: str | None = None


def ask(questions: Sequence[Question], prompts: Sequence[str], encoder: Encoder) -> tuple[list[Sample], list[list[int]]]:
    """Held-out questions and the user's prompts, and the tokens of each."""
    samples = [Sample(question.text, question.answer) for question in questions] + [Sample(prompt, None) for prompt in prompts]
    tokens = [question.prompt_tokens for question in questions]
    return samples, tokens + [encoder.ask([{"role": "user", "content": prompt}]) for prompt in prompts]


def answers(engine: Engine, tokenizer: Any, tokens: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers, stripped of white space at both ends."""
    return [answer.strip() for answer in engine.generate(tokenizer, tokens, max_new_tokens=max_new_tokens)]


def exact_match(samples: Sequence[Sample], *, after: bool) -> float | None:
    """Share of the held-out questions that are answered as in the data; None without any."""
    judged = [(sample.expected, sample.after if after else sample.before) for sample in samples if sample.expected is not None]
    return sum(expected == answer for expected, answer in judged) / len(judged) if judged else None


def with_answers(samples: Sequence[Sample], given: Sequence[str], *, after: bool) -> list[Sample]:
    """The samples with the answers of one of the two times."""
    pairs = zip(samples, given, strict=True)
    return [replace(sample, after=answer) if after else replace(sample, before=answer) for sample, answer in pairs]


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """As JSON; a resumed run reads what was answered before training."""
    path.write_text(json.dumps([asdict(sample) for sample in samples], ensure_ascii=False, indent=1) + "\n", "utf-8")


def read_samples(path: Path) -> list[Sample] | None:
    """What `write_samples` wrote; None if there is nothing, or half of it."""
    try:
        return [Sample(**values) for values in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
