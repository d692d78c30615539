"""Importing is free: it loads no torch where none is needed, and changes nothing in the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "pyarrow")


def modules() -> list[str]:
    """Every module that decides, and so needs no torch."""
    rooms = ["recipe", "planning"]
    files = [SRC / "pantheraml/__init__.py", SRC / "pantheraml/errors.py", SRC / "pantheraml/hardware/device.py"]
    files += [
        SRC / "pantheraml/hardware/select.py",
        *(file for room in rooms for file in sorted((SRC / "pantheraml" / room).rglob("*.py"))),
    ]
    return [".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__") for file in files]


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)


# One process for all: the first module after which something is different is the one that did it.
IMPORT_EACH = """
import importlib, json, os, signal, sys
heavy, names = sys.argv[1].split(","), sys.argv[2:]
def state():
    return [dict(os.environ), [name for name in heavy if name in sys.modules], os.getcwd(), [str(signal.getsignal(s)) for s in (2, 15)]]
before, changed = state(), []
for name in names:
    importlib.import_module(name)
    if state() != before:
        changed.append([name, [b for a, b in zip(before, state()) if a != b]])
        before = state()
print(json.dumps(changed))
"""


def test_importing_what_decides_loads_no_torch_and_changes_nothing():
    done = run(IMPORT_EACH, ",".join(HEAVY), *modules())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


HELP = """
import json, sys
from pantheraml.cli import main
heavy, sys.argv = sys.argv[1].split(","), ["pantheraml", *sys.argv[2:]]
try:
    main()
except SystemExit as stop:
    code = stop.code
else:
    code = 0
print("\\n" + json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(words):
    done = run(HELP, ",".join(HEAVY), *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert "Usage" in done.stdout
