from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from pantheraml.errors import MissingExtra
from pantheraml.models.quantize import NF4, available, quantization


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == "bitsandbytes" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.usefixtures("without_bitsandbytes")
def test_without_bitsandbytes_nothing_is_offered_and_the_error_says_what_to_install() -> None:
    assert available((NF4,)) == ()
    with pytest.raises(MissingExtra) as caught:
        quantization(NF4, torch.bfloat16)
    assert "bitsandbytes" in caught.value.what
    assert "model.load_in_4bit" in caught.value.what + caught.value.why
    assert "pip install bitsandbytes" in caught.value.fix


def test_what_a_device_cannot_is_not_offered_even_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert available(()) == ()
    assert available((NF4,)) == (NF4,)
