"""What both benchmarks share: the hardware's description, a clock, the textbook loss."""

import os
import platform
import re
import time
from pathlib import Path

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> str:
    """One line that says where a number comes from."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    name = re.findall(r"model name\s*: (.*)", text) or [platform.machine()]
    instructions = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {name[0]} ({instructions}), {cores}, {gpu}"


def clock() -> float:
    """Seconds, read when the GPU has done its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The textbook form: all B x C distances by |x|² + |c|² - 2xc, of which a mask keeps B."""
    squares = features.pow(2).sum(1, keepdim=True) + centers.pow(2).sum(1)
    distances = squares - 2 * features @ centers.T  # (B, C)
    mask = labels[:, None] == torch.arange(len(centers), device=centers.device)
    return (distances * mask).clamp(1e-12, 1e12).sum() / len(features)
