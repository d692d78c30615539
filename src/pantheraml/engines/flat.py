"""All parameters that train as one vector, and their gradients as another: one kernel clips and updates them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pantheraml.errors import PantheraError

ALIGNED = 256
"""Each parameter begins at a multiple of this: a kernel may load 16 bytes at once, and a block of 8-bit states is of one parameter alone."""
NORM_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter lies in the vector."""

    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """Where the next one begins: a block of ALIGNED belongs to one parameter."""
        return self.start + -(-self.shape.numel() // ALIGNED) * ALIGNED

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


class FlatParameters:
    """Takes over the storage of parameters: each becomes a view of `weights`, in float32, and its gradient one of `gradients`.

    Parameters that were one tensor in memory stay one. Gaps between parameters have no gradient; what stands in them is nobody's.
    Of a parameter that is divided over processes (a DTensor) this one's part is meant throughout.

    Args:
        model: whose parameters train where they require gradients. While they are moved, old and new memory are both there.
        decay: the weight decay of a parameter. kind: anything else by which parameters are to be told apart, from their names.
            Those with the same of both lie together.

    Attributes:
        weights: float32, [n].
        parts: where in it those of one decay and kind lie, and both.
        gradients: float32, [n]; None before the first step, and after one that failed.
    Raises: ValueError if no parameter trains.
    """

    def __init__(self, model: nn.Module, decay: Callable[[Tensor], float], kind: Callable[[str], str] = lambda _: "") -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trained:
            raise ValueError("no parameter of the model trains")
        self._trained = trained
        self.parts: list[tuple[slice, float, str]] = []
        places: dict[object, _Place] = {}
        end = 0
        own = {name: (decay(parameter), kind(name)) for name, parameter in trained.items()}
        for value in sorted(set(own.values()), reverse=True):
            start = end
            for name, parameter in trained.items():
                here = local_part(parameter)
                if own[name] == value and _memory_of(here) not in places:
                    places[_memory_of(here)] = place = _Place(end, here.shape)
                    end = place.end
            if end > start:
                self.parts.append((slice(start, end), *value))
        self._places = {name: places[_memory_of(local_part(parameter))] for name, parameter in trained.items()}
        self.weights = torch.zeros(end, dtype=torch.float32, device=local_part(next(iter(trained.values()))).device)
        self.gradients: Tensor | None = None
        self._gradient_of: dict[str, Tensor] = {}
        # A frozen parameter that is the same memory as a trained one goes on being that.
        taken: list[tuple[Any, _Place]] = [
            (each, places[key]) for each in model.parameters() if (key := _memory_of(local_part(each))) in places
        ]
        for parameter, place in taken:
            view, here = place.of(self.weights), local_part(parameter)
            view.copy_(here.data)
            if here is parameter:
                parameter.data = view
            else:
                parameter._local_tensor = view
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in trained}
        self._without_gradient = set(trained)
        self._hooks: list[RemovableHandle] = []
        self._watch(model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._trained)

    def __len__(self) -> int:
        return len(self._trained)

    def blocks(self, flat: Tensor, each: int = ALIGNED) -> dict[str, Tensor]:
        """A vector with `each` values to a block of ALIGNED, cut by parameter; what stands in the gaps comes along."""
        return {name: flat[place.start // ALIGNED * each : place.end // ALIGNED * each] for name, place in self._places.items()}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector like `weights`, cut into tensors like the parameters; they share its memory."""
        return {name: place.of(flat) for name, place in self._places.items()}

    def zero_gradients(self) -> Tensor:
        """Zeros for a step to add to: the same tensor as long as none failed."""
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.weights)
            views = self.views(self.gradients)
            self._gradient_of = {name: _like(self._trained[name], view) for name, view in views.items()}
        else:
            self.gradients.zero_()
        for name, parameter in self._trained.items():
            parameter.grad = self._gradient_of[name]
        return self.gradients

    @torch.no_grad()
    def spread(self) -> None:
        """After `weights` have changed. FSDP keeps a part that is shorter than that of others in memory of its own."""
        for name, view in self.views(self.weights).items():
            here = local_part(self._trained[name])
            if here.data_ptr() != view.data_ptr():
                here.copy_(view)

    def drop_gradients(self) -> None:
        """Let go of the memory of the gradients."""
        self.gradients, self._gradient_of = None, {}
        for parameter in self._trained.values():
            parameter.grad = None

    def checked_gradients(self, add_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What a step has added up.

        Args:
            add_up: sums over the processes of a run, all of which call this; None: there is one.
        Raises: PantheraError if a parameter or its gradient is no longer the view that it was made, or if a parameter has
            got no gradient in the first step, in any process.
        """
        assert self.gradients is not None, "zero_gradients comes first"
        base, size = self.weights.data_ptr(), self.weights.element_size()
        moved = [
            name
            for name, parameter in self._trained.items()
            if parameter.grad is not self._gradient_of[name]
            or (local_part(parameter) is parameter and parameter.data_ptr() != base + size * self._places[name].start)
            or getattr(self._owners[name], name.rpartition(".")[2]) is not parameter
        ]
        if moved:
            raise PantheraError(
                f"{_some(moved)}: weights or gradients of {len(moved)} parameters were replaced while they train",
                why="the update is computed where they were before, and the model would not learn",
                fix="move or convert the model before training; copy values into its parameters (copy_), and do not set .data or .grad",
            )
        missing = self._missing(add_up)
        if missing:
            raise PantheraError(
                f"{len(missing)} of {len(self)} trainable parameters got no gradient: {_some(missing)}",
                why="they would stay as they are, and the run would not train what it says",
                fix="freeze them (requires_grad_(False)), or leave them out of adapter.targets",
            )
        return self.gradients

    def _watch(self, model: nn.Module) -> None:
        """Until the first step is checked, hear of each parameter that gets a gradient.

        In the place of a DTensor FSDP puts what it has gathered, which gets the gradient: the DTensor gets one also where it is not used.
        """
        waiting = {name for name, parameter in self._trained.items() if local_part(parameter) is not parameter}
        for name in self._trained.keys() - waiting:
            self._hooks.append(self._trained[name].register_post_accumulate_grad_hook(self._got_gradient(name)))
        if not waiting:
            return
        from torch.distributed.fsdp import FSDPModule

        def gathered(place: str) -> Callable[[nn.Module, Any], None]:
            def look(module: nn.Module, _: Any) -> None:
                for name, parameter in module.named_parameters(place):
                    if name in waiting and local_part(parameter) is parameter:
                        waiting.remove(name)
                        self._hooks.append(parameter.register_post_accumulate_grad_hook(self._got_gradient(name)))

            return look

        for place, module in model.named_modules():
            if isinstance(module, FSDPModule):
                self._hooks.append(model.get_submodule(place).register_forward_pre_hook(gathered(place)))

    def _got_gradient(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self._without_gradient.discard(name)

    def _missing(self, add_up: Callable[[Tensor], Tensor] | None) -> list[str]:
        """The parameters that have got no gradient in the first step; later none, since later it is not looked for."""
        if not self._hooks:
            return []
        for hook in self._hooks:
            hook.remove()
        missing = [name for name in self if name in self._without_gradient]
        if add_up is not None:
            got = add_up(torch.tensor([float(name not in missing) for name in self], device=self.weights.device))
            missing = [name for name, processes in zip(self, got.tolist(), strict=True) if not processes]
        self._hooks, self._without_gradient = [], set[str]()
        return missing


def local_part(parameter: Any) -> Any:
    """Of a DTensor this process's part, which is what training changes; any other tensor itself."""
    return getattr(parameter, "_local_tensor", parameter)


def _like(parameter: Any, part: Tensor) -> Tensor:
    """A part as what the parameter is."""
    if local_part(parameter) is parameter:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def norm_of(flat: Tensor) -> Tensor:
    """The 2-norm, by blocks: over 1e8 and more values in one go a sum in float32 loses what is added last."""
    whole = flat.numel() // NORM_BLOCK * NORM_BLOCK
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1)
    return torch.linalg.vector_norm(torch.cat([norms, torch.linalg.vector_norm(flat[whole:])[None]]))


def _memory_of(parameter: Tensor) -> object:
    """What is equal for two parameters that are the same values in the same memory."""
    if not parameter.numel():
        return id(parameter)
    return parameter.data_ptr(), parameter.dtype, tuple(parameter.shape), parameter.stride()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
