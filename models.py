"""Networks: images (B, C, H, W) to features (B, feat_dim) and logits (B, num_classes).

`create(name, ...)` builds one of MODELS; each ends in an embedding of feat_dim dimensions, small enough to plot at 2,
and a linear classifier on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class ModelError(Exception):
    """The network cannot be built as asked; the message is one line for the user."""


POOL, POOL3 = "pool 2x2", "pool 3x3 by 2"
LENETPP = (32, 32, POOL, 64, 64, POOL, 128, 128)


@dataclass(frozen=True)
class Design:
    """What sets a network apart. `stages`: a pool, or a convolution by its channels (5x5, padding 2), or by a tuple
    of channels, kernel size and padding.
    """

    stages: Sequence[int | tuple[int, int, int] | str]
    batch_norm: bool = False  # convolution without bias + BatchNorm + ReLU, in place of convolution + PReLU
    pool_first: bool = False  # a pool stands before the BatchNorm + ReLU, which then have a quarter of the pixels
    prelu_per_channel: bool = False  # in place of one slope a layer
    classifier_bias: bool = True  # without it the class centers spread on a circle, with it on rays to one side


MODELS = {
    "cnn": Design((*LENETPP, POOL)),  # LeNet++ as in zhou2018
    "cnn-wen2016": Design((*LENETPP, POOL3), prelu_per_channel=True, classifier_bias=False),  # LeNet++ as in the paper
    "bn-deep": Design((32, 64, POOL, 128, 256, POOL, 512, 512, POOL, 256, 128, 64, POOL), batch_norm=True),
    "bn-shallow": Design((32, 64, POOL, 128, 256, POOL, 512, 512, POOL), batch_norm=True),
    "bn-fast": Design(
        ((16, 5, 0), POOL, (32, 5, 0), POOL, (64, 3, 1), (64, 3, 1), POOL), batch_norm=True, pool_first=True
    ),
}


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, through which gradients go back to all of them."""

    @staticmethod
    def forward(context, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    backward = forward


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d; on the CPU, over the joined batch of all ranks (torch's SyncBatchNorm does so on GPUs alone)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not (self.training and dist.is_initialized() and images.device.type == "cpu"):
            return super().forward(images)
        given, images = images.dtype, images.to(torch.promote_types(images.dtype, torch.float32))
        over, count = (0, 2, 3), images.new_tensor([images.numel() / images.shape[1]])
        total = SumOverRanks.apply(torch.cat([images.sum(over), count]))
        mean, count = total[:-1] / total[-1], total[-1].item()
        centered = images - mean.view(1, -1, 1, 1)
        variance = SumOverRanks.apply(centered.square().sum(over)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(given)


class PReLUOnCPU(torch.autograd.Function):
    """F.prelu with a backward pass of vectorised operations; torch's own takes four times as long on the CPU."""

    @staticmethod
    def forward(context, inputs: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(inputs, slopes)
        return F.prelu(inputs, slopes)

    @staticmethod
    @once_differentiable
    def backward(context, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, slopes = (each.to(gradients.dtype) for each in context.saved_tensors)  # autocast has lowered F.prelu's
        beside = slopes.view(1, -1, *[1] * (inputs.ndim - 2))  # (1, 1 or C, 1, 1)
        above = torch.ops.aten.threshold_backward(gradients, inputs, 0)  # gradients where inputs > 0, else 0
        below = gradients - above  # gradients where inputs <= 0, else 0
        # In place, as each new (B, C, H, W) costs more than the operation that fills it.
        to_inputs = above.addcmul_(beside, below)
        return to_inputs, below.mul_(inputs).sum_to_size(beside.shape).view_as(slopes)


class PReLU(nn.PReLU):
    """PReLU, quicker on the CPU."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.device.type == "cpu":
            return PReLUOnCPU.apply(inputs, self.weight)
        return super().forward(inputs)


class ConvNet(nn.Module):
    """Convolutions, an embedding and a linear classifier on it."""

    def __init__(self, design: Design, num_classes: int, in_channels: int, image_size: int, feat_dim: int):
        super().__init__()
        layers, channels, size = [], in_channels, image_size
        for stage in design.stages:
            if stage in (POOL, POOL3):
                kernel, padding, stride = 3 if stage == POOL3 else 2, 0, 2
                layers.insert(len(layers) - 2 * design.pool_first, nn.MaxPool2d(kernel, stride))
            else:
                inputs, stride = channels, 1
                channels, kernel, padding = (stage, 5, 2) if isinstance(stage, int) else stage
                layers.append(nn.Conv2d(inputs, channels, kernel, padding=padding, bias=not design.batch_norm))
                layers += self._activation(design, channels)
            size = (size + 2 * padding - kernel) // stride + 1
            if size < 1 + design.pool_first:  # a BatchNorm of one pixel could not train on a batch of one image
                raise ModelError(f"images of {image_size} pixels are too small for this network")
        self.body = nn.Sequential(*layers)
        embedding = nn.Linear(channels * size**2, feat_dim)
        self.embedding = (
            embedding if design.batch_norm else nn.Sequential(embedding, *self._activation(design, feat_dim))
        )
        self.classifier = nn.Linear(feat_dim, num_classes, bias=design.classifier_bias)

    @staticmethod
    def _activation(design: Design, channels: int) -> list[nn.Module]:
        if design.batch_norm:
            return [BatchNorm2d(channels), nn.ReLU()]
        return [PReLU(channels if design.prelu_per_channel else 1)]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.body(images).flatten(1).to(self.classifier.weight.dtype)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would lay the features on a visible grid
            features = self.embedding(inputs)
            return features, self.classifier(features)


class Compiled(nn.Module):
    """`net`, compiled for batches of one size; one of another size, such as an epoch's last, goes through it as it is.

    On a GPU the compiled passes are CUDA graphs, but not among several ranks, whose gradients are sent off on the way.
    """

    def __init__(self, net: nn.Module, batch_size: int):
        super().__init__()
        parameter = next(net.parameters())
        try:
            torch.compile(torch.neg)(parameter.detach())  # fails here, rather than within the first step
        except Exception as error:  # of torch's compiler, Triton's or the system's
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(f"--compile needs a C++ compiler that works: {reason}") from error
        graphs = parameter.is_cuda and not dist.is_initialized()
        self.net, self.batch_size = net, batch_size
        self.compiled = torch.compile(net, dynamic=False, mode="reduce-overhead" if graphs else "default")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(images) != self.batch_size:
            return self.net(images)
        features, logits = self.compiled(images)
        return features.clone(), logits.clone()  # the next CUDA graph overwrites them


def keep_(parameter: torch.Tensor) -> torch.Tensor:
    """As PyTorch's layers have drawn themselves."""
    return parameter


def xavier_(parameter: torch.Tensor) -> torch.Tensor:
    """Caffe's "xavier" (wen2016): weights uniform within sqrt(3 / fan_in), biases zero."""
    if parameter.ndim == 1:
        return nn.init.zeros_(parameter)
    bound = math.sqrt(3 / parameter[0].numel())
    return nn.init.uniform_(parameter, -bound, bound)


INITS = {"default": keep_, "xavier": xavier_}


def create(
    name: str,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    feat_dim: int = 2,
    init: str = "default",
) -> ConvNet:
    """Builds MODELS[name] and starts it by INITS[init]. Raises ModelError where the images are too small for it."""
    model = ConvNet(MODELS[name], num_classes, in_channels, image_size, feat_dim)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters():
                INITS[init](parameter)
    return model
