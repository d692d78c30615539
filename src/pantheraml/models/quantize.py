"""A frozen base in fewer bits: NF4 through bitsandbytes when it is loaded, whole numbers or floats of eight bits afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pantheraml.errors import MissingExtra, RecipeError
from pantheraml.kernels.fp8 import Fp8
from pantheraml.kernels.int8 import Int8
from pantheraml.kernels.linear import Base, Projection, linear

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

NF4 = "nf4"
EightBit = Literal["int8", "fp8"]


def available(quantizers: tuple[str, ...]) -> tuple[str, ...]:
    """Of what a device can do, what the installed packages can too."""
    from importlib.util import find_spec

    return quantizers if find_spec("bitsandbytes") else tuple(each for each in quantizers if each != NF4)


def quantization(quantizer: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers shall load the weights: NF4 with doubly quantised scales; products are in `dtype`. None: as they are.

    Raises: MissingExtra without bitsandbytes.
    """
    if quantizer != NF4:
        return None
    from transformers import BitsAndBytesConfig

    if not available((quantizer,)):
        raise MissingExtra("bitsandbytes", needed_for="model.load_in_4bit", install="bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantizer, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_format(model: Any) -> None:
    """bitsandbytes shall leave four-bit weights in the format that training reads.

    Its layers on a CPU lay them out anew in the first evaluation, for a product of their own, which (0.50) also fails for
    matrices whose inputs are no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class EightBitLinear(nn.Module):
    """A frozen linear layer whose matrix is held in eight bits. It has no weight that could be saved or trained."""

    def __init__(self, layer: nn.Linear, bits: EightBit) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self._base: Base = Int8(layer.weight.detach()) if bits == "int8" else Fp8(layer.weight.detach())

    def kernel_base(self) -> Base:
        """What multiplies, for the kernels."""
        return self._base

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, [..., outputs]."""
        rows = x.reshape(-1, self.in_features)
        return linear(rows, Projection(None, self.bias, base=self._base)).view(*x.shape[:-1], self.out_features)


def to_eight_bits(model: Any, bits: EightBit) -> int:
    """Every frozen linear layer of the model but its output head into eight bits, one after the other; how many.

    The weights they had are gone: what is trained beside them is an adapter, which fits the base on disk as well.
    Raises: RecipeError for fp8 where a matrix has a side that is no multiple of 16.
    """
    from pantheraml.models.head import causal_model

    head = causal_model(model).get_output_embeddings()
    done = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is head or layer.weight.requires_grad:
                continue
            try:
                setattr(parent, name, EightBitLinear(layer, bits))
            except ValueError as error:
                raise RecipeError(
                    "this model does not fit into eight-bit floats", why=str(error), fix="set model.load_in_fp8 to false"
                ) from error
            done += 1
    causal_model(model).is_quantized = True  # transformers' own word for a base that cannot be merged into
    return done
