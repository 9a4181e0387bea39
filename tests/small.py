"""A network of two layers with its step, and batches of made-up images."""

import torch
from torch import nn

from center_loss import CenterLoss
from engine.step import Step


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(6, 2)
        self.classifier = nn.Linear(2, 3)

    def forward(self, images):
        features = self.embedding(images.flatten(1))
        return features, self.classifier(features)


def make_step(weight=0.3, **options) -> Step:
    torch.manual_seed(0)
    net = Network()
    center_loss = CenterLoss(3, 2, use_gpu=False)
    optimizers = dict(
        model=torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        cent=torch.optim.SGD(center_loss.parameters(), 0.5),
    )
    return Step(net, center_loss, optimizers, weight=weight, **options)


def make_batches(count, size=5) -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        images = torch.randn(size, 1, 2, 3, generator=generator)
        batches.append((images, torch.randint(3, (size,), generator=generator), size))
    return batches


def constant(step: Step) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(step.optimizers["model"], 1.0)
