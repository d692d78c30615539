"""Several processes that train one model: who has which part of it, and what they tell each other in a step.

Axes of the mesh, the outermost first: dp holds copies, fsdp parts of every weight that are gathered where they are used
(PyTorch's FSDP2), cp parts of the tokens of each micro-batch, tp parts of the products. What trains is one vector on each
process, so that gradients of copies are summed in one go, once a step: micro-batches may differ in number and be divided when
memory runs out, and adapters, which every process has as a whole, are the only thing that travels for them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pantheraml.engines.engine import LossFn
from pantheraml.engines.flat import FlatParameters, local_part, norm_of
from pantheraml.errors import RecipeError
from pantheraml.kernels.context_parallel import ContextParallel
from pantheraml.kernels.sums import Sums
from pantheraml.kernels.tensor_parallel import TensorParallel
from pantheraml.models.decoder import unexchangeable
from pantheraml.models.head import causal_model
from pantheraml.models.quantize import to_plain_bytes
from pantheraml.models.swap import called
from pantheraml.models.tensor_parallel import divide, divided_layers, summed_over

AXES = ("dp", "fsdp", "cp", "tp")
_TOGETHER = (("dp",), ("fsdp", "cp"), ("cp",), ("tp",), ("dp", "fsdp", "cp"), ("dp", "tp"))
"""Axes along which groups of processes differ; where FSDP divides the weights, it does so over those that share tokens as well."""
_SHARED, _PARTIAL, _PART = "shared", "partial", "part"


class Parallel:
    """This process's place in the mesh, and its part of the model.

    torch.distributed is ready, with as many processes as the mesh has places.

    Args:
        mesh: axis -> processes. device: of this process. timeout_s: how long processes wait for each other.

    Attributes:
        tp, cp: those with which it shares products, or tokens; None: none.
        data_rank, data_size: whose share of a step's examples it takes, and into how many they are divided.
        token_rank: the same for its tokens: those who have others draw other random numbers.
        in_step: all processes take as many micro-batches, since they meet in each.
        hooks: modules must be called as such, since FSDP brings what they need.
        sums: what this process adds up with others; not what FSDP sends.
    """

    def __init__(self, mesh: Mapping[str, int], device: torch.device, timeout_s: float = 600.0) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._sizes = [mesh.get(axis, 1) for axis in AXES]
        self._device, self._rank, self.sums = device, dist.get_rank(), Sums(device)
        if math.prod(self._sizes) != dist.get_world_size():
            raise ValueError(f"a mesh of {self._sizes} does not have the {dist.get_world_size()} processes that are here")
        self._at = self._place(self._rank)
        _, fsdp, cp, tp = self._sizes
        self.token_rank = self._rank // tp
        self.data_rank, self.data_size = self.token_rank // cp, len(self) // (cp * tp)
        self.hooks = fsdp > 1
        self._parts = fsdp * cp if self.hooks else 1
        self.in_step = self.hooks or tp > 1
        self._groups = {along: self._group(along) for along in dict.fromkeys(map(self._along, _TOGETHER)) if along}
        self.cp = ContextParallel(self._at[2], cp, self._groups["cp",], self.sums) if cp > 1 else None
        self.tp = TensorParallel(self._at[3], tp, self._groups["tp",], self.sums) if tp > 1 else None
        self._divided: dict[str, int] = {}
        self._inner: set[str] = set()
        self._managed: set[str] = set()

    def __len__(self) -> int:
        return math.prod(self._sizes)

    def _place(self, rank: int) -> tuple[int, ...]:
        _, fsdp, cp, tp = self._sizes
        return rank // (fsdp * cp * tp), rank // (cp * tp) % fsdp, rank // tp % cp, rank % tp

    def _along(self, axes: Collection[str]) -> tuple[str, ...]:
        """Those of the axes that have more than one place."""
        return tuple(axis for axis, size in zip(AXES, self._sizes, strict=True) if axis in axes and size > 1)

    def _group(self, axes: tuple[str, ...]) -> Any:
        """Those that differ from this process along these axes alone. All processes make all groups."""
        where = [AXES.index(axis) for axis in axes]
        along: dict[tuple[int, ...], list[int]] = {}
        for rank in range(len(self)):
            along.setdefault(tuple(at for i, at in enumerate(self._place(rank)) if i not in where), []).append(rank)
        mine, _ = dist.new_subgroups_by_enumeration(list(along.values()), timeout=self._timeout)
        return mine

    # ---- The model -----------------------------------------------------------------------------------------------

    def divide(self, model: Any) -> None:
        """Keep this process's part of the model, on its device. What trains beside a frozen base stays whole.

        Raises: RecipeError if its products cannot be divided, or its heads exchanged.
        """
        why = None if self.cp is None else unexchangeable(model, self.cp.size)
        if self.cp is not None and why is not None:
            raise RecipeError(
                f"hardware.cp={self.cp.size} does not go with this model",
                why=why,
                fix="leave hardware.cp out; hardware.fsdp divides any model",
            )
        frozen_base = any(not parameter.requires_grad for parameter in model.parameters())
        if self.tp is not None:
            self._divided = divide(model, self.tp)
            self._inner = summed_over(model)
        if self.hooks:
            whole = {parameter for parameter in model.parameters() if parameter.requires_grad} if frozen_base else set[nn.Parameter]()
            for parameter in whole:
                parameter.data = parameter.data.to(self._device)
            self._shard(model, whole)
            self._managed = set() if frozen_base else {name for name, _ in model.named_parameters()}
        else:
            model.to(self._device)

    def _shard(self, model: Any, whole: set[nn.Parameter]) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(self._groups[self._along(("fsdp", "cp"))], self._device.type)
        to_plain_bytes(model, self._device)
        for module in (*_layers(model), causal_model(model)):
            for parameter in module.parameters():  # as it was read, it may be pages of a file, which processes have in common
                if parameter.requires_grad and local_part(parameter) is parameter:
                    parameter.data = parameter.data.float()
            sharded: Any = fully_shard(module, mesh=mesh, ignored_params=whole)
            # The sum of the losses is divided by the labels of all processes before, so gradients are summed.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply on the way
            # Where one process does not reach a weight that others reach, its part is zeros; torch that cannot do so breaks off.
            if hasattr(sharded, "set_reduce_scatter_unused_params"):
                sharded.set_reduce_scatter_unused_params(True)

    # ---- A step --------------------------------------------------------------------------------------------------

    def kind(self, name: str) -> str:
        """How the gradients of a trainable parameter add up; see `sum_gradients`."""
        inner = _PARTIAL if name in self._inner else _PART if name in self._divided else _SHARED
        return f"{inner} {'managed' if name in self._managed else 'flat'}"

    def sum_gradients(self, flat: FlatParameters) -> None:
        """Make the gradients of the processes those of the whole step."""
        assert flat.gradients is not None
        for where, _, kind in flat.parts:
            inner, by = kind.split()
            part = flat.gradients[where]
            axes = {"dp"} if by == "managed" else {"dp", "fsdp", "cp"}
            if inner == _PARTIAL:
                axes.add("tp")
            elif inner == _SHARED and by == "flat" and self.tp is not None:
                part /= self.tp.size  # each of them has all of it
                axes.add("tp")
            # Of what is shared and managed each process of tp has summed the same bits by itself: it follows from sums of activations, which
            # gloo and NCCL bring to all with the same bits, by kernels that add in a fixed order. On unlike GPUs it might drift.
            self._sum(part, axes)

    def _sum(self, tensor: Tensor, axes: Collection[str]) -> None:
        along = self._along(axes)
        if not along:
            return
        everybody = math.prod(self._sizes[AXES.index(axis)] for axis in along) == len(self)
        self.sums.over(tensor, None if everybody else self._groups[along])

    def totals(self, loss: Tensor, flat: FlatParameters) -> tuple[Tensor, Tensor]:
        """(sum of the losses of all processes, norm of the gradients of the whole model), after `sum_gradients`."""
        assert flat.gradients is not None
        squares = torch.zeros((), device=loss.device)
        dp, fsdp, cp, tp = self._sizes
        for where, _, kind in flat.parts:
            inner, by = kind.split()
            copies = (1 if inner == _PART else tp) * dp * (1 if by == "managed" else fsdp * cp)
            squares += norm_of(flat.gradients[where]).square() / copies
        both = torch.stack((self._own(loss), squares))
        self.sums.over(both)
        return both[0], both[1].sqrt()

    def total(self, loss: Tensor) -> Tensor:
        """The sum of the losses of all processes."""
        return self.sums.over(self._own(loss).clone())

    def _own(self, loss: Tensor) -> Tensor:
        """Processes that share products have the same loss; those that share tokens have each their own."""
        return loss / (1 if self.tp is None else self.tp.size)

    def within(self, loss: LossFn) -> LossFn:
        """The same loss, as FSDP's hooks need it: around the whole of it they bring what belongs to no layer."""
        return loss if not self.hooks else lambda model, batch: called(causal_model(model), loss, model, batch)

    def settle(self, model: Any) -> None:
        """After the model was used without a backward, at whose end FSDP would let go of what it had brought: weights may change now."""
        if self.hooks:
            causal_model(model).reshard()

    def answering(self, model: Any) -> AbstractContextManager[Any]:
        """Within the block the model's own forward computes with the parts that are here."""
        return nullcontext() if self.tp is None else divided_layers(model, self.tp)

    # ---- State ---------------------------------------------------------------------------------------------------

    @property
    def first(self) -> bool:
        """Whether this process keeps what all of them have."""
        return self._rank == 0

    def places(self, model: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """(shape of the whole, where this process's part begins) of each trainable parameter that is divided."""
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: self._where(name, each) for name, each in named.items() if name in self._divided or name in self._managed}

    def _where(self, name: str, parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape, offsets = list(parameter.shape), [0] * parameter.ndim
        if name in self._managed:  # FSDP cuts the first dimension into equal parts, but for the last ones
            _, fsdp_at, cp_at, _ = self._at
            offsets[0] = min(shape[0], -(-shape[0] // self._parts) * (fsdp_at * self._sizes[2] + cp_at))
        if name in self._divided:
            dim = self._divided[name]
            offsets[dim] += self._at[3] * shape[dim]
            shape[dim] *= self._sizes[3]
        return tuple(shape), tuple(offsets)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a model: the longest of its lists that lie in no other one."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    outer = [each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=len)
