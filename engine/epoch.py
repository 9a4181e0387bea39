"""A pass over the training images, and a test."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from engine.metrics import center_metrics, class_means, percentage
from engine.ranks import Ranks
from engine.step import Output, Step


class Progress:
    """The sums of a pass so far, which stay on the device until they are read."""

    def __init__(self, device: torch.device, ranks: Ranks):
        self.ranks = ranks
        self.batches = 0
        self.images = 0  # of all ranks
        # This rank's part, as in Output.means.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.latest = self.sums

    def add(self, output: Output, size: int) -> None:
        self.batches += 1
        self.images += size
        self.latest = output.means
        self.sums += output.means * size

    def means(self) -> dict[str, float]:
        """The mean losses and the accuracy (%). Waits for the device."""
        xent, center, correct = (self.ranks.total(self.sums) / self.images).tolist()
        return dict(loss=xent + center, xent=xent, center=center, accuracy=100 * correct)

    def line(self, per_epoch: int) -> str:
        """The losses for the log: of the latest batch and, in brackets, of the pass so far."""
        xent, center, _ = self.ranks.total(self.latest).tolist()
        means = self.means()
        return (
            f"Batch {self.batches}/{per_epoch}\t Loss {xent + center:.6f} ({means['loss']:.6f}) "
            f"XentLoss {xent:.6f} ({means['xent']:.6f}) "
            f"CenterLoss {center:.6f} ({means['center']:.6f})"
        )


def train_epoch(
    step: Step,
    batches: Iterable[tuple[Tensor, Tensor, int]],
    scheduler: LRScheduler,
    keep: bool = False,
    report: Callable[[Progress], object] = lambda progress: None,
) -> dict:
    """One pass over the batches: images, labels and the size of the batch over all ranks.

    `report` is called after each step. Returns mean losses and accuracy (%) and, with `keep`,
    features (N, D), labels and predictions (N,) of all ranks, as of the moment of training.
    """
    step.net.train()
    progress = Progress(step.device, step.ranks)
    kept = []
    for images, labels, size in batches:
        output = step(images, labels, size)
        scheduler.step()
        progress.add(output, size)
        if keep:
            kept.append((output.features.clone(), labels, output.predictions.clone()))
        report(progress)
    # Ranks with unequal shares draw unequal numbers for dropout; the next order must be the same.
    torch.set_rng_state(step.ranks.gather(torch.get_rng_state().unsqueeze(0))[0])
    trained = progress.means()
    if keep:
        gathered = (step.ranks.gather(torch.cat(each)) for each in zip(*kept, strict=True))
        trained |= zip(("features", "labels", "predictions"), gathered, strict=True)
    return trained


def current_centers(step: Step, trained: dict) -> Tensor:
    """The centers (C, D) of metrics and pictures; at λ = 0, with none trained, class means."""
    centers = step.center_loss.centers.detach()
    if not step.weight:
        centers = class_means(trained["features"], trained["labels"], len(centers))
    return centers


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, int]],
    amp: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> dict[str, Tensor]:
    """Features (N, D), logits (N, C), labels and predictions (N,), in the order of the data set."""
    model.eval()
    outputs = []
    seen = 0
    for images, labels, size in batches:
        rows = ranks.share(torch.arange(seen, seen + size, device=labels.device))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            features, logits = model(images)
        outputs.append((features, logits, labels, rows))
        seen += size
    *gathered, rows = (ranks.gather(torch.cat(each)) for each in zip(*outputs, strict=True))
    order = rows.argsort()
    features, logits, labels = (each[order] for each in gathered)
    return dict(features=features, logits=logits, labels=labels, predictions=logits.argmax(1))


@torch.no_grad()
def measure(outputs: dict[str, Tensor], centers: Tensor) -> dict[str, float]:
    """Cross-entropy, accuracies (%) and distances from centers (C, D) of what `predict` returns."""
    labels = outputs["labels"]
    xent = F.cross_entropy(outputs["logits"], labels).item()
    accuracy = percentage(outputs["predictions"] == labels)
    by_centers = center_metrics(outputs["features"], labels, centers)
    return dict(xent=xent, accuracy=accuracy, **by_centers)


def lines(tested: dict) -> list[str]:
    """These metrics for the log."""
    accuracy = tested["accuracy"]
    return [
        f"Accuracy (%): {accuracy:.2f}\t Error rate (%): {100 - accuracy:.2f}",
        f"Nearest-center accuracy (%): {tested['nearest_center_accuracy']:.2f}\t "
        f"Intra-class distance (mean): {tested['intra_distance']:.4f}\t "
        f"Inter-class distance (min): {tested['inter_distance']:.4f}",
    ]


def state_sums(step: Step) -> dict[str, float]:
    """The sums of weights and centers: finite where all of them are. Waits for the device."""
    states = {"network's weights": step.net, "centers": step.center_loss}
    sums = {}
    for name, module in states.items():
        sums[name] = sum(each.double().sum() for each in module.state_dict().values()).item()
    return sums
