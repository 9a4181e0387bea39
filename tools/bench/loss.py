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
import statistics

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from center_loss import CenterLoss
from tools.bench import DEVICE, clock, matrix_loss

FORMS = ("matrix", "indexing", "dense", "sparse")
RATIOS = ("matrix/dense", "matrix/sparse", "indexing/dense")
WEIGHT = 0.01  # λ, which does not matter for the cost


def run(args: argparse.Namespace) -> None:
    size = f"B = {args.batch_size}, D = {args.feat_dim}"
    print(f"one step of the loss, {size}, float32, {DEVICE}\n")
    times = [f"{form}, ms" for form in FORMS]
    header = ["classes", *times, *RATIOS, *(f"{form}, MiB" for form in FORMS)]
    print("| " + " | ".join(header) + " |")
    print("| ---: " * len(header) + "|")
    for num_classes in args.classes:
        steps = {form: LossStep(form, num_classes, args) for form in FORMS}
        ms = median_ms(steps, seconds=0.1 if args.quick else 10.0)
        cells = [f"{num_classes:,}", *(f"{ms[form]:,.3f}" for form in FORMS)]
        for ratio in RATIOS:
            above, below = ratio.split("/")
            cells.append(f"{ms[above] / ms[below]:,.2f}")
        cells += [f"{step.memory() / 2**20:,.2f}" for step in steps.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def median_ms(steps: dict[str, "LossStep"], seconds: float) -> dict[str, float]:
    """Milliseconds of each step, over the turns that fit into some seconds."""
    times = {form: [] for form in steps}
    end = clock() + seconds
    while clock() < end or len(times["sparse"]) < 3:
        for form, step in steps.items():
            step()  # finds the caches as the other forms have left them
            start = clock()
            step()
            times[form].append(1000 * (clock() - start))
    return {form: statistics.median(values) for form, values in times.items()}


def indexing_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    return (features - centers[labels]).pow(2).sum() / len(features)


class LossStep:
    """A step of one form, again and again on the same batch."""

    def __init__(self, form: str, num_classes: int, args: argparse.Namespace):
        size = (args.batch_size, args.feat_dim)
        self.features = torch.randn(size, device=DEVICE, requires_grad=True)
        self.labels = torch.randint(num_classes, size[:1], device=DEVICE)
        self.center_loss = CenterLoss(num_classes, args.feat_dim, sparse=form == "sparse")
        self.centers = self.center_loss.centers
        self.function = dict(matrix=matrix_loss, indexing=indexing_loss).get(form)
        self.optimizer = torch.optim.SGD([self.centers], lr=0.5)

    def loss(self) -> Tensor:
        if self.function:
            return self.function(self.features, self.labels, self.centers)
        return self.center_loss(self.features, self.labels)

    def __call__(self) -> None:
        (WEIGHT * self.loss()).backward()
        if self.function:
            self.centers.grad.mul_(1 / WEIGHT)
        else:
            self.center_loss.rescale_center_grad(WEIGHT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.features.grad = None

    def memory(self) -> int:
        """In bytes."""
        kept = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss()
        for given in (self.features, self.labels, self.centers):
            kept.pop(given.data_ptr(), None)
        (gradient,) = torch.autograd.grad(loss, [self.centers])
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            return sum(kept.values()) + gradient.indices().nbytes + gradient.values().nbytes
        return sum(kept.values()) + gradient.nbytes
