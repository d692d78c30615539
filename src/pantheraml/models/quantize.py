"""A frozen base in four bits, through bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.errors import MissingExtra

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

NF4 = "nf4"


def available(quantizers: tuple[str, ...]) -> tuple[str, ...]:
    """Of what a device can do, what the installed packages can too."""
    from importlib.util import find_spec

    return quantizers if find_spec("bitsandbytes") else ()


def quantization(quantizer: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with doubly quantised scales; products are computed in `dtype`. Raises: MissingExtra without bitsandbytes."""
    from transformers import BitsAndBytesConfig

    if not available((quantizer,)):
        raise MissingExtra("bitsandbytes", needed_for="model.load_in_4bit", install="bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantizer, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
