"""What errors mean, by texts that people really met, and by errors that are raised here."""

from __future__ import annotations

import errno
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from pantheraml.errors import DeviceError
from pantheraml.hardware.failures import ROWS, FailureKind, classify


def made(line: str) -> BaseException:
    """An error that prints as this line of a traceback does: "module.Type: message"."""
    name, message = re.fullmatch(r"([\w.]+): (.*)", line, re.DOTALL).groups()
    module, _, kind = name.rpartition(".")
    if not module:
        known = {"RuntimeError": RuntimeError, "ValueError": ValueError, "MemoryError": MemoryError}
        return known.get(kind, type(kind, (RuntimeError,), {"__module__": "elsewhere"}))(message)
    return type(kind, (RuntimeError,), {"__module__": module})(message)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.example[:60])
def test_each_row_knows_its_example_and_is_needed_for_it(row):
    error = made(row.example)
    assert classify(error) == row.kind
    line = f"{type(error).__module__}.{type(error).__qualname__}: {error}".removeprefix("builtins.")
    # The first that fits is this one: a row whose example another one takes says nothing.
    assert next(each for each in ROWS if re.search(each.pattern, line)) is row
    assert row.source


# Texts beside the examples of the table, each as somebody met it.
OTHER_WORDS: list[tuple[FailureKind, str]] = [
    (
        "out of memory",  # pytorch/pytorch#16417
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which "
        "11.06 MiB is free. Including non-PyTorch memory, this process has 23.60 GiB memory in use.",
    ),
    (
        "out of memory",  # huggingface/autotrain-advanced#737
        "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 124.00 MiB. GPU 0 has a total capacity of 19.94 GiB of which "
        "554.47 MiB is free. Of the allocated memory 15.87 GiB is allocated by PyTorch, and 165.29 MiB is reserved by PyTorch but unallocated.",
    ),
    (
        "out of memory",  # intel/torch-xpu-ops#1324
        "torch.OutOfMemoryError: XPU out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 16.50 GiB. Of the "
        "allocated memory 16.50 GiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated.",
    ),
    (
        "out of memory",  # intel/intel-extension-for-pytorch#629
        "RuntimeError: XPU out of memory. Tried to allocate 1.71 GiB (GPU 0; 15.56 GiB total capacity; 0 bytes already allocated; "
        "0 bytes reserved in total by PyTorch)",
    ),
    ("out of memory", "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),  # KupynOrest/DeblurGAN#128
    (
        "out of memory",  # Comfy-Org/ComfyUI#7440
        "RuntimeError: MPS backend out of memory (MPS allocated: 9.57 GiB, other allocations: 17.35 GiB, max allowed: 27.20 GiB). "
        "Tried to allocate 292.50 MiB on private pool.",
    ),
    (
        "out of memory",  # lllyasviel/Fooocus#237
        r"RuntimeError: [enforce fail at ..\c10\core\impl\alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you tried to "
        "allocate 26214400 bytes.",
    ),
    (
        "out of memory",  # patrickbryant1/AFProfile#8
        "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\n"
        "BufferAssignment OOM Debugging.",
    ),
    (
        "out of memory",  # huggingface/diffusers#8358
        "ValueError: RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 196.00M. That was not possible. "
        "There are 60.94M free.; (0x0x0_HBM0)",
    ),
    (
        "out of memory",  # pytorch/xla#8020
        "RuntimeError: Bad StatusOr access: RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 196.00M. That was "
        "not possible. There are 134.44M free.; (1x0x0_HBM0): while running replica 0 and partition 0 of a replicated computation",
    ),
    (
        "out of memory",  # pytorch/xla#4847
        "RuntimeError: RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 7.04G at the bottom of memory. That was not "
        "possible. There are 6.90G free, 0B reserved, and 6.90G reservable.",
    ),
    (
        "out of memory",  # google-deepmind/jax_privacy#10, and mesh-transformer-jax#66 for the older spelling
        "XlaRuntimeError: RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0",
    ),
    ("out of memory", "RuntimeError: Resource exhausted: Failed to allocate request for 32.00MiB (33554432B) on device ordinal 0"),
    (
        "out of memory",  # a compiler that ran out itself: the text of torch 2.13 on a CPU
        "torch._dynamo.exc.BackendCompilerFailed: backend='backend2' raised:\nRuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. "
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
    ),
    ("compilation", "ValueError: Mosaic failed to compile TPU kernel: Not Implemented: The last dim size is not 128"),  # jax-ml/jax#29520
    (
        "compilation",  # vllm-project/vllm#12498
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 66560, Hardware limit: 65536. Reducing block "
        "sizes or `num_stages` may help.",
    ),
    ("compilation", "RuntimeError: HIP error: no kernel image is available for execution on the device"),  # autotrain-advanced#737
    ("device lost", "RuntimeError: CUDA error: unspecified launch failure"),  # opendatalab/MinerU#426: the card was broken
    ("device lost", "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),  # vllm-project/vllm#39373
    (
        "device lost",  # ROCm/legacy-rocm-build#5742
        "torch.AcceleratorError: HIP error: an illegal memory access was encountered\nSearch for `hipErrorIllegalAddress' in "
        "https://rocm.docs.amd.com/projects/HIP/en/latest/index.html for more information.",
    ),
    (
        "communication",  # pytorch/pytorch#75512
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [18.25.6.30]:28048",
    ),
    (
        "communication",  # RVC-Project/Retrieval-based-Voice-Conversion-WebUI#1882
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:589] Read error [192.168.70.92]:25266: Connection reset by peer",
    ),
    ("communication", "RuntimeError: Application timeout caused pair closure"),  # torch 2.13, the next use after a timeout
    (
        "communication",  # vllm-project/vllm#10523
        "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1333, unhandled system "
        "error (run with NCCL_DEBUG=INFO for details), NCCL version 2.18.1",
    ),
    (
        "version counter",  # torch 2.13
        "RuntimeError: Inference tensors cannot be saved for backward. Please do not use Tensors created in inference mode in computation "
        "tracked by autograd.",
    ),
]


@pytest.mark.parametrize(("kind", "line"), OTHER_WORDS, ids=[line[:60] for _, line in OTHER_WORDS])
def test_other_words_for_the_same(kind: FailureKind, line: str):
    assert classify(made(line)) == kind


# What mentions memory, devices or versions, and is none of it.
LOOKALIKES = [
    "RuntimeError: DataLoader worker (pid 46794) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.",  # hkchengrex/STCN#132
    "RuntimeError: CUDA error: too many resources requested for launch",  # cudaErrorLaunchOutOfResources
    "RuntimeError: CUDA error: device-side assert triggered",  # pytorch/pytorch#48530: the program's own index
    "RuntimeError: CUDA error: invalid device ordinal",
    "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    # Raised with memory to spare, and after it even good tensors cannot be read (intel/torch-xpu-ops#1324, #1526).
    "RuntimeError: UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    # oneDNN has no kernel for it: torch 2.13 on a CPU, of a product in float8.
    "RuntimeError: could not create a primitive descriptor for the inner product forward propagation primitive. Run workload with "
    "environment variable ONEDNN_VERBOSE=all to get additional diagnostic information.",
    "RuntimeError: could not create a primitive descriptor for a reorder primitive",  # an older oneDNN, under PaddleOCR
    "RuntimeError: Could not initialize NNPACK! Reason: Out of memory.",  # torch says so in a warning, and does without
    "RuntimeError: RESOURCE_EXHAUSTED: Received message larger than max (4194400 vs. 4194304)",  # gRPC
    "RuntimeError: RESOURCE_EXHAUSTED: Quota exceeded for quota metric",
    "RuntimeError: required rank 4 tensor to use channels_last format; the memory format is not supported",
    "RuntimeError: unsupported memory format option Preserve",
    "RuntimeError: some elements of the input tensor and the written-to tensor refer to a single memory location",
    "ValueError: the answer to 'what is CUDA out of memory?' has no label",
    "RuntimeError: Placeholder buffer size is not large enough to contain the Tensor storage of size",  # pytorch/pytorch#78042
    "RuntimeError: Unable to initialize backend 'tpu': UNAVAILABLE: No TPU Platform available.",
    "RuntimeError: Backend 'tpu' failed to initialize: INTERNAL: Failed to open libtpu.so: libtpu.so: cannot open shared object file",
    "RuntimeError: INTERNAL: YNNPACK operation failed: error",  # jax 0.10 on a CPU
    "RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation: "
    "[torch.FloatTensor [3]], which is output 0 of Add, is at version 1; expected version 0 instead.",
    "RuntimeError: Storage size calculation overflowed with sizes=[4611686018427387904, 4]",
    "RuntimeError: shapes do not match",
]


@pytest.mark.parametrize("line", LOOKALIKES, ids=[line[:70] for line in LOOKALIKES])
def test_lookalikes_are_something_else(line: str):
    assert classify(made(line)) == "other"


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def compiled(backend) -> None:
    torch.compile(lambda x: x * 2, backend=backend)(torch.ones(2))


def broken_backend(graph, inputs):
    raise ValueError("boom")


# Raised here, by the libraries that are here: (what does it, kind).
RAISED = {
    "cpu": (lambda: torch.empty(1 << 52, dtype=torch.uint8), "out of memory"),
    "numpy": (lambda: np.empty(1 << 50, dtype=np.uint8), "out of memory"),
    "python": (lambda: bytearray(1 << 60), "out of memory"),
    "in place": (lambda: inference_tensor().add_(1), "version counter"),
    "version": (lambda: inference_tensor()._version, "version counter"),
    "saved": (lambda: (torch.ones(3, requires_grad=True) * inference_tensor()).sum().backward(), "version counter"),
    "requires_grad": (lambda: inference_tensor().requires_grad_(True), "version counter"),
    "a compiler": (lambda: compiled(broken_backend), "compilation"),
    "a compiler short of memory": (lambda: compiled(lambda graph, inputs: torch.empty(1 << 52, dtype=torch.uint8)), "out of memory"),
    "shapes": (lambda: torch.ones(2) @ torch.ones(3), "other"),
}


@pytest.mark.parametrize("name", RAISED)
def test_errors_that_are_raised_here(name: str):
    work, kind = RAISED[name]
    with pytest.raises(Exception) as caught:
        work()
    assert classify(caught.value) == kind


def test_a_peer_that_is_not_there_is_communication():
    from datetime import timedelta

    with pytest.raises(RuntimeError) as caught:
        torch.distributed.TCPStore("127.0.0.1", 1, 2, is_master=False, timeout=timedelta(milliseconds=200))
    assert classify(caught.value) == "communication"


# In a process of its own: what imports jax here would change how other tests find a TPU.
XLA = """
import jax
from pantheraml.hardware.failures import classify
try:
    jax.numpy.zeros((1 << 20, 1 << 22), jax.numpy.float32).block_until_ready()
except Exception as error:
    print(classify(error), "Out of memory allocating" in str(error))
"""


def test_xla_on_a_cpu():
    pytest.importorskip("jaxlib")
    done = subprocess.run([sys.executable, "-c", XLA], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "out of memory True\n"


# One product in bfloat16, in children with more and more room beside its result. oneDNN 3.12 itself crashes with less room still.
PRODUCTS = """
import os, resource
from pathlib import Path
import torch
from pantheraml.hardware.failures import classify
torch.set_num_threads(1)
for room in range(0, 4 << 20, 1 << 17):
    if not os.fork():
        x = torch.ones(1024, 64, dtype=torch.bfloat16)
        held = torch.ones(1024, 1024, dtype=torch.bfloat16)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, resource.RLIM_INFINITY))
        del held
        try:
            torch.nn.functional.linear(x, x)
            said = "fine"
        except RuntimeError as error:
            said = f"{classify(error)}: {str(error)[:80]}"
        os.write(1, said.encode() + b"\\n")
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="the limit and what counts against it are Linux's")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no oneDNN kernel for bfloat16 on this CPU")
def test_a_kernel_that_finds_no_room_is_out_of_memory():
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, timeout=120, check=True)
    said = done.stdout.splitlines()
    assert "out of memory: could not create a primitive" in said and said[-1] == "fine", said
    assert all(line == "fine" or line.startswith("out of memory: ") for line in said), said


def test_what_an_error_was_raised_from_counts_and_what_was_merely_handled_does_not():
    wrapped = DeviceError("the step failed", why="see above", fix="wait")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    assert classify(wrapped) == "out of memory"
    handled = RuntimeError("shapes do not match")
    handled.__context__ = MemoryError()
    assert classify(handled) == "other"
    loop = RuntimeError("round")
    loop.__cause__ = RuntimeError("and round")
    loop.__cause__.__cause__ = loop
    assert classify(loop) == "other"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "other"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "communication"),
        (KeyboardInterrupt(), "other"),
        (RuntimeError(), "other"),
    ],
)
def test_the_systems_own_errors(error: BaseException, kind: FailureKind):
    assert classify(error) == kind
