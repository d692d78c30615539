"""Stand-ins for machines that are not here: an 8x H100 on a laptop. Everything they return says `simulated`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from pantheraml.hardware.backend import MemoryUse, Telemetry
from pantheraml.hardware.device import Absent, Device, Inventory
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.kinds import Kind

GIB = 1 << 30


def fake_device(
    kind: Kind = "cuda",
    index: int = 0,
    *,
    name: str = "Fake",
    memory_bytes: int = 80 * GIB,
    free_bytes: int | None = None,
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    peak_flops: float | None = None,
) -> Device:
    return Device(
        kind=kind,
        index=index,
        name=name,
        memory_bytes=memory_bytes,
        free_bytes=memory_bytes if free_bytes is None else free_bytes,
        dtypes=dtypes,
        peak_flops=peak_flops,
        simulated=True,
    )


def laptop(memory_gib: float = 16, *, dtypes: tuple[str, ...] = ("float32", "bfloat16"), peak_flops: float | None = 2e11) -> Inventory:
    cpu = fake_device("cpu", name="Fake laptop", memory_bytes=int(memory_gib * GIB), dtypes=dtypes, peak_flops=peak_flops)
    absent = (
        Absent(kind="cuda", why="torch was built without CUDA", fix="install the CUDA build of torch"),
        Absent(kind="xpu", why="torch was built without XPU", fix="install the XPU build of torch"),
    )
    return Inventory(devices=(cpu,), absent=absent)


def h100s(count: int = 8, *, memory_gib: float = 80) -> Inventory:
    gpus = tuple(
        fake_device("cuda", index, name="Fake H100", memory_bytes=int(memory_gib * GIB), peak_flops=7e14) for index in range(count)
    )
    return Inventory(devices=(*gpus, *laptop(256).devices))


class FakeBackend:
    """A backend whose devices are described by the test and compute on the CPU."""

    engine = "torch"
    collective = "gloo"
    pinned_memory = False

    def __init__(
        self,
        kind: Kind = "cuda",
        *,
        count: int = 1,
        name: str = "Fake",
        memory_bytes: int = 80 * GIB,
        dtypes: tuple[str, ...] = ("bfloat16", "float32"),
        peak_flops: float | None = None,
        static_shapes: bool = False,
        attention: tuple[str, ...] = ("sdpa", "eager"),
        quantizers: tuple[str, ...] = (),
        absent: Absent | None = None,
    ) -> None:
        self.kind: Kind = kind
        self.static_shapes = static_shapes
        self.attention = attention
        self.quantizers = quantizers
        self._absent = absent
        self._devices = tuple(
            fake_device(kind, index, name=name, memory_bytes=memory_bytes, dtypes=dtypes, peak_flops=peak_flops) for index in range(count)
        )

    def probe(self) -> tuple[Device, ...] | Absent:
        return self._absent or self._devices

    def torch_device(self, index: int) -> torch.device:
        return torch.device("cpu")

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_threads(self, threads: int | None) -> int:
        return torch.get_num_threads() if threads is None else threads

    def synchronize(self, index: int | None = None) -> None:
        return

    def memory(self, index: int) -> MemoryUse:
        device = self._devices[index]
        return MemoryUse(total_bytes=device.memory_bytes, free_bytes=device.free_bytes, used_bytes=0, reserved_bytes=None, peak_bytes=0)

    def reset_peak(self, index: int) -> None:
        return

    def empty_cache(self) -> None:
        return

    def recorder(self, index: int) -> None:
        return

    def telemetry(self, index: int) -> Telemetry:
        return Telemetry()


def decoder_shape(
    name: str = "fake/1b",
    *,
    layers: int = 16,
    hidden: int = 2048,
    intermediate: int = 8192,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 64,
    vocab: int = 128256,
    tied: bool = True,
    max_tokens: int = 131072,
    packs: bool = True,
    family: str = "llama",
) -> ModelShape:
    """The shape of a Llama-like decoder; the defaults are those of Llama-3.2-1B."""
    q, k = heads * head_dim, kv_heads * head_dim
    layer = ((hidden, q), (hidden, k), (hidden, k), (q, hidden), (hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
    embedding = vocab * hidden * (1 if tied else 2)
    linears = layer * layers
    return ModelShape(
        name=name,
        family=family,
        parameters=sum(n_in * n_out for n_in, n_out in linears) + embedding + hidden * (2 * layers + 1),
        embedding_parameters=embedding,
        linears=linears,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        max_tokens=max_tokens,
        packs=packs,
        weight_bytes_each=2,
    )


def llama_8b() -> ModelShape:
    return decoder_shape("fake/8b", layers=32, hidden=4096, intermediate=14336, head_dim=128, tied=False)
