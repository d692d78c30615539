"""TPUs, through XLA.

JAX is asked in a process of its own: starting it takes the TPU for one process alone, writes to the environment and to
stderr, and waits for the other hosts of a slice. A program that has started JAX itself is asked where it is, because it
holds the TPU already.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import MemoryUse, Telemetry, set_host_threads
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.tpu import FLAT, TpuEnvironment, device_files, duty_cycle, read_tpu_environment, seen_on_pci, shape_of
from pantheraml.hardware.xla_memory import Held, arrays_on
from pantheraml.recipe.kinds import Kind

if TYPE_CHECKING:
    import torch

INSTALL = 'pip install "pantheraml[tpu]", which brings jax[tpu] with libtpu'
_ATTACH = "run this on a machine with a TPU (Google Cloud, or a TPU runtime on Colab or Kaggle)"
_ANSWER_WITHIN_S = 120  # JAX itself begins to warn after 60
_PROBE_SIZE = 256


class Core(BaseModel):
    """What JAX tells of one of its devices: a chip, or on generations without megacore (v2, v3, 7x) a core of one."""

    model_config = ConfigDict(frozen=True)

    device_kind: str
    coords: tuple[int, ...] | None = None
    core_on_chip: int | None = None
    num_cores: int | None = None
    bytes_limit: int | None = None
    bytes_in_use: int | None = None


class Answer(BaseModel):
    """What JAX said: the devices of this host that computed, where all those of the slice lie, and on how many hosts; or why there are none."""

    model_config = ConfigDict(frozen=True)

    version: str | None = None
    cores: tuple[Core, ...] = ()
    slice_coords: tuple[tuple[int, ...], ...] = ()
    hosts: int = 1
    error: str | None = None


class XlaBackend:
    """TPUs that JAX reaches. Models train on them through engines/xla_engine.py; torch itself works on the host.

    Args:
        simulate: take XLA's CPU devices for TPUs, to try things out. Everything they report says "simulated".
        environment: None reads it now.
        root: where the kernel's files are (/sys, /dev).
    """

    kind: Kind = "tpu"
    engine = "xla"
    collective = None
    static_shapes = True
    attention = ("sdpa", "eager")
    quantizers = ("int8",)
    pinned_memory = False

    def __init__(self, *, simulate: bool = False, environment: TpuEnvironment | None = None, root: Path = Path("/")) -> None:
        self._simulate = simulate
        self._platform = "cpu" if simulate else "tpu"
        self._environment = environment or read_tpu_environment()
        self._pci, self._files = root / "sys/bus/pci/devices", root / "dev"

    def probe(self) -> tuple[Device, ...] | Absent:
        """Multiply matrices on each device that JAX lists. JAX is only started where something points to a TPU."""
        refusal = self._refusal()
        if refusal is not None:
            return refusal
        answer = ask_here(self._platform) if _started() else ask_apart(self._platform)
        if answer.error is not None:
            return self._no_answer(answer.error)
        return self.describe(answer)

    def describe(self, answer: Answer) -> tuple[Device, ...]:
        """The devices of an answer."""
        if self._simulate:
            return tuple(self._simulated(index, answer) for index in range(len(answer.cores)))
        return tuple(self._device(index, core, answer) for index, core in enumerate(answer.cores))

    def _device(self, index: int, core: Core, answer: Answer) -> Device:
        entry = lookup("tpu", core.device_kind)
        # Without megacore each core of a chip is a device with its share of the chip's memory; with it, the chip is one.
        per_chip = max(1, len({other.core_on_chip for other in answer.cores}))
        total = core.bytes_limit
        if total is None and entry is not None and entry.memory_bytes is not None:
            total = entry.memory_bytes // per_chip
        cores = core.num_cores
        if cores is None and entry is not None and entry.cores is not None:
            cores = entry.cores // per_chip
        generation = entry.name.partition("TPU")[2].split()[0] if entry else None  # "v6e" of "Google TPU v6e (Trillium)"
        flat = generation in FLAT
        return Device(
            kind="tpu",
            index=index,
            name=core.device_kind,
            memory_bytes=total,
            free_bytes=None if core.bytes_in_use is None or total is None else total - core.bytes_in_use,  # one process holds a TPU
            dtypes=("bfloat16", "float32") if installed("torchax") else (),
            capability=generation,
            cores=cores,
            topology=_extent(answer.slice_coords, flat=flat) or self._environment.slice_shape(flat=flat),
            hosts=answer.hosts,
        )

    def _simulated(self, index: int, answer: Answer) -> Device:
        from pantheraml.hardware.cpu import cpu_name, usable_memory  # brings torch, which the process that asks JAX has no use for

        total, free = usable_memory()
        return Device(
            kind="tpu",
            index=index,
            name=f"XLA {answer.version} on {cpu_name()}",
            memory_bytes=total,
            free_bytes=free,
            dtypes=("float32", "bfloat16") if installed("torchax") else (),
            hosts=answer.hosts,
            simulated=True,
        )

    # ---- Why there is none ---------------------------------------------------------------------------------------

    def _refusal(self) -> Absent | None:
        """Why JAX need not be asked; None: it must be."""
        seen, but = seen_on_pci(self._pci), self._signs()
        if not installed("jax"):
            return Absent(kind="tpu", why=f"{but}jax is not installed, and XLA is reached through it", fix=INSTALL, seen=seen)
        if self._simulate:
            return None
        has_library = installed("libtpu") or self._environment.libtpu_path is not None
        if not (but or has_library):
            why = "nothing points to one: no TPU variable is set, libtpu is not installed, and the driver lists no chip"
            return Absent(kind="tpu", why=why, fix=_ATTACH)
        if not has_library:
            return Absent(kind="tpu", why=f"{but}libtpu is not installed, so XLA here runs on the CPU", fix=INSTALL, seen=seen)
        platforms = self._environment.platforms
        if platforms is not None and "tpu" not in platforms.split(","):
            why = f"{but}JAX_PLATFORMS={platforms} keeps JAX from it"
            return Absent(kind="tpu", why=why, fix="unset JAX_PLATFORMS, or set it to tpu,cpu", seen=seen)
        return None

    def _no_answer(self, error: str) -> Absent:
        if self._simulate:
            return Absent(kind="tpu", why=f"XLA on the CPU, which was to stand in for it, failed: {error}", fix=INSTALL)
        seen, said = seen_on_pci(self._pci), self._environment.set_variables()
        if "already in use" in error or "lockfile" in error:
            fix = "stop the other process that uses the TPU: it serves one at a time"
        elif seen:
            fix = "restart the machine, and install the libtpu that fits its TPU"
        else:
            fix = _ATTACH + (f", or unset {said[0].partition('=')[0]}" if said else "")
        return Absent(kind="tpu", why=f"{self._signs()}XLA here runs on the CPU; libtpu says: {error}", fix=fix, seen=seen)

    def _signs(self) -> str:
        """What points to a TPU, as the beginning of a sentence that goes on with what is wrong; empty if nothing does."""
        seen, said = seen_on_pci(self._pci), self._environment.set_variables()
        signs = [f"the driver lists {len(seen)} x {seen[0].name}"] if seen else []
        if not seen and device_files(self._files):
            signs.append("there is a device file that may belong to one")
        if said:
            signs.append(f"{' and '.join(said)} {'is' if len(said) == 1 else 'are'} set")
        return f"{', and '.join(signs)}, but " if signs else ""

    # ---- Deeds ---------------------------------------------------------------------------------------------------

    def torch_device(self, index: int) -> torch.device:
        """There is none. Raises: DeviceError."""
        return self._no_torch(f"tpu:{index} is no device of torch")

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """float32: does nothing. Raises: DeviceError for others: torch computes nothing here that could be cast."""
        import torch

        return nullcontext() if dtype == torch.float32 else self._no_torch("torch has no autocast for a TPU")

    def _no_torch(self, what: str) -> NoReturn:
        raise DeviceError(
            what,
            why="torch has no tensors on a TPU; models train there through JAX, by pantheraml train and Trainer",
            fix="train with them, or choose another device; pantheraml devices lists what is here",
        )

    def seed(self, seed: int) -> None:
        """Set torch's generator, which initial weights draw from. JAX has none: its random numbers take a key each."""
        import torch

        torch.manual_seed(seed)

    def set_threads(self, threads: int | None) -> int:
        """Torch's own number is kept unless one is given: the work is on the TPU."""
        return set_host_threads(threads)

    def synchronize(self, index: int | None = None) -> None:
        """Wait for what this process gave to its devices. A device works off what it is given in order."""
        for device in self._opened():
            _add_one(device)

    def memory(self, index: int) -> MemoryUse:
        """What JAX tells in this process; of a simulated TPU, the process's own memory.

        Until the process has started JAX nothing is known: to ask would take the TPU.
        """
        if self._simulate:
            from pantheraml.hardware.cpu import CpuBackend

            return CpuBackend().memory(0)
        opened = self._opened()
        stats = (opened[index].memory_stats() if opened else None) or {}
        total, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
        return MemoryUse(
            total_bytes=total,
            free_bytes=total - used if total is not None and used is not None else None,
            used_bytes=used,
            reserved_bytes=stats.get("bytes_reserved"),
            peak_bytes=stats.get("peak_bytes_in_use"),
        )

    def arrays(self, index: int) -> tuple[Held, ...]:
        """What this process holds on one of its devices, the largest first."""
        return arrays_on(self._platform, index) if self._opened() else ()

    def reset_peak(self, index: int) -> None:
        """Nothing: JAX keeps one peak for the whole process. Of a simulated TPU, that of the process."""
        if self._simulate:
            from pantheraml.hardware.cpu import CpuBackend

            CpuBackend().reset_peak(0)

    def empty_cache(self) -> None:
        """Nothing: XLA gives a buffer back when its array goes."""

    def recorder(self, index: int) -> None:
        """Nothing is recorded here."""

    def telemetry(self, index: int) -> Telemetry:
        """The duty cycle of the chip, from libtpu, once this process uses the TPU; it tells neither temperature nor power."""
        opened = self._opened()
        # Loaded where no TPU was started, libtpu asks the network for more than a minute.
        if self._simulate or not opened:
            return Telemetry()
        try:
            from libtpu.sdk import tpumonitoring  # pyright: ignore[reportMissingImports] - comes with the extra

            return Telemetry(utilization=duty_cycle(tpumonitoring.get_metric("duty_cycle_pct").data(), index, len(opened)))
        except (ImportError, AttributeError, RuntimeError):
            return Telemetry()  # an older libtpu, or a generation for which it does not measure

    def _opened(self) -> list[Any]:
        """JAX's devices on this host, if this process has started JAX with this platform; starts nothing."""
        if not _started():
            return []
        try:
            return sys.modules["jax"].local_devices(backend=self._platform)
        except RuntimeError:
            return []


def _started() -> bool:
    """Whether this process has started JAX. Importing it starts nothing."""
    jax = sys.modules.get("jax")
    return jax is not None and jax._src.xla_bridge.backends_are_initialized()


def ask_apart(platform: str, within_s: float = _ANSWER_WITHIN_S) -> Answer:
    """Ask JAX in a process of its own. What goes wrong there, a crash and no end included, is the answer's `error`."""
    # -P: the folder that the user works in must not hide modules (a jax.py there).
    command = [sys.executable, "-P", "-m", "pantheraml.hardware.xla", platform]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False)
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer within {within_s:g} s; on a slice of several hosts, all of them must ask at the same time")
    try:
        return Answer.model_validate_json(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    except ValidationError:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        return Answer(error=f"the process that asked JAX ended with {done.returncode}: {last}")


def ask_here(platform: str) -> Answer:
    """Ask JAX in this process, which starts it: every device of this host computes, and the result is checked."""
    import jax

    try:
        devices = jax.local_devices(backend=platform)
        for device in devices:
            _multiply(device)
        everywhere = jax.devices(platform)
    except RuntimeError as error:  # JAX's own errors are of this kind, too
        said = str(error).strip().splitlines()[0]
        return Answer(version=jax.__version__, error=said.partition(" (set JAX_PLATFORMS=")[0])
    coords = [_coords(device) for device in everywhere]
    return Answer(
        version=jax.__version__,
        cores=tuple(_core(device) for device in devices),
        slice_coords=tuple(each for each in coords if each is not None) if None not in coords else (),
        hosts=_hosts(platform),
    )


def _hosts(platform: str) -> int:
    """How many machines work together. A slice knows its own; what the environment says are those that have not met yet."""
    import jax

    said, slices = read_tpu_environment(), 1
    if not jax.distributed.is_initialized():
        slices = said.slices
    return max(jax.process_count(platform) * slices, said.processes)


def _multiply(device: Any) -> None:
    """Raises: RuntimeError if the device multiplies wrongly."""
    import jax
    import numpy

    half = jax.device_put(numpy.full((_PROBE_SIZE, _PROBE_SIZE), 0.5, numpy.float32), device)
    product = numpy.asarray(half @ half)
    # Exact in every precision that a TPU may choose: a quarter, so many times.
    if not (product == _PROBE_SIZE / 4).all():
        raise RuntimeError(f"{device} multiplied matrices wrongly")


def _add_one(device: Any) -> None:
    import jax

    (jax.device_put(0.0, device) + 1).block_until_ready()


def _core(device: Any) -> Core:
    stats = device.memory_stats() or {}
    return Core(
        device_kind=device.device_kind,
        coords=_coords(device),
        core_on_chip=getattr(device, "core_on_chip", None),
        num_cores=getattr(device, "num_cores", None),
        bytes_limit=stats.get("bytes_limit"),
        bytes_in_use=stats.get("bytes_in_use"),
    )


def _coords(device: Any) -> tuple[int, ...] | None:
    coords = getattr(device, "coords", None)
    return None if coords is None else tuple(coords)


def _extent(coords: tuple[tuple[int, ...], ...], *, flat: bool) -> str | None:
    """How many chips lie along each axis, from where they lie."""
    return shape_of(tuple(max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True)), flat=flat) if coords else None


def installed(package: str) -> bool:
    """Whether a package is here; nothing of it is imported."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # without an origin it is any folder of that name


def _main(platform: str) -> None:
    """In the process of its own: only the platform that is asked for starts, and the last line written is the answer."""
    import jax

    if platform == "cpu" or read_tpu_environment().platforms is None:
        jax.config.update("jax_platforms", "cpu" if platform == "cpu" else "tpu,cpu")
    sys.stdout.write("\n" + ask_here(platform).model_dump_json() + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
