"""The scripts run in any POSIX shell, ask no host by name, and pin what pyproject.toml asks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / ".ci" / "run", *(ROOT / "scripts" / name for name in ("setup", "test", "check", "demo"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_plain_sh_and_names_no_host(script):
    assert script.read_text().startswith("#!/bin/sh\n")
    assert os.access(script, os.X_OK)
    assert "://" not in script.read_text()
    subprocess.run([shutil.which("dash") or "sh", "-n", script], check=True)


def test_constraints_pin_what_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=!~ ]", each)[0].lower().replace("_", "-") for each in asked}
    lines = [line for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert names - {"torch", "triton"} <= pinned, "add the version that the tests ran on to scripts/constraints.txt"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    # Each torch asks for its own versions of these.
    assert not pinned & {"torch", "sympy", "networkx", "mpmath", "triton"}


@pytest.mark.parametrize(("main", "xla"), [(0, 0), (1, 0), (0, 1)])
def test_the_test_script_fails_when_either_suite_does(tmp_path, main, xla):
    """With a setup and a python of our own in its place, which end as they are told."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts" / "test")
    (tmp_path / "scripts" / "setup").write_text("exit 0\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *--ignore=tests/xla*) exit {main} ;; *) echo of XLA; exit {xla} ;; esac\n')
    python.chmod(0o755)
    done = subprocess.run([shutil.which("dash") or "sh", tmp_path / "scripts" / "test"], capture_output=True, text=True, check=False)
    assert done.returncode == max(main, xla), done.stderr
    assert "of XLA" in done.stdout
