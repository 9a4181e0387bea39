"""One step of the center loss alone: forward, backward, center gradient divided by λ, SGD step.

Four forms of it take the same random batch, in turn:

    matrix    the textbook form with all B x C distances
    indexing  the shortest form, features - centers[labels]
    dense     CenterLoss(sparse=False): as indexing, with the checks and options of CenterLoss
    sparse    CenterLoss(sparse=True): a center gradient of at most B rows

A time is the median of steps. Memory is what the loss keeps for its backward pass, and the gradient
of the centers.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from center_loss import CENTER_UPDATES, CenterLoss
from tools.bench import hardware, matrix_loss, positive, seconds_of

FORMS = ("matrix", "indexing", "dense", "sparse")
WEIGHT = 0.01  # λ, which does not matter for the cost


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--classes", type=positive, nargs="+", default=[10**power for power in range(1, 7)])
    add("--batch-size", type=positive, default=128)
    add("--feat-dim", type=positive, default=128)
    add("--center-update", choices=sorted(CENTER_UPDATES), default="gradient")


def run(args: argparse.Namespace) -> None:
    print(hardware())
    size = f"B = {args.batch_size}, D = {args.feat_dim}, {args.center_update}"
    print(f"one step of the loss, {size}, float32, {args.device}\n")
    columns = [f"{form}, ms" for form in FORMS]
    columns += ["matrix/dense", "matrix/sparse", "indexing/dense"]
    columns += [f"{form}, MiB" for form in FORMS]
    print("| classes | " + " | ".join(columns) + " |")
    print("| ---: " * (1 + len(columns)) + "|")
    for num_classes in args.classes:
        steps = [LossStep(form, num_classes, args) for form in FORMS]
        times = median_ms(steps, args)
        matrix, indexing, dense, sparse = times
        cells = [f"{milliseconds:,.3f}" for milliseconds in times]
        cells += [f"{ratio:,.2f}" for ratio in (matrix / dense, matrix / sparse, indexing / dense)]
        cells += [f"{step.memory() / 2**20:,.2f}" for step in steps]
        print(f"| {num_classes:,} | " + " | ".join(cells) + " |", flush=True)


def median_ms(steps: list[Callable], args: argparse.Namespace) -> list[float]:
    """Milliseconds of each step, over the turns that fit into some seconds.

    A call before finds the caches as the other forms have left them, and is not counted.
    """
    turns = []
    end = time.perf_counter() + (0.1 if args.quick else 10.0)
    while len(turns) < 3 or (time.perf_counter() < end and len(turns) < 5000):
        times = []
        for step in steps:
            step()
            times.append(1000 * seconds_of(step, args.device))
        turns.append(times)
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def indexing_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    return (features - centers[labels]).pow(2).sum() / len(features)


class LossStep:
    """A step of one form, again and again on the same batch."""

    def __init__(self, form: str, num_classes: int, args: argparse.Namespace):
        size = (args.batch_size, args.feat_dim)
        self.features = torch.randn(size, device=args.device, requires_grad=True)
        self.labels = torch.randint(num_classes, size[:1], device=args.device)
        self.is_ours = form in ("dense", "sparse")
        if self.is_ours:
            options = dict(center_update=args.center_update, sparse=form == "sparse")
            self.criterion = CenterLoss(num_classes, args.feat_dim, use_gpu=False, **options)
            self.criterion.to(args.device)
            self.centers = self.criterion.centers
        else:
            self.centers = nn.Parameter(torch.randn(num_classes, args.feat_dim, device=args.device))
            function = matrix_loss if form == "matrix" else indexing_loss
            self.criterion = functools.partial(function, centers=self.centers)
        self.optimizer = torch.optim.SGD([self.centers], lr=0.5)

    def __call__(self) -> None:
        (WEIGHT * self.criterion(self.features, self.labels)).backward()
        if self.is_ours:
            self.criterion.rescale_center_grad(WEIGHT)
        else:
            self.centers.grad.mul_(1 / WEIGHT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.features.grad = None

    def memory(self) -> int:
        """In bytes."""
        kept = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.criterion(self.features, self.labels)
        for given in (self.features, self.labels, self.centers):
            kept.pop(given.data_ptr(), None)
        (gradient,) = torch.autograd.grad(loss, [self.centers])
        parts = [gradient]
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            parts = [gradient.indices(), gradient.values()]
        return sum(kept.values()) + sum(part.nbytes for part in parts)
