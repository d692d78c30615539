"""What NVIDIA's driver tells, asked of stand-ins that speak as the real ones do: a program on the PATH, and a library in C."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pantheraml.hardware import nvidia
from pantheraml.hardware.backend import Telemetry
from pantheraml.hardware.cuda import CudaBackend
from pantheraml.hardware.device import Absent, Seen
from pantheraml.hardware.nvidia import MIB, Listing, list_by_nvml, list_by_program, list_cards, telemetry

H100 = {
    "index": "0",
    "uuid": "GPU-7fdaf0a5-179b-f636-d15d-daf243e3ff16",
    "name": "NVIDIA H100 80GB HBM3",
    "memory.total": "81559",
    "memory.free": "81008",
    "compute_cap": "9.0",
    "mig.mode.current": "Disabled",
    "utilization.gpu": "86",
    "temperature.gpu": "45",
    "power.draw": "176.98",
}
# nvidia-smi on a GB10, whose memory is the processor's: it has no numbers for it.
GB10 = {
    **H100,
    "index": "1",
    "uuid": "GPU-22b2c6ac-2d49-4863-197c-9c469071178a",
    "name": "NVIDIA GB10",
    "memory.total": "[N/A]",
    "memory.free": "[N/A]",
    "compute_cap": "12.1",
    "mig.mode.current": "[N/A]",
    "utilization.gpu": "0",
    "temperature.gpu": "38",
    "power.draw": "4.26",
}
# A GTX 770: the driver answers most questions with words; the power of a card that fell off is an error.
OLD = {
    **H100,
    "name": "GeForce GTX 770",
    "memory.total": "2004",
    "memory.free": "2004",
    "utilization.gpu": "[Not Supported]",
    "temperature.gpu": "[Unknown Error]",
    "power.draw": "ERR!",
    "mig.mode.current": "[N/A]",
}


def program(folder: Path, source: str) -> str:
    """An executable nvidia-smi."""
    folder.mkdir(exist_ok=True)
    file = folder / "nvidia-smi"
    file.write_text(source)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def answering(folder: Path, *cards: dict[str, str], unknown: tuple[str, ...] = ()) -> str:
    """A program that prints the fields asked for, in their order, and refuses a field as the real one does."""
    (folder / "cards.json").write_text(json.dumps([cards, unknown]))
    return program(
        folder,
        f"""#!{sys.executable}
import json, sys
cards, unknown = json.load(open({str(folder / "cards.json")!r}))
(query,) = [word.split("=", 1)[1] for word in sys.argv if word.startswith("--query-gpu=")]
assert "--format=csv,noheader,nounits" in sys.argv
for field in query.split(","):
    if field in unknown:
        print(f'Field "{{field}}" is not a valid field to query.')
        print()
        sys.exit(2)
for card in cards:
    print(", ".join(card[field] for field in query.split(",")))
""",
    )


def saying(folder: Path, text: str, code: int) -> str:
    (folder / "said").write_text(text)
    return program(folder, f"#!/bin/sh\n{shutil.which('cat', path=os.defpath)} {folder / 'said'}\nexit {code}\n")


@pytest.fixture
def only_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without nvidia-ml-py, whose PATH is one empty folder."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


# ---- nvidia-smi --------------------------------------------------------------------------------------------------


def test_the_program_gives_facts_in_bytes_and_telemetry_in_si_units(tmp_path: Path):
    listing = list_by_program(answering(tmp_path, H100))
    assert listing.seen == (
        Seen(index=0, name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * MIB, free_bytes=81008 * MIB, capability="9.0"),
    )
    assert listing.cards[0].telemetry == Telemetry(utilization=0.86, temperature_c=45.0, power_w=176.98)
    assert (listing.source, listing.trouble, listing.words) == ("nvidia-smi", None, "NVIDIA H100 80GB HBM3 (80 GiB)")


def test_words_in_place_of_numbers_are_unknown(tmp_path: Path):
    listing = list_by_program(answering(tmp_path, OLD, GB10))
    assert listing.cards[0].telemetry == Telemetry()
    assert listing.seen[1] == Seen(index=1, name="NVIDIA GB10", capability="12.1")
    # Zero that the driver did say stays zero.
    assert listing.cards[1].telemetry == Telemetry(utilization=0.0, temperature_c=38.0, power_w=4.26)
    assert listing.words == "GeForce GTX 770 (2 GiB), NVIDIA GB10 (memory unknown)"


def test_of_a_gpu_cut_into_slices_only_the_temperature_holds(tmp_path: Path):
    sliced = {**H100, "mig.mode.current": "Enabled", "utilization.gpu": "[N/A]"}
    assert list_by_program(answering(tmp_path, sliced)).cards[0].telemetry == Telemetry(temperature_c=45.0)


def test_a_driver_that_does_not_know_a_field_is_asked_for_the_others(tmp_path: Path):
    listing = list_by_program(answering(tmp_path, H100, unknown=("compute_cap", "mig.mode.current")))
    assert listing.seen == (Seen(index=0, name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * MIB, free_bytes=81008 * MIB),)
    assert listing.cards[0].telemetry.power_w == 176.98


def test_a_name_may_have_a_comma(tmp_path: Path):
    assert list_by_program(answering(tmp_path, {**H100, "name": "Quadro, the second"})).seen[0].name == "Quadro, the second"


@pytest.mark.parametrize(
    ("text", "code", "trouble"),
    [
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is "
            "installed and running.\n\n",
            9,
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is "
            "installed and running.",
        ),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n",
            18,
            "Failed to initialize NVML: Driver/library version mismatch",
        ),
        ("No devices were found\n", 6, "No devices were found"),
        (
            "Unable to determine the device handle for GPU0000:B1:00.0: Unknown Error\n",
            255,
            "Unable to determine the device handle for GPU0000:B1:00.0: Unknown Error",
        ),
        ("", 127, "nvidia-smi answered nothing (exit code 127)"),
        ("\xff\xfe, garbage\n0, 1\n", 0, "ÿþ, garbage"),
    ],
)
def test_a_driver_that_is_broken_is_quoted(tmp_path: Path, text: str, code: int, trouble: str):
    assert list_by_program(saying(tmp_path, text, code)) == Listing(trouble=trouble)


def test_a_lost_gpu_does_not_hide_the_other(tmp_path: Path):
    columns = ["index", "uuid", "memory.total", "memory.free", "compute_cap", "mig.mode.current"]
    columns += ["utilization.gpu", "temperature.gpu", "power.draw", "name"]
    row = ", ".join(H100[column] for column in columns)
    listing = list_by_program(saying(tmp_path, f"{row}\nUnable to determine the device handle for GPU0000:B1:00.0: GPU is lost.\n", 15))
    assert [each.name for each in listing.seen] == ["NVIDIA H100 80GB HBM3"]
    assert listing.trouble == "Unable to determine the device handle for GPU0000:B1:00.0: GPU is lost."


def test_a_program_that_cannot_run_or_hangs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "nvidia-smi").write_text("not a program")
    assert list_by_program(str(tmp_path / "nvidia-smi")) == Listing(trouble="nvidia-smi cannot be run: Permission denied")
    monkeypatch.setattr(nvidia, "TIMEOUT_S", 0.2)
    hanging = program(tmp_path / "hangs", "#!/bin/sh\nexec sleep 60\n")
    assert list_by_program(hanging).trouble == "nvidia-smi did not answer within 0 s"


# ---- Who is asked ------------------------------------------------------------------------------------------------


def test_without_package_and_program_there_is_no_driver(only_the_program: Path):
    assert list_cards() == Listing()
    assert telemetry(H100["uuid"]) == Telemetry()


def test_the_program_is_found_on_the_path_and_the_gpu_by_its_uuid(only_the_program: Path):
    answering(only_the_program, {**OLD, "uuid": "GPU-00000000-0000-0000-0000-000000000000"}, {**H100, "index": "1"})
    assert [each.name for each in list_cards().seen] == ["GeForce GTX 770", "NVIDIA H100 80GB HBM3"]
    # Torch that sees only the second calls it 0, and writes the UUID without "GPU-".
    for name in (H100["uuid"], H100["uuid"].removeprefix("GPU-")):
        assert telemetry(name) == Telemetry(utilization=0.86, temperature_c=45.0, power_w=176.98)
    assert telemetry("feb88891-0321-5fef-9c87-d4af3b54259e") == Telemetry()


WITHOUT_CUDA = pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="torch was built with CUDA")


@WITHOUT_CUDA
def test_a_torch_without_cuda_says_what_it_leaves_unused(only_the_program: Path):
    answering(only_the_program, H100, {**H100, "index": "1"})
    absent = CudaBackend().probe()
    assert isinstance(absent, Absent)
    assert absent.why == f"the driver lists 2 x NVIDIA H100 80GB HBM3 (80 GiB), but torch {torch.__version__} was built without CUDA"
    assert absent.fix.startswith("install the CUDA build of torch") and [each.index for each in absent.seen] == [0, 1]


@WITHOUT_CUDA
def test_a_torch_without_cuda_tells_a_broken_driver_from_none(only_the_program: Path):
    none = CudaBackend().probe()
    assert isinstance(none, Absent) and none.why.endswith("was built without CUDA, and no NVIDIA driver was found") and none.seen == ()
    saying(only_the_program, "No devices were found\n", 6)
    broken = CudaBackend().probe()
    assert isinstance(broken, Absent) and broken.why.endswith("NVIDIA's driver lists no GPU: No devices were found")
    assert broken.fix.startswith("repair the driver") and broken.seen == ()


# ---- NVML --------------------------------------------------------------------------------------------------------

# NVML's functions as its header declares them, for two GPUs: an H100, and an A100 cut into slices that has fallen silent on power.
LIBRARY = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } rates_t;
static int cards[2] = {0, 1};
static int which(void *handle) { return *(int *)handle; }
static const char *uuids[2] = {"GPU-7fdaf0a5-179b-f636-d15d-daf243e3ff16", "GPU-e9ba38ab-3da6-4a9c-b3b0-2f0d4b0d7f5c"};
int nvmlInitWithFlags(unsigned int flags) { return STATE; }
int nvmlInit_v2(void) { return STATE; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "Unknown Error"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) { if (index > 1) return 15; *handle = &cards[index]; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (int i = 0; i < 2; i++) if (!strcmp(uuid, uuids[i])) { *handle = &cards[i]; return 0; }
    return 6;
}
int nvmlDeviceGetName(void *h, char *name, unsigned int size) {
    strcpy(name, which(h) ? "NVIDIA A100-SXM4-80GB" : "NVIDIA H100 80GB HBM3"); return 0;
}
int nvmlDeviceGetUUID(void *h, char *uuid, unsigned int size) { strcpy(uuid, uuids[which(h)]); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory_t *m) {
    if (which(h)) return 3;
    m->total = 85520809984ULL; m->free = 84942651392ULL; m->used = m->total - m->free; return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) { *major = which(h) ? 8 : 9; *minor = 0; return 0; }
int nvmlDeviceGetUtilizationRates(void *h, rates_t *r) { if (which(h)) return 3; r->gpu = 97; r->memory = 41; return 0; }
int nvmlDeviceGetTemperature(void *h, int sensor, unsigned int *t) { if (sensor) return 2; *t = which(h) ? 33 : 61; return 0; }
int nvmlDeviceGetPowerUsage(void *h, unsigned int *milliwatts) { *milliwatts = which(h) ? 87123 : 642500; return 0; }
int nvmlDeviceGetMigMode(void *h, unsigned int *current, unsigned int *pending) {
    *current = *pending = which(h); return 0;
}
"""
ASK = """
import json, sys
from dataclasses import asdict
from pantheraml.hardware import nvidia
listing = nvidia.list_cards()
print(json.dumps([asdict(listing), [asdict(nvidia.telemetry(uuid)) for uuid in sys.argv[1:]], "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    for state, code in (("sound", 0), ("mismatch", 18)):
        (folder / state).mkdir()
        source = folder / f"{state}.c"
        source.write_text(LIBRARY)
        library = folder / state / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", f"-DSTATE={code}", "-o", str(library), str(source)], check=True)
    return folder


def asked(libraries: Path, *uuids: str) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PATH": str(libraries)}
    done = subprocess.run([sys.executable, "-c", ASK, *uuids], capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_library_gives_facts_and_telemetry_without_torch(libraries: Path):
    pytest.importorskip("pynvml")
    listing, (first, second, nobody), loaded_torch = asked(
        libraries / "sound",
        "7fdaf0a5-179b-f636-d15d-daf243e3ff16",
        "GPU-e9ba38ab-3da6-4a9c-b3b0-2f0d4b0d7f5c",
        "MIG-feb88891-0321-5fef-9c87-d4af3b54259e",
    )
    assert not loaded_torch and listing["source"] == "NVML"
    assert [card["seen"] for card in listing["cards"]] == [
        {"index": 0, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85520809984, "free_bytes": 84942651392, "capability": "9.0"},
        {"index": 1, "name": "NVIDIA A100-SXM4-80GB", "memory_bytes": None, "free_bytes": None, "capability": "8.0"},
    ]
    assert listing["trouble"] == "GPU 2 does not answer"
    assert first == {"utilization": 0.97, "temperature_c": 61.0, "power_w": 642.5}
    assert second == {"utilization": None, "temperature_c": 33.0, "power_w": None}
    assert nobody == {"utilization": None, "temperature_c": None, "power_w": None}


def test_a_library_that_does_not_fit_the_driver_is_quoted(libraries: Path):
    pytest.importorskip("pynvml")
    listing, (of_nobody,), _ = asked(libraries / "mismatch", "7fdaf0a5-179b-f636-d15d-daf243e3ff16")
    assert (listing["cards"], listing["trouble"]) == ([], "RM has detected an NVML/RM version mismatch.")  # pynvml's words for 18
    assert of_nobody == {"utilization": None, "temperature_c": None, "power_w": None}


def test_the_real_package_on_a_machine_without_a_driver():
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        assert list_by_nvml() == Listing()
    except pynvml.NVMLError as error:
        assert list_by_nvml() == Listing(trouble=str(error))
    else:
        listing = list_by_nvml()
        assert len(listing.cards) == pynvml.nvmlDeviceGetCount()
        for card in listing.cards:
            assert card.uuid and telemetry(card.uuid).temperature_c


# ---- A real one --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_real_driver_tells_the_same_both_ways_and_what_torch_tells():
    backend = CudaBackend()
    devices = backend.probe()
    if isinstance(devices, Absent) or torch.version.hip is not None:
        pytest.skip("no NVIDIA GPU that answers")
    smi = shutil.which("nvidia-smi")
    ways = [way for way in (list_by_nvml(), list_by_program(smi) if smi else Listing()) if way.cards]
    assert ways, "torch computes on a GPU that no driver lists"
    for way in ways:
        assert [(card.uuid, card.seen.name, card.seen.capability) for card in way.cards] == [
            (card.uuid, card.seen.name, card.seen.capability) for card in ways[0].cards
        ]
    by_uuid = {card.uuid: card for card in ways[0].cards}
    for device in devices:
        uuid = str(torch.cuda.get_device_properties(device.index).uuid)
        major, minor = torch.cuda.get_device_capability(device.index)
        assert device.capability == f"{major}.{minor}" and device.cores
        told = backend.telemetry(device.index)
        # Above a cold room, and below where a chip switches itself off.
        assert told.temperature_c is None or 5 < told.temperature_c < 110
        assert told.utilization is None or 0 <= told.utilization <= 1
        assert told.power_w is None or 1 < told.power_w < 2000
        if card := by_uuid.get(f"GPU-{uuid}"):
            assert (card.seen.name, card.seen.capability) == (device.name, device.capability)
            assert card.seen.memory_bytes is None or abs(card.seen.memory_bytes / device.memory_bytes - 1) < 0.05
            assert told.temperature_c is not None
