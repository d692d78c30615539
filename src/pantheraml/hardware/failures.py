"""What a device's error means. The texts are those of the drivers; nobody else looks into a message."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

FailureKind = Literal["out of memory", "compilation", "device lost", "communication", "version counter", "other"]
"""
out of memory: an allocation on the device, or on the host for it, was refused. Less at once may fit.
compilation: no program could be made for this device. The same program fails again.
device lost: this process can use the device no more. A new process, or a repaired device, can.
communication: another process or host did not answer. It may answer later.
version counter: a tensor made under inference mode is used where autograd needs its version.
other: anything else, among it the program's own errors.
"""


class Row(NamedTuple):
    """One text of one driver.

    Attributes:
        pattern: looked for in the lines "module.Type: message" of an error and of its causes.
        example: the text as people met it, with its numbers. source: where.
    """

    kind: FailureKind
    pattern: str
    example: str
    source: str


_RAISED = "raised by torch 2.13 on a CPU"

# The first row that fits counts. Ahead are texts that speak of memory but mean a program that is too large for a core.
ROWS: tuple[Row, ...] = (
    Row(
        "compilation",
        r"Ran out of memory in memory space (?!hbm)\w+",
        "RuntimeError: Bad StatusOr access: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. "
        "Used 32.42M of 16.00M vmem. Exceeded vmem capacity by 16.42M",
        "pytorch/xla#9524",
    ),
    Row(
        "compilation",
        r"out of resource: .*Hardware limit",
        "RuntimeError: No valid triton configs. OutOfMemoryError: out of resource: triton_mm Required: 294912 Hardware limit:232448 "
        "Reducing block sizes or `num_stages` may help.",
        "pytorch/pytorch#181198; shared memory of one core, not the device's",
    ),
    Row(
        "out of memory",
        r"^torch\.(cuda\.)?OutOfMemoryError: ",
        "torch.cuda.OutOfMemoryError: Allocation on device 5 would exceed allowed memory. (out of memory)\n"
        "Currently allocated     : 54.14 GiB\nRequested               : 686.41 MiB\nDevice limit            : 79.35 GiB",
        "pytorch/pytorch#110194; cudaMallocAsync",
    ),
    Row(
        "out of memory",
        r"\b(CUDA|HIP|XPU) out of memory\. Tried to allocate ",
        "RuntimeError: CUDA out of memory. Tried to allocate 12.50 MiB (GPU 0; 10.92 GiB total capacity; 8.57 MiB already allocated; "
        "9.28 GiB free; 4.68 MiB cached)",
        "pytorch/pytorch#16417; torch before 2.0, without a type of its own",
    ),
    Row(
        "out of memory",
        r"\b(CUDA|HIP)( driver)? error: out of memory\b",
        "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call, "
        "so the stacktrace below might be incorrect.",
        "deepbeepmeep/Wan2GP#1083; the text of cudaErrorMemoryAllocation in CUDA 13.0",
    ),
    Row(
        "out of memory",
        r"\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_ALLOC_FAILED\b",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "QwenLM/Qwen3#873",
    ),
    Row(
        "out of memory",
        r"\bCuda failure (\d+ )?'out of memory'",
        "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error "
        "(run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'",
        "NVIDIA/nccl#1410 for the frame, NVIDIA/nccl#1235 for the last line",
    ),
    Row(
        "out of memory",
        r"\bUR_RESULT_ERROR_OUT_OF_(DEVICE|HOST)_MEMORY\b",
        "RuntimeError: level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "open-edge-platform/physical-ai-studio#440",
    ),
    Row(
        "out of memory",
        r"can NOT allocate memory block with size larger than 4GB",
        "RuntimeError: Current platform can NOT allocate memory block with size larger than 4GB! Tried to allocate 6.85 GiB "
        "(GPU  0; 15.56 GiB total capacity; 0 bytes already allocated; 0 bytes reserved in total by PyTorch)",
        "intel/intel-extension-for-pytorch#629",
    ),
    Row(
        "out of memory",
        r"\bMPS backend out of memory \(MPS allocated: ",
        "RuntimeError: MPS backend out of memory (MPS allocated: 8.89 GB, other allocations: 172.98 MB, max allowed: 9.07 GB). "
        "Tried to allocate 6.25 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations "
        "(may cause system failure).",
        "lllyasviel/Fooocus#1139",
    ),
    Row(
        "out of memory",
        r": Invalid buffer size: [\d.]+ [KMG]i?B",
        "RuntimeError: Invalid buffer size: 19.38 GiB",
        "kijai/ComfyUI-SUPIR#151; one tensor larger than Metal allows",
    ),
    Row(
        "out of memory",
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory",
        "RuntimeError: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "ggml-org/llama.cpp#7010",
    ),
    Row(
        "out of memory",
        # gRPC uses the same status for quotas and for messages that are too long.
        r"(?i:resource[_ ]exhausted): (?s:.*?)(Out of memory|Ran out of memory in memory space hbm|Failed to allocate request for"
        r"|Attempting to (allocate|reserve) [\d.]+[KMGT]?\b)",
        "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.",
        "LargeWorldModel/LWM#60",
    ),
    Row(
        "out of memory",
        r"RESOURCE_EXHAUSTED: Ran out of memory on HBM\b",
        "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.62G) "
        "exceeds available HBM (15.75G).",
        "raised by libtpu 0.0.42, which compiled for a slice that was not there",
    ),
    Row(
        "out of memory",
        r"DefaultCPUAllocator: (can't allocate memory|not enough memory): you tried to allocate ",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
        f"{_RAISED}; Windows says not enough memory (lllyasviel/Fooocus#237)",
    ),
    Row("out of memory", r": std::bad_alloc\b", "RuntimeError: std::bad_alloc", "HiLab-git/SSL4MIS#66, from backward"),
    Row(
        "out of memory",
        # oneDNN, for products in bfloat16 and convolutions. It says this of any failure once it has settled on a kernel, and
        # keeps the status to itself. On a CPU: memory was refused, for the machine code of the kernel or for what it works
        # in. It is also said where no memory may be executable (pytorch/pytorch#143651) and of bugs in Intel's GPU compiler
        # (pytorch/pytorch#194418): smaller pieces do not help there, and the last error is raised. What oneDNN does not
        # support has words of its own, "could not create a primitive descriptor for ...".
        # oneDNN 3.12 never clears this error (xbyak.h, GetErrorRef): the thread that met it can make no other kernel, even
        # with memory to spare. Kernels that are there go on, and so does another thread.
        r": could not create a primitive$",
        "RuntimeError: could not create a primitive",
        f"{_RAISED} without room for the code; pytorch/pytorch#55884, where a smaller picture helped",
    ),
    Row(
        "out of memory",
        # The same for a kernel that is running: those that allocate then, a product in bfloat16 without instructions for it
        # among them (gemm_bf16_matmul.cpp), say nothing else of a refusal. Not seen here, and ambiguous in the same way.
        r": could not execute a primitive$",
        "RuntimeError: could not execute a primitive",
        "the text and the status in oneDNN 3.13, dnnl.hpp and src/cpu/matmul",
    ),
    Row(
        "device lost",
        r"\bUR_RESULT_ERROR_DEVICE_LOST\b",
        "RuntimeError: level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
        "pytorch/pytorch#190972",
    ),
    Row(
        "device lost",
        # CUDA's manual says of each: the process must be ended and begun anew. An assert on the device is one too, but it is
        # the program's own check of an index, which a new process fails again: "other", so that people look at the program.
        r"\b(CUDA|HIP)( driver)? error: (an illegal memory access was encountered|an illegal instruction was encountered|misaligned address"
        r"|unspecified launch failure|hardware stack error|uncorrectable (ECC|NVLink) error)",
        "RuntimeError: CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "tloen/alpaca-lora#123; the other texts are those of cudaGetErrorString in CUDA 13.0",
    ),
    Row(
        "device lost",
        r"\bGPU is lost\b|\bGPU has fallen off the bus\b",
        "pynvml.NVMLError_GpuIsLost: GPU is lost",
        "rossumai/nvgpu#6; Xid 79 in the kernel's log is the same event",
    ),
    Row(
        "device lost",
        r"\bAccelerator device halted prematurely\b|\bCore halted unexpectedly\b",
        "jaxlib._jax.XlaRuntimeError: INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted prematurely, "
        "perhaps due to an on-device check-failure. Node 0 halted unexpectedly at tag:pc TensorCoreSequencer:20:0xa",
        "vllm-project/tpu-inference#412",
    ),
    Row(
        "version counter",
        r"Inference tensors do not track version counter|Cannot set version_counter for inference tensor",
        "RuntimeError: Inference tensors do not track version counter.",
        _RAISED,
    ),
    Row(
        "version counter",
        r"Inplace update to inference tensor outside InferenceMode is not allowed",
        "RuntimeError: Inplace update to inference tensor outside InferenceMode is not allowed.You can make a clone to get a normal tensor "
        "before doing inplace update.See https://github.com/pytorch/rfcs/pull/17 for more details.",
        _RAISED,
    ),
    Row(
        "version counter",
        r"Inference tensors cannot be saved for backward",
        "RuntimeError: Inference tensors cannot be saved for backward. To work around you can make a clone to get a normal tensor and use "
        "it in autograd.",
        f"pytorch/pytorch#161164, as torch before 2.9 says it; {_RAISED} with more words",
    ),
    Row(
        "version counter",
        r"Setting requires_grad=True on inference tensor outside InferenceMode",
        "RuntimeError: Setting requires_grad=True on inference tensor outside InferenceMode is not allowed.",
        _RAISED,
    ),
    Row(
        "compilation",
        r"^(torch\._(dynamo|inductor)\.exc|triton\.compiler\.errors)\.\w+: ",
        "torch._dynamo.exc.BackendCompilerFailed: backend='backend' raised:\nValueError: boom",
        _RAISED,
    ),
    Row(
        "compilation",
        r"\bMosaic failed to compile\b|\bcompile permanent error\b",
        "XlaRuntimeError: INTERNAL: Mosaic failed to compile TPU kernel: Target does not support this comparison",
        "jax-ml/jax#30104",
    ),
    Row(
        "compilation",
        r": UNIMPLEMENTED: ",
        "RuntimeError: UNIMPLEMENTED: While rewriting computation to not contain X64 element types, XLA encountered an HLO for which this "
        "rewriting is not implemented: %bitcast-convert.4 = u64[2]{0} bitcast-convert(u32[2,2]{1,0} %reshape.3)",
        "google-research/t5x#79",
    ),
    Row(
        "compilation",
        r"\b(CUDA|HIP) error: no kernel image is available for execution on the device",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "pytorch/pytorch#149845",
    ),
    Row(
        "communication",
        r"\[\S*gloo/\S+\] |Application timeout caused pair closure",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to "
        "complete",
        f"Intellindust-AI-Lab/DEIMv2#65; {_RAISED} with the same words",
    ),
    Row(
        "communication",
        r"^torch\.distributed\.Dist\w*Error: |\bNCCL error\b",
        "torch.distributed.DistNetworkError: The client socket has timed out after 1000ms while trying to connect to (127.0.0.1, 29511).",
        _RAISED,
    ),
    Row(
        "communication",
        r"\bWatchdog caught collective operation timeout\b",
        "RuntimeError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7753, OpType=_REDUCE_SCATTER_BASE, "
        "NumelIn=544997376, NumelOut=68124672, Timeout(ms)=600000) ran for 600061 milliseconds before timing out.",
        "hiyouga/LlamaFactory#6269",
    ),
    Row(
        "communication",
        r"\b(?i:unavailable): (?s:.*?)(?i:socket closed|failed to connect|connection re(set|fused))",
        "XlaRuntimeError: UNAVAILABLE: Socket closed",
        "pytorch/xla#3975",
    ),
    Row(
        "communication",
        r"\bDEADLINE_EXCEEDED: ",
        "jaxlib.xla_extension.XlaRuntimeError: DEADLINE_EXCEEDED: Barrier timed out. Barrier_id: PjRT_Client_Connect. Timed out task names:",
        "ayaka14732/llama-2-jax#20",
    ),
)


def classify(error: BaseException) -> FailureKind:
    """The kind of an error that a device raised, or of what caused it (`__cause__`): the first of ROWS that fits."""
    chain = tuple(_causes(error))
    if any(isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno == errno.ENOMEM) for each in chain):
        return "out of memory"
    lines = [f"{type(each).__module__}.{type(each).__qualname__}: {each}".removeprefix("builtins.") for each in chain]
    for row in ROWS:
        if any(re.search(row.pattern, line) for line in lines):
            return row.kind
    return "communication" if any(isinstance(each, ConnectionError) for each in chain) else "other"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, each once."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__
