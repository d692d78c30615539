"""Comparing a query with all vectors on a device that has memory of its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from pantheraml.memory.columns import Block, Rows
from pantheraml.memory.features import F32

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pantheraml.hardware.device import Device

MOST_BLOCKS = 64
"""That are kept on the device; 16 MiB each at 256 dimensions. One more displaces the one that was used longest ago."""


class Scan:
    """The codes of blocks on a device, copied when they are needed first; what a block has got since is copied then.

    Raises: DeviceError if torch has no tensors there.
    """

    def __init__(self, device: Device) -> None:
        from pantheraml.hardware.backend import backend_of

        self._where: torch.device = backend_of(device).torch_device(device.index)
        self._held: OrderedDict[int, tuple[Block, int, Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def shortlist(self, fits: list[tuple[Block, Rows]], query: F32, most: int) -> list[tuple[Block, Rows]]:
        """Of some rows of each block the `most` with the highest dot products, as float16 tells them; rising."""
        import torch

        with self._lock, torch.no_grad():
            asked = torch.from_numpy(query).to(self._where, torch.float16)
            found: list[tuple[Block, Rows]] = []
            for block, rows in fits:
                code, scale = self._codes(block, int(rows[-1]) + 1)
                scores = (code.half() @ asked).float() * scale
                best = scores[torch.from_numpy(rows).to(self._where)].topk(min(most, len(rows))).indices
                found.append((block, np.sort(rows[best.cpu().numpy()])))
            return found

    def _codes(self, block: Block, needed: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of `needed` rows at least."""
        import torch

        held = self._held.pop(id(block), None)
        if held is None or held[1] < needed:
            count = block.count
            code, scale = (torch.from_numpy(each[:count]).to(self._where, copy=True) for each in (block.code, block.scale))
            held = (block, count, code, scale)
        self._held[id(block)] = held
        while len(self._held) > MOST_BLOCKS:
            self._held.popitem(last=False)
        return held[2], held[3]
