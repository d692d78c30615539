"""Training steps through XLA: the model and its loss as compiled JAX functions, on one device or spread over a mesh of them.

Two functions are compiled: one adds the gradients of all micro-batches of a shape (once for each shape that the plan declares),
one updates the weights. How many micro-batches a step has is an argument, not a shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh

from pantheraml.data.pack import StepBatch
from pantheraml.engines.adamw import one_step
from pantheraml.engines.engine import LossFn, State, StepMetrics, StepValues, check_fits
from pantheraml.engines.xla_adamw import MOMENTS, update
from pantheraml.engines.xla_ahead import Compiled, told
from pantheraml.engines.xla_answers import continued
from pantheraml.engines.xla_arrays import Arrays, Spread, Store, fetched, fetched_members, in_eight_bits, to_torch, used
from pantheraml.engines.xla_batch import XlaRows
from pantheraml.engines.xla_model import TracedModel
from pantheraml.engines.xla_rows import ladder, shapes_of, stacked
from pantheraml.errors import DeviceError, PantheraError
from pantheraml.hardware.recovery import Recovery
from pantheraml.models.generate import BATCH_ROWS, stop_tokens
from pantheraml.planning.levels import format_levels, lower
from pantheraml.planning.memory import Level
from pantheraml.planning.plan import Plan
from pantheraml.recipe.types import OptimSpec


class XlaEngine:
    """An `Engine`. Weights that train are float32; products are computed in the plan's dtype.

    Dropout draws from a key made of the run's seed and the number of the step, so it needs no saved state.

    Args:
        mesh: the devices, with axes named as in planning/sharding.py.
        recovery: what to do when memory runs out; None: stop. allowed: levels that layers may go down to, the fastest first.
    """

    def __init__(self, mesh: Mesh, recovery: Recovery | None = None, allowed: Sequence[Level] = ()) -> None:
        self._spread, self._recovery, self._allowed = Spread(mesh), recovery or Recovery(), tuple(allowed)
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
        self.traced = TracedModel(model, loss, self._spread, plan.levels)
        self._slots = {slot.name: slot for slot in self.traced.slots}
        self._trained = {name: slot for name, slot in self._slots.items() if slot.trains}
        if optim is not None and not self._trained:
            raise ValueError("no parameter of the model trains")
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._ahead = any(tensor.is_meta for tensor in tensors.values())
        eighths = frozenset(in_eight_bits(model, self._slots) if plan.quantizer == "int8" else ())
        self._store = Store(self._spread, self._slots, eighths=eighths, ahead=self._ahead)
        arrays = {name: self._store.put(name, [tensors[member] for member in slot.members]) for name, slot in self._slots.items()}
        self._weights: Arrays = {name: arrays.pop(name) for name in self._trained}
        self._frozen: Arrays = arrays
        self._functions: dict[str, Any] = {}
        self._declared = shapes_of(plan, self._spread)
        self._moments: dict[str, Arrays] = {} if optim is None else {moment: self._zeros() for moment in MOMENTS}
        self._done = self._everywhere(np.zeros((), np.int32))
        self._halted = self._everywhere(np.zeros((), np.bool_))
        self._checked = False

    @property
    def arrays(self) -> tuple[Arrays, ...]:
        """All that stays on the devices between steps: frozen weights, trained ones, both moments."""
        return self._frozen, self._weights, *self._moments.values()

    def _zeros(self) -> Arrays:
        """Like the weights that train."""
        if self._ahead:
            return {name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding) for name, each in self._weights.items()}
        zeros: Arrays = self._run("zeros", ())
        return zeros

    def _make_zeros(self) -> Arrays:
        return {name: jnp.zeros(slot.array_shape, jnp.float32) for name, slot in self._trained.items()}

    def _everywhere(self, value: np.ndarray) -> Any:
        return self._store.from_host(value, self._spread.everywhere)

    # ---- What is compiled -------------------------------------------------------------------------------------------

    def _loss(self, weights: Arrays, frozen: Arrays, batch: Any, key: Any, train: bool) -> Any:
        cast = {name: weight.astype(self._dtype) for name, weight in weights.items()}
        ids, positions, labels = batch
        return self.traced.loss({**frozen, **cast}, ids, positions, labels, key, train=train)

    def _sum_gradients(
        self, weights: Arrays, frozen: Arrays, gradients: Arrays, total: Any, batches: Any, count: Any, labels: Any, k: Any
    ) -> tuple[Arrays, Any]:
        """(gradients, total) and what the first `count` micro-batches of step k add to them. batches: [A, B, T] each."""
        # Micro-batches count from 0 in each shape.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), k), math.prod(batches[0].shape[1:]))

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

    def _update(self, *args: Any) -> Any:
        assert self._optim is not None
        decayed = frozenset(name for name, slot in self._trained.items() if len(slot.shape) >= 2)
        return update(*args, optim=self._optim, decayed=decayed)

    def _run(self, phase: str, shape: tuple[int, ...], *args: Any) -> Any:
        """What the compiled function of a phase, for micro-batches of a shape, gives for these arguments."""
        return self._function(phase, shape)(*args)

    def _function(self, phase: str, shape: tuple[int, ...]) -> Any:
        """It is compiled when it is called first."""
        name = phase + "".join(f" {'x'.join(map(str, shape))}" if shape else "")
        if name not in self._functions:
            trained = {each: self._store.of(each) for each in self._trained}
            frozen = {each: self._store.of(each) for each, slot in self._slots.items() if not slot.trains}
            one, batches = self._spread.everywhere, (self._spread.batches,) * 3
            moments = dict.fromkeys(MOMENTS, trained)
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
                    "fun": self._answers(shape[2] if phase == "answers" else 0),
                    "in_shardings": (trained, frozen, self._spread.rows, self._spread.rows, one, one),
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

            first: dict[str, str] = {}

            def counted(*args: Any) -> Any:
                self.compilations[name] += 1  # JAX calls it when it traces, and never again
                self._report(name, shape if phase in ("gradients", "losses") else None, args, first)
                return fun(*args)

            counted.__name__ = name.replace(" ", "_")
            self._functions[name] = jax.jit(counted, **how)
        return self._functions[name]

    def _report(self, name: str, shape: tuple[int, ...] | None, args: Any, first: dict[str, str]) -> None:
        """Say which shape is the cause, where something is compiled that need not be.

        Args:
            shape: of the micro-batches, if it has any. first: the arguments of its first compilation, which are filled in here.
        """
        given = {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree_util.tree_leaves_with_path(args)}
        if shape is not None and shape not in self._declared and not first:
            known = ", ".join("x".join(map(str, each)) for each in sorted(self._declared))
            self._recovery.note(f"{name} is compiled, a shape that the plan does not have ({known}): that takes time, once")
        if first:
            other = (f"argument {where} was {was} and is {given.get(where)}" for where, was in first.items() if given.get(where) != was)
            self._recovery.note(f"{name} is compiled again: {next(other, 'its arguments lie elsewhere on the devices')}")
        first.update(given)

    def compile_ahead(self, rows: int, tokens: int) -> tuple[Compiled, ...]:
        """What XLA makes of the two parts of a step, see `lowered`. Raises: JAX's RuntimeError if it does not fit."""
        return tuple(told(phase, lowered, beside) for phase, (lowered, beside) in self.lowered(rows, tokens).items())

    def lowered(self, rows: int, tokens: int) -> dict[str, tuple[Any, Any]]:
        """Phase -> what JAX has for the compiler, and what waits on the devices meanwhile. They need not be here; nothing is computed.

        Args:
            rows, tokens: of a micro-batch.
        """
        batches = tuple(self._store.from_host(np.empty((1, rows, tokens), np.int32), self._spread.batches) for _ in range(3))
        number, count = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), np.int32)
        zeros, total = self._zeros(), self._everywhere(np.zeros((), np.float32))
        phases = {
            "gradients": ((rows, tokens), (self._weights, self._frozen, zeros, total, batches, count, number, count), self._moments),
            "update": ((), (self._weights, self._moments, self._done, self._halted, zeros, total, number, number), self._frozen),
        }
        return {phase: (self._function(phase, shape).lower(*args), beside) for phase, (shape, args, beside) in phases.items()}

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
        found = lower(self.traced.levels, self._allowed)
        if found is None:
            return None
        self.traced.levels = found
        self._functions.clear()
        return f"with layers at {format_levels(found)}"

    def _gradients(self, doing: str, batch: StepBatch, k: int) -> tuple[Arrays, Any]:
        """The gradients of the mean loss of step k, and the sum of its losses."""
        labels = np.float32(max(1, batch.label_count))
        gradients, total = {}, None
        for attempt in self._recovery.attempts(doing, ladder(batch.micro, self._spread), relief=self.lower):
            with attempt:
                gradients, total = self._zeros(), self._everywhere(np.zeros((), np.float32))
                for shape, arrays, count in self._stacked(batch, attempt.parts):
                    self._check_used(shape)
                    given = (self._weights, self._frozen, gradients, total, arrays, count, labels, np.int32(k))
                    gradients, total = self._run("gradients", shape, *given)
        return gradients, total

    def _stacked(self, batch: StepBatch, parts: int) -> Iterator[tuple[tuple[int, ...], Any, Any]]:
        """See `stacked`, with the arrays on the devices."""
        for shape, arrays, count in stacked(batch.micro, parts, self._spread, batch_size=self._plan.batch_size):
            yield shape, tuple(self._store.from_host(array, self._spread.batches) for array in arrays), np.int32(count)

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

    def read(self, metrics: Sequence[StepMetrics]) -> list[StepValues]:
        """See `Engine.read`."""
        pairs = jax.device_get([(each.loss, each.grad_norm) for each in metrics])
        return [StepValues(float(loss), float(norm), bool(np.isfinite(loss) and np.isfinite(norm))) for loss, norm in pairs]

    def evaluate(self, batches: Sequence[StepBatch]) -> float:
        """See `Engine.evaluate`."""
        total: Any = 0.0
        every = ladder([each for batch in batches for each in batch.micro], self._spread)
        for attempt in self._recovery.attempts("an evaluation", every, relief=self.lower):
            with attempt:
                total = self._everywhere(np.zeros((), np.float32))
                for batch in batches:
                    for shape, arrays, count in self._stacked(batch, attempt.parts):
                        total = self._run("losses", shape, self._weights, self._frozen, total, arrays, count)
                total = float(total)
        return float(total) / max(1, sum(batch.label_count for batch in batches))

    # ---- Answers ----------------------------------------------------------------------------------------------------

    def generate(self, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """See `Engine.generate`. Prompts of like length are answered together, in a few shapes; each is compiled once."""
        stops = np.asarray(stop_tokens(self._model, tokenizer), np.int32)
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH_ROWS):
            those = order[start : start + BATCH_ROWS]
            rows = self._spread.full_rows(_power_of_two(len(those)))
            ids = np.zeros((rows, _power_of_two(max(len(prompts[i]) for i in those))), np.int32)
            lengths = np.ones(rows, np.int32)
            for row, i in enumerate(those):
                ids[row, : len(prompts[i])], lengths[row] = prompts[i], len(prompts[i])
            placed = (self._store.from_host(array, self._spread.rows) for array in (ids, lengths))
            given = (self._weights, self._frozen, *placed, stops, np.int32(len(those)))
            found = np.asarray(self._run("answers", (*ids.shape, max_new_tokens, len(stops)), *given))
            for i, tokens in zip(those, found, strict=False):
                end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
                answers[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return answers

    def rows(self, *, count: int, tokens: int, chunk: int = 64) -> XlaRows:
        """Rows for models/batch.py: `Batcher(model, tokenizer, using=engine.rows(...))` answers with the weights that are here."""

        def arrays() -> Arrays:
            return {**self._frozen, **{name: weight.astype(self._dtype) for name, weight in self._weights.items()}}

        return XlaRows(self.traced, self._spread, self._store, arrays, count=count, tokens=tokens, chunk=chunk)

    def _answers(self, new: int) -> Callable[..., Any]:
        def compute(weights: Arrays, frozen: Arrays, ids_BP: Any, lengths_B: Any, stops: Any, real: Any) -> Any:
            arrays = {**frozen, **{name: weight.astype(self._dtype) for name, weight in weights.items()}}
            return continued(self.traced, arrays, ids_BP, lengths_B, stops, real, new=new, caches=self.traced.caches)

        return compute

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
            parts = fetched_members(arrays[name]) if slot.stacked else [fetched(arrays[name])]
            found += [(member, to_torch(part)) for member, part in zip(slot.members, parts, strict=True)]
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        moments = {name: tensor for name, tensor in state.items() if not name.startswith("weight/")}
        shapes = {member: slot.shape for slot in self._trained.values() for member in slot.members}
        wanted = {f"weight/{name}": shape for name, shape in shapes.items()}
        if moments:
            wanted |= {f"{moment}/{name}": shape for moment in MOMENTS for name, shape in shapes.items()}
            wanted |= {f"step/{name}": () for name in shapes}
        check_fits(state, wanted)
        done = one_step(moments) if moments else 0
        self._weights, self._moments = {}, {}  # so that the devices never hold both
        self._moments = {moment: self._from_members(moments, moment) if moments else self._zeros() for moment in MOMENTS}
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
        return {name: self._store.put(name, [state[f"{kind}/{member}"] for member in slot.members]) for name, slot in self._trained.items()}


def _power_of_two(number: int) -> int:
    """The smallest one that is not smaller."""
    return 1 << (number - 1).bit_length()
