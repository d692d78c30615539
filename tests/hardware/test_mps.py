"""Apple's GPU. On other machines only its absence can be tried, and that torch has what would be called."""

from __future__ import annotations

import ast
import re
from functools import reduce
from pathlib import Path

import pytest
import torch

from pantheraml.hardware import cuda, mps, xpu
from pantheraml.hardware.device import Absent
from pantheraml.hardware.mps import MpsBackend

ELSEWHERE = pytest.mark.skipif(torch.backends.mps.is_built(), reason="torch was built with MPS")


@ELSEWHERE
def test_a_torch_without_mps_says_so():
    absent = MpsBackend().probe()
    assert isinstance(absent, Absent) and absent.kind == "mps"
    assert absent.why.startswith(f"torch {torch.__version__} was built without MPS") and "Apple silicon" in absent.fix


def test_a_mac_without_a_gpu_for_metal_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    absent = MpsBackend().probe()
    assert isinstance(absent, Absent)
    assert "torch was built with MPS, but Metal offers it no GPU" in absent.why and "update macOS" in absent.fix


def test_there_is_one_and_it_takes_part_in_no_collective():
    backend = MpsBackend()
    assert str(backend.torch_device(0)) == "mps:0"
    with pytest.raises(ValueError, match="index 0, not 1"):
        backend.torch_device(1)
    assert (backend.collective, backend.quantizers, backend.engine, backend.static_shapes) == (None, (), "torch", False)


def test_autocast_is_that_of_the_device():
    with MpsBackend().autocast(torch.float32):
        assert not torch.is_autocast_enabled("mps")
    with MpsBackend().autocast(torch.bfloat16):
        assert torch.is_autocast_enabled("mps") and torch.get_autocast_dtype("mps") == torch.bfloat16


@pytest.mark.parametrize("module", [mps, cuda, xpu])
def test_torch_has_every_function_that_would_be_called(module):
    """What cannot be run here can at least be looked up."""
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text()))
    written = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    names = sorted(name for name in written if re.fullmatch(r"torch\.(backends\.mps|mps|cuda|xpu)\.\w+", name))
    assert len(names) > 5
    for name in names:
        reduce(getattr, name.split(".")[1:], torch)
