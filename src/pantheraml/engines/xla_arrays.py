"""What of a model is an array of JAX, how it is spread over devices, and the way there and back.

Letters: G layers that are stacked, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

from pantheraml.models.head import causal_model
from pantheraml.planning.sharding import spec_of

Arrays = dict[str, Any]
"""Name of a `Slot` -> array; of one in eight bits -> (int8 [.., O, I], scale [.., O, 1])."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Tensors of the model that are one array: one tensor, or the same one of G layers, stacked.

    Attributes:
        name: the tensor's, with `*` where the number of the layer would stand.
        members: names of the tensors in the model.
        stacked: the array's first axis counts layers.
        shape: of one member. dtype: of torch.
        trains: its values are learned.
    """

    name: str
    members: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Of the array."""
        return (len(self.members), *self.shape) if self.stacked else self.shape


class Spread:
    """How what has rows is spread over a mesh.

    Attributes:
        shares: into how many parts rows are divided.
        everywhere: on each device. rows: [B, ...]. batches: [A, B, ...]. heads: [B, H, ...].
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        axes = tuple(axis for axis in mesh.axis_names if axis != "tp")
        self.shares = mesh.size // mesh.shape.get("tp", 1)
        self.everywhere, self.rows, self.batches = self.over(), self.over(axes), self.over(None, axes)
        self.heads = self.over(axes, "tp" if "tp" in mesh.axis_names else None)

    @property
    def has_flash(self) -> bool:
        """Whether the devices, here or not, are TPUs whose compiler takes JAX's attention kernel."""
        device = self.mesh.devices.flat[0]
        return device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3")

    def full_rows(self, rows: int) -> int:
        """So many that each part has as many, some of them empty."""
        return -(-rows // self.shares) * self.shares

    def over(self, *axes: Any) -> NamedSharding:
        """By the axis, or axes, over which each dimension is spread."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def pinned(self, x: Any, sharding: NamedSharding) -> Any:
        """An array in the middle of a computation, which stays spread like this."""
        return jax.lax.with_sharding_constraint(x, sharding) if self.mesh.size > 1 else x


class Store:
    """Where the arrays of a model are: each device gets its part, and no more is made on the host.

    Args:
        slots: of the model. eighths: names of those that are kept in eight bits.
        ahead: the devices are not here, so that arrays are shapes alone.
    """

    def __init__(self, spread: Spread, slots: Mapping[str, Slot], *, eighths: frozenset[str] = frozenset(), ahead: bool = False) -> None:
        self._spread, self._slots, self._eighths, self._ahead = spread, slots, eighths, ahead

    def of(self, name: str) -> Any:
        """The sharding of a slot's array; of one in eight bits that of the whole numbers, and that of the scales."""
        slot = self._slots[name]
        over, mesh = self._spread.over, self._spread.mesh
        sharding = over(*((None,) if slot.stacked else ()), *spec_of(slot.members[0], slot.shape, mesh.shape))
        return (sharding, over(*sharding.spec[:-1], None)) if name in self._eighths else sharding

    def put(self, name: str, tensors: Sequence[Tensor]) -> Any:
        """The array of a slot from the tensors of its members, in float32 if it trains."""
        slot = self._slots[name]
        dtype = jnp.dtype("float32" if slot.trains else str(slot.dtype).removeprefix("torch."))
        shardings = self.of(name)
        whole, scales = shardings if isinstance(shardings, tuple) else (shardings, None)
        if self._ahead:
            if scales is None:
                return jax.ShapeDtypeStruct(slot.array_shape, dtype, sharding=whole)
            scale = jax.ShapeDtypeStruct((*slot.array_shape[:-1], 1), dtype, sharding=scales)
            return jax.ShapeDtypeStruct(slot.array_shape, jnp.int8, sharding=whole), scale

        def part(index: Any) -> np.ndarray:
            if not slot.stacked:
                return np.asarray(to_numpy(tensors[0])[index], dtype)
            return np.stack([np.asarray(to_numpy(each)[index[1:]], dtype) for each in tensors[index[0]]])

        placed = jax.make_array_from_callback(slot.array_shape, whole, part)
        return placed if scales is None else jax.jit(_to_eight_bits, out_shardings=shardings)(placed)

    def from_host(self, value: np.ndarray, sharding: NamedSharding) -> Any:
        """An array of numpy on the devices."""
        if self._ahead:
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def in_eight_bits(model: Any, slots: Mapping[str, Slot]) -> Iterator[str]:
    """Slots of frozen matrices of linear layers, but the output head and adapters."""
    head = causal_model(model).get_output_embeddings()
    linears = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and part is not head and ".lora_" not in name]
    matrices = {f"{name}.weight" for name in linears}
    for name, slot in slots.items():
        if not slot.trains and slot.members[0] in matrices:
            yield name


def _to_eight_bits(weight: Any) -> tuple[Any, Any]:
    """Whole numbers from -127 to 127 and the scale of each output, so that their product is about the weight [.., O, I]."""
    scale = jnp.maximum(jnp.abs(weight).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny).astype(jnp.float32) / 127
    return jnp.round(weight.astype(jnp.float32) / scale).astype(jnp.int8), scale.astype(weight.dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values; bfloat16 is JAX's. The memory is shared where it can be."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.int16).numpy().view(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def fetched(array: Any) -> np.ndarray:
    """The whole of an array; of one that lies on several hosts each of them gets it, so all must ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def fetched_members(array: Any) -> Iterator[np.ndarray]:
    """The parts of a stacked one. Of several hosts they are gathered one by one: devices hold no more than one whole."""
    here = array.is_fully_addressable or array.is_fully_replicated
    yield from np.asarray(array) if here else (fetched(array[i]) for i in range(len(array)))


def to_torch(host: np.ndarray) -> Tensor:
    """A copy of an array of the host as a tensor."""
    if host.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(host.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(host))


def whole(arrays: Arrays) -> Arrays:
    """With matrices in eight bits as products."""
    return {name: value[0].astype(value[1].dtype) * value[1] if isinstance(value, tuple) else value for name, value in arrays.items()}


def used(arguments: Mapping[str, Any], compute: Callable[[Mapping[str, Any]], Any]) -> set[str]:
    """Names of the arguments that the result of a computation depends on; nothing is computed."""
    from jax.interpreters import partial_eval

    names = list(arguments)
    closed = jax.make_jaxpr(lambda *values: compute(dict(zip(names, values, strict=True))))(*arguments.values())
    _, kept = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return {name for name, needed in zip(names, kept, strict=True) if needed}
