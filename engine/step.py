"""One update of network and centers: the place to change how they are trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from center_loss import CenterLoss
from engine.ranks import Ranks


class Output(NamedTuple):
    """What a step computed before its update, on the device. A CUDA graph overwrites its last."""

    features: Tensor  # (B, D)
    predictions: Tensor  # (B,)
    means: Tensor  # (3,), this rank's part of cross-entropy, λ · center loss and share correct


@dataclass(eq=False)
class Step:
    """One update with cross-entropy + λ · center loss.

    Here λ, both losses and both optimizers meet: a loss term of your own is a line in `__call__`.
    Nothing in it waits for the device.
    """

    net: nn.Module  # images (B, C, H, W) to features (B, D) and logits (B, C)
    center_loss: CenterLoss
    optimizers: Mapping[str, Optimizer]  # of network and centers; all of them take a step
    weight: float  # λ; at 0 there is no center loss, and the centers stay where they are
    lr_ratio: float = 1.0  # the centers' learning rate over the optimizer's, if they share one
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    amp: bool = False  # run the network under bfloat16 autocast
    ranks: Ranks = Ranks()  # the processes that share each batch

    @property
    def device(self) -> torch.device:
        return self.center_loss.centers.device

    def __call__(self, images: Tensor, labels: Tensor, size: int | None = None) -> Output:
        """Takes the step. `size`: samples of the batch over all ranks, by default those given."""
        size = size or len(labels)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            features, logits = self.net(images)
        smoothing = dict(label_smoothing=self.label_smoothing)
        xent = F.cross_entropy(logits, labels, reduction="sum", **smoothing) / size
        center = torch.zeros_like(xent)
        if self.weight:
            center = self.weight * self.center_loss(features, labels)
        loss = xent + center

        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        # DistributedDataParallel averages the ranks' gradients, of which the sum is wanted.
        (self.ranks.size * loss).backward()
        if self.weight:
            self.center_loss.rescale_center_grad(self.ranks.size * self.weight, self.lr_ratio)
        for optimizer in self.optimizers.values():
            optimizer.step()

        predictions = logits.detach().argmax(1)
        correct = (predictions == labels).sum() / size
        means = torch.stack([xent.detach(), center.detach() / self.ranks.size, correct])
        return Output(features.detach(), predictions, means)
