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
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from center_loss import CenterLoss
from tools.bench.common import hardware, matrix_loss, median_ms, positive

BATCH_SIZE = 128
WEIGHT, ALPHA = 0.01, 0.5  # λ and the centers' learning rate; neither matters for the cost


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "loss",
        help="time and memory of a step as the number of classes grows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--classes",
        type=positive,
        nargs="+",
        metavar="C",
        help="numbers of classes (default: 10 to 1,000,000)",
    )
    add(
        "--feat-dim",
        type=positive,
        default=128,
        metavar="D",
        help="dimensions (default: %(default)s)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--quick", action="store_true", help="few classes and steps: a check, not a measurement")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    classes = args.classes or ([10, 1000] if args.quick else [10**power for power in range(1, 7)])
    print(hardware())
    print(f"one step of the loss, B = {BATCH_SIZE}, D = {args.feat_dim}, float32, {args.device}\n")
    print(
        f"| classes | {', ms | '.join(FORMS)}, ms | matrix/dense | matrix/sparse | {', MiB | '.join(FORMS)}, MiB |"
    )
    print("| ---: " * 9 + "|")
    for num_classes in classes:
        rows = [measure_apart(form, num_classes, args) for form in FORMS]
        (matrix, dense, sparse), memory = zip(*rows, strict=True)
        print(
            f"| {num_classes:,} | {matrix:,.2f} | {dense:,.2f} | {sparse:,.2f} "
            f"| {matrix / dense:,.1f} | {matrix / sparse:,.1f} | "
            f"{' | '.join('< 1' if mib < 1 else f'{mib:,.0f}' for mib in memory)} |",
            flush=True,
        )


def measure_apart(form: str, num_classes: int, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds and MiB of one form; NaN if the memory did not suffice."""
    if args.device == "cuda":  # its allocator counts for itself, and CUDA does not survive a fork
        return measure(form, num_classes, args)
    # A forked child starts at once, because it has torch already; elsewhere a child has to import it again.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(measure, form, num_classes, args).result()
    except (BrokenProcessPool, RuntimeError):  # killed for its memory, or refused it
        return float("nan"), float("nan")


def measure(form: str, num_classes: int, args: argparse.Namespace) -> tuple[float, float]:
    FORMS[form](10, args)()  # so that threads, libraries and their memory do not count
    step = FORMS[form](num_classes, args)
    before = peak_memory(args.device, reset=True)
    step()
    memory = peak_memory(args.device) - before
    return median_ms(step, args.device, seconds=0.2 if args.quick else 3.0), memory / 2**20


def peak_memory(device: str, reset: bool = False) -> int:
    """The most bytes used so far; reset sets the count back to what is used now, where it can be."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def batches(num_classes: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """32 random batches, again and again."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(32):
        features = torch.randn(BATCH_SIZE, args.feat_dim, generator=generator).to(args.device)
        labels = torch.randint(num_classes, (BATCH_SIZE,), generator=generator).to(args.device)
        drawn.append((features.requires_grad_(), labels))
    for features, labels in itertools.cycle(drawn):
        features.grad = None
        yield features, labels


def matrix_step(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
    centers = nn.Parameter(torch.randn(num_classes, args.feat_dim).to(args.device))
    optimizer, drawn = torch.optim.SGD([centers], lr=ALPHA), batches(num_classes, args)

    def step() -> None:
        features, labels = next(drawn)
        optimizer.zero_grad()
        (WEIGHT * matrix_loss(features, labels, centers)).backward()
        centers.grad.mul_(1 / WEIGHT)
        optimizer.step()

    return step


def center_loss_step(
    num_classes: int, args: argparse.Namespace, sparse: bool = False
) -> Callable[[], None]:
    center_loss = CenterLoss(num_classes, args.feat_dim, use_gpu=False, sparse=sparse).to(
        args.device
    )
    optimizer, drawn = (
        torch.optim.SGD(center_loss.parameters(), lr=ALPHA),
        batches(num_classes, args),
    )

    def step() -> None:
        features, labels = next(drawn)
        optimizer.zero_grad()
        (WEIGHT * center_loss(features, labels)).backward()
        center_loss.rescale_center_grad(WEIGHT)
        optimizer.step()

    return step


def sparse_step(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
    return center_loss_step(num_classes, args, sparse=True)


FORMS = {"matrix": matrix_step, "dense": center_loss_step, "sparse": sparse_step}
