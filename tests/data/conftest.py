from __future__ import annotations

import pytest

from pantheraml.data.chat import Example
from pantheraml.models.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte: what is learned can be read off as text, exactly. Tests that change it make their own."""
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def learned(tokenizer):
    """The runs of learned tokens of an example, as text."""

    def runs(example: Example, tokenizer=tokenizer) -> list[str]:
        found, run = [], []
        for token, loss in zip([*example.tokens, -1], [*example.loss, False], strict=True):
            if loss:
                run.append(int(token))
            elif run:
                found.append(tokenizer.decode(run))
                run = []
        return found

    return runs
