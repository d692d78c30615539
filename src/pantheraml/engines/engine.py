"""The border between the training loop and how a step is computed. The loop does not know which engine it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pantheraml.data.pack import StepBatch

if TYPE_CHECKING:
    from torch import Tensor

    from pantheraml.kernels.context_parallel import ContextParallel
    from pantheraml.planning.plan import Plan
    from pantheraml.recipe.types import OptimSpec

State = dict[str, Any]
"""Name -> tensor, flat: what a checkpoint writes as safetensors."""


@dataclass(frozen=True, slots=True)
class RowTensors:
    """Rows of a micro-batch, as the model's own forward computes them; attention tells the examples of a row by their positions.

    Attributes:
        input_ids, position_ids, labels: integers [B, T]; labels are already shifted, -100 counts for nothing.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class MicroTensors(RowTensors):
    """A micro-batch on the device, int64. What is known of it on the host comes along, so that no step asks the device.

    Attributes:
        starts: int32 [S + 1], where the examples begin in the B*T tokens one after the other, and B*T.
        longest: tokens of the longest of them.
        labelled: int64, which of the B*T tokens have a label.
        cp: with whom this process shares the micro-batch; None: with nobody. Otherwise the rows are [1, n], this process's part of the
            N tokens, with at least one in `labelled`; starts and longest are those of all N.
    """

    starts: Tensor
    longest: int
    labelled: Tensor
    cp: ContextParallel | None = None


LossFn = Callable[[Any, RowTensors], "Tensor"]
"""(model, batch) -> the sum of the token losses, a float32 scalar. What a training method is."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step measured. The values may still be on the device; `Engine.read` brings them over."""

    loss: Any
    grad_norm: Any


@dataclass(frozen=True, slots=True)
class StepValues:
    """The same as numbers. `ok` is false where loss or gradient were not finite: then nothing was updated."""

    loss: float
    grad_norm: float
    ok: bool


class Engine(Protocol):
    """One model, one optimizer, one way to compute."""

    def prepare(
        self, model: Any, loss: LossFn, optim: OptimSpec | None, plan: Plan, *, seed: int, relief: Callable[[], str | None] = lambda: None
    ) -> None:
        """Takes over the model; without `optim` it can only evaluate. Raises: ValueError if no parameter trains.

        Args:
            relief: makes the loss need less memory, and says how; None: it cannot. Asked before micro-batches are divided.
        """
        ...

    def rehearse(self, batch: StepBatch) -> None:
        """Loss and gradients of a batch, and nothing comes of them but that memory was needed. Recovers like a step."""
        ...

    def step(self, batch: StepBatch, k: int, lr: float) -> StepMetrics:
        """Step k, from 0: gradients of the mean loss over `batch.label_count` labels, clipping, one update.

        A loss or gradient that is not finite leaves the weights as they are, in this step and in all that follow.
        When memory runs out before the update, the same step is taken again with fewer rows at once, as often as the
        engine's `Recovery` allows; its gradient and mean loss are the same but for rounding (and for dropout's masks).
        Raises: PantheraError if a trainable parameter gets no gradient; DeviceError if memory runs out for good.
        """
        ...

    def lower(self) -> str | None:
        """Need less memory from here on, and how; None: it cannot. What a step does by itself when memory runs out."""
        ...

    def read(self, metrics: Sequence[StepMetrics]) -> list[StepValues]:
        """Waits for the device, once, and brings the numbers over."""
        ...

    def evaluate(self, batches: Sequence[StepBatch]) -> float:
        """Mean token loss, without dropout and without gradients. Recovers like a step."""
        ...

    def generate(self, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """The likeliest answer to each prompt (token ids, at least one), without the token that ended it."""
        ...

    def state_dict(self) -> State:
        """Every trained weight and both moments of the optimizer, on the host; a copy."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave. Raises: ValueError if names or shapes differ."""
        ...

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Puts back the weights alone."""
        ...

    def hand_back(self) -> None:
        """From here on the model that was taken over has the weights that were trained."""
        ...


def check_fits(state: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises: ValueError unless a state has the names and shapes that are wanted, and no others."""
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    other = [
        f"{name} {tuple(state[name].shape)}" for name in sorted(wanted.keys() & state.keys()) if tuple(state[name].shape) != wanted[name]
    ]
    if missing or extra or other:
        raise ValueError(
            f"the saved state does not fit this model: missing {missing[:3]}, not known {extra[:3]}, of another shape {other[:3]}"
        )
