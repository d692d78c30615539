"""The C++ kernels of the CPU: built once with the compiler that is here, kept, and opened.

They are plain C functions that get addresses, so neither torch's headers nor its version matter, a build takes seconds, and the
threads are those that torch has already. Without a compiler the references in torch compute the same, only slower.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import blake3

_SOURCES = ("rows_cpu.cpp", "attention_cpu.cpp", "low_rank_cpu.cpp", "integer_cpu.cpp")
_HEADERS = ("vector_cpu.h", "product_cpu.h")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
_COMPILERS = ("c++", "g++", "clang++")
_FOLDER = Path("~/.cache/pantheraml")
_LONGEST_BUILD_S = 300


@dataclass
class _State:
    opened: ctypes.CDLL | None = None
    why_not: str | None = None
    folder: Path = field(default=_FOLDER)


_state = _State()


def opened() -> ctypes.CDLL | None:
    """The built kernels, built now if nobody has; None: `why_not()` says why."""
    if _state.opened is None and _state.why_not is None:
        prepare(_state.folder)
    return _state.opened


def why_not() -> str | None:
    """Why the kernels in torch are used; None: they are not, or nobody has tried yet."""
    return _state.why_not


def compiler() -> str | None:
    """Where a C++ compiler is here; None: there is none."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def prepare(folder: Path, say: Callable[[str], None] = lambda _: None) -> str | None:
    """Open the kernels that are kept in a folder, or build them there. Returns why that cannot be; None: they are open.

    Args:
        say: hears of a build, which takes some seconds, before it begins.
    """
    if _state.opened is not None:
        return None
    _state.folder = folder
    try:
        _state.opened, _state.why_not = _opened(folder.expanduser() / "kernels", say), None
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _state.why_not = said.strip().splitlines()[0][:200] if said.strip() else type(error).__name__
    return _state.why_not


def _opened(folder: Path, say: Callable[[str], None]) -> ctypes.CDLL:
    found = compiler()
    if found is None:
        raise OSError(f"there is no C++ compiler here ({', '.join(_COMPILERS)})")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    room = Path(__file__).parent
    texts = [(room / name).read_text(encoding="utf-8") for name in (*_SOURCES, *_HEADERS)]
    made_of = "\0".join((*texts, version, *_FLAGS, platform.machine(), _processor()))
    built = folder / f"{blake3.blake3(made_of.encode()).hexdigest()[:16]}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        say("Building the CPU kernels, once, with " + version.splitlines()[0] + ".")
        with tempfile.TemporaryDirectory(dir=folder) as private:  # two processes may build at once; each moves a whole file
            made = Path(private) / "kernels.so"
            command = [found, *_FLAGS, *(str(room / name) for name in _SOURCES), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LONGEST_BUILD_S)
            os.replace(made, built)
    # torch is open already, so the threads are found in the OpenMP that it brought.
    return ctypes.CDLL(str(built))


def _processor() -> str:
    """What this processor can do: code made for another one may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
