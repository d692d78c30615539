"""Training steps through XLA: the model and its loss as compiled JAX functions, on one device or spread over a mesh of them.

Two functions are compiled: one adds the gradients of all micro-batches of a shape (once for each shape that the plan declares),
one updates the weights. How many micro-batches a step has is an argument, not a shape.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pantheraml.data.pack import IGNORED, MicroBatch, StepBatch
from pantheraml.engines.adamw import one_step
from pantheraml.engines.engine import LossFn, State, StepMetrics, StepValues, check_fits
from pantheraml.engines.xla_model import Arrays, Slot, TracedModel, to_numpy, to_torch, used
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.recovery import Recovery
from pantheraml.models.generate import BATCH_ROWS, stop_tokens
from pantheraml.models.head import causal_model
from pantheraml.models.load import carries_state
from pantheraml.planning.levels import format_levels, lower, rungs
from pantheraml.planning.plan import Plan
from pantheraml.planning.sharding import spec_of
from pantheraml.recipe.types import OptimSpec

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What XLA tells of a function that it compiled, for each device.

    Attributes:
        phase: "gradients" or "update".
        arguments_bytes, results_bytes: what goes in; and what comes out and is not in the place of an argument.
        temporary_bytes: what is needed in between.
        waiting_bytes: what is on the device meanwhile and takes no part.
        collectives: how often its text has an exchange between devices, by kind; those in a loop count once.
    """

    phase: str
    arguments_bytes: int
    results_bytes: int
    temporary_bytes: int
    waiting_bytes: int
    collectives: dict[str, int]
    compile_s: float

    @property
    def peak_bytes(self) -> int:
        """All that is on a device at once."""
        return self.arguments_bytes + self.results_bytes + self.temporary_bytes + self.waiting_bytes


class XlaEngine:
    """An `Engine`. Weights that train are float32; products are computed in the plan's dtype.

    Dropout draws from a key made of the run's seed and the number of the step, so it needs no saved state.

    Args:
        mesh: the devices, with axes named as in planning/sharding.py.
        recovery: what to do when memory runs out; None: stop.
    """

    def __init__(self, mesh: Mesh, recovery: Recovery | None = None) -> None:
        self._mesh, self._recovery = mesh, recovery or Recovery()
        self.compilations: Counter[str] = Counter()
        """What was compiled, by phase and shape, and how often."""

    def prepare(
        self, model: Any, loss: LossFn, optim: OptimSpec | None, plan: Plan, *, seed: int, relief: Callable[[], str | None] = lambda: None
    ) -> None:
        """See `Engine.prepare`."""
        if optim is not None and optim.states != "float32":
            raise DeviceError(
                f"optim.states={optim.states} is not possible on {plan.device}",
                why="bitsandbytes does not compute there",
                fix="set optim.states to float32",
            )
        self._model, self._plan, self._optim, self._seed = model, plan, optim, seed
        self._dtype = jnp.dtype(plan.dtype)
        rows = tuple(axis for axis in ("dcn", "dp", "fsdp") if axis in self._mesh.shape)
        self._rows = int(np.prod([self._mesh.shape[axis] for axis in rows]))
        self._batch_sharding = self._sharding(None, rows)
        self._rows_sharding = self._sharding(rows)
        heads = self._sharding(rows, "tp" if "tp" in self._mesh.shape else None)
        flash = self._mesh if self._mesh.devices.flat[0].platform == "tpu" else None
        self.traced = TracedModel(
            model, loss, plan.levels, pin=self._pinned(self._rows_sharding), pin_heads=self._pinned(heads), flash_mesh=flash
        )
        self._slots = {slot.name: slot for slot in self.traced.slots}
        self._trained = {name: slot for name, slot in self._slots.items() if slot.trains}
        if optim is not None and not self._trained:
            raise ValueError("no parameter of the model trains")
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._ahead = any(tensor.is_meta for tensor in tensors.values())
        self._eighths = frozenset(_in_eight_bits(model, self._slots) if plan.quantizer == "int8" else ())
        arrays = {name: self._stored(slot, [tensors[member] for member in slot.members]) for name, slot in self._slots.items()}
        self._weights: Arrays = {name: arrays.pop(name) for name in self._trained}
        self._frozen: Arrays = arrays
        self._functions: dict[str, Any] = {}
        self._called: dict[str, Any] = {}
        self._moments: dict[str, Arrays] = {moment: self._zeros() for moment in _MOMENTS}
        self._done = self._everywhere(np.zeros((), np.int32))
        self._halted = self._everywhere(np.zeros((), np.bool_))
        self._caches = not carries_state(model)
        self._checked = False

    @property
    def arrays(self) -> tuple[Arrays, ...]:
        """All that stays on the devices between steps: frozen weights, trained ones, both moments."""
        return self._frozen, self._weights, *self._moments.values()

    # ---- Placing ----------------------------------------------------------------------------------------------------

    def _sharding(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(*axes))

    def _pinned(self, sharding: NamedSharding) -> Callable[[Any], Any]:
        return lambda x: jax.lax.with_sharding_constraint(x, sharding) if self._mesh.size > 1 else x

    def _sharding_of(self, slot: Slot) -> NamedSharding:
        spec = spec_of(slot.members[0], slot.shape, self._mesh.shape)
        return self._sharding(*(((None,) if slot.stacked else ()) + spec))

    def _shardings_of(self, name: str) -> Any:
        """Of what is stored for a slot."""
        slot = self._slots[name]
        sharding = self._sharding_of(slot)
        if name not in self._eighths:
            return sharding
        return sharding, self._sharding(*sharding.spec[:-1], None)

    def _stored(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> Any:
        """What stays on the devices for a slot: its array, or whole numbers in eight bits and the scale of each output."""
        if slot.name not in self._eighths:
            return self._placed(slot, tensors)
        placed, shardings = self._placed(slot, tensors), self._shardings_of(slot.name)
        if self._ahead:
            scale = jax.ShapeDtypeStruct((*placed.shape[:-1], 1), placed.dtype, sharding=shardings[1])
            return jax.ShapeDtypeStruct(placed.shape, jnp.int8, sharding=shardings[0]), scale
        return jax.jit(_to_eight_bits, out_shardings=shardings, donate_argnums=0)(placed)

    def _placed(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> Any:
        """The array of a slot: each device gets its part of it, and no more is made on the host. Without values: its shape."""
        dtype = jnp.dtype("float32" if slot.trains else str(slot.dtype).removeprefix("torch."))
        if self._ahead:
            return jax.ShapeDtypeStruct(slot.array_shape, dtype, sharding=self._sharding_of(slot))

        def part(index: Any) -> np.ndarray:
            if not slot.stacked:
                return np.asarray(to_numpy(tensors[0])[index], dtype)
            return np.stack([np.asarray(to_numpy(each)[index[1:]], dtype) for each in tensors[index[0]]])

        return jax.make_array_from_callback(slot.array_shape, self._sharding_of(slot), part)

    def _everywhere(self, value: np.ndarray) -> Any:
        return self._from_host(value, self._sharding())

    def _from_host(self, value: np.ndarray, sharding: NamedSharding) -> Any:
        if self._ahead:
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    def _zeros(self) -> Arrays:
        """Like the weights that train."""
        if self._ahead:
            return {name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding) for name, each in self._weights.items()}
        zeros: Arrays = self._run("zeros", ())
        return zeros

    def _make_zeros(self) -> Arrays:
        return {name: jnp.zeros(slot.array_shape, jnp.float32) for name, slot in self._trained.items()}

    # ---- What is compiled -------------------------------------------------------------------------------------------

    def _loss(self, weights: Arrays, frozen: Arrays, batch: Any, key: Any, train: bool) -> Any:
        cast = {name: weight.astype(self._dtype) for name, weight in weights.items()}
        ids, positions, labels = batch
        return self.traced.loss({**frozen, **cast}, ids, positions, labels, key, train=train)

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

    def _run(self, phase: str, shape: tuple[int, ...], *args: Any) -> Any:
        """What the compiled function of a phase, for micro-batches of a shape, gives for these arguments."""
        name, function = self._function(phase, shape)
        if name not in self._called:
            self._called[name] = jax.tree.map(lambda arg: jax.ShapeDtypeStruct(np.shape(arg), jnp.result_type(arg)), args)
        return function(*args)

    def _function(self, phase: str, shape: tuple[int, ...]) -> tuple[str, Any]:
        """Its name, and the function that is compiled when it is called first."""
        name = phase + "".join(f" {'x'.join(map(str, shape))}" if shape else "")
        if name not in self._functions:
            trained = {each: self._sharding_of(slot) for each, slot in self._trained.items()}
            frozen = {each: self._shardings_of(each) for each, slot in self._slots.items() if not slot.trains}
            one, batches = self._sharding(), (self._batch_sharding,) * 3
            moments = dict.fromkeys(_MOMENTS, trained)
            how: dict[str, Any] = {
                "zeros": {"fun": self._make_zeros, "out_shardings": trained},
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
                "answers": {
                    "fun": functools.partial(self._continue, shape[2] if phase == "answers" else 0),
                    "in_shardings": (trained, frozen, self._rows_sharding, self._rows_sharding, one, one),
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

            def counted(*args: Any) -> Any:
                self.compilations[name] += 1  # JAX calls it when it traces, and never again
                return fun(*args)

            counted.__name__ = name.replace(" ", "_")
            self._functions[name] = jax.jit(counted, **how)
        return name, self._functions[name]

    def compile_ahead(self, rows: int, tokens: int) -> tuple[Compiled, ...]:
        """What XLA makes of the two parts of a step for this mesh, whose devices need not be here; nothing is computed.

        Args:
            rows, tokens: of a micro-batch.
        Raises: JAX's RuntimeError if it does not fit.
        """
        batches = tuple(self._from_host(np.empty((1, rows, tokens), np.int32), self._batch_sharding) for _ in range(3))
        number, count = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), np.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        zeros, total = self._zeros(), self._everywhere(np.zeros((), np.float32))
        phases = {
            "gradients": ((rows, tokens), (self._weights, self._frozen, zeros, total, batches, count, number, key), self._moments),
            "update": ((), (self._weights, self._moments, self._done, self._halted, zeros, total, number, number), self._frozen),
        }
        return tuple(self._compile_ahead(phase, *about) for phase, about in phases.items())

    def _compile_ahead(self, phase: str, shape: tuple[int, ...], args: tuple[Any, ...], beside: Any) -> Compiled:
        """beside: arrays that wait on the devices meanwhile."""
        start = time.perf_counter()
        compiled: Any = self._function(phase, shape)[1].lower(*args).compile()
        memory = compiled.memory_analysis()
        waiting = sum(math.prod(each.sharding.shard_shape(each.shape)) * each.dtype.itemsize for each in jax.tree.leaves(beside))
        return Compiled(
            phase=phase,
            arguments_bytes=memory.argument_size_in_bytes,
            results_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            waiting_bytes=waiting,
            collectives=collectives(compiled.as_text()),
            compile_s=time.perf_counter() - start,
        )

    def hlo(self, phase: str) -> str:
        """What XLA made of the first function of a phase that was called; it is compiled once more."""
        name = next(name for name in self._functions if name.startswith(phase))
        text: str = self._functions[name].lower(*self._called[name]).compile().as_text()
        return text

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def step(self, batch: StepBatch, k: int, lr: float) -> StepMetrics:
        """See `Engine.step`."""
        gradients, total = self._gradients(f"step {k + 1}", batch, k)
        count = np.float32(max(1, batch.label_count))
        self._weights, self._moments, self._done, self._halted, mean, norm = self._run(
            "update", (), self._weights, self._moments, self._done, self._halted, gradients, total, count, np.float32(lr)
        )
        return StepMetrics(mean, norm)

    def rehearse(self, batch: StepBatch) -> None:
        """See `Engine.rehearse`."""
        jax.block_until_ready(self._gradients("a rehearsal at the largest shape", batch, 0))

    def lower(self) -> str | None:
        """See `Engine.lower`. What was compiled is compiled anew."""
        found = lower(self.traced.levels, rungs(self._plan.device, "auto", fused=False))
        if found is None:
            return None
        self.traced.levels = found
        self._functions.clear()
        return f"with layers at {format_levels(found)}"

    def _gradients(self, doing: str, batch: StepBatch, k: int) -> tuple[Arrays, Any]:
        """The gradients of the mean loss of step k, and the sum of its losses."""
        key = jax.random.fold_in(jax.random.key(self._seed), k)
        labels = np.float32(max(1, batch.label_count))
        gradients, total = {}, None
        for attempt in self._recovery.attempts(doing, (1,), relief=self.lower):
            with attempt:
                gradients, total = self._zeros(), self._everywhere(np.zeros((), np.float32))
                for shape, arrays, count in self._stacked(batch.micro):
                    self._check_used(shape)
                    given = (self._weights, self._frozen, gradients, total, arrays, count, labels, key)
                    gradients, total = self._run("gradients", shape, *given)
        return gradients, total

    def _check_used(self, shape: tuple[int, ...]) -> None:
        """Raises: PantheraError if the loss does not depend on a parameter that trains; looked at once."""
        if self._checked:
            return
        batch = (jnp.zeros(shape, jnp.int32),) * 3
        needed = used(self._weights, lambda weights: self._loss(dict(weights), self._frozen, batch, jax.random.key(0), True))
        missing = sorted(self._trained.keys() - needed)
        if missing:
            raise PantheraError(
                f"{len(missing)} of {len(self._trained)} trainable parameters got no gradient: {', '.join(missing[:3])}",
                why="they would stay as they are, and the run would not train what it says",
                fix="freeze them (requires_grad_(False)), or leave them out of adapter.targets",
            )
        self._checked = True

    def _stacked(self, micro: Sequence[MicroBatch]) -> list[tuple[tuple[int, ...], Any, np.ndarray]]:
        """(shape, arrays [A, B, T], how many of the A are there) for each shape among micro-batches; A is the most that a step can have."""
        shapes: dict[tuple[int, ...], list[MicroBatch]] = {}
        for each in micro:
            shapes.setdefault(each.input_ids.shape, []).append(each)
        found = []
        for (height, tokens), those in shapes.items():
            rows = -(-height // self._rows) * self._rows
            most = max(len(those), -(-self._plan.batch_size // height))
            empty = {"input_ids": 0, "position_ids": np.arange(tokens), "labels": IGNORED}
            arrays = {name: np.full((most, rows, tokens), filler, np.int32) for name, filler in empty.items()}
            for name, array in arrays.items():
                for i, each in enumerate(those):
                    array[i, :height] = getattr(each, name)
            placed = tuple(self._from_host(array, self._batch_sharding) for array in arrays.values())
            found.append(((rows, tokens), placed, np.int32(len(those))))
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
                total = self._run("losses", shape, self._weights, self._frozen, total, arrays, count)
        return float(total) / max(1, sum(batch.label_count for batch in batches))

    # ---- Answers ----------------------------------------------------------------------------------------------------

    def generate(self, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """See `Engine.generate`. Prompts of like length are answered together, in a few shapes; each is compiled once."""
        stops = np.asarray(stop_tokens(self._model, tokenizer), np.int32)
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH_ROWS):
            those = order[start : start + BATCH_ROWS]
            rows = -(-_power_of_two(len(those)) // self._rows) * self._rows
            ids = np.zeros((rows, _power_of_two(max(len(prompts[i]) for i in those))), np.int32)
            lengths = np.ones(rows, np.int32)
            for row, i in enumerate(those):
                ids[row, : len(prompts[i])], lengths[row] = prompts[i], len(prompts[i])
            given = (self._weights, self._frozen, ids, lengths, stops, np.int32(len(those)))
            found = np.asarray(self._run("answers", (*ids.shape, max_new_tokens, len(stops)), *given))
            for i, tokens in zip(those, found, strict=False):
                end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
                answers[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return answers

    def _continue(self, new: int, weights: Arrays, frozen: Arrays, ids_BP: Any, lengths_B: Any, stops: Any, real: Any) -> Any:
        """The likeliest tokens [B, new] behind each prompt; what follows a stop token means nothing. Ends when all `real` rows have stopped."""
        arrays = {**frozen, **{name: weight.astype(self._dtype) for name, weight in weights.items()}}
        rows, width = ids_BP.shape
        ids_BS = jnp.pad(ids_BP, ((0, 0), (0, new)))
        positions_BS = jnp.broadcast_to(jnp.arange(width + new), ids_BS.shape)

        def first() -> tuple[Any, Any]:
            if not self._caches:
                return self.traced.logits(arrays, ids_BS, positions_BS, lengths_B - 1, None)[0], ids_BS
            logits, caches = self.traced.logits(arrays, ids_BP, positions_BS[:, :width], lengths_B - 1, None)
            return logits, jax.tree.map(lambda cache: jnp.pad(cache, ((0, 0),) * (cache.ndim - 2) + ((0, new), (0, 0))), caches)

        def then(token_B: Any, i: Any, kept: Any) -> tuple[Any, Any]:
            at_B = lengths_B + i
            if not self._caches:
                kept = kept.at[jnp.arange(rows), at_B].set(token_B)
                return self.traced.logits(arrays, kept, positions_BS, at_B, None)[0], kept
            return self.traced.logits(arrays, token_B[:, None], at_B[:, None], jnp.zeros_like(at_B), kept)

        def more(state: tuple[Any, ...]) -> Any:
            i, _, _, done_B, _ = state
            return (i < new) & ~done_B.all()

        def add(state: tuple[Any, ...]) -> tuple[Any, ...]:
            i, written_BN, logits, done_B, kept = state
            token_B = jnp.argmax(logits, -1).astype(jnp.int32)
            written_BN = written_BN.at[:, i].set(token_B)
            done_B |= (token_B[:, None] == stops).any(-1)
            logits, kept = then(token_B, i, kept)
            return i + 1, written_BN, logits, done_B, kept

        logits, kept = first()
        start = (jnp.zeros((), jnp.int32), jnp.zeros((rows, new), jnp.int32), logits, jnp.arange(rows) >= real, kept)
        return jax.lax.while_loop(more, add, start)[1]

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
        moments = {name: tensor for name, tensor in state.items() if not name.startswith("weight/")}
        shapes = {member: slot.shape for slot in self._trained.values() for member in slot.members}
        wanted = {f"weight/{name}": shape for name, shape in shapes.items()}
        if moments:
            wanted |= {f"{moment}/{name}": shape for moment in _MOMENTS for name, shape in shapes.items()}
            wanted |= {f"step/{name}": () for name in shapes}
        check_fits(state, wanted)
        done = one_step(moments) if moments else 0
        self._moments = {moment: self._from_members(moments, moment) if moments else self._zeros() for moment in _MOMENTS}
        self._done = self._everywhere(np.asarray(done, np.int32))
        self._weights = self._from_members(state, "weight")

    def hand_back(self) -> None:
        """See `Engine.hand_back`."""
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in self._members(self._weights):
                parameters[name].data = tensor.to(parameters[name].dtype)

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_weights`."""
        shapes = {f"weight/{member}": slot.shape for slot in self._trained.values() for member in slot.members}
        check_fits({name: tensor for name, tensor in state.items() if name.startswith("weight/")}, shapes)
        self._weights = self._from_members(state, "weight")

    def _from_members(self, state: Mapping[str, Any], kind: str) -> Arrays:
        return {name: self._placed(slot, [state[f"{kind}/{member}"] for member in slot.members]) for name, slot in self._trained.items()}


def _power_of_two(number: int) -> int:
    """The smallest one that is not smaller."""
    return 1 << (number - 1).bit_length()


def _to_eight_bits(weight: Any) -> tuple[Any, Any]:
    """Whole numbers from -127 to 127 and the scale of each output, so that their product is about the weight [.., O, I]."""
    scale = jnp.maximum(jnp.abs(weight).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny).astype(jnp.float32) / 127
    return jnp.round(weight.astype(jnp.float32) / scale).astype(jnp.int8), scale.astype(weight.dtype)


def _in_eight_bits(model: Any, slots: Mapping[str, Slot]) -> Iterator[str]:
    """Slots of frozen matrices of linear layers, but the output head and adapters."""
    head = causal_model(model).get_output_embeddings()
    matrices = {
        f"{name}.weight"
        for name, part in model.named_modules()
        if type(part) is torch.nn.Linear and part is not head and ".lora_" not in name
    }
    for name, slot in slots.items():
        if not slot.trains and slot.members[0] in matrices:
            yield name


_COLLECTIVE = re.compile(r"[)\]}] (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(text: str) -> dict[str, int]:
    """How often XLA's text has an exchange between devices, by kind."""
    return dict(Counter(_COLLECTIVE.findall(text)))
