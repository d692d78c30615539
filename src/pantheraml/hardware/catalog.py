"""What vendors and clouds say of an accelerator: peak FLOP/s, memory, bandwidth, price, each with its source. Needs no torch.

Nothing here was measured on the device at hand. Peaks are dense (never the doubled figure for sparse matrices) and, where a
card is slower with float32 sums, those with float32 sums, because training uses them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from pantheraml.recipe.kinds import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One accelerator on paper; unknown is None, or a dtype that `flops` does not have.

    Attributes:
        name: the usual name. names: what drivers call it, as `lookup` spells it.
        memory_bytes: vendors print GB, their memory chips hold that many GiB; a driver reports about a tenth less at most.
        flops: operations per second by dtype: "float32" (no tensor cores), "tf32", "bfloat16", "float16", "fp8", "int8".
        usd_per_hour: on demand, for one device: the price of the instance divided by its devices.
        price_source: the cloud, the instance, and where its price was read; price_date: the day that it was true.
        source: where memory, bandwidth and FLOP/s were read; date: its edition, or else the day of reading (YYYY-MM-DD).
        link_bytes_per_s: to the other devices of its machine, in one direction, where each sends to all at that speed (NVLink through
            switches); read in https://github.com/stas00/ml-engineering/blob/0030e63/network/README.md. None: not known, or it depends on who talks to whom.
        cores: TensorCores of a TPU chip. JAX shows each as a device on v2, v3 and TPU7x; the figures of CATALOG are of the whole chip.
    """

    name: str
    kind: Kind
    names: tuple[str, ...]
    memory_bytes: int
    bandwidth_bytes_per_s: float | None
    flops: Mapping[str, float]
    usd_per_hour: float | None
    price_source: str | None
    price_date: str | None
    source: str
    date: str
    link_bytes_per_s: float | None = None
    cores: int | None = None


def lookup(kind: Kind, name: str, memory_bytes: int | None = None) -> Entry | None:
    """The entry for a device by the name that its driver, JAX or a TPU's environment gives it; None if there is none.

    Names are compared whole, so that a laptop GPU, a MIG slice or the next model is not taken for its namesake.

    Args:
        kind: a key of KINDS. name: "NVIDIA H100 80GB HBM3", "TPU v5 lite", "v5litepod-8".
        memory_bytes: what the driver reports. A part of a device that carries the name of the whole (a virtual GPU, an
            AMD partition) has less memory than its entry, and so none; a core of a TPU chip gets its share of the chip.
            None: the whole device is meant.
    """
    plain = _plain(name)
    for entry in CATALOG:
        if entry.kind == kind and plain in entry.names:
            if memory_bytes is None or _fits(entry, memory_bytes, 1):
                return entry
            if entry.cores and _fits(entry, memory_bytes, entry.cores):
                return _share(entry, entry.cores)
    return None


_MARKS = re.compile(r"\((?:r|tm)\)|[®™]", re.IGNORECASE)
_SLICE = re.compile(r"(v\d\w*|tpu\d\w*)-\d+")
_VENDORS = ("nvidia", "amd", "intel", "tesla")


def _plain(name: str) -> str:
    """Lower case, without trade marks, vendor, hyphens, and the size of a TPU slice: "Tesla V100-SXM2-16GB" is "v100 sxm2 16gb"."""
    low = _MARKS.sub(" ", name).casefold().strip()
    if size := _SLICE.fullmatch(low):
        return size[1]
    words = low.replace("-", " ").split()
    while words and words[0] in _VENDORS:
        words = words[1:]
    return " ".join(words)


def _fits(entry: Entry, memory_bytes: int, parts: int) -> bool:
    """Firmware, error correction and drivers keep about a tenth of the memory at most."""
    return 0.88 <= memory_bytes * parts / entry.memory_bytes <= 1.05


def _share(entry: Entry, parts: int) -> Entry:
    """One core of a TPU chip, where JAX shows each as a device."""
    return replace(
        entry,
        name=f"{entry.name} (one of {parts} cores)",
        memory_bytes=entry.memory_bytes // parts,
        bandwidth_bytes_per_s=None if entry.bandwidth_bytes_per_s is None else entry.bandwidth_bytes_per_s / parts,
        flops={dtype: flops / parts for dtype, flops in entry.flops.items()},
        usd_per_hour=None if entry.usd_per_hour is None else entry.usd_per_hour / parts,
        cores=1,
    )


class _Page(NamedTuple):
    """Where figures were read, and when they were true."""

    text: str
    date: str


class _Price(NamedTuple):
    usd_per_hour: float
    source: str
    date: str


# Editions are named by day or commit. The vendors' own pages stand in the text where they are quoted by another.
_TABLE = _Page(
    "product pages of NVIDIA and AMD, as tabled without sparsity and linked row by row in "
    "https://github.com/stas00/ml-engineering/blob/744d01e/compute/accelerator/README.md",
    "2026-08-22",
)
_A100 = _Page(
    "NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), as quoted in "
    "https://glennklockwood.com/garden/processors/A100 and https://www.thundercompute.com/blog/nvidia-a100-specs-full-guide",
    "2026-05-21",
)
_NVL = _Page(
    "https://www.nvidia.com/en-us/data-center/h100/, as quoted in https://github.com/pytorch/torchtitan (torchtitan/tools/utils.py) "
    "and, memory and bandwidth, in https://github.com/stas00/ml-engineering/blob/744d01e/compute/accelerator/README.md",
    "2026-08-22",
)
_SHEETS = _Page(
    "NVIDIA datasheets of L4, L40S and A10, as tabled in https://github.com/winston-zhang-orz/gpu-specs (specs.md)",
    "2025-02-28",
)
_OLDER = _Page(
    "NVIDIA datasheets of T4 (t4-tensor-core-datasheet-951643.pdf) and V100 (volta-v100-datasheet-update-us-1165301-r5.pdf), as quoted "
    "in https://github.com/Lightning-AI/pytorch-lightning (src/lightning/fabric/utilities/throughput.py); the T4's memory clock: "
    "https://sysrqmts.com/gpus; the V100's bandwidth: https://github.com/winston-zhang-orz/gpu-specs",
    "2026-11-21",
)
_P100 = _Page(
    "NVIDIA Tesla P100 datasheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-p100/pdf/"
    "nvidia-tesla-p100-PCIe-datasheet.pdf, as quoted by two tables of datasheets",
    "2026-11-21",
)
_A10G = _Page(
    "NVIDIA A10G datasheet, https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf, "
    "as quoted by a table of datasheets; bfloat16 is as fast as float16 on this generation",
    "2022-02-17",
)
_CARDS = _Page(
    "NVIDIA GeForce and RTX architecture papers, as tabled in https://waredb.com/processor/nvidia-geforce-rtx-4090, "
    "https://hmc-tech.com/gpus, https://www.codesota.com/hardware/rtx-5090 and https://github.com/VladislavDuma/gpu_specs",
    "2026-11-21",
)
_MI210 = _Page(
    "AMD Instinct MI210 data sheet, as quoted in https://github.com/bytedance/ByteMLPerf (byte_mlperf/backends/MIGRAPHX/README.md)",
    "2026-11-21",
)
_MAX = _Page(
    "computed: 1024 matrix engines x 512 operations a clock in 16 bits (Intel's oneAPI GPU Optimization Guide), half in TF32, twice in "
    "INT8, and 1024 vector engines x 32, at 1.6 GHz; clock, memory, bandwidth: https://glennklockwood.com/garden/processors/pvc",
    "2026-11-21",
)
_MAX_MEMORY = _Page("Intel Data Center GPU Max series, as tabled in https://github.com/junxnone/xwiki (issue 223)", "2023-03-17")
_B580 = _Page(
    "https://hmc-tech.com/gpu/intel-arc-b580-vs-intel-arc-a580 (INT4 matrix peak at 2.67 GHz; INT8 is half of it, 16 bits a quarter) "
    "and https://fpsbench.com/compare/gpu/intel-arc-b580-vs-intel-uhd-graphics-730",
    "2026-11-21",
)
_A770 = _Page("a table of Intel Arc cards, of 2025-11-25; its matrix types: https://intel.com (support article 000098346)", "2025-11-25")
_JAX = _Page("JAX's own table, https://github.com/jax-ml/jax (jax/_src/pallas/mosaic/tpu_info.py)", "2026-11-21")
_V5P = _Page(
    "Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/v5p; INT8: https://github.com/jax-ml/jax "
    "(jax/_src/pallas/mosaic/tpu_info.py)",
    "2026-11-21",
)


def _cloud_tpu(page: str) -> _Page:
    return _Page(f"Google Cloud documentation, https://docs.cloud.google.com/tpu/docs/{page}", "2026-11-21")


def _tpu_price(usd_per_chip_hour: float, region: str) -> _Price:
    listed = "https://cloud.google.com/tpu/pricing, as kept in https://github.com/dstackai/gpuhunt (src/gpuhunt/resources/tpu_pricing.json)"
    return _Price(usd_per_chip_hour, f"Google Cloud TPU, {region}, per chip: {listed}", "2024-12-23")


def _shared(devices: int) -> str:
    return "" if devices == 1 else f", {devices} devices"


def _aws(instance: str, usd_per_hour: float, devices: int) -> _Price:
    listed = "https://instances.vantage.sh, as kept in https://github.com/tsaol/aws-gpu/blob/77fcd9f/data/all_gpu_instances.js"
    return _Price(usd_per_hour / devices, f"AWS {instance}, us-east-1{_shared(devices)}: {listed}", "2026-01-21")


def _receipts(instance: str, usd_per_hour: float, devices: int) -> _Price:
    listed = "https://github.com/datareceipts/data-receipts (109-gpu-pricing)"
    return _Price(usd_per_hour / devices, f"{instance}{_shared(devices)}: {listed}", "2026-11-09")


def _runpod(product: str, usd_per_hour: float) -> _Price:
    listed = "https://www.runpod.io/pricing, as kept in https://github.com/Malaeu/nanoGPT-RH (docs/runpod_specs.md)"
    return _Price(usd_per_hour, f"Runpod {product} on demand: {listed}", "2026-01-01")


_AMD_RENT = "https://www.cliffcenter.com/research/amd-inference-economics"


def _entry(
    kind: Kind,
    name: str,
    names: tuple[str, ...],
    memory_gib: int,
    bandwidth_gb_per_s: float | None,
    flops: Mapping[str, float],
    page: _Page,
    price: _Price | None = None,
    *,
    link_gb_per_s: float | None = None,
    cores: int | None = None,
) -> Entry:
    return Entry(
        kind=kind,
        name=name,
        names=names,
        memory_bytes=memory_gib << 30,
        bandwidth_bytes_per_s=None if bandwidth_gb_per_s is None else bandwidth_gb_per_s * 1e9,
        flops=flops,
        usd_per_hour=price.usd_per_hour if price else None,
        price_source=price.source if price else None,
        price_date=price.date if price else None,
        source=page.text,
        date=page.date,
        link_bytes_per_s=None if link_gb_per_s is None else link_gb_per_s * 1e9,
        cores=cores,
    )


def _tera(**rates: float) -> dict[str, float]:
    return {dtype: rate * 1e12 for dtype, rate in rates.items()}


_HOPPER = _tera(float32=67, tf32=494.5, bfloat16=989, float16=989, fp8=1979, int8=1979)
_AMPERE = _tera(float32=19.5, tf32=156, bfloat16=312, float16=312, int8=624)
_VOLTA = _tera(float32=15.7, float16=125)
_VOLTA_PCIE = _tera(float32=14, float16=112)
_CDNA3 = _tera(float32=163.4, tf32=653.7, bfloat16=1307, float16=1307, fp8=2610, int8=2600)
_PVC = _tera(float32=52.43, tf32=419.4, bfloat16=838.9, float16=838.9, int8=1677.7)

_NVIDIA = (
    _entry(
        "cuda", "NVIDIA B200 SXM", ("b200",), 180, 8000,
        _tera(float32=80, tf32=1125, bfloat16=2250, float16=2250, fp8=4500, int8=4500), _TABLE, _aws("p6-b200.48xlarge", 113.9328, 8),
        link_gb_per_s=900,
    ),
    _entry("cuda", "NVIDIA H200 SXM", ("h200",), 141, 4800, _HOPPER, _TABLE, _aws("p5en.48xlarge", 63.296, 8), link_gb_per_s=450),
    _entry(
        "cuda", "NVIDIA H100 SXM", ("h100 80gb hbm3",), 80, 3350, _HOPPER, _TABLE,
        _receipts("AWS p5.48xlarge, us-east-1", 55.04, 8), link_gb_per_s=450,
    ),
    _entry(
        "cuda", "NVIDIA H100 PCIe", ("h100 pcie",), 80, 2000,
        _tera(float32=51, tf32=378, bfloat16=756, float16=756, fp8=1513, int8=1513), _TABLE,
        _receipts("Runpod H100 PCIe, Secure Cloud", 2.89, 1),
    ),
    # Its other rates were not found.
    _entry(
        "cuda", "NVIDIA H100 NVL", ("h100 nvl",), 94, 3900, _tera(bfloat16=835, float16=835), _NVL,
        _receipts("Azure Standard_NC40ads_H100_v5, eastus", 6.98, 1),
    ),
    _entry(
        "cuda", "NVIDIA A100 SXM 80 GB", ("a100 sxm4 80gb",), 80, 2039, _AMPERE, _A100,
        _receipts("AWS p4de.24xlarge, us-east-1", 27.44705, 8), link_gb_per_s=300,
    ),
    _entry(
        "cuda", "NVIDIA A100 SXM 40 GB", ("a100 sxm4 40gb",), 40, 1555, _AMPERE, _A100,
        _receipts("AWS p4d.24xlarge, us-east-1", 21.957642, 8), link_gb_per_s=300,
    ),
    _entry(
        "cuda", "NVIDIA A100 PCIe 80 GB", ("a100 80gb pcie",), 80, 1935, _AMPERE, _A100,
        _receipts("Azure Standard_NC24ads_A100_v4, eastus", 3.673, 1),
    ),
    _entry("cuda", "NVIDIA A100 PCIe 40 GB", ("a100 pcie 40gb",), 40, 1555, _AMPERE, _A100),
    _entry(
        "cuda", "NVIDIA L40S", ("l40s",), 48, 864,
        _tera(float32=91.6, tf32=183, bfloat16=362, float16=362, fp8=733, int8=733), _SHEETS, _aws("g6e.xlarge", 1.861, 1),
    ),
    _entry(
        "cuda", "NVIDIA L4", ("l4",), 24, 300,
        _tera(float32=30.3, tf32=60, bfloat16=121, float16=121, fp8=242, int8=242), _SHEETS, _aws("g6.xlarge", 0.8048, 1),
    ),
    _entry("cuda", "NVIDIA A10", ("a10",), 24, 600, _tera(float32=31.2, tf32=62.5, bfloat16=125, float16=125, int8=250), _SHEETS),
    _entry(
        "cuda", "NVIDIA A10G", ("a10g",), 24, 600, _tera(float32=35, tf32=35, bfloat16=70, float16=70), _A10G,
        _aws("g5.xlarge", 1.006, 1),
    ),
    _entry("cuda", "NVIDIA T4", ("t4",), 16, 320, _tera(float32=8.1, float16=65, int8=130), _OLDER, _aws("g4dn.xlarge", 0.526, 1)),
    _entry("cuda", "NVIDIA V100 SXM2 32 GB", ("v100 sxm2 32gb",), 32, 900, _VOLTA, _OLDER),
    _entry("cuda", "NVIDIA V100 SXM2 16 GB", ("v100 sxm2 16gb",), 16, 900, _VOLTA, _OLDER, _aws("p3.2xlarge", 3.06, 1)),
    _entry("cuda", "NVIDIA V100 PCIe 32 GB", ("v100 pcie 32gb",), 32, 900, _VOLTA_PCIE, _OLDER),
    _entry("cuda", "NVIDIA V100 PCIe 16 GB", ("v100 pcie 16gb",), 16, 900, _VOLTA_PCIE, _OLDER),
    _entry("cuda", "NVIDIA P100 PCIe 16 GB", ("p100 pcie 16gb",), 16, 732, _tera(float32=9.3, float16=18.7), _P100),
    _entry(
        "cuda", "NVIDIA GeForce RTX 5090", ("geforce rtx 5090",), 32, 1792,
        _tera(float32=104.8, tf32=104.8, bfloat16=209.5, float16=209.5, fp8=419, int8=838), _CARDS, _runpod("RTX 5090", 0.89),
    ),
    _entry(
        "cuda", "NVIDIA GeForce RTX 4090", ("geforce rtx 4090",), 24, 1008,
        _tera(float32=82.6, tf32=82.6, bfloat16=165.2, float16=165.2, fp8=330.3, int8=660.6), _CARDS, _runpod("RTX 4090", 0.59),
    ),
    _entry(
        "cuda", "NVIDIA GeForce RTX 3090", ("geforce rtx 3090",), 24, 936,
        _tera(float32=35.6, tf32=35.6, bfloat16=71.2, float16=71.2, int8=284), _CARDS,
        _Price(0.43, "Runpod RTX 3090, Secure Cloud: https://github.com/carsonpo/gpus/blob/d1e3f75/costs/runpod.md", "2025-07-13"),
    ),
    _entry(
        "cuda", "NVIDIA RTX 6000 Ada", ("rtx 6000 ada generation",), 48, 960,
        _tera(float32=91.1, tf32=182, bfloat16=364, float16=364, fp8=728, int8=728), _CARDS, _runpod("RTX 6000 Ada", 0.77),
    ),
)  # fmt: skip

_AMD = (
    _entry(
        "cuda", "AMD Instinct MI325X", ("instinct mi325x",), 256, 6000, _CDNA3, _TABLE,
        _Price(1.95, f"TensorWave MI325X: {_AMD_RENT}", "2026-05-18"),
    ),
    _entry(
        "cuda", "AMD Instinct MI300X", ("instinct mi300x", "instinct mi300x oam", "instinct mi300x vf"), 192, 5300, _CDNA3, _TABLE,
        _Price(1.85, f"Vultr MI300X: {_AMD_RENT}", "2026-05-18"),
    ),
    # The driver shows each half of an MI250X as a device of its own.
    _entry(
        "cuda", "AMD Instinct MI250X (one die of two)", ("instinct mi250x",), 64, 3280 / 2,
        _tera(float32=47.9 / 2, bfloat16=383 / 2, float16=383 / 2, int8=383 / 2), _TABLE,
    ),
    _entry("cuda", "AMD Instinct MI210", ("instinct mi210",), 64, 1600, _tera(float32=22.6, bfloat16=181, float16=181, int8=181), _MI210),
)  # fmt: skip

_INTEL = (
    _entry("xpu", "Intel Data Center GPU Max 1550", ("data center gpu max 1550",), 128, 3276.8, _PVC, _MAX),
    # By default the driver shows each half of a Max 1550 as a device, under the same name.
    _entry(
        "xpu", "Intel Data Center GPU Max 1550 (one stack of two)", ("data center gpu max 1550",), 64, 3276.8 / 2,
        {dtype: rate / 2 for dtype, rate in _PVC.items()}, _MAX,
    ),
    _entry("xpu", "Intel Data Center GPU Max 1100", ("data center gpu max 1100",), 48, None, {}, _MAX_MEMORY),
    _entry(
        "xpu", "Intel Arc B580", ("arc b580 graphics",), 12, 456,
        _tera(float32=13.67, bfloat16=109.4, float16=109.4, int8=218.7), _B580,
    ),
    _entry("xpu", "Intel Arc A770 16 GB", ("arc a770 graphics",), 16, 560, {}, _A770),
)  # fmt: skip

_TPU = (
    _entry("tpu", "Google TPU7x (Ironwood)", ("tpu7x",), 192, 7380, _tera(bfloat16=2307, fp8=4614), _cloud_tpu("tpu7x"), cores=2),
    _entry(
        "tpu", "Google TPU v6e (Trillium)", ("tpu v6 lite", "tpu v6e", "v6e"), 32, 1638,
        _tera(bfloat16=918, fp8=918, int8=1836), _cloud_tpu("v6e"), _tpu_price(2.70, "us-east5"), cores=1,
    ),
    _entry(
        "tpu", "Google TPU v5p", ("tpu v5", "tpu v5p", "v5p"), 95, 2765,
        _tera(bfloat16=459, fp8=459, int8=918), _V5P, _tpu_price(4.20, "us-east5"), cores=2,
    ),
    _entry(
        "tpu", "Google TPU v5e", ("tpu v5 lite", "tpu v5e", "v5litepod", "v5e"), 16, 819,
        _tera(bfloat16=197, int8=393), _cloud_tpu("v5e"), _tpu_price(1.20, "us-central1"), cores=1,
    ),
    _entry(
        "tpu", "Google TPU v4", ("tpu v4", "v4"), 32, 1200,
        _tera(bfloat16=275, int8=275), _cloud_tpu("v4"), _tpu_price(3.22, "us-central2"), cores=2,
    ),
    _entry(
        "tpu", "Google TPU v3", ("tpu v3", "v3"), 32, 900, _tera(bfloat16=123), _cloud_tpu("v3"), _tpu_price(2.20, "europe-west4"), cores=2,
    ),
    _entry("tpu", "Google TPU v2", ("tpu v2", "v2"), 16, 716, _tera(bfloat16=46), _JAX, _tpu_price(1.2375, "europe-west4"), cores=2),
)  # fmt: skip

CATALOG: tuple[Entry, ...] = _NVIDIA + _AMD + _INTEL + _TPU
"""Every entry; where two share a name, the whole device comes before its half."""
