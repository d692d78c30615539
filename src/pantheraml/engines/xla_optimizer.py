"""Any function of torch, compiled by XLA: for what is not a training step, such as a reward, a metric or an embedding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn

from pantheraml.engines.xla_arrays import to_numpy, to_torch
from pantheraml.engines.xla_bridge import Bridge
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.settings import read_settings
from pantheraml.hardware.xla_mesh import open_mesh

_WHOLE = range(-(1 << 31), 1 << 31)
"""Whole numbers that XLA computes with here."""


class XLAOptimizer:
    """Compiles functions and modules of torch: once for each function, each shape of its tensors, and each choice of options.

    optimizer = XLAOptimizer()
    fast = optimizer.compile(module)      # or a function of tensors
    fast(x)                               # compiles
    fast(x)                               # does not

    Args:
        simulate: let XLA's CPU device stand in for a TPU. None: as PANTHERAML_SIMULATE_TPU says.
    Raises: DeviceError if there is no TPU, and it is not to be simulated.
    """

    def __init__(self, *, simulate: bool | None = None) -> None:
        settings = read_settings()
        self.simulated = bool(settings.simulate_tpu) if simulate is None else simulate
        """Whether the CPU computes what is compiled."""
        mesh = open_mesh({"fsdp": 1}, simulate=self.simulated, cache=settings.cache)
        self._device = mesh.local_devices[0]
        self._bridge = Bridge()
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.compilations: Counter[str] = Counter()
        """How often each function was compiled, by its name and the shapes of its tensors: "f 4x8 3"."""

    def compile(self, function: Callable[..., Any], *, dtype: torch.dtype | None = None, seed: int = 0) -> Callable[..., Any]:
        """A function of the same arguments that gives the same numbers, as tensors on the host; it is compiled when it is called first.

        Without gradients, and without side effects: what it changes in its arguments or in its module (the running means of a
        batch norm) is as it was. Whole numbers are computed in 32 bits, and come back in 64.

        Args:
            function: of tensors, and of other arguments, for each value of which it is compiled anew; or a module, whose weights and
                mode (training or not) are those at the time of each call.
            dtype: floats are computed in it; None: as they come.
            seed: of the random numbers that it draws, which are the same at each call.
        Raises: RecipeError for what cannot be called; DeviceError, when it is called, for what XLA cannot trace, as a result whose
            shape depends on values, and for float64 and larger whole numbers.
        """
        if not callable(function) or not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
            raise RecipeError(
                f"compile({function!r}, dtype={dtype}) is not possible",
                why="it takes a function or a module, and a dtype of floats of torch",
                fix="call it like compile(module, dtype=torch.bfloat16)",
            )
        key = (function, dtype, seed)
        if key not in self._compiled:
            self._compiled[key] = self._made(function, dtype, seed)
        return self._compiled[key]

    def _made(self, function: Callable[..., Any], dtype: torch.dtype | None, seed: int) -> Callable[..., Any]:
        name = getattr(function, "__name__", type(function).__name__)
        module = function if isinstance(function, nn.Module) else None
        bridge = self._bridge

        def refused(said: str) -> DeviceError:
            return DeviceError(
                f"{name} cannot be compiled by XLA",
                why=said,
                fix="see that it runs in torch; then make new tensors on the device of an argument (device=x.device), hand over those from "
                "outside as arguments, and take out what depends on values of tensors",
            )

        def traced(weights: dict[str, Any], arrays: list[Any], how: _How) -> Any:
            self.compilations[" ".join([name, *("x".join(map(str, array.shape)) for array in arrays)])] += 1
            with bridge.computing(jax.random.key(seed), refused):
                args, kwargs = how.arguments(bridge.tensor(arrays))
                if module is not None:
                    return bridge.array(torch.func.functional_call(module, bridge.tensor(weights), args, kwargs))
                return bridge.array(function(*args, **kwargs))

        compiled = jax.jit(traced, static_argnums=2)

        def run(*args: Any, **kwargs: Any) -> Any:
            state = dict(module.named_parameters()) | dict(module.named_buffers()) if module is not None else {}
            leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda each: isinstance(each, Tensor))
            rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            modes = tuple(part.training for part in module.modules()) if module is not None else ()
            weights = {each: self._placed(tensor, dtype) for each, tensor in state.items()}
            arrays = [self._placed(leaf, dtype) for leaf in leaves if isinstance(leaf, Tensor)]
            return jax.tree.map(_returned, compiled(weights, arrays, _How(tree, rest, modes)))

        return run

    def _placed(self, tensor: Tensor, dtype: torch.dtype | None) -> Any:
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        whole = tensor.dtype == torch.int64 and tensor.numel() > 0
        if tensor.dtype == torch.float64 or (whole and not (int(tensor.min()) in _WHOLE and int(tensor.max()) in _WHOLE)):
            raise DeviceError(
                f"a tensor of {str(tensor.dtype).removeprefix('torch.')} cannot be computed with by XLA",
                why="floats have 32 bits there at most, and so have whole numbers",
                fix="pass dtype=torch.float32, or smaller numbers",
            )
        return jax.device_put(to_numpy(tensor), self._device)


class _How:
    """What of a call is no tensor; a call with another one is compiled anew."""

    def __init__(self, tree: Any, rest: tuple[Any, ...], modes: tuple[bool, ...]) -> None:
        self._tree, self._rest, self._key = tree, rest, (tree, tuple((type(each), each) for each in rest), modes)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _How) and self._key == other._key

    def arguments(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of the call, with these tensors in their places."""
        left = iter(tensors)
        args, kwargs = jax.tree.unflatten(self._tree, [next(left) if each is None else each for each in self._rest])
        return args, kwargs


def _returned(array: Any) -> Tensor:
    tensor = to_torch(np.asarray(array))
    return tensor.long() if tensor.dtype == torch.int32 else tensor
