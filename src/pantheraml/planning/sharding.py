"""How each tensor of a model is spread over a mesh of devices: rules by name and shape. Needs no torch.

Axes of a mesh: dp holds copies, fsdp parts of every weight that are gathered where they are used, tp parts of a product
(Megatron-LM, arXiv 1909.08053); dcn copies on other slices, over a slower network.
"""

from __future__ import annotations

from collections.abc import Mapping

AXES = ("dcn", "dp", "fsdp", "tp")
_BY_OUTPUT = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens"})
_BY_INPUT = frozenset({"o_proj", "down_proj"})

Spec = tuple[str | None, ...]
"""For each dimension the axis over which it is spread; None: it is whole on each device."""


def spec_of(name: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> Spec:
    """How a tensor of the model is spread.

    Args:
        name: its name in the model. shape: [outputs, inputs] for the weight of a linear layer.
        mesh: axis -> devices along it.
    Returns: one entry for each dimension; a dimension that an axis does not divide is not spread over it.
    """
    tp, fsdp = mesh.get("tp", 1), mesh.get("fsdp", 1)
    spec: list[str | None] = [None] * len(shape)
    parts = name.split(".")
    if tp > 1 and len(shape) == 2 and (along := _tp_dimension(parts)) is not None and shape[along] % tp == 0:
        spec[along] = "tp"
    if fsdp > 1:
        free = [i for i, size in enumerate(shape) if spec[i] is None and size % fsdp == 0 and size >= fsdp]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return tuple(spec)


def _tp_dimension(parts: list[str]) -> int | None:
    """Over which dimension of a weight tensor parallelism divides it; None: over neither."""
    by_output, by_input = (any(part in kinds for part in parts) for kinds in (_BY_OUTPUT, _BY_INPUT))
    if not (by_output or by_input):
        return None
    if "lora_A" in parts:  # [rank, inputs]
        return 1 if by_input else None
    if "lora_B" in parts:  # [outputs, rank]
        return 0 if by_output else None
    return 0 if by_output else 1
