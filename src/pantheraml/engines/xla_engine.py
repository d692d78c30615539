"""Training steps through XLA: the model and its loss as compiled JAX functions, on one device or spread over a mesh of them.

Two functions are compiled: one adds the gradients of all micro-batches of a shape (once for each shape that the plan declares),
one updates the weights. How many micro-batches a step has is an argument, not a shape.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pantheraml.data.pack import MicroBatch, StepBatch
from pantheraml.engines.engine import LossFn, State, StepMetrics, StepValues, check_fits
from pantheraml.engines.xla_model import Arrays, Slot, TracedModel, to_numpy, to_torch, used
from pantheraml.errors import PantheraError
from pantheraml.hardware.backend import Backend
from pantheraml.planning.plan import Plan
from pantheraml.planning.sharding import spec_of
from pantheraml.recipe.types import OptimSpec

_MOMENTS = ("exp_avg", "exp_avg_sq")


class XlaEngine:
    """An `Engine`. Weights that train are float32; products are computed in the plan's dtype.

    Dropout draws from a key made of the run's seed and the number of the step, so it needs no saved state.

    Args:
        mesh: the devices, with axes named dp, fsdp and tp (and dcn, between slices); None: the first one alone.
    """

    def __init__(self, backend: Backend, mesh: Mesh | None = None) -> None:
        self._backend = backend
        self._mesh = mesh if mesh is not None else Mesh(np.array(jax.devices()[:1]), ("fsdp",))
        self.compilations: Counter[str] = Counter()
        """What was compiled, by phase and shape, and how often."""

    def prepare(
        self, model: Any, loss: LossFn, optim: OptimSpec | None, plan: Plan, *, seed: int, relief: Callable[[], str | None] = lambda: None
    ) -> None:
        """See `Engine.prepare`."""
        self._model, self._plan, self._optim, self._seed = model, plan, optim, seed
        self._dtype = jnp.dtype(plan.dtype)
        rows = tuple(axis for axis in ("dcn", "dp", "fsdp") if axis in self._mesh.shape)
        self._rows = int(np.prod([self._mesh.shape[axis] for axis in rows]))
        self._batch_sharding = self._sharding(None, rows)
        activations = self._sharding(rows)
        several = self._mesh.size > 1
        self._traced = TracedModel(
            model, loss, plan.levels, pin=lambda x: jax.lax.with_sharding_constraint(x, activations) if several else x
        )
        self._slots = {slot.name: slot for slot in self._traced.slots}
        self._trained = {name: slot for name, slot in self._slots.items() if slot.trains}
        if optim is not None and not self._trained:
            raise ValueError("no parameter of the model trains")
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        arrays = {name: self._placed(slot, [tensors[member] for member in slot.members]) for name, slot in self._slots.items()}
        self._weights: Arrays = {name: arrays.pop(name) for name in self._trained}
        self._frozen: Arrays = arrays
        self._moments: dict[str, Arrays] = {moment: self._zeros() for moment in _MOMENTS}
        self._done = self._everywhere(np.zeros((), np.int32))
        self._halted = self._everywhere(np.zeros((), np.bool_))
        self._checked = False
        self._functions: dict[str, Any] = {}

    # ---- Placing ----------------------------------------------------------------------------------------------------

    def _sharding(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*axes))

    def _sharding_of(self, slot: Slot) -> NamedSharding:
        spec = spec_of(slot.members[0], slot.shape, self._mesh.shape)
        return self._sharding(*(((None,) if slot.stacked else ()) + spec))

    def _placed(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> jax.Array:
        """The array of a slot: each device gets its part of it, and no more is made on the host."""
        dtype = jnp.float32 if slot.trains else None

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if not slot.stacked:
                return np.asarray(to_numpy(tensors[0])[index], dtype)
            return np.stack([np.asarray(to_numpy(each)[index[1:]], dtype) for each in tensors[index[0]]])

        return jax.make_array_from_callback(slot.array_shape, self._sharding_of(slot), part)

    def _everywhere(self, value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(value.shape, self._sharding(), lambda index: value[index])

    def _zeros(self) -> Arrays:
        shardings = {name: self._sharding_of(slot) for name, slot in self._trained.items()}
        shapes = {name: slot.array_shape for name, slot in self._trained.items()}

        def zeros() -> Arrays:
            return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

        made: Arrays = jax.jit(zeros, out_shardings=shardings)()
        return made

    # ---- What is compiled -------------------------------------------------------------------------------------------

    def _loss(self, weights: Arrays, frozen: Arrays, batch: Any, key: Any, train: bool) -> Any:
        cast = {name: weight.astype(self._dtype) for name, weight in weights.items()}
        return self._traced.loss({**frozen, **cast}, *batch, key, train=train)

    def _sum_gradients(
        self, weights: Arrays, frozen: Arrays, gradients: Arrays, total: Any, batches: Any, count: Any, labels: Any, key: Any
    ) -> tuple[Arrays, Any]:
        """(gradients, total) and what the first `count` micro-batches add to them. batches: [A, B, T] each."""

        def add(i: Any, so_far: tuple[Arrays, Any]) -> tuple[Arrays, Any]:
            gradients, total = so_far
            batch = tuple(jax.lax.dynamic_index_in_dim(array, i, keepdims=False) for array in batches)
            loss, more = jax.value_and_grad(self._loss)(weights, frozen, batch, jax.random.fold_in(key, i), True)
            return jax.tree.map(lambda a, b: a + b / labels, gradients, more), total + loss

        return jax.lax.fori_loop(0, count, add, (gradients, total))

    def _sum_losses(self, weights: Arrays, frozen: Arrays, total: Any, batches: Any, count: Any) -> Any:
        """total and the losses of the first `count` micro-batches."""

        def add(i: Any, total: Any) -> Any:
            batch = tuple(jax.lax.dynamic_index_in_dim(array, i, keepdims=False) for array in batches)
            return total + self._loss(weights, frozen, batch, jax.random.key(0), False)

        return jax.lax.fori_loop(0, count, add, total)

    def _update(
        self, weights: Arrays, moments: dict[str, Arrays], done: Any, halted: Any, gradients: Arrays, total: Any, labels: Any, lr: Any
    ) -> tuple[Arrays, dict[str, Arrays], Any, Any, Any, Any]:
        """AdamW as in adamw.py; nothing changes where loss or gradient are not finite, or were not in a step before."""
        optim = self._optim
        assert optim is not None
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
        mean = total / labels
        halted = halted | ~(jnp.isfinite(norm) & jnp.isfinite(mean))
        done = jnp.where(halted, done, done + 1)
        factor = 1.0 / jnp.maximum(1.0, (norm + 1e-6) / optim.clip_norm) if optim.clip_norm else 1.0
        power = done.astype(jnp.float32)
        first_correction, second_correction = 1 - optim.beta1**power, 1 - optim.beta2**power

        def updated(name: str) -> tuple[Any, Any, Any]:
            weight, gradient = weights[name], gradients[name] * factor
            first = optim.beta1 * moments["exp_avg"][name] + (1 - optim.beta1) * gradient
            second = optim.beta2 * moments["exp_avg_sq"][name] + (1 - optim.beta2) * jnp.square(gradient)
            decay = optim.weight_decay if len(self._trained[name].shape) >= 2 else 0.0
            change = first / first_correction / (jnp.sqrt(second / second_correction) + optim.eps)
            before = (weight, moments["exp_avg"][name], moments["exp_avg_sq"][name])
            after = (weight - lr * (decay * weight + change), first, second)
            return jax.tree.map(lambda old, new: jnp.where(halted, old, new), before, after)

        new = {name: updated(name) for name in weights}
        parts = [{name: each[i] for name, each in new.items()} for i in range(3)]
        return parts[0], dict(zip(_MOMENTS, parts[1:], strict=True)), done, halted, mean, norm

    def _compiled(self, phase: str, shape: tuple[int, ...] = ()) -> Any:
        """The compiled function of a phase, for micro-batches of a shape."""
        name = phase + "".join(f" {'x'.join(map(str, shape))}" if shape else "")
        if name not in self._functions:
            trained = {each: self._sharding_of(slot) for each, slot in self._trained.items()}
            frozen = {each: self._sharding_of(slot) for each, slot in self._slots.items() if not slot.trains}
            one, batches = self._sharding(), (self._batch_sharding,) * 3
            moments = dict.fromkeys(_MOMENTS, trained)
            how: dict[str, Any] = {
                "gradients": {
                    "fun": self._sum_gradients,
                    "in_shardings": (trained, frozen, trained, one, batches, one, one, one),
                    "out_shardings": (trained, one),
                    "donate_argnums": (2, 3),
                },
                "losses": {
                    "fun": self._sum_losses,
                    "in_shardings": (trained, frozen, one, batches, one),
                    "out_shardings": one,
                },
                "update": {
                    "fun": self._update,
                    "in_shardings": (trained, moments, one, one, trained, one, one, one),
                    "out_shardings": (trained, moments, one, one, one, one),
                    "donate_argnums": (0, 1, 2, 3),
                },
            }[phase]
            fun = how.pop("fun")

            @functools.wraps(fun)
            def counted(*args: Any) -> Any:
                self.compilations[name] += 1  # JAX calls it when it traces, and never again
                return fun(*args)

            self._functions[name] = jax.jit(counted, **how)
        return self._functions[name]

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def step(self, batch: StepBatch, k: int, lr: float) -> StepMetrics:
        """See `Engine.step`."""
        gradients, total = self._gradients(batch, k)
        count = np.float32(max(1, batch.label_count))
        self._weights, self._moments, self._done, self._halted, mean, norm = self._compiled("update")(
            self._weights, self._moments, self._done, self._halted, gradients, total, count, np.float32(lr)
        )
        return StepMetrics(mean, norm)

    def rehearse(self, batch: StepBatch) -> None:
        """See `Engine.rehearse`."""
        jax.block_until_ready(self._gradients(batch, 0))

    def _gradients(self, batch: StepBatch, k: int) -> tuple[Arrays, Any]:
        gradients, total = self._zeros(), self._everywhere(np.zeros((), np.float32))
        key = jax.random.fold_in(jax.random.key(self._seed), k)
        labels = np.float32(max(1, batch.label_count))
        for shape, arrays, count in self._stacked(batch.micro):
            self._check_used(arrays, shape)
            gradients, total = self._compiled("gradients", shape)(
                self._weights, self._frozen, gradients, total, arrays, count, labels, jax.random.key_data(key) if False else key
            )
        return gradients, total

    def _check_used(self, arrays: Any, shape: tuple[int, ...]) -> None:
        """Raises: PantheraError if the loss does not depend on a parameter that trains; looked at once."""
        if self._checked:
            return
        batch = tuple(jax.ShapeDtypeStruct(shape, np.int32) for _ in arrays)
        needed = used(self._weights, lambda weights: self._loss(dict(weights), self._frozen, _zeros_like(batch), jax.random.key(0), True))
        missing = sorted(self._trained.keys() - needed)
        if missing:
            raise PantheraError(
                f"{len(missing)} of {len(self._trained)} trainable parameters got no gradient: {', '.join(missing[:3])}",
                why="they would stay as they are, and the run would not train what it says",
                fix="freeze them (requires_grad_(False)), or leave them out of adapter.targets",
            )
        self._checked = True

    def _stacked(self, micro: Sequence[MicroBatch]) -> list[tuple[tuple[int, ...], Any, np.ndarray]]:
        """(shape, arrays [A, B, T], how many of the A are there) for each shape among micro-batches."""
        shapes: dict[tuple[int, ...], list[MicroBatch]] = {}
        for each in micro:
            shapes.setdefault(each.input_ids.shape, []).append(each)
        found = []
        for shape, those in shapes.items():
            rows = -(-shape[0] // self._rows) * self._rows
            most = -(-max(len(those), self._plan.batch_size // max(1, shape[0])) // 1)
            made = []
            for name, filler in (("input_ids", 0), ("position_ids", 0), ("labels", -100)):
                array = np.full((most, rows, shape[1]), filler, np.int32)
                for i, each in enumerate(those):
                    array[i, : shape[0]] = getattr(each, name)
                if name == "position_ids":
                    array[len(those) :] = array[:, shape[0] :] = np.arange(shape[1])
                made.append(jax.make_array_from_callback(array.shape, self._batch_sharding, lambda index, array=array: array[index]))
            found.append(((rows, shape[1]), tuple(made), np.int32(len(those))))
        return found

    def read(self, metrics: Sequence[StepMetrics]) -> list[StepValues]:
        """See `Engine.read`."""
        pairs = jax.device_get([(each.loss, each.grad_norm) for each in metrics])
        return [StepValues(float(loss), float(norm), bool(np.isfinite(loss) and np.isfinite(norm))) for loss, norm in pairs]

    def evaluate(self, batches: Sequence[StepBatch]) -> float:
        """See `Engine.evaluate`."""
        total = self._everywhere(np.zeros((), np.float32))
        for batch in batches:
            for shape, arrays, count in self._stacked(batch.micro):
                total = self._compiled("losses", shape)(self._weights, self._frozen, total, arrays, count)
        return float(total) / max(1, sum(batch.label_count for batch in batches))

    # ---- State ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """See `Engine.state_dict`. The names are those of `TorchEngine.state_dict`, and either engine goes on from the other's."""
        state = {f"weight/{name}": tensor for name, tensor in self._members(self._weights)}
        done = int(self._done)
        if done:
            for moment, arrays in self._moments.items():
                state |= {f"{moment}/{name}": tensor for name, tensor in self._members(arrays)}
            state |= {f"step/{member}": torch.tensor(float(done)) for slot in self._trained.values() for member in slot.members}
        return state

    def _members(self, arrays: Arrays) -> list[tuple[str, torch.Tensor]]:
        """Tensors of the model by their names, from arrays like the trained ones."""
        found = []
        for name, slot in self._trained.items():
            whole = to_torch(arrays[name])
            found += [(member, whole[i].clone() if slot.stacked else whole) for i, member in enumerate(slot.members)]
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        from pantheraml.engines.adamw import one_step

        moments = {name: tensor for name, tensor in state.items() if not name.startswith("weight/")}
        shapes = {member: slot.shape for slot in self._trained.values() for member in slot.members}
        wanted = {f"weight/{name}": shape for name, shape in shapes.items()}
        if moments:
            wanted |= {f"{moment}/{name}": shape for moment in _MOMENTS for name, shape in shapes.items()}
            wanted |= {f"step/{name}": () for name in shapes}
        check_fits(state, wanted)
        done = one_step(moments) if moments else 0
        self._moments = {
            moment: self._from_members(moments, moment) if moments else self._zeros() for moment in _MOMENTS
        }
        self._done = self._everywhere(np.asarray(done, np.int32))
        self._weights = self._from_members(state, "weight")

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_weights`."""
        shapes = {f"weight/{member}": slot.shape for slot in self._trained.values() for member in slot.members}
        check_fits({name: tensor for name, tensor in state.items() if name.startswith("weight/")}, shapes)
        self._weights = self._from_members(state, "weight")

    def _from_members(self, state: Mapping[str, Any], kind: str) -> Arrays:
        return {
            name: self._placed(slot, [state[f"{kind}/{member}"] for member in slot.members]) for name, slot in self._trained.items()
        }


def _zeros_like(batch: Any) -> Any:
    return tuple(jnp.zeros(each.shape, each.dtype) for each in batch)
