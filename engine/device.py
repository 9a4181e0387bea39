"""Which device, and what it can do."""

import argparse
import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F


def choose_device(args: argparse.Namespace, log: Callable[[str], None]) -> torch.device:
    """The GPU that --gpu names, or the CPU; logs which, and applies --deterministic."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.use_cpu or not torch.cuda.is_available():
        log("Currently using CPU")
        device = torch.device("cpu")
    else:
        log(f"Currently using GPU: {args.gpu}")
        device = torch.device("cuda", int(args.gpu))
        torch.cuda.set_device(device)
        if args.workers == 0:  # no thread may run where workers are forked
            threading.Thread(target=load_libraries, args=(device,)).start()
    if args.amp and not multiplies_bfloat16(device.index):
        log("--amp is slow here: the hardware has no bfloat16 multiplication; --no-amp is faster")
    return device


def multiplies_bfloat16(gpu: int | None) -> bool:
    """Whether that GPU, or the CPU for None, has instructions for it; without them bfloat16 is slower than float32."""
    if gpu is not None:
        with torch.cuda.device(gpu):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in allowed for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        found = {name for name, value in torch.cpu.get_capabilities().items() if value}
    else:
        cpuinfo = Path("/proc/cpuinfo")
        found = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(found & {"avx512_bf16", "amx_bf16"})


def load_libraries(device: torch.device) -> None:
    """Loads CUDA's convolutions, which takes a second but not Python's lock: for a thread during imports."""
    with (
        contextlib.suppress(RuntimeError),
        torch.no_grad(),
    ):  # the main thread will meet the same error
        F.conv2d(torch.zeros(8, 1, 8, 8, device=device), torch.zeros(1, 1, 5, 5, device=device))
