"""What both benchmarks share: the hardware's description, a clock, the textbook loss."""

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def positive(text: str) -> int:
    """A type for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def hardware() -> str:
    """One line that says where a number comes from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
    instructions = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {model} ({instructions}), {cores}, {gpu}"


def seconds_of(function: Callable[[], object], device: str) -> float:
    """What a call takes, with the work that it leaves to the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The textbook form: all B x C distances by |x|² + |c|² - 2xc, of which a mask keeps B."""
    squares = features.pow(2).sum(1, keepdim=True) + centers.pow(2).sum(1)
    distances = squares - 2 * features @ centers.T  # (B, C)
    mask = labels[:, None] == torch.arange(len(centers), device=centers.device)
    return (distances * mask).clamp(1e-12, 1e12).sum() / len(features)
