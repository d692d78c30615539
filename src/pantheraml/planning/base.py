"""How the frozen base is held: in the dtype of the products, or in fewer bits where the recipe asks and the device can. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Device
from pantheraml.planning.memory import MemoryEstimate
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import LoRA, Recipe

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES_EACH: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_NF4_BYTES_EACH = 0.5 + 4 / 64  # four bits, and a float32 scale for each 64 weights
_EIGHT_BIT_BYTES_EACH = 2  # one byte for each direction of the product
_QUANTIZERS = {
    "nf4": (
        "load_in_4bit",
        "4 bits",
        "NF4 needs bitsandbytes with support for this device, which is not here",
        "pip install bitsandbytes, or ",
    ),
    "int8": (
        "load_in_8bit",
        "8-bit whole numbers",
        "it has no fast products of eight-bit whole numbers (on a CPU: AVX-512 VNNI, AVX VNNI or AMX)",
        "",
    ),
    "fp8": ("load_in_fp8", "8-bit floats", "eight-bit floats need an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper)", ""),
}
"""Quantizer -> its field in the recipe, its form, what a device lacks without it, and the start of the fix."""


def quantizer_of(recipe: Recipe, device: Device, quantizers: tuple[str, ...]) -> str | None:
    """How the frozen base is held; None: in the dtype of the products. Raises: DeviceError if the device cannot."""
    asked = asked_quantizer(recipe)
    if asked is None:
        return None
    field, form, missing, fix = _QUANTIZERS[asked]
    if asked not in quantizers or (asked == "fp8" and not _multiplies_fp8(device)):
        raise DeviceError(
            f"model.{field}=true, but {device} ({device.label}) cannot hold a base in {form}",
            why=missing if KINDS[device.kind].engine == "torch" else f"XLA holds one in {' or '.join(quantizers) or 'no fewer bits'} alone",
            fix=f"{fix if KINDS[device.kind].engine == 'torch' else ''}set model.{field} to false",
        )
    return asked


def _multiplies_fp8(device: Device) -> bool:
    """NVIDIA GPUs do from compute capability 8.9 on (Ada, then Hopper); AMD's of 9.4 have another format of the same name."""
    major, _, minor = (device.capability or "").partition(".")
    return device.capability is None or (major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) >= (8, 9))


def whole_bytes(recipe: Recipe, shape: ModelShape, dtype: Dtype, memory: MemoryEstimate, budget_bytes: int) -> int:
    """What it takes to keep each matrix in four bits in the dtype of the products as well; 0: it is made whole at each use.

    Where that fits beside everything else, and nobody asked for less memory by hardware.checkpointing.
    """
    lora = recipe.adapter
    if asked_quantizer(recipe) != "nf4" or recipe.hardware.checkpointing not in ("auto", "off"):
        return 0
    if not isinstance(lora, LoRA) or lora.dropout > 0 or lora.dora:  # PEFT computes with the four bits itself
        return 0
    size = sum(n_in * n_out for n_in, n_out in shape.linears) * BYTES_EACH[dtype]
    return size if memory.total_bytes + size <= budget_bytes else 0


def asked_quantizer(recipe: Recipe) -> str | None:
    """How the recipe wants the frozen base to be held; None: in the dtype of the products."""
    return next((name for name, (field, *_) in _QUANTIZERS.items() if getattr(recipe.model, field)), None)


def base_reason(quantizer: str | None, lora: bool, *, xla: bool = False) -> str:
    """Why the frozen weights are held as they are. xla: it computes."""
    if quantizer == "nf4":
        return "the recipe asks for 4 bits; products are computed in dtype"
    if quantizer and xla:
        return "the recipe asks for 8 bits; products are computed in dtype"
    if quantizer:
        return "the recipe asks for 8 bits; products with the base are computed in them, all others in dtype"
    return "frozen, so the dtype of the arithmetic is enough" if lora else "every weight trains: small updates need float32"


def base_bytes_each(shape: ModelShape, base_dtype: Dtype, quantizer: str | None, *, both_ways: bool = True) -> float:
    """Bytes of a frozen weight, embeddings and head included. both_ways: eight bits are kept once for each direction of the product."""
    if quantizer is None:
        return BYTES_EACH[base_dtype]
    linears = sum(n_in * n_out for n_in, n_out in shape.linears)  # embeddings and norms stay as they are
    return (
        linears * (_NF4_BYTES_EACH if quantizer == "nf4" else _EIGHT_BIT_BYTES_EACH if both_ways else 1)
        + (shape.parameters - linears) * BYTES_EACH[base_dtype]
    ) / shape.parameters
