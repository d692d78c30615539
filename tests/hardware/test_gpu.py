"""What every GPU backend promises, asked of the real device where there is one."""

from __future__ import annotations

import pytest
import torch

from pantheraml.doctor import smoke_steps
from pantheraml.hardware.backend import Backend, open_backend
from pantheraml.hardware.device import Absent, Device
from pantheraml.hardware.failures import classify
from pantheraml.recipe.kinds import Kind

pytestmark = pytest.mark.gpu
MIB = 1 << 20


@pytest.fixture(params=["cuda", "xpu"])
def found(request: pytest.FixtureRequest) -> tuple[Backend, Device]:
    kind: Kind = request.param
    backend = open_backend(kind)
    answer = backend.probe()
    if isinstance(answer, Absent):
        pytest.skip(answer.why)
    return backend, answer[0]


def test_probe_describes_the_device(found: tuple[Backend, Device]) -> None:
    _, device = found
    assert 0 < device.free_bytes <= device.memory_bytes
    assert device.peak_flops is not None
    assert device.peak_flops > 1e11
    assert "float32" in device.dtypes


def test_the_device_takes_a_training_step(found: tuple[Backend, Device]) -> None:
    assert [smoke.error for smoke in smoke_steps(*found)] == [None] * len(found[1].dtypes)


def test_memory_sees_an_allocation_and_its_peak(found: tuple[Backend, Device]) -> None:
    backend, device = found
    where = backend.torch_device(device.index)
    backend.empty_cache()
    backend.reset_peak(device.index)
    before = backend.memory(device.index)
    block = torch.ones(64 * MIB // 4, device=where)
    during = backend.memory(device.index)
    del block
    after = backend.memory(device.index)
    assert during.used_bytes - before.used_bytes == 64 * MIB
    assert after.used_bytes == before.used_bytes
    assert after.peak_bytes >= before.used_bytes + 64 * MIB


def test_seed_repeats_what_the_device_draws(found: tuple[Backend, Device]) -> None:
    backend, device = found
    where = backend.torch_device(device.index)
    backend.seed(7)
    first = torch.rand(3, device=where)
    backend.seed(7)
    assert torch.equal(first, torch.rand(3, device=where))


def test_running_out_of_memory_is_recognised(found: tuple[Backend, Device]) -> None:
    backend, device = found
    with pytest.raises(RuntimeError) as caught:
        torch.empty(device.memory_bytes * 4, dtype=torch.uint8, device=backend.torch_device(device.index))
    assert classify(caught.value) == "out of memory"


def test_what_is_recorded_is_computed_anew_at_each_replay(found: tuple[Backend, Device]) -> None:
    backend, device = found
    record = backend.recorder(device.index)
    if record is None:
        pytest.skip(f"nothing is recorded on {device.kind}")
    where = backend.torch_device(device.index)
    x, weight = torch.ones(4, 8, device=where), torch.full((8, 8), 0.5, device=where, requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def compute() -> torch.Tensor:
        loss = (x @ weight).sum()
        loss.backward()
        return loss.detach()

    compute()
    weight.grad.zero_()
    result, replay = record(compute)
    for factor in (1.0, 3.0):
        weight.grad.zero_()
        x.fill_(factor)
        replay()
        assert result.item() == 4 * 8 * 8 * 0.5 * factor and weight.grad.eq(4 * factor).all()
