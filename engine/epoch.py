"""A pass over the training images, and a test."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from engine.metrics import percentage
from engine.ranks import Ranks
from engine.step import Step


@dataclass
class Epoch:
    """Running sums of a pass over the training data; a checkpoint holds these fields of an interrupted one."""

    batches: int = 0
    samples: int = 0
    sums: Tensor | None = (
        None  # (3,) float64, over the samples: cross-entropy, λ · center loss, correct predictions
    )
    kept: list[Tensor] | None = (
        None  # features (N, D), labels (N,) and predictions (N,), where wanted from the start
    )
    rng: Tensor | None = None  # random state after the last step, from which dropout goes on

    def results(self) -> dict:
        """The mean losses, the accuracy (%) and, where they were kept, features, labels and predictions.

        Waits for the device.
        """
        xent, center, correct = (self.sums / self.samples).tolist()
        kept = zip(("features", "labels", "predictions"), self.kept or (), strict=False)
        return dict(
            loss=xent + center, xent=xent, center=center, accuracy=100 * correct, **dict(kept)
        )


class Progress(NamedTuple):
    """What `train_epoch` passes to `stop` after each step."""

    epoch: Epoch  # whose sums are this rank's
    latest: Tensor  # (3,), `means` of the step's Output
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
    """One pass over the batches, or until `stop`, called after each step, returns True.

    Args:
        batches: images, labels and the size of the batch over all ranks.
        scheduler: takes a step after each of the optimizers'.
        begun: an interrupted pass, of which `batches` is the rest.
        keep: gather features, labels and predictions as well, unless `begun` lacks those of its batches.

    Returns the sums over all ranks.
    """
    step.net.train()
    ranks, begun = step.ranks, begun or Epoch()
    epoch = Epoch(
        begun.batches, begun.samples, torch.zeros(3, dtype=torch.float64, device=step.device)
    )
    kept = []
    if begun.batches:
        first, keep = ranks.rank == 0, keep and begun.kept is not None
        if first:  # the sums of all ranks go on in one of them
            epoch.sums += begun.sums.to(step.device)
        kept = (
            [[(each if first else each[:0]).to(step.device) for each in begun.kept]] if keep else []
        )

    for images, labels, size in _from_state(begun.rng, batches):
        output = step(images, labels, size)
        scheduler.step()
        epoch.batches, epoch.samples = epoch.batches + 1, epoch.samples + size
        epoch.sums += output.means * size
        if keep:
            kept.append([output.features.clone(), labels, output.predictions.clone()])
        if stop(Progress(epoch, output.means, ranks)):
            break

    # Ranks with unequal shares draw unequal numbers for dropout, but the order of the next batches must be the same.
    epoch.rng = ranks.gather(torch.get_rng_state().unsqueeze(0))[0]
    torch.set_rng_state(epoch.rng)
    epoch.sums = ranks.total(epoch.sums)
    epoch.kept = (
        [ranks.gather(torch.cat(each)) for each in zip(*kept, strict=True)] if keep else None
    )
    return epoch


def _from_state(rng: Tensor | None, batches: Iterable) -> Iterator:
    """The batches; the random state becomes `rng` once their order has been drawn from the one before."""
    batches = iter(batches)
    batch = next(batches, None)
    if rng is not None:
        torch.set_rng_state(rng)
    while batch is not None:
        yield batch
        batch = next(batches, None)


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[tuple], amp: bool = False, ranks: Ranks = Ranks()
) -> dict:  # noqa: B008
    """Features (N, D), logits (N, C), labels and predictions (N,) of a network on the batches of all ranks.

    They are in the order of the data set.
    """
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
    return dict(features=features, logits=logits, labels=labels, predictions=logits.argmax(1))


@torch.no_grad()
def test(
    model: nn.Module, batches: Iterable[tuple], amp: bool = False, ranks: Ranks = Ranks()
) -> dict:  # noqa: B008
    """The outputs of `predict`, with the cross-entropy and the accuracy (%)."""
    tested = predict(model, batches, amp, ranks)
    return tested | dict(
        xent=F.cross_entropy(tested["logits"], tested["labels"]).item(),
        accuracy=percentage(tested["predictions"] == tested["labels"]),
    )


def state_sum(module: nn.Module) -> float:
    """The sum of a module's state: finite where all of it is. Waits for the device."""
    return sum(tensor.double().sum() for tensor in module.state_dict().values()).item()
