"""Training steps in plain torch, on whatever it runs on: one process for a device, alone or with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np
import torch
from torch import Tensor

from pantheraml.data.pack import MicroBatch, StepBatch, divided, in_one_row, labelled_tokens, lengthened, pieces, segments
from pantheraml.engines.adamw import open_adamw
from pantheraml.engines.engine import LossFn, MicroTensors, State, StepMetrics, StepValues, check_fits
from pantheraml.engines.flat import FlatParameters, norm_of
from pantheraml.engines.graphs import Graphs, recurring
from pantheraml.engines.piece import Piece, read_part, read_whole
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.backend import Backend
from pantheraml.hardware.failures import classify
from pantheraml.hardware.recovery import Recovery, halvings
from pantheraml.models.generate import generate
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan
from pantheraml.recipe.types import OptimSpec

if TYPE_CHECKING:
    from pantheraml.engines.parallel import Parallel
    from pantheraml.kernels.context_parallel import ContextParallel


class TorchEngine:
    """An `Engine`. Weights that train are float32; products are computed in the plan's dtype under autocast.

    Every step seeds the generators from the run's seed and its own number, so dropout needs no saved state.

    Args:
        recovery: what to do when memory runs out; None: stop.
        graphs: recordings of micro-batches; None: each is computed in the usual way.
        parallel: the other processes of the run; None: there are none.
    """

    def __init__(
        self, backend: Backend, recovery: Recovery | None = None, graphs: Graphs | None = None, parallel: Parallel | None = None
    ) -> None:
        self._backend, self._recovery, self._graphs, self._parallel = backend, recovery or Recovery(), graphs, parallel

    def prepare(
        self, model: Any, loss: LossFn, optim: OptimSpec | None, plan: Plan, *, seed: int, relief: Callable[[], str | None] = lambda: None
    ) -> None:
        """See `Engine.prepare`."""
        self._model, self._loss, self._plan, self._seed, self._relief = model, loss, plan, seed, relief
        self._device = self._backend.torch_device(plan.device.index)
        self._dtype = getattr(torch, plan.dtype)
        if optim is None:
            return
        self._places: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        parallel = self._parallel
        if parallel is not None:
            parallel.divide(model)
            self._loss = parallel.within(loss)
            self._places = parallel.places(model)
            if self._places and optim.states != "float32":
                raise RecipeError(
                    f"optim.states={optim.states} does not go with weights that are divided over processes",
                    why="its blocks of 256 values would have to be cut where the weights are",
                    fix="set optim.states to float32, or set hardware.parallel to ddp",
                )
        # In float32: in bfloat16 an update of less than 1/256 of a weight would be lost.
        kind = parallel.kind if parallel is not None else lambda _: ""
        self._flat = FlatParameters(model, decay=lambda parameter: optim.weight_decay if parameter.ndim >= 2 else 0.0, kind=kind)
        self._adamw = open_adamw(self._flat, optim)
        # The update looks at this tensor on the device and does nothing where it is 1: no step waits for the host to look.
        self._halted = torch.zeros((), device=self._device)
        if plan.checkpointing:  # for a model that keeps its own forward
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(self, batch: StepBatch, k: int, lr: float) -> StepMetrics:
        """See `Engine.step`."""
        with self._memory_explained(f"step {k + 1}"):
            return self._step(batch, k, lr)

    def _step(self, batch: StepBatch, k: int, lr: float) -> StepMetrics:
        total = self._recovered(f"step {k + 1}", batch, k)
        gradients = self._flat.checked_gradients(None if self._parallel is None else self._parallel.sums.over)
        if self._parallel is None:
            norm = norm_of(gradients)
        else:
            self._parallel.sum_gradients(self._flat)
            total, norm = self._parallel.totals(total, self._flat)
        mean = total / max(1, batch.label_count)
        self._halted.copy_(torch.maximum(self._halted, (~(norm.isfinite() & mean.isfinite())).float()))
        self._adamw.step(gradients, norm, self._halted, lr)
        if self._places:
            self._flat.spread()
        return StepMetrics(mean, norm)

    def rehearse(self, batch: StepBatch) -> None:
        """See `Engine.rehearse`."""
        with self._memory_explained("a rehearsal at the largest shape"):
            self._recovered("a rehearsal at the largest shape", batch, 0)
        self._flat.drop_gradients()
        self._backend.synchronize(self._plan.device.index)

    def lower(self) -> str | None:
        """See `Engine.lower`."""
        return self._relief()

    def _recovered(self, doing: str, batch: StepBatch, k: int) -> Tensor:
        """`_gradients`, with less memory or in more parts where it must be."""
        self._model.train()
        total = torch.zeros((), device=self._device)
        for attempt in self._recovery.attempts(doing, halvings(_most_pieces(batch.micro)), relief=self._relief):
            with attempt:
                total = self._gradients(batch, k, attempt.parts)
        return total

    def _gradients(self, batch: StepBatch, k: int, parts: int) -> Tensor:
        """The sum of the losses of step k; the gradients of their mean are in the parameters, or none if it fails."""
        # Each attempt draws what the first one drew. In smaller parts dropout takes other masks, as with smaller micro-batches.
        share = self._parallel.token_rank if self._parallel is not None else 0
        self._backend.seed(_mixed(self._seed, k, share))
        total = torch.zeros((), device=self._device)
        gradients = self._flat.zero_gradients()
        count = max(1, batch.label_count)
        graphs = self._graphs if self._graphs is not None and self._graphs.trouble is None else None
        divisor = count if graphs is None else torch.full((), count, dtype=torch.float32, device=self._device)
        try:
            for micro in batch.micro:
                for part in self._on_device(micro, parts, again=graphs is not None):
                    if micro.filler:  # the others meet this process in its forward and backward
                        self._backward(part, math.inf)
                    elif graphs is None or isinstance(divisor, int):
                        total += self._backward(part, divisor)
                    else:
                        total += graphs.backward(part, divisor, self._backward, gradients)
        except (RuntimeError, MemoryError):
            self._flat.drop_gradients()
            if self._graphs is not None:
                self._graphs.forget()
            raise
        return total

    def _backward(self, batch: MicroTensors, divisor: float | Tensor) -> Tensor:
        """The sum of the losses; the gradients of it / divisor are added to those that are there."""
        with self._backend.autocast(self._dtype):
            loss = self._loss(self._model, batch)
        # A batch without labels has a loss of 0 that hangs on no parameter.
        if loss.requires_grad:
            (loss / divisor).backward()
        return loss.detach()

    def read(self, metrics: Sequence[StepMetrics]) -> list[StepValues]:
        """See `Engine.read`."""
        if not metrics:
            return []
        pairs = torch.stack([torch.stack((each.loss, each.grad_norm.float())) for each in metrics])
        ok = pairs.isfinite().all(dim=1)
        return [StepValues(loss, norm, fine) for (loss, norm), fine in zip(pairs.tolist(), ok.tolist(), strict=True)]

    def evaluate(self, batches: Sequence[StepBatch]) -> float:
        """See `Engine.evaluate`."""
        was_training = self._model.training
        self._model.eval()
        total = torch.zeros((), device=self._device)
        labels = 0
        try:
            with self._memory_explained("an evaluation"), torch.no_grad(), self._backend.autocast(self._dtype):
                for batch in batches:
                    for micro in batch.micro:
                        loss = self._loss_of(micro)
                        total += 0.0 if micro.filler else loss
                    labels += batch.label_count
                if self._parallel is not None:
                    total = self._parallel.total(total)
        finally:
            self._model.train(was_training)
            if self._parallel is not None:
                self._parallel.settle(self._model)
        return float(total) / max(1, labels)

    def _loss_of(self, micro: MicroBatch) -> Tensor:
        """The sum of the losses of a micro-batch."""
        losses: list[Tensor] = []
        for attempt in self._recovery.attempts("an evaluation", halvings(_most_pieces((micro,)))):
            with attempt:
                losses = [self._loss(self._model, part) for part in self._on_device(micro, attempt.parts)]
        return torch.stack(losses).sum()

    def generate(self, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """See `Engine.generate`."""
        if self._parallel is None:
            return generate(self._model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        with self._parallel.answering(self._model):
            answers = generate(self._model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        self._parallel.settle(self._model)
        return answers

    def state_dict(self) -> State:
        """See `Engine.state_dict`. Names: `weight/NAME`, and `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME` after the first step."""
        state = {f"weight/{name}": view for name, view in self._flat.views(self._flat.weights).items()}
        return {name: self._kept(name, tensor) for name, tensor in (state | self._adamw.state()).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        moments = {name: value for name, value in state.items() if not name.startswith("weight/")}
        check_fits(state, self._whole_shapes(self._weight_shapes() | (self._adamw.shapes() if moments else {})))
        self._adamw.load({name: self._part(name, value) for name, value in moments.items()})
        self.load_weights(state)

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_weights`."""
        # All of it is looked at before any weight changes.
        weights = {name: value for name, value in state.items() if name.startswith("weight/")}
        check_fits(weights, self._whole_shapes(self._weight_shapes()))
        for name, view in self._flat.views(self._flat.weights).items():
            view.copy_(self._part(f"weight/{name}", state[f"weight/{name}"]))
        self._flat.spread()

    def _kept(self, name: str, tensor: Tensor) -> Tensor | Piece:
        """A tensor of the state on the host, for a checkpoint; of what every process has, the first one's is kept."""
        place = self._places.get(name.partition("/")[2])
        if place is not None and tensor.ndim:
            return Piece(_copied(tensor), *place)
        first = self._parallel is None or self._parallel.first
        return _copied(tensor) if first else tensor.detach()

    def _part(self, name: str, value: Any) -> Tensor:
        """What this process has of a tensor of a state."""
        place = self._places.get(name.partition("/")[2])
        if place is None or not value.shape:
            return read_whole(value)
        shape = tuple(self._flat.views(self._flat.weights)[name.partition("/")[2]].shape)
        return read_part(value, place[1], shape)

    def _whole_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        places = {name: self._places.get(name.partition("/")[2]) for name in shapes}
        return {name: place[0] if (place := places[name]) is not None and shape else shape for name, shape in shapes.items()}

    def hand_back(self) -> None:
        """See `Engine.hand_back`. Its parameters are the trained ones all along."""

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"weight/{name}": tuple(view.shape) for name, view in self._flat.views(self._flat.weights).items()}

    def _on_device(self, micro: MicroBatch, parts: int, *, again: bool = False) -> Iterator[MicroTensors]:
        """A micro-batch in at most `parts` pieces, one after the other. again: in shapes that come again soon.

        Fewer rows are a new shape: a device with static shapes compiles once more when memory has run out, and, as all
        later steps keep to that number of parts, then no more.
        """
        for arrays in divided(micro, parts):
            made = micro_tensors(
                *(lengthened(*arrays, most=self._plan.micro_tokens) if again else arrays),
                self._device,
                pinned=self._backend.pinned_memory,
                static=self._backend.static_shapes,
                cp=None if self._parallel is None else self._parallel.cp,
            )
            yield recurring(made) if again else made

    @contextmanager
    def _memory_explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if classify(error) == "out of memory":
                raise self._out_of_memory(doing, error) from error
            raise

    def _out_of_memory(self, doing: str, error: BaseException) -> DeviceError:
        plan = self._plan
        use = self._backend.memory(plan.device.index)
        self._backend.empty_cache()
        parts = self._recovery.parts
        # The plan's shapes, in as many parts as came to be tried.
        at_once = max(n * -(-max(1, plan.micro_tokens // n) // parts) for n in plan.row_tokens)
        shorter = max(plan.row_tokens[-1], at_once // 2)
        fix = (
            f"set batch.micro_tokens to {shorter} (the result stays the same)"
            if shorter < at_once
            else "set hardware.checkpointing to on"
            if not plan.checkpointing and not self._recovery.reliefs
            else f"set model.max_tokens below {plan.row_tokens[-1]}, or choose a smaller model"
        )
        tried = f", and still does in {parts} parts" if parts > 1 else ""
        # Some texts mean this most of the time and not always (hardware/failures.py): people shall see which one it was.
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return DeviceError(
            f"out of memory in {doing}: {format_bytes(use.used_bytes)} in use, {format_bytes(use.free_bytes)} free on {plan.device}",
            why=f"a micro-batch of {plan.micro_tokens} tokens needs more{tried}; "
            f"the plan had expected {plan.memory.total_bytes / 2**30:.1f} GiB; the refusal said: {said}",
            fix=fix,
        )


def micro_tensors(
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    *,
    pinned: bool = False,
    static: bool = False,
    cp: ContextParallel | None = None,
) -> MicroTensors:
    """Rows [B, T] of a micro-batch on a device, with what the host knows of them.

    Args:
        pinned: see `Backend.pinned_memory`.
        static: see `Backend.static_shapes`; every token goes to the loss, where one without a label counts nothing.
        cp: with whom this process shares the rows: it has its part of the tokens alone.
    """

    def there(array: np.ndarray) -> Tensor:
        here = torch.from_numpy(np.ascontiguousarray(array))
        return (here.pin_memory() if pinned else here).to(device, non_blocking=True)

    if cp is not None:
        input_ids, position_ids, labels = in_one_row(input_ids, position_ids, labels, multiple=cp.size)
    starts, longest = segments(position_ids)
    if cp is not None:
        input_ids, position_ids, labels = (np.split(array, cp.size, axis=1)[cp.rank] for array in (input_ids, position_ids, labels))
    labelled = np.arange(labels.size) if static else labelled_tokens(labels)
    return MicroTensors(
        input_ids=there(input_ids),
        position_ids=there(position_ids),
        labels=there(labels),
        starts=there(starts),
        longest=longest,
        # A part without labels goes to the loss with a token that counts nothing: kernels want rows, and the others meet it in backward.
        labelled=there(labelled if len(labelled) or cp is None else np.zeros(1, np.int64)),
        cp=cp,
    )


def _most_pieces(batches: Sequence[MicroBatch]) -> int:
    """Into how many parts the largest of these can be divided."""
    return max(map(pieces, batches), default=1)


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().cpu()
    return copied.clone() if copied.data_ptr() == tensor.data_ptr() else copied


def _mixed(seed: int, k: int, share: int) -> int:
    """A seed for a share of step k: steps that follow each other, and shares, get numbers that have nothing in common."""
    return int.from_bytes(blake3.blake3(f"{seed}:{k}{f':{share}' if share else ''}".encode()).digest(7), "big")
