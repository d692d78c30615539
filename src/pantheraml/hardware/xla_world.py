"""The hosts of a TPU slice, each with a process of its own, brought together by JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Device
from pantheraml.hardware.tpu import read_tpu_environment

if TYPE_CHECKING:
    from torch import Tensor

HEARTBEAT_S = 60
"""A host that was not heard of for so long is lost, and JAX ends the others."""
_LOOK_EVERY_MS = 5_000  # so that Ctrl-C is heard


class XlaWorld:
    """A `World`, see distributed/world.py. Words go through the store that JAX's coordinator keeps, tensors through the devices.

    Args:
        client: JAX's, of that store.
        gave_up: the error for a host (its rank, how many there are, why) that goes no further.
    """

    called = "host"

    def __init__(self, client: Any, rank: int, size: int, gave_up: Callable[[int, int, str], Exception]) -> None:
        self.rank, self.size, self._client, self._gave_up, self._round = rank, size, client, gave_up, 0

    def gathered(self, text: str) -> list[str]:
        """See `World.gathered`."""
        here = self._round
        self._round += 1
        self._client.key_value_set(_key(here, self.rank), "=" + text)
        found = [self._read(here, rank) for rank in range(self.size)]
        if here:  # all have come here, so all have read what was said before
            self._client.key_value_delete(_key(here - 1, self.rank))
        return found

    def give_up(self, why: str) -> None:
        """See `World.give_up`."""
        with suppress(RuntimeError):  # the store is gone with the first host
            self._client.key_value_set(_key(self._round, self.rank), "!" + why, allow_overwrite=True)

    def _read(self, round: int, rank: int) -> str:
        """It waits as long as the other host lives."""
        while True:
            try:
                said: str = self._client.blocking_key_value_get(_key(round, rank), _LOOK_EVERY_MS)
                break
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self._gave_up(rank, self.size, str(error).strip().splitlines()[0]) from error
        if said.startswith("!"):
            raise self._gave_up(rank, self.size, said[1:])
        return said[1:]

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `World.shared`; one after the other, so that the devices hold no more than one."""
        import torch
        from jax.experimental import multihost_utils

        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            # As bytes: JAX has no numbers of 64 bits, and numpy no bfloat16.
            sent = multihost_utils.broadcast_one_to_all(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            found[name] = torch.from_numpy(sent.copy()).view(tensor.dtype).reshape(tensor.shape)
        return found


def _key(round: int, rank: int) -> str:
    return f"pantheraml/{round}/{rank}"


_joined: list[XlaWorld] = []
"""The one of this process, once it has joined: what was said in it stays in JAX's store."""


def join(device: Device, announce: Callable[[str], None], gave_up: Callable[[int, int, str], Exception]) -> XlaWorld:
    """Wait until the processes of all hosts have come. JAX must not have started in this one, unless it has joined already.

    On Google's machines JAX finds the others by itself; elsewhere the environment says where the first one listens.
    Raises: DeviceError if that is not possible. If they do not come within five minutes, JAX ends the process.
    """
    if _joined:
        return _joined[0]
    jax: Any = import_module("jax")  # its store of words is not in its public face

    said = read_tpu_environment()
    named: dict[str, Any] = {}
    if said.coordinator is not None:
        named = {"coordinator_address": said.coordinator, "num_processes": said.processes, "process_id": said.process}
    if device.simulated:
        jax.config.update("jax_platforms", "cpu")
    where = f" at {said.coordinator}" if said.coordinator else ""
    announce(f"Waiting for {device.hosts} hosts to meet{where}, for five minutes at most.")
    try:
        if not jax.distributed.is_initialized():
            jax.distributed.initialize(**named, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=HEARTBEAT_S)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"the {device.hosts} hosts of {device.name} did not come together",
            why=str(error).strip().splitlines()[0],
            fix="start the same command on all of them at the same time; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
            "say where they meet, where JAX does not find it out; a program of your own must not use JAX before",
        ) from error
    state = jax._src.distributed.global_state
    _joined.append(XlaWorld(state.client, state.process_id, state.num_processes, gave_up))
    return _joined[0]
