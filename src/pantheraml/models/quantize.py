"""A frozen base in fewer bits: NF4 through bitsandbytes when it is loaded, whole numbers or floats of eight bits afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pantheraml.errors import MissingExtra, PantheraError, RecipeError
from pantheraml.kernels.fp8 import Fp8, unfit
from pantheraml.kernels.int8 import Int8
from pantheraml.kernels.linear import Projection, linear
from pantheraml.kernels.nf4 import Nf4
from pantheraml.models.lora import product_dtype
from pantheraml.recipe.kinds import in_host_memory

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
    matrices whose inputs are no multiple of 64. Those it reads wrongly as well, so they are made whole here: as rounded, in two bytes.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
            state = getattr(getattr(layer, "weight", None), "quant_state", None)
            if state is not None and in_host_memory(layer.weight.device.type) and layer.in_features % state.blocksize:
                setattr(parent, name, _plain(layer, Nf4(layer.weight).dense(), model.dtype))


def keep_whole(model: Any) -> None:
    """From here on each matrix in four bits stays whole beside them once the kernels have used it, until `let_go`."""
    for layer in _four_bit_layers(model):
        layer.kernel_base = Nf4(layer.weight, keep=True)


def let_go(model: Any) -> str | None:
    """Forget what `keep_whole` keeps, and say so; None: there is nothing."""
    kept = [layer for layer in _four_bit_layers(model) if "kernel_base" in vars(layer)]
    for layer in kept:
        del layer.kernel_base
    return "with matrices in four bits made whole at each use" if kept else None


def _four_bit_layers(model: Any) -> list[Any]:
    plain = [layer for layer in model.modules() if not hasattr(layer, "base_layer")]  # PEFT's wrappers show the weight that is within
    return [layer for layer in plain if getattr(getattr(layer, "weight", None), "quant_state", None) is not None]


def _plain(layer: Any, matrix: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A frozen linear layer of a matrix, with the bias of the layer whose place it takes."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(matrix.to(dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain


class FourBitLinear(nn.Module):
    """A frozen linear layer in four bits whose matrix is a plain tensor of bytes, which can be divided over processes and gathered."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._state = layer.weight.quant_state
        self.weight = nn.Parameter(layer.weight.data.view(-1), requires_grad=False)
        self.bias = layer.bias

    @property
    def kernel_base(self) -> Nf4:
        """What the layer multiplies by, as its bytes are now."""
        return Nf4(self.weight, self._state)

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, [..., outputs]."""
        rows = x.reshape(-1, self.in_features).to(product_dtype(x))
        return linear(rows, Projection(None, self.bias, base=self.kernel_base)).view(*x.shape[:-1], self.out_features)


def to_plain_bytes(model: Any, device: torch.device) -> None:
    """Every layer in four bits into a `FourBitLinear`. FSDP knows nothing of the kind of tensor that bitsandbytes keeps.

    Args:
        device: where FSDP will bring the bytes; the scales by which they are read go there now.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not hasattr(layer, "base_layer") and getattr(getattr(layer, "weight", None), "quant_state", None) is not None:
                layer.weight.quant_state.to(device)
                setattr(parent, name, FourBitLinear(layer))


class WeightAbsent(PantheraError, AttributeError):
    """Somebody asked a layer for the matrix that it no longer has."""


class EightBitLinear(nn.Module):
    """A frozen linear layer whose matrix is held in eight bits, where it was made. It has no weight that could be saved or trained."""

    def __init__(self, layer: nn.Linear, bits: EightBit) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.kernel_base: Int8 | Fp8 = Int8(layer.weight.detach()) if bits == "int8" else Fp8(layer.weight.detach())

    def matrix(self) -> Tensor:
        """What the layer multiplies by, float32 [outputs, inputs]: the weight that it had, rounded."""
        return self.kernel_base.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, [..., outputs]."""
        rows = x.reshape(-1, self.in_features).to(product_dtype(x))
        return linear(rows, Projection(None, self.bias, base=self.kernel_base)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As nn.Linear shows itself, with the form of the matrix."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {type(self.kernel_base).__name__.lower()}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # to PEFT's merge, for one, an AttributeError alone would say nothing
            raise WeightAbsent(
                "this layer holds its matrix in eight bits, and has no weight",
                why="the weight was rounded when it was loaded, and what is merged or trained should not be",
                fix="merge with save_pretrained_merged or pantheraml export, which read the base again; or load it without eight bits",
            )
        return super().__getattr__(name)


def to_eight_bits(model: Any, bits: EightBit) -> int:
    """Every frozen linear layer of the model but its output head and its adapters into eight bits, one by one; how many.

    The weights they had are gone: what is trained beside them is an adapter, which fits the base on disk as well.
    Raises: RecipeError, before anything is changed, for DoRA, and for fp8 where a matrix has a side that is no multiple of 16.
    """
    found = list(_frozen_linears(model))
    if any(getattr(module, "lora_variant", None) for module in model.modules()):
        raise RecipeError(
            "adapter.dora does not go with a base in eight bits",
            why="DoRA scales the base's weights at each step, and in eight bits they are only there as products",
            fix="set adapter.dora to false, or hold the base in another form",
        )
    for _, _, layer in found if bits == "fp8" else ():
        if why := unfit(layer.weight):
            raise RecipeError("this model does not fit into eight-bit floats", why=why, fix="set model.load_in_fp8 to false")
    for parent, name, layer in found:
        setattr(parent, name, EightBitLinear(layer, bits))
    leave_file(model)
    return len(found)


def held_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that a model was loaded with, one at a time: what is in four bits with its scales, what is in eight as it is multiplied by."""
    yield from model.named_parameters()
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # those are computed, not loaded
                yield f"{place}.{name}", buffer
        if isinstance(module, EightBitLinear):
            yield f"{place}.matrix", module.matrix()
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        while state is not None:  # the scales of bitsandbytes are in few bits themselves
            yield from ((f"{place}.{name}", value) for name, value in vars(state).items() if isinstance(value, Tensor))
            state = state.state2


def leave_file(model: Any) -> None:
    """Copy what is left of the weights in ordinary memory: as they were read they are pages of a file, all of which stay while one is in use."""
    copies: dict[object, Tensor] = {}  # what shared its memory goes on doing so
    for tensor in (*model.parameters(), *model.buffers()):
        if in_host_memory(tensor.device.type) and tensor.is_floating_point():
            same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            tensor.data = copies.setdefault(same, tensor.data.clone())


def to_matrices(model: Any) -> int:
    """Every layer in eight bits into a linear layer again, of the matrix that it multiplies by and the model's dtype; how many."""
    dtype, done = model.dtype, 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, EightBitLinear):
                continue
            setattr(parent, name, _plain(layer, layer.matrix(), dtype))
            done += 1
    return done


def held_in_eight_bits(model: Any) -> bool:
    """Whether some layer of the model is."""
    return any(isinstance(module, EightBitLinear) for module in model.modules())


def _frozen_linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every plain one that nobody trains and whose weight nobody reads past it."""
    from pantheraml.models.adapters import bypassed
    from pantheraml.models.head import causal_model

    head = causal_model(model).get_output_embeddings()
    others = {id(part) for part in (head.modules() if head is not None else ())}  # under an adapter the head lies within it
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):  # PEFT's; they may be frozen, too
            part = getattr(module, name, None)
            others |= {id(each) for each in part.modules()} if isinstance(part, nn.Module) else set()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and id(layer) not in others and not layer.weight.requires_grad and not bypassed(parent, name):
                yield parent, name, layer
