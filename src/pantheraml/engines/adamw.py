"""AdamW over flat parameters, with clipping, in one pass: moments in float32, or in 8 bits through bitsandbytes.

m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, both divided by 1 - beta^k in step k;
w = w - lr (decay w + m / (sqrt(v) + eps)), with g the gradient times min(1, clip_norm / (norm + 1e-6)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pantheraml.engines.engine import State
from pantheraml.engines.flat import FlatParameters
from pantheraml.recipe.types import OptimSpec

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(Protocol):
    """The update of one step, and its state: names that begin with the kind of tensor, and end with a parameter's."""

    def step(self, gradients: Tensor, norm: Tensor, halted: Tensor, lr: float) -> None:
        """Update the weights. Where `halted` is 1, nothing changes, neither weights nor state."""
        ...

    def state(self) -> State:
        """Views of the state; empty before the first step."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what `state` gives after the first step."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `state` gave; an empty one begins anew. Raises: ValueError if it is of no step."""
        ...


def open_adamw(flat: FlatParameters, optim: OptimSpec) -> AdamW:
    """The update that the recipe asks for."""
    return FusedAdamW(flat, optim)


class FusedAdamW:
    """Torch's fused AdamW. No step waits for the host: clipping and halting are two numbers that its kernel reads on the device."""

    def __init__(self, flat: FlatParameters, optim: OptimSpec) -> None:
        self._flat, self._clip_norm = flat, optim.clip_norm
        self._parts = [flat.weights[part] for part, _ in flat.parts]
        groups = [{"params": [part], "weight_decay": decay} for part, (_, decay) in zip(self._parts, flat.parts, strict=True)]
        self._optimizer: Any = torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        if optim.clip_norm:
            # The kernel divides the gradients by it, and stores them so; meant for the scale of a loss in float16.
            self._optimizer.grad_scale = torch.ones((), device=flat.weights.device)
        self._moments: dict[str, Tensor] = {}

    def step(self, gradients: Tensor, norm: Tensor, halted: Tensor, lr: float) -> None:
        """See `AdamW.step`."""
        if not self._moments:
            self._begin()
        for group, part, (where, _) in zip(self._optimizer.param_groups, self._parts, self._flat.parts, strict=True):
            group["lr"] = lr
            part.grad = gradients[where]
        if self._clip_norm:
            torch.clamp((norm + 1e-6) / self._clip_norm, min=1.0, out=self._optimizer.grad_scale)
        self._optimizer.found_inf = halted
        self._optimizer.step()

    def state(self) -> State:
        """See `AdamW.state`."""
        if not self._moments:
            return {}
        step = self._optimizer.state[self._parts[0]]["step"]
        state = {f"{moment}/{name}": view for moment, flat in self._moments.items() for name, view in self._flat.views(flat).items()}
        return {**state, **{f"step/{name}": step for name in self._flat}}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `AdamW.shapes`."""
        shapes = {name: tuple(view.shape) for name, view in self._flat.views(self._flat.weights).items()}
        moments = {f"{moment}/{name}": shape for moment in _MOMENTS for name, shape in shapes.items()}
        return {**moments, **{f"step/{name}": () for name in shapes}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `AdamW.load`."""
        self._moments.clear()
        self._optimizer.state.clear()
        if not state:
            return
        step = one_step(state)
        self._begin()
        for moment, flat in self._moments.items():
            for name, view in self._flat.views(flat).items():
                view.copy_(state[f"{moment}/{name}"])
        for part in self._parts:
            self._optimizer.state[part]["step"].fill_(step)

    def _begin(self) -> None:
        weights = self._flat.weights
        self._moments = {moment: torch.zeros_like(weights) for moment in _MOMENTS}
        for part, (where, _) in zip(self._parts, self._flat.parts, strict=True):
            self._optimizer.state[part] = {
                "step": torch.zeros((), device=weights.device),
                **{moment: flat[where] for moment, flat in self._moments.items()},
            }


def one_step(state: Mapping[str, Tensor]) -> float:
    """The number of steps that every parameter of a state has done. Raises: ValueError if there is not one."""
    steps = {float(tensor) for name, tensor in state.items() if name.startswith("step/")}
    if len(steps) != 1:
        raise ValueError(f"the saved state does not fit: its parameters have done {sorted(steps)[:4]} steps, and they are updated together")
    return steps.pop()
