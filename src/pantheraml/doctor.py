"""What is here, what is not and why, and whether each device can take a training step. A CPU alone is a pass."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.hardware.backend import Backend, open_backend
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Device, Inventory
from pantheraml.kernels.table import installed
from pantheraml.planning.memory import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

BASICS = ("torch", "transformers", "peft", "tokenizers", "safetensors")

# distribution, module, what it is for, what pip installs
OPTIONAL = (
    ("bitsandbytes", "bitsandbytes", "model.load_in_4bit", "bitsandbytes"),
    ("flash-attn", "flash_attn", "model.attention=flash_attention_2 on CUDA", "flash-attn --no-build-isolation"),
    ("datasets", "datasets", "data from the Hub", "pantheraml[hub]"),
    ("xllamacpp", "xllamacpp", "checking exported GGUF files by running them", "xllamacpp"),
    ("llama-cpp-python", "llama_cpp", "checking exported GGUF files by running them", "pantheraml[gguf]"),
    ("tensorboard", "tensorboard", "run.reporters=tensorboard", "tensorboard"),
    ("trackio", "trackio", "run.reporters=trackio", "trackio"),
    ("wandb", "wandb", "run.reporters=wandb", "wandb"),
)


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
class DoctorReport:
    """Everything the doctor saw. Missing options are not problems; a device that cannot train is one."""

    python: str
    system: str
    basics: tuple[Package, ...]
    optional: tuple[Package, ...]
    inventory: Inventory
    smoke: tuple[Smoke, ...]
    runs_folder: str
    disk_free_bytes: int | None
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    """Kind of device -> operation -> the function that would compute it."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps training from working; empty: all is well."""
        missing = [f"{package.name} is not installed: pip install {package.install}" for package in self.basics if package.version is None]
        broken = [f"{smoke.device} does not train in {smoke.dtype}: {smoke.error}" for smoke in self.smoke if smoke.error]
        return (*missing, *broken, *(() if self.inventory.devices else ("no device answered",)))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "problems": list(self.problems), "ok": not self.problems}

    def render(self) -> RenderableType:
        """For rich's console."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        devices = Table("device", "name", "memory", "free", "measured", "trains in", title="Devices", title_justify="left")
        for device in self.inventory.devices:
            speed = "unknown" if device.peak_flops is None else f"{device.peak_flops / 1e12:.2g} TFLOP/s in {device.dtypes[0]}"
            steps = [smoke.dtype for smoke in self.smoke if smoke.device == str(device) and smoke.error is None]
            memory, free = format_bytes(device.memory_bytes), format_bytes(device.free_bytes)
            devices.add_row(str(device), device.name, memory, free, speed, ", ".join(steps) or "nothing")
        absent = Table("not here", "why", "what would bring it", title="Absent", title_justify="left")
        for one in self.inventory.absent:
            absent.add_row(one.kind, Text(one.why), Text(one.fix))
        packages = Table("package", "version", "for", "install", title="Packages", title_justify="left")
        for package in (*self.basics, *self.optional):
            install = "" if package.version else f"pip install {package.install}"
            packages.add_row(package.name, package.version or "-", Text(package.needed_for), Text(install))
        kernels = Table("operation", "device", "computed by", title="Kernels", title_justify="left")
        for kind, operations in self.kernels.items():
            for operation, function in operations.items():
                kernels.add_row(operation, kind, function.removeprefix("pantheraml."))
        disk = f"{format_bytes(self.disk_free_bytes)} free for {self.runs_folder}/"
        verdict = [Text(f"problem: {problem}", style="red") for problem in self.problems] or [Text("ready to train", style="green")]
        return Group(Text(f"Python {self.python} on {self.system}; {disk}"), devices, absent, kernels, packages, *verdict)


def report(runs_folder: str = "runs") -> DoctorReport:
    """Look at everything. Takes a few seconds: torch is imported and each device computes."""
    inventory = detect()
    return DoctorReport(
        python=platform.python_version(),
        system=platform.platform(terse=True),
        basics=tuple(_package(name, name, "the basic installation", name) for name in BASICS),
        optional=tuple(_package(*row) for row in OPTIONAL),
        inventory=inventory,
        smoke=tuple(step for device in inventory.devices for step in smoke_steps(open_backend(device.kind), device)),
        runs_folder=runs_folder,
        disk_free_bytes=_disk_free(Path(runs_folder)),
        kernels={kind: installed(kind) for kind in dict.fromkeys(device.kind for device in inventory.devices)},
    )


def smoke_steps(backend: Backend, device: Device) -> tuple[Smoke, ...]:
    """Two linear layers, forward, backward and AdamW, in each dtype of the device: the loss and every gradient must be finite."""
    import torch

    steps: list[Smoke] = []
    where = backend.torch_device(device.index)
    for name in device.dtypes:
        error: str | None = None
        try:
            with torch.random.fork_rng(devices=()):  # the caller's random numbers stay as they are
                model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).to(where)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            with backend.autocast(getattr(torch, name)):
                loss = model(torch.ones(4, 64, device=where)).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            backend.synchronize()
            gradients = [parameter.grad for parameter in model.parameters()]
            if not all(grad is not None and bool(grad.isfinite().all()) for grad in gradients):
                error = "a gradient is not finite"
        except RuntimeError as raised:  # what torch raises when an operator or the driver fails
            error = str(raised).strip().splitlines()[0]
        steps.append(Smoke(device=str(device), dtype=name, error=error))
    return tuple(steps)


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
