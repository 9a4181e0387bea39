"""One update of network and centers."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from center_loss import CenterLoss
from engine.ranks import Ranks


class Output(NamedTuple):
    """What a step computed before its update of the weights, on the device. A captured step overwrites its last."""

    xent: Tensor  # scalar; over several ranks, this rank's share of the mean cross-entropy of the joined batch
    center: Tensor  # scalar, λ · center loss of the joined batch
    features: Tensor  # (B, D)
    predictions: Tensor  # (B,)
    means: Tensor  # (3,), this rank's part of mean cross-entropy, λ · center loss and share of correct predictions


class Step:
    """One update of a network and of its class centers with cross-entropy + λ · center loss.

    Args:
        net: images (B, C, H, W) to features (B, D) and logits (B, C); may be compiled or parallel.
        center_loss: whose centers are in one of the optimizers.
        optimizers: by name; all of them take a step.
        weight: λ. At 0 there is no center loss, and the centers stay where they are.
        lr_ratio: the centers' learning rate over the optimizer's, if network and centers share one optimizer.
        label_smoothing: share of the cross-entropy's target that is spread evenly over all classes.
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
        label_smoothing: float = 0.0,
        amp: bool = False,
        ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    ):
        self.net, self.center_loss, self.optimizers = net, center_loss, optimizers
        self.weight, self.lr_ratio, self.label_smoothing = weight, lr_ratio, label_smoothing
        self.amp, self.ranks = amp, ranks

    @property
    def device(self) -> torch.device:
        return self.center_loss.centers.device

    def __call__(self, images: Tensor, labels: Tensor, size: int | None = None) -> Output:
        """Takes the step. `size`: samples in the joined batch of all ranks, by default those of this one."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            features, logits = self.net(images)
        xent = F.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        xent = xent / (size or len(labels))
        center = (
            self.weight * self.center_loss(features, labels)
            if self.weight
            else torch.zeros_like(xent)
        )

        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        # DistributedDataParallel averages the ranks' gradients, of which the sum is wanted.
        (self.ranks.size * (xent + center)).backward()
        if self.weight:
            self.center_loss.rescale_center_grad(self.ranks.size * self.weight, self.lr_ratio)
        for optimizer in self.optimizers.values():
            optimizer.step()
        xent, center, predictions = xent.detach(), center.detach(), logits.detach().argmax(1)
        correct = (predictions == labels).sum() / (size or len(labels))
        means = torch.stack([xent, center / self.ranks.size, correct])
        return Output(xent, center, features.detach(), predictions, means)
