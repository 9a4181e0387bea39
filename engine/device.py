"""Which device, and what it can do."""

import contextlib
import os
import threading

import torch
import torch.nn.functional as F


def choose_device(gpu: str, use_cpu: bool = False) -> torch.device:
    """The GPU of that index, or the CPU where there is none or it is asked for."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(gpu))
    torch.cuda.set_device(device)
    threading.Thread(target=load_libraries, args=(device,)).start()
    return device


def make_deterministic() -> None:
    """Lets torch choose only algorithms that give the same result each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def multiplies_bfloat16(gpu: int | None) -> bool:
    """Whether that GPU, or the CPU for None, has instructions for it: else float32 is faster."""
    if gpu is not None:
        with torch.cuda.device(gpu):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in allowed for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.6 and later
    found = {name for name, value in capabilities.items() if value}
    return bool(found & {"avx512_bf16", "amx_bf16"})


def load_libraries(device: torch.device) -> None:
    """Loads CUDA's convolutions, which takes a second: for a thread of its own."""
    # The main thread will meet the same error.
    with contextlib.suppress(RuntimeError), torch.no_grad():
        images = torch.zeros(8, 1, 8, 8, device=device)
        F.conv2d(images, torch.zeros(1, 1, 5, 5, device=device))
