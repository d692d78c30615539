"""What is here, what is not and why, what each device can do and costs, and what to do next. A CPU alone is a pass."""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import DeviceError, StorageError
from pantheraml.hardware.backend import Backend, MemoryUse, Telemetry, backend_of
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.find import find
from pantheraml.hardware.price import Price, price_of
from pantheraml.hardware.settings import read_settings
from pantheraml.hardware.speed import Measured, measure, remember, remembered
from pantheraml.kernels import native
from pantheraml.kernels.table import CPU_ROOM, OPERATIONS, installed
from pantheraml.models.quantize import available
from pantheraml.planning.memory import format_bytes
from pantheraml.recipe.kinds import KINDS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BASICS = ("torch", "transformers", "peft", "tokenizers", "safetensors")

# distribution, module, what it is for, what pip installs
OPTIONAL = (
    ("bitsandbytes", "bitsandbytes", "model.load_in_4bit", "bitsandbytes"),
    ("flash-attn", "flash_attn", "model.attention=flash_attention_2 on CUDA", "flash-attn --no-build-isolation"),
    ("nvidia-ml-py", "pynvml", "load, temperature and power of NVIDIA GPUs", "pantheraml[cuda]"),
    ("jax", "jax", "seeing TPUs", "pantheraml[tpu]"),
    ("datasets", "datasets", "data from the Hub", "pantheraml[hub]"),
    ("xllamacpp", "xllamacpp", "checking exported GGUF files by running them", "xllamacpp"),
    ("llama-cpp-python", "llama_cpp", "checking exported GGUF files by running them", "pantheraml[gguf]"),
    ("tensorboard", "tensorboard", "run.reporters=tensorboard", "tensorboard"),
    ("trackio", "trackio", "run.reporters=trackio", "trackio"),
    ("wandb", "wandb", "run.reporters=wandb", "wandb"),
)
LITTLE_DISK_BYTES = 10 << 30
BETWEEN_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoke:
    """One training step of two layers on one device in one dtype; `error` is None if it worked."""

    device: str
    dtype: str
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package that is there (with its version), or not (None), and the pip line that brings it."""

    name: str
    version: str | None
    needed_for: str
    install: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """One device and everything that was asked of it.

    Attributes:
        facts: what its probe saw. memory, telemetry: what its driver tells now. smoke: the steps that were tried.
        kernels: operation -> the function that would compute it. quantizers: ways to hold a base in few bits whose packages are installed.
        price: of an hour. measured: by `--bench`, now or before with this torch; None: never.
        peak_share, copy_share: what was measured over what the catalog says is possible; None where either is unknown.
        trouble: why a measurement was not kept.
    """

    facts: Device
    memory: MemoryUse
    telemetry: Telemetry
    smoke: tuple[Smoke, ...]
    kernels: dict[str, str]
    quantizers: tuple[str, ...]
    price: Price
    measured: Measured | None
    peak_share: float | None
    copy_share: float | None
    trouble: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """Everything the doctor saw; docs/devices.md describes each key. Missing options are not problems; a device that cannot train is one.

    Attributes:
        device: what a run would use now (`cuda:0`), None if nothing can be used. why: one sentence.
        settings: what the environment sets, by variable's meaning.
    """

    python: str
    system: str
    device: str | None
    why: str
    devices: tuple[Examined, ...]
    absent: tuple[Absent, ...]
    basics: tuple[Package, ...]
    optional: tuple[Package, ...]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    runs_folder: str = "runs"
    disk_free_bytes: int | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps training from working; empty: all is well."""
        missing = [f"{package.name} is not installed: pip install {package.install}" for package in self.basics if package.version is None]
        broken = [
            f"{smoke.device} does not train in {smoke.dtype}: {smoke.error}" for each in self.devices for smoke in each.smoke if smoke.error
        ]
        return (*missing, *broken, *(() if self.device else (self.why,)))

    @property
    def recommendations(self) -> tuple[str, ...]:
        """What would make this machine better at its work, the most useful first."""
        advice = [f"{absent.kind}: {absent.fix}" for absent in self.absent if absent.seen]
        versions = {package.name: package.version for package in self.optional}
        current = next((each for each in self.devices if str(each.facts) == self.device), None)
        if current:
            if current.facts.simulated:
                advice.append(f"{self.device} is simulated: its speed and memory say nothing about a real one")
            if KINDS[current.facts.kind].unproven:
                advice.append(
                    f"{self.device} is unproven: nothing of PantheraML has run on one yet, so compare a short run with another device"
                )
            if not current.quantizers and versions.get("bitsandbytes") is None and backend_of(current.facts).quantizers:
                advice.append("pip install bitsandbytes: models of up to four times the size fit with model.load_in_4bit=true")
            if current.measured is None and not current.facts.simulated:
                advice.append("pantheraml devices --bench: measure what this device really does, for choosing devices and for comparison")
        if self.disk_free_bytes is not None and self.disk_free_bytes < LITTLE_DISK_BYTES:
            advice.append(
                f"only {format_bytes(self.disk_free_bytes)} of disk are free for {self.runs_folder}/: set run.folder, or make room"
            )
        return tuple(advice)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        devices = [{"id": str(each.facts), "kind": each.facts.kind, **asdict(each)} for each in self.devices]
        derived = {"recommendations": list(self.recommendations), "problems": list(self.problems), "ok": not self.problems}
        return {**asdict(self), "devices": devices, **derived}

    def render(self, *, verbose: bool = False) -> RenderableType:
        """For rich's console."""
        from rich.console import Group
        from rich.text import Text

        devices = _table("Devices", "", "device", "name", "memory", "free", "speed", "an hour", "trains in")
        for each in self.devices:
            facts = each.facts
            mark = "*" if str(facts) == self.device else ""
            memory, free = format_bytes(each.memory.total_bytes), format_bytes(each.memory.free_bytes)
            steps = ", ".join(smoke.dtype for smoke in each.smoke if smoke.error is None) or "nothing"
            devices.add_row(mark, str(facts), Text(facts.label), memory, free, _speed(each), _dollars(each.price.usd_per_hour), steps)
        absent = _table("Absent", "not here", "why", "what would bring it")
        for one in self.absent:
            absent.add_row(one.kind, Text(one.why), Text(one.fix))
        parts: list[RenderableType] = [
            Text(f"Python {self.python} on {self.system}; {format_bytes(self.disk_free_bytes)} free for {self.runs_folder}/"),
            # Why the others were passed over stands in the table of what is absent.
            Text(f"In use: {self.device or 'nothing'}, {self.why.partition(' (')[0]}" if self.device else "In use: nothing"),
            devices,
            absent,
        ]
        if verbose:
            parts += [_details(self.devices)]
        parts += [_computed(self.devices), _packages((*self.basics, *self.optional) if verbose else self.basics)]
        parts += [Text(f"set by the environment: {name}={value}") for name, value in self.settings.items()]
        parts += [Text(f"advice: {advice}") for advice in self.recommendations]
        parts += [Text(f"note: {each.trouble}") for each in self.devices if each.trouble]
        parts += [Text(f"problem: {problem}", style="red") for problem in self.problems] or [Text("ready to train", style="green")]
        return Group(*parts)


def report(runs_folder: str = "runs", *, bench: bool = False) -> DoctorReport:
    """Look at everything. Takes about as long as importing torch, and with `bench` a few seconds more a device."""
    settings = read_settings()
    named = (settings.device_type or settings.prefer or "auto").strip().lower().partition(":")[0]
    inventory = detect(simulate_tpu=bool(settings.simulate_tpu), named=named)
    chosen: Device | None = None
    try:
        found = find(inventory=inventory)
        chosen, why = found.device, found.why
    except DeviceError as error:
        why = f"{error.what}: {error.why}"
    return DoctorReport(
        python=platform.python_version(),
        system=platform.platform(terse=True),
        device=None if chosen is None else str(chosen),
        why=why,
        devices=tuple(
            # The price of the settings is that of the device they choose.
            examine(device, settings.usd_per_hour if device == chosen else None, settings.cache, bench=bench)
            for device in inventory.devices
        ),
        absent=inventory.absent,
        basics=tuple(_package(name, name, "the basic installation", name) for name in BASICS),
        optional=tuple(_package(*row) for row in OPTIONAL),
        settings={name: str(value) for name, value in settings.model_dump(exclude_defaults=True).items()},
        runs_folder=runs_folder,
        disk_free_bytes=_disk_free(Path(runs_folder)),
    )


def examine(
    device: Device, own_usd_per_hour: float | None, cache: Path, *, bench: bool = False, backend: Backend | None = None
) -> Examined:
    """Ask a device everything. With `bench` its speed is measured and kept in `cache`."""
    backend = backend or backend_of(device)
    measured, trouble = None, None
    if device.dtypes and not device.simulated:
        measured = measure(backend, device) if bench else remembered(device, cache)
        if bench and measured:
            try:
                remember(measured, cache)
            except StorageError as error:
                trouble = f"{error.what}: {error.fix}"
    entry = None if device.simulated else lookup(device.kind, device.name, device.memory_bytes)
    peak = entry.flops.get(measured.dtype) if entry and measured else None
    bandwidth = entry.bandwidth_bytes_per_s if entry else None
    return Examined(
        facts=device,
        memory=backend.memory(device.index),
        telemetry=_told(backend, device),
        smoke=smoke_steps(backend, device),
        kernels=_kernels(device) if device.dtypes else {},  # nothing trains there
        quantizers=available(backend.quantizers),
        price=price_of(device, own_usd_per_hour),
        measured=measured,
        peak_share=measured.flops_per_s / peak if measured and peak else None,
        copy_share=measured.copy_bytes_per_s / bandwidth if measured and bandwidth else None,
        trouble=trouble,
    )


def _kernels(device: Device) -> dict[str, str]:
    """What computes each operation; without a compiler that is torch, where it would be our C++."""
    built = native.compiler() is not None
    return {
        name: target if built or not target.startswith(CPU_ROOM) else OPERATIONS[name].reference
        for name, target in installed(device.kind).items()
    }


def _told(backend: Backend, device: Device) -> Telemetry:
    """What the driver tells now. Load and power of some are means since the last question, so it is asked twice."""
    told = backend.telemetry(device.index)
    if None in (told.utilization, told.power_w):
        time.sleep(BETWEEN_S)
        told = backend.telemetry(device.index)
    return told


def smoke_steps(backend: Backend, device: Device) -> tuple[Smoke, ...]:
    """Two linear layers, forward, backward and an update, in each dtype of a device of torch: every gradient must be finite."""
    import torch

    if backend.engine != "torch":
        return ()  # its probe has multiplied matrices; to train, the process would have to take it
    steps: list[Smoke] = []
    for name in device.dtypes:
        error: str | None = None
        try:
            where = backend.torch_device(device.index)
            with torch.random.fork_rng(devices=()):  # the caller's random numbers stay as they are
                model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).to(where)
            with backend.autocast(getattr(torch, name)):
                loss = model(torch.ones(4, 64, device=where)).float().pow(2).mean()
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            with torch.no_grad():  # by hand: torch.optim would import the compiler, which takes a second
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
            backend.synchronize()
            if not all(grad is not None and bool(grad.isfinite().all()) for grad in gradients):
                error = "a gradient is not finite"
        except RuntimeError as raised:  # what torch raises when an operator or the driver fails
            error = str(raised).strip().splitlines()[0]
        steps.append(Smoke(device=str(device), dtype=name, error=error))
    return tuple(steps)


def _table(title: str, *columns: str) -> Table:
    """Without lines between the columns: they would take a fifth of a narrow terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _speed(each: Examined) -> str:
    measured = each.measured
    if measured:
        share = "" if each.peak_share is None else f", {each.peak_share:.0%} of its peak"
        return f"{measured.flops_per_s / 1e12:.3g} TFLOP/s in {measured.dtype}{share}; copies {measured.copy_bytes_per_s / 1e9:.3g} GB/s"
    probed = each.facts.peak_flops
    return "unknown" if probed is None else f"about {probed / 1e12:.2g} TFLOP/s in {each.facts.dtypes[0]}"


def _dollars(usd_per_hour: float | None) -> str:
    return "unknown" if usd_per_hour is None else f"${usd_per_hour:.2f}"


def _details(devices: tuple[Examined, ...]) -> RenderableType:
    """Everything else that is known of each device; what is unknown is left out."""
    from rich.text import Text

    table = _table("Details", "device", "what", "value")
    for each in devices:
        facts, told = each.facts, each.telemetry
        rows: dict[str, object] = {
            "capability": facts.capability,
            "cores": facts.cores,
            "topology": facts.topology,
            "memory in use": None if each.memory.used_bytes is None else format_bytes(each.memory.used_bytes),
            "memory reserved": None if each.memory.reserved_bytes is None else format_bytes(each.memory.reserved_bytes),
            "memory peak": None if each.memory.peak_bytes is None else format_bytes(each.memory.peak_bytes),
            "busy": None if told.utilization is None else f"{told.utilization:.0%}",
            "temperature": None if told.temperature_c is None else f"{told.temperature_c:.0f} C",
            "power": None if told.power_w is None else f"{told.power_w:.0f} W",
            "price": f"{_dollars(each.price.usd_per_hour)} an hour ({each.price.source})",
        }
        if each.measured:
            rows |= {
                "measured": f"{each.measured.date}, torch {each.measured.torch}, {each.measured.threads} threads",
                "matrix product": f"[{each.measured.matrix_size}, {each.measured.matrix_size}] in {each.measured.dtype}",
                "copy": f"{format_bytes(each.measured.copy_bytes)}"
                + ("" if each.copy_share is None else f", {each.copy_share:.0%} of its peak"),
                "from the host": None if each.measured.host_bytes_per_s is None else f"{each.measured.host_bytes_per_s / 1e9:.3g} GB/s",
                "launch": f"{each.measured.launch_s * 1e6:.3g} us",
            }
        for what, value in rows.items():
            if value is not None:
                table.add_row(str(facts), what, Text(str(value)))
    return table


def _computed(devices: tuple[Examined, ...]) -> RenderableType:
    table = _table("Kernels and quantizers", "operation", "device", "computed by")
    for each in {each.facts.kind: each for each in reversed(devices)}.values():
        for operation, function in each.kernels.items():
            table.add_row(operation, each.facts.kind, function.removeprefix("pantheraml."))
        if each.kernels:
            table.add_row("base in few bits", each.facts.kind, ", ".join(each.quantizers) or "not here")
    return table


def _packages(packages: tuple[Package, ...]) -> RenderableType:
    from rich.text import Text

    table = _table("Packages", "package", "version", "for", "install")
    for package in packages:
        install = "" if package.version else f"pip install {package.install}"
        table.add_row(package.name, package.version or "-", Text(package.needed_for), Text(install))
    return table


def _package(name: str, module: str, needed_for: str, install: str) -> Package:
    """Looked up, not imported: a broken package must not break the doctor."""
    try:
        found: str | None = version(name)
    except PackageNotFoundError:
        found = "without version" if find_spec(module) else None
    return Package(name=name, version=found, needed_for=needed_for, install=install)


def _disk_free(folder: Path) -> int | None:
    """Bytes free where the folder is, or would be made."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_dir():
            return shutil.disk_usage(place).free
    return None
