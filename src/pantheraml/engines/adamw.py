"""AdamW over flat parameters, with clipping, in one pass: moments in float32, or in 8 bits through bitsandbytes.

m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, both divided by 1 - beta^k in step k;
w = w - lr (decay w + m / (sqrt(v) + eps)), with g the gradient times min(1, clip_norm / (norm + 1e-6)).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from pantheraml.engines.engine import State
from pantheraml.engines.flat import ALIGNED, FlatParameters
from pantheraml.errors import DeviceError, MissingExtra
from pantheraml.recipe.types import OptimSpec

_MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 1 << 24
"""Values that bitsandbytes updates at once: its kernels count in 32 bits, and on a CPU they hold them in float32 meanwhile."""
_TRIED = 1 << 17  # values; bitsandbytes pages nothing smaller than 1e5


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
    """The update that the recipe asks for. Raises: MissingExtra, DeviceError if it cannot be had here."""
    return FusedAdamW(flat, optim) if optim.states == "float32" else BlockwiseAdamW(flat, optim)


def check_installed(optim: OptimSpec) -> None:
    """Raises: MissingExtra if what the recipe asks for needs a package that is not here. Imports nothing."""
    if optim.states != "float32" and find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", needed_for=f"optim.states={optim.states}", install="bitsandbytes")


class FusedAdamW:
    """Torch's fused AdamW. No step waits for the host: clipping and halting are two numbers that its kernel reads on the device."""

    def __init__(self, flat: FlatParameters, optim: OptimSpec) -> None:
        self._flat, self._clip_norm = flat, optim.clip_norm
        self._parts = [flat.weights[part] for part, _, _ in flat.parts]
        groups = [{"params": [part], "weight_decay": decay} for part, (_, decay, _) in zip(self._parts, flat.parts, strict=True)]
        self._optimizer: Any = torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        if optim.clip_norm:
            # The kernel divides the gradients by it, and stores them so; meant for the scale of a loss in float16.
            self._optimizer.grad_scale = torch.ones((), device=flat.weights.device)
        self._moments: dict[str, Tensor] = {}

    def step(self, gradients: Tensor, norm: Tensor, halted: Tensor, lr: float) -> None:
        """See `AdamW.step`."""
        if not self._moments:
            self._begin()
        for group, part, (where, _, _) in zip(self._optimizer.param_groups, self._parts, self._flat.parts, strict=True):
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
        for part, (where, _, _) in zip(self._parts, self._flat.parts, strict=True):
            self._optimizer.state[part] = {
                "step": torch.zeros((), device=weights.device),
                **{moment: flat[where] for moment, flat in self._moments.items()},
            }


class BlockwiseAdamW:
    """AdamW of bitsandbytes: moments in 8 bits, with a float32 scale for each block of 256 that belong to one parameter.

    bitsandbytes waits for the device after each update, so the host looks whether to halt. Paged moments are in memory that the
    driver moves between device and host.
    """

    def __init__(self, flat: FlatParameters, optim: OptimSpec) -> None:
        check_installed(optim)
        self._flat, self._clip_norm = flat, optim.clip_norm
        kind = _adamw_8bit(optim.states, flat.weights.device)
        groups = [
            {
                "params": [flat.weights[start : min(start + CHUNK, part.stop)] for start in range(part.start, part.stop, CHUNK)],
                "weight_decay": decay,
            }
            for part, decay, _ in flat.parts
        ]
        self._optimizer: Any = kind(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, min_8bit_size=0)

    def step(self, gradients: Tensor, norm: Tensor, halted: Tensor, lr: float) -> None:
        """See `AdamW.step`."""
        if bool(halted):
            return
        if self._clip_norm:
            gradients.div_(((norm + 1e-6) / self._clip_norm).clamp(min=1.0))
        at = 0
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            for chunk in group["params"]:
                chunk.grad = gradients[at : at + chunk.numel()]
                at += chunk.numel()
        self._optimizer.step()

    def state(self) -> State:
        """See `AdamW.state`. A parameter's moments are its blocks with their gaps, so that a run goes on bit by bit."""
        states = [self._optimizer.state[chunk] for chunk in self._chunks()]
        if not states[0]:
            return {}
        state: State = {f"step/{name}": torch.tensor(float(states[0]["step"])) for name in self._flat}
        for number, moment in enumerate(_MOMENTS, start=1):
            codes, scales = (torch.cat([each[f"{what}{number}"].cpu() for each in states]) for what in ("state", "absmax"))
            state |= {f"{moment}/{name}": blocks for name, blocks in self._flat.blocks(codes).items()}
            state |= {f"{moment}_scale/{name}": blocks for name, blocks in self._flat.blocks(scales, 1).items()}
        return state

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `AdamW.shapes`."""
        blocks = {name: block.numel() for name, block in self._flat.blocks(self._flat.weights).items()}
        shapes: dict[str, tuple[int, ...]] = {f"step/{name}": () for name in blocks}
        for moment in _MOMENTS:
            shapes |= {f"{moment}/{name}": (size,) for name, size in blocks.items()}
            shapes |= {f"{moment}_scale/{name}": (size // ALIGNED,) for name, size in blocks.items()}
        return shapes

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `AdamW.load`."""
        self._optimizer.state.clear()
        if not state:
            return
        step = int(one_step(state))
        codes = {moment: torch.zeros(self._flat.weights.numel(), dtype=torch.uint8) for moment in _MOMENTS}
        scales = {moment: torch.zeros(self._flat.weights.numel() // ALIGNED) for moment in _MOMENTS}
        for moment in _MOMENTS:
            for vector, each, kind in ((codes[moment], ALIGNED, moment), (scales[moment], 1, f"{moment}_scale")):
                for name, blocks in self._flat.blocks(vector, each).items():
                    blocks.copy_(state[f"{kind}/{name}"])
        at = 0
        for g, group in enumerate(self._optimizer.param_groups):
            for p, chunk in enumerate(group["params"]):
                self._optimizer.init_state(group, chunk, g, p)
                own, end = self._optimizer.state[chunk], at + chunk.numel()
                own["step"] = step
                for number, moment in enumerate(_MOMENTS, start=1):
                    own[f"state{number}"].copy_(codes[moment][at:end])
                    own[f"absmax{number}"].copy_(scales[moment][at // ALIGNED : end // ALIGNED])
                at = end

    def _chunks(self) -> list[Tensor]:
        return [chunk for group in self._optimizer.param_groups for chunk in group["params"]]


def _adamw_8bit(states: str, device: torch.device) -> Any:
    """The class of bitsandbytes, after it has done one update on this device. Raises: DeviceError if it cannot."""
    import bitsandbytes

    optimizers: Any = bitsandbytes.optim
    kind = optimizers.PagedAdamW8bit if states == "paged" else optimizers.AdamW8bit
    tried = torch.zeros(_TRIED, device=device)
    tried.grad = torch.ones_like(tried)
    optimizer = kind([tried], min_8bit_size=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a CPU pages nothing; it is asked below
            optimizer.step()
    except (NotImplementedError, RuntimeError, AttributeError) as error:  # no kernel for the device, or a library without it
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refused(states, device, f"bitsandbytes {bitsandbytes.__version__} cannot update weights there: {said}", "float32") from error
    if states == "paged" and not getattr(optimizer.state[tried]["state1"], "is_paged", False):
        raise _refused(states, device, "bitsandbytes would keep all of them where they are: there is nothing to page to", "8bit")
    return kind


def _refused(states: str, device: torch.device, why: str, instead: str) -> DeviceError:
    return DeviceError(f"optim.states={states} is not possible on {device}", why=why, fix=f"set optim.states to {instead}")


def one_step(state: Mapping[str, Tensor]) -> float:
    """The number of steps that every parameter of a state has done. Raises: ValueError if there is not one."""
    steps = {float(tensor) for name, tensor in state.items() if name.startswith("step/")}
    if len(steps) != 1:
        raise ValueError(f"the saved state does not fit: its parameters have done {sorted(steps)[:4]} steps, and they are updated together")
    return steps.pop()
