"""Training without files, flags or prints: one update of network and centers, an epoch of them, a test, their metrics.

step = Step(net, center_loss, optimizers, weight=0.01)
output = step(images, labels)   # all still on the device; nothing waits
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from center_loss import CenterLoss
from processes import Ranks


class Output(NamedTuple):
    """What a step has computed before it updated the weights, on the device and without a graph."""

    xent: Tensor  # scalar; over several ranks, this rank's share of the mean cross-entropy of the joined batch
    center: Tensor  # scalar, λ · center loss of the joined batch
    features: Tensor  # (B, D)
    predictions: Tensor  # (B,)


class Step:
    """One update of a network and of its class centers with cross-entropy + λ · center loss.

    Args:
        net: images (B, C, H, W) to features (B, D) and logits (B, C); may be compiled or parallel.
        center_loss: whose centers are in one of the optimizers.
        optimizers: by name; all of them take a step.
        weight: λ. At 0 there is no center loss, and the centers stay where they are.
        lr_ratio: the centers' learning rate over the optimizer's, if network and centers share one optimizer.
        amp: run the network under bfloat16 autocast.
        ranks: the processes that share each batch.
    """

    def __init__(
        self,
        net: nn.Module,
        center_loss: CenterLoss,
        optimizers: Mapping[str, Optimizer],
        *,
        weight: float,
        lr_ratio: float = 1.0,
        amp: bool = False,
        ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    ):
        self.net, self.center_loss, self.optimizers = net, center_loss, optimizers
        self.weight, self.lr_ratio, self.amp, self.ranks = weight, lr_ratio, amp, ranks

    @property
    def device(self) -> torch.device:
        return self.center_loss.centers.device

    def __call__(self, images: Tensor, labels: Tensor, size: int | None = None) -> Output:
        """Takes the step. `size`: samples in the joined batch of all ranks, by default those of this one."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            features, logits = self.net(images)
        xent = F.cross_entropy(logits, labels, reduction="sum") / (size or len(labels))
        center = self.weight * self.center_loss(features, labels) if self.weight else torch.zeros_like(xent)

        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        # DistributedDataParallel averages the ranks' gradients, of which the sum is wanted.
        (self.ranks.size * (xent + center)).backward()
        if self.weight:
            self.center_loss.rescale_center_grad(self.ranks.size * self.weight, self.lr_ratio)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return Output(xent.detach(), center.detach(), features.detach(), logits.detach().argmax(1))


@dataclass
class Epoch:
    """What a pass over the training data has summed up so far; a checkpoint holds these fields of a stopped one."""

    batches: int = 0
    samples: int = 0
    sums: Tensor | None = None  # (3,) float64, over the samples: cross-entropy, λ · center loss, correct predictions
    kept: list[Tensor] | None = None  # features (N, D), labels (N,) and predictions (N,), where they are wanted

    def results(self) -> dict:
        """The mean losses, the accuracy (%) and, where they were kept, features, labels and predictions.

        Waits for the device.
        """
        xent, center, correct = (self.sums / self.samples).tolist()
        kept = zip(("features", "labels", "predictions"), self.kept or (), strict=False)
        return dict(loss=xent + center, xent=xent, center=center, accuracy=100 * correct, **dict(kept))


class Progress(NamedTuple):
    """What `train_epoch` tells after each step."""

    epoch: Epoch  # whose sums are this rank's
    latest: Tensor  # (3,), this rank's part of the step's mean cross-entropy, λ · center loss, share of correct ones
    ranks: Ranks

    def losses(self) -> tuple[float, float, float, float]:
        """Cross-entropy and λ · center loss of this step, and their means over the pass. Waits for the device."""
        latest, sums = self.ranks.total(torch.stack([self.latest, self.epoch.sums])).tolist()
        return *latest[:2], *(total / self.epoch.samples for total in sums[:2])


def train_epoch(
    step: Step,
    batches: Iterable[tuple[Tensor, Tensor, int]],
    scheduler: LRScheduler,
    begun: Epoch | None = None,
    keep: bool = False,
    stop: Callable[[Progress], bool] = lambda progress: False,
) -> Epoch:
    """One pass over the batches, until `stop`, which is asked after each step.

    Args:
        batches: images, labels and the size of the batch over all ranks.
        scheduler: takes a step after each of the optimizers'.
        begun: an interrupted pass, of which `batches` is the rest.
        keep: gather features, labels and predictions as well.

    Returns what all ranks together have summed up.
    """
    step.net.train()
    ranks, begun = step.ranks, begun or Epoch()
    epoch = Epoch(begun.batches, begun.samples, torch.zeros(3, dtype=torch.float64, device=step.device))
    kept = []
    if ranks.rank == 0 and begun.batches:  # the sums of all ranks go on in one of them
        epoch.sums += begun.sums.to(step.device)
        kept = [[each.to(step.device) for each in begun.kept]] if keep and begun.kept else []

    for images, labels, size in batches:
        output = step(images, labels, size)
        scheduler.step()
        correct = (output.predictions == labels).sum() / size
        latest = torch.stack([output.xent, output.center / ranks.size, correct])
        epoch.batches, epoch.samples = epoch.batches + 1, epoch.samples + size
        epoch.sums += latest * size
        if keep:
            kept.append([output.features, labels, output.predictions])
        if stop(Progress(epoch, latest, ranks)):
            break

    epoch.sums = ranks.total(epoch.sums)
    epoch.kept = [ranks.gather(torch.cat(each)) for each in zip(*kept, strict=True)] if keep else None
    return epoch


@torch.no_grad()
def test(model: nn.Module, batches: Iterable[tuple], amp: bool = False, ranks: Ranks = Ranks()) -> dict:  # noqa: B008
    """Cross-entropy, accuracy (%), features (N, D), labels and predictions (N,) of a network on the batches."""
    model.eval()
    outputs, seen = [], 0
    for images, labels, size in batches:
        rows = ranks.share(torch.arange(seen, seen + size, device=labels.device))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            outputs.append((*model(images), labels, rows))
        seen += size
    *gathered, rows = (ranks.gather(torch.cat(each)) for each in zip(*outputs, strict=True))
    order = rows.argsort()  # that of the data set
    features, logits, labels = (each[order] for each in gathered)
    predictions, xent = logits.argmax(1), F.cross_entropy(logits, labels).item()
    return dict(xent=xent, accuracy=percentage(predictions == labels),
                features=features, labels=labels, predictions=predictions)  # fmt: skip


@torch.no_grad()
def center_metrics(features: Tensor, labels: Tensor, centers: Tensor) -> dict[str, float]:
    """Accuracy (%) of the nearest center, mean distance from one's own center, smallest distance of two centers."""
    exact = "donot_use_mm_for_euclid_dist"
    nearest = [torch.cdist(some, centers, compute_mode=exact).argmin(1) for some in features.split(4096)]
    return dict(
        nearest_center_accuracy=percentage(torch.cat(nearest) == labels),
        intra_distance=(features - centers[labels]).norm(dim=1).mean().item(),
        inter_distance=torch.pdist(centers).min().item(),
    )


def percentage(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean feature of each class (num_classes, D); 0 for a class without features."""
    sums = torch.zeros(num_classes, features.shape[1], device=features.device).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes).clamp(min=1).unsqueeze(1)


def state_sum(module: nn.Module) -> float:
    """The sum of a module's state: finite where all of it is. Waits for the device."""
    return sum(tensor.double().sum() for tensor in module.state_dict().values()).item()
