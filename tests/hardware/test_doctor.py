from __future__ import annotations

import io
import json

from rich.console import Console
from tests.fakes import FakeBackend, fake_device

from pantheraml.doctor import DoctorReport, report, smoke_steps
from pantheraml.hardware.cpu import CpuBackend
from pantheraml.hardware.device import Inventory


def test_a_cpu_alone_is_a_pass() -> None:
    seen = report()
    assert seen.problems == ()
    assert {(smoke.device, smoke.dtype, smoke.error) for smoke in seen.smoke} >= {("cpu:0", "float32", None), ("cpu:0", "bfloat16", None)}
    assert json.loads(json.dumps(seen.to_dict()))["ok"] is True


def test_render_says_what_is_missing_and_how_to_get_it() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    seen = report()
    console.print(seen.render())
    text = console.export_text()
    assert "cpu:0" in text
    assert "ready to train" in text
    assert "linear_cross_entropy" in text
    for package in seen.optional:
        assert package.name in text
        # An extra in brackets is not read as markup.
        assert package.version or f"pip install {package.install}" in text
    for absent in seen.inventory.absent:
        assert absent.kind in text


def test_a_dtype_that_does_not_train_is_a_problem() -> None:
    class Broken(FakeBackend):
        def synchronize(self) -> None:
            raise RuntimeError("the device is lost")

    device = fake_device("cuda", dtypes=("float32",))
    (smoke,) = smoke_steps(Broken(), device)
    assert smoke.error == "the device is lost"
    seen = DoctorReport(
        python="3",
        system="x",
        basics=(),
        optional=(),
        inventory=Inventory(devices=(device,)),
        smoke=(smoke,),
        runs_folder="runs",
        disk_free_bytes=None,
    )
    assert seen.problems == ("cuda:0 does not train in float32: the device is lost",)


def test_smoke_leaves_the_callers_random_numbers_alone() -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    smoke_steps(CpuBackend(), fake_device("cpu"))
    assert torch.equal(torch.rand(1), expected)
