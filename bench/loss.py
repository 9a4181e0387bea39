"""One step of the center loss alone: zero_grad, forward, backward, division of the center gradient by λ, SGD step.

Three forms of it are compared on the same random batches:

    matrix    the textbook form with all B x C distances
    dense     CenterLoss(sparse=False): B distances, a center gradient of size C x D
    sparse    CenterLoss(sparse=True): B distances, a center gradient of at most B rows

Time is the median over steps. Memory is what the first step needs at its peak on top of centers and batch: on the CPU
the growth of the process's peak resident memory, in a process of its own for each row and form (resolution about
1 MiB); on CUDA that of the allocator's peak. Each ratio is of two numbers of one run.
"""

import argparse
import itertools
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.common import hardware, matrix_loss, median_ms, positive
from center_loss import CenterLoss

# A forked child starts at once, because it has torch already; elsewhere a child has to import it again.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
WEIGHT, ALPHA = 0.01, 0.5  # λ and the centers' learning rate; neither matters for the cost


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("loss", help="time and memory of a step as the number of classes grows",
                                 description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--classes", type=positive, nargs="+", metavar="C", help="numbers of classes (default: 10 to 1,000,000)")
    add("--feat-dim", type=positive, default=128, metavar="D", help="dimensions (default: %(default)s)")
    add("--batch-size", type=positive, default=128, metavar="B", help="over all ranks (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads over all ranks (default: torch's choice)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--ranks", type=positive, default=1, help="gloo processes on this CPU (default: %(default)s)")
    add("--seconds", type=float, default=3.0, help="time for each number (default: %(default)s)")
    add("--quick", action="store_true", help="few classes and steps: a check, not a measurement")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.seconds = 0.2
    print(hardware())
    if args.ranks > 1:
        args.classes = args.classes or ([10, 1000] if args.quick else [1000, 1_000_000])
        return run_ranks(args)
    args.classes = args.classes or ([10, 1000] if args.quick else [10**power for power in range(1, 7)])
    print(f"one step of the loss, B = {args.batch_size}, D = {args.feat_dim}, float32, {args.device}\n")
    times = ", ms | ".join(FORMS)
    print(f"| classes | {times}, ms | matrix/dense | matrix/sparse | {', MiB | '.join(FORMS)}, MiB |")
    print("| ---: " * 9 + "|")
    sparse = {}
    for num_classes in args.classes:
        (matrix, dense, sparse[num_classes]), memory = zip(*(measure_apart(form, num_classes, args) for form in FORMS),
                                                           strict=True)  # fmt: skip
        print(f"| {num_classes:,} | {matrix:,.2f} | {dense:,.2f} | {sparse[num_classes]:,.2f} | {matrix / dense:,.1f} "
              f"| {matrix / sparse[num_classes]:,.1f} | "
              f"{' | '.join('< 1' if mib < 1 else f'{mib:,.0f}' for mib in memory)} |", flush=True)  # fmt: skip
    print_growth(sparse)


def print_growth(sparse: dict[int, float]) -> None:
    """What sparse gradients are for: how time grows from 1,000 classes to the most."""
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
    return median_ms(step, args.device, args.seconds), memory / 2**20


def peak_memory(device: str, reset: bool = False) -> int:
    """The most bytes used so far; reset sets the count back to what is used now, where it can be."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def batches(num_classes: int, args: argparse.Namespace) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns one of 32 random batches after another."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(32):
        features = torch.randn(args.batch_size, args.feat_dim, generator=generator).to(args.device)
        labels = torch.randint(num_classes, (args.batch_size,), generator=generator).to(args.device)
        drawn.append((features.requires_grad_(), labels))
    turns = itertools.cycle(drawn)

    def draw() -> tuple[Tensor, Tensor]:
        features, labels = next(turns)
        features.grad = None
        return features, labels

    return draw


def matrix_step(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
    centers = nn.Parameter(torch.randn(num_classes, args.feat_dim).to(args.device))
    optimizer = torch.optim.SGD([centers], lr=ALPHA)
    draw = batches(num_classes, args)

    def step() -> None:
        features, labels = draw()
        optimizer.zero_grad()
        (WEIGHT * matrix_loss(features, labels, centers)).backward()
        centers.grad.mul_(1 / WEIGHT)
        optimizer.step()

    return step


def center_loss_step(num_classes: int, args: argparse.Namespace, sparse: bool = False) -> Callable[[], None]:
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


def sparse_step(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
    return center_loss_step(num_classes, args, sparse=True)


FORMS = {"matrix": matrix_step, "dense": center_loss_step, "sparse": sparse_step}


def run_ranks(args: argparse.Namespace) -> None:
    print(f"one sparse step of the loss on {args.ranks} gloo processes, B = {args.batch_size} over all, "
          f"D = {args.feat_dim}, float32, cpu\n")  # fmt: skip
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
    # Every rank must take the same number of steps, so the count is fixed and no rank's clock decides.
    count = 10 if args.quick else 500
    times = [median_ms(sparse_step(num_classes, args), "cpu", 0, count) for num_classes in args.classes]
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()
