"""Measures speed and memory, and prints ratios against a plain baseline written here.

    python bench.py loss              the center loss as the number of classes grows, 10 to 1,000,000
    python bench.py loss --quick      the same for small numbers, in seconds
    python bench.py loss --ranks 2    sparse gradients on two gloo processes, 1,000 against 1,000,000 classes

`loss` measures one whole step of the center loss alone: zero_grad, forward, backward, division of the center
gradient by λ, SGD step of the centers. Three forms of it are compared, on the same random batches:

    matrix    the textbook form: all B x C distances by |x|^2 + |c|^2 - 2xc, of which a mask keeps B
    dense     CenterLoss(sparse=False): B distances, a center gradient of size C x D
    sparse    CenterLoss(sparse=True): B distances, a center gradient of at most B rows

Time is the median over steps. Memory is what the first step needs at its peak on top of centers and batch:
on the CPU the growth of the process's peak resident memory, measured in a process of its own for each row and
form (resolution about 1 MiB); on CUDA that of the allocator's peak. Ratios are of two figures of one run.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from center_loss import CenterLoss

# A forked child starts at once, because it has torch already; elsewhere a child has to import it again.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
WEIGHT, ALPHA = 0.01, 0.5  # λ and the centers' learning rate; neither matters for the cost


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    args.run(args)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def hardware() -> str:
    """One line that says where a figure comes from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1]
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0].strip() if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {model}, {threads}, {gpu}"


# ------------------------------------------------------------------------------------------------ loss


def add_loss(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("loss", help="time and memory of a step as the number of classes grows")
    parser.add_argument(
        "--classes", type=positive, nargs="+", metavar="C", help="numbers of classes to measure"
    )
    parser.add_argument("--feat-dim", type=positive, default=128, metavar="D", help="features (default: 128)")
    parser.add_argument(
        "--batch-size", type=positive, default=128, metavar="B", help="samples over all ranks (default: 128)"
    )
    parser.add_argument(
        "--threads", type=positive, help="CPU threads over all ranks (default: torch's choice)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--ranks", type=positive, default=1, help="gloo processes on this CPU (default: 1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each figure (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="few classes and steps: a check, not a measurement"
    )
    parser.set_defaults(run=bench_loss)


def bench_loss(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.seconds = 0.2
    print(hardware())
    if args.ranks > 1:
        args.classes = args.classes or ([10, 1000] if args.quick else [1000, 1_000_000])
        bench_loss_on_ranks(args)
        return
    args.classes = args.classes or ([10, 1000] if args.quick else [10**power for power in range(1, 7)])
    print(f"one step of the loss, B = {args.batch_size}, D = {args.feat_dim}, float32, {args.device}\n")
    forms = list(FORMS)
    print(
        f"| classes | {' | '.join(f'{form}, ms' for form in forms)} | matrix/dense | matrix/sparse "
        f"| {' | '.join(f'{form}, MiB' for form in forms)} |"
    )
    print("| ---: " * (2 * len(forms) + 3) + "|")
    times = {}
    for num_classes in args.classes:
        memory = {}
        for form in forms:
            times[num_classes, form], memory[form] = measure_apart(form, num_classes, args)
        ms = [times[num_classes, form] for form in forms]
        print(
            f"| {num_classes:,} | {' | '.join(f'{value:,.2f}' for value in ms)} "
            f"| {ms[0] / ms[1]:,.1f} | {ms[0] / ms[2]:,.1f} "
            f"| {' | '.join('< 1' if value < 1 else f'{value:,.0f}' for value in memory.values())} |",
            flush=True,
        )
    print_growth({num_classes: times[num_classes, "sparse"] for num_classes in args.classes})


def print_growth(sparse: dict[int, float]) -> None:
    """The figure that sparse gradients are for: how time grows from 1,000 classes to the most."""
    many = max(sparse)
    few = 1000 if 1000 in sparse and many > 1000 else min(sparse)
    print(f"\nsparse, {many:,} against {few:,} classes: {sparse[many] / sparse[few]:.2f} times the time")


def measure_apart(form: str, num_classes: int, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds and MiB of one form; NaN where the memory did not suffice."""
    if args.device == "cuda":  # its allocator counts for itself, and CUDA does not survive a fork
        return measure(form, num_classes, args)
    try:
        with ProcessPoolExecutor(1, get_context(START_METHOD)) as pool:
            return pool.submit(measure, form, num_classes, args).result()
    except (BrokenProcessPool, RuntimeError):  # killed for its memory, or refused it
        return float("nan"), float("nan")


def measure(form: str, num_classes: int, args: argparse.Namespace) -> tuple[float, float]:
    FORMS[form](10, args)()  # threads, libraries and their memory are there before anything is measured
    step = FORMS[form](num_classes, args)
    before = peak_memory(args.device, reset=True)
    step()
    memory = peak_memory(args.device) - before
    return median_times([step], args)[0], memory / 2**20


def peak_memory(device: str, reset: bool = False) -> int:
    """The most bytes used so far; reset sets the count back to what is used now, where it can be."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def median_times(steps: list[Callable[[], None]], args: argparse.Namespace, least: int = 3) -> list[float]:
    """Median milliseconds of each step; the steps take turns, so that a disturbance meets all alike."""
    taken: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + args.seconds * len(steps)
    while len(taken[0]) < least or (time.perf_counter() < end and len(taken[0]) < 1000):
        for step, times in zip(steps, taken, strict=True):
            start = time.perf_counter()
            step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


def batches(num_classes: int, args: argparse.Namespace) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns one of 32 random batches after another."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(32):
        features = torch.randn(args.batch_size, args.feat_dim, generator=generator).to(args.device)
        labels = torch.randint(num_classes, (args.batch_size,), generator=generator).to(args.device)
        drawn.append((features.requires_grad_(), labels))
    turn = iter(range(sys.maxsize))

    def draw() -> tuple[Tensor, Tensor]:
        features, labels = drawn[next(turn) % len(drawn)]
        features.grad = None
        return features, labels

    return draw


def matrix_step(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
    centers = nn.Parameter(torch.randn(num_classes, args.feat_dim).to(args.device))
    classes = torch.arange(num_classes, device=args.device)
    optimizer = torch.optim.SGD([centers], lr=ALPHA)
    draw = batches(num_classes, args)

    def step() -> None:
        features, labels = draw()
        optimizer.zero_grad()
        squares = features.pow(2).sum(1, keepdim=True) + centers.pow(2).sum(1)
        distances = squares - 2 * features @ centers.T  # (B, C)
        mask = labels[:, None] == classes
        loss = (distances * mask).clamp(1e-12, 1e12).sum() / len(features)
        (WEIGHT * loss).backward()
        centers.grad.mul_(1 / WEIGHT)
        optimizer.step()

    return step


def center_loss_step(sparse: bool) -> Callable[[int, argparse.Namespace], Callable[[], None]]:
    def make(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
        center_loss = CenterLoss(num_classes, args.feat_dim, use_gpu=False, sparse=sparse).to(args.device)
        optimizer = torch.optim.SGD(center_loss.parameters(), lr=ALPHA)
        draw = batches(num_classes, args)

        def step() -> None:
            features, labels = draw()
            optimizer.zero_grad()
            (WEIGHT * center_loss(features, labels)).backward()
            center_loss.rescale_center_grad(WEIGHT)
            optimizer.step()

        return step

    return make


FORMS = {"matrix": matrix_step, "dense": center_loss_step(False), "sparse": center_loss_step(True)}


def bench_loss_on_ranks(args: argparse.Namespace) -> None:
    print(
        f"one sparse step of the loss on {args.ranks} gloo processes, B = {args.batch_size} over all, "
        f"D = {args.feat_dim}, float32, cpu\n"
    )
    threads = max(1, torch.get_num_threads() // args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            measure_on_rank, (args, threads, folder), nprocs=args.ranks, start_method=START_METHOD
        )
        times = json.loads(Path(folder, "times.json").read_text())
    print("| classes | sparse, ms |\n| ---: | ---: |")
    for num_classes, ms in zip(args.classes, times, strict=True):
        print(f"| {num_classes:,} | {ms:.2f} |")
    print_growth(dict(zip(args.classes, times, strict=True)))


def measure_on_rank(rank: int, args: argparse.Namespace, threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    args.device, args.batch_size = "cpu", max(1, args.batch_size // args.ranks)
    steps = [FORMS["sparse"](num_classes, args) for num_classes in args.classes]
    for step in steps:
        step()
    # Every rank must take the same number of steps, so the count is fixed and no rank's clock decides.
    count, args.seconds = (10 if args.quick else 500), 0.0
    times = median_times(steps, args, least=count)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


COMMANDS = (add_loss,)

if __name__ == "__main__":
    main()
