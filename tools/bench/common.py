"""Shared by the benchmarks: the hardware's description, medians, and the baseline's loss."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def hardware() -> str:
    """One line that says where a number comes from."""
    model, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1]
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0].strip() if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {model} ({torch.backends.cpu.get_cpu_capability()}), {threads}, {gpu}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(step: Callable[[], None], device: str, seconds: float, least: int = 3) -> float:
    """Median milliseconds of a step, over so many seconds but at least a few steps."""
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < least or (time.perf_counter() < end and len(taken) < 1000):
        start = time.perf_counter()
        step()
        synchronize(device)
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def matrix_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The textbook form: all B x C distances by |x|^2 + |c|^2 - 2xc, of which a mask keeps B."""
    squares = features.pow(2).sum(1, keepdim=True) + centers.pow(2).sum(1)
    distances = squares - 2 * features @ centers.T  # (B, C)
    mask = labels[:, None] == torch.arange(len(centers), device=centers.device)
    return (distances * mask).clamp(1e-12, 1e12).sum() / len(features)
