"""Networks: images (B, C, H, W) to features (B, feat_dim) and logits (B, num_classes).

MODELS maps a name to its constructor(num_classes, in_channels, image_size, feat_dim). Each ends in an embedding of
feat_dim dimensions, small enough to plot at 2, and a linear classifier on it. Any other name is one of torchvision's
classification networks.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class ModelError(Exception):
    """The network cannot be built as asked; the message is one line for the user."""


class Stage(NamedTuple):
    """A convolution, its activation and a max-pool of stride 2."""

    channels: int
    pool: int = 0  # its kernel size; 0: no pool
    kernel: int = 5
    padding: int = 2


class PReLUOnCPU(torch.autograd.Function):
    """F.prelu with a backward pass of vectorised operations; torch's own takes four times as long on the CPU."""

    @staticmethod
    def forward(context, inputs: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(inputs, slopes)
        return F.prelu(inputs, slopes)

    @staticmethod
    @once_differentiable
    def backward(context, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, slopes = (
            each.to(gradients.dtype) for each in context.saved_tensors
        )  # autocast casts F.prelu's
        slopes_by_channel = slopes.view(1, -1, *[1] * (inputs.ndim - 2))  # (1, 1 or C, 1, 1)
        above = torch.ops.aten.threshold_backward(
            gradients, inputs, 0
        )  # gradients where inputs > 0, else 0
        below = gradients - above  # gradients where inputs <= 0, else 0
        # In place, as each new (B, C, H, W) costs more than the operation that fills it.
        to_inputs = above.addcmul_(slopes_by_channel, below)
        return to_inputs, below.mul_(inputs).sum_to_size(slopes_by_channel.shape).view_as(slopes)


class PReLU(nn.PReLU):
    """PReLU with a faster backward pass on the CPU."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.device.type == "cpu":
            return PReLUOnCPU.apply(inputs, self.weight)
        return super().forward(inputs)


class ConvNet(nn.Module):
    """Convolutions, an embedding and a linear classifier on it.

    Args:
        num_classes, in_channels, image_size, feat_dim: as in every constructor of MODELS.
        stages: the convolutions.
        batch_norm: convolution without bias, BatchNorm and ReLU, instead of convolution and PReLU.
        pool_first: pool before BatchNorm and ReLU, which then have a quarter of the pixels.
        global_pool: the embedding sees the maximum of each channel, instead of all pixels.
        prelu_per_channel: a slope for each channel, instead of one for each layer.
        classifier_bias: without it the class centers spread on a circle, with it on rays to one side.
        dirac: the first convolution begins as the cosine basis of its patches and the negative of it, the others as the
            identity of their input's channels (Jordan, arXiv:2404.00498, whose first layer whitens the patches).

    Raises:
        ModelError: the images are too small for the pools, or feat_dim is 0.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        feat_dim: int,
        *,
        stages: Sequence[Stage],
        batch_norm: bool = False,
        pool_first: bool = False,
        global_pool: bool = False,
        prelu_per_channel: bool = False,
        classifier_bias: bool = True,
        dirac: bool = False,
    ):
        super().__init__()
        if not feat_dim:
            raise ModelError(
                "--feat-dim must be at least 1 for this network; 0 is the width of one of torchvision"
            )

        def activation(channels: int) -> list[nn.Module]:
            if batch_norm:
                return [nn.BatchNorm2d(channels), nn.ReLU()]
            return [PReLU(channels if prelu_per_channel else 1)]

        layers, channels, size = [], in_channels, image_size
        for stage in stages:
            pool = [nn.MaxPool2d(stage.pool, stride=2)] if stage.pool else []
            layers.append(
                nn.Conv2d(
                    channels,
                    stage.channels,
                    stage.kernel,
                    padding=stage.padding,
                    bias=not batch_norm,
                )
            )
            layers += (
                pool + activation(stage.channels)
                if pool_first
                else activation(stage.channels) + pool
            )
            channels, size = stage.channels, size + 2 * stage.padding - stage.kernel + 1
            if stage.pool:
                size = (size - stage.pool) // 2 + 1
            if (
                size < 1 + pool_first
            ):  # a BatchNorm of one pixel could not train on a batch of one image
                raise ModelError(f"images of {image_size} pixels are too small for this network")
        if global_pool:
            layers, size = [*layers, nn.AdaptiveMaxPool2d(1)], 1
        self.body = nn.Sequential(*layers)
        if dirac:
            first, *others = (layer.weight for layer in layers if isinstance(layer, nn.Conv2d))
            _begin_as_patches(first)
            for weight in others:
                nn.init.dirac_(weight[: weight.shape[1]])
        embedding = nn.Linear(channels * size**2, feat_dim)
        self.embedding = (
            embedding if batch_norm else nn.Sequential(embedding, *activation(feat_dim))
        )
        self.classifier = nn.Linear(feat_dim, num_classes, bias=classifier_bias)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.body(images).flatten(1).to(self.classifier.weight.dtype)
        with torch.autocast(
            images.device.type, enabled=False
        ):  # bfloat16 would round the features to a visible grid
            features = self.embedding(inputs)
            return features, self.classifier(features)


def _begin_as_patches(weight: torch.Tensor) -> None:
    """Filters (N, C, H, W) as the C·H·W vectors of the discrete cosine transform, then as their negatives.

    Of 2x2 pixels these are the mean and the edges, of RGB the brightness and the opponent colours.
    """

    def basis(size: int) -> torch.Tensor:  # orthonormal, a vector a row
        index = torch.arange(size)
        vectors = torch.cos(math.pi / size * index.unsqueeze(1) * (index + 0.5))
        return vectors / vectors.norm(dim=1, keepdim=True)

    patches = functools.reduce(torch.kron, map(basis, weight.shape[1:])).view(-1, *weight.shape[1:])
    filters = torch.cat([patches, -patches])[: len(weight)]
    with torch.no_grad():
        weight[: len(filters)] = filters


class Backbone(nn.Module):
    """A torchvision classification network with an embedding in place of its last layer, and a linear classifier.

    Args:
        name: as in torchvision.models.
        num_classes, in_channels, image_size: as in every constructor of MODELS; grey images become equal channels.
        feat_dim: 0: no embedding, the features are the last layer's input.
        pretrained: with the weights that torchvision names DEFAULT, downloaded where they are missing.

    Raises:
        ModelError: the weights can be neither read nor downloaded, or the network cannot take images of this shape.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int,
        image_size: int,
        feat_dim: int,
        pretrained: bool = False,
    ):
        super().__init__()
        self.body = _torchvision_network(name, pretrained)
        layers = [
            each for each in self.body.named_modules() if isinstance(each[1], nn.Linear | nn.Conv2d)
        ]
        last, layer = layers[-1]
        parent, _, own = last.rpartition(".")
        setattr(self.body.get_submodule(parent), own, nn.Identity())
        width = layer.weight.shape[1]
        self.embedding = nn.Linear(width, feat_dim) if feat_dim else nn.Identity()
        self.classifier = nn.Linear(feat_dim or width, num_classes)
        self._check(name, in_channels, image_size)

    def _check(self, name: str, in_channels: int, image_size: int) -> None:
        if in_channels not in (1, 3):
            raise ModelError(f"{name} takes images of 1 or 3 channels, got {in_channels}")
        try:
            with torch.no_grad():
                self.eval()(torch.zeros(1, in_channels, image_size, image_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"{name} cannot take images of {image_size} pixels, unlike those of --image-size 224: {reason}"
            ) from error
        self.train()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # After the last stride there may be one pixel; BatchNorm cannot train on one pixel of one image.
        twice = self.training and len(images) == 1 and not torch.distributed.is_initialized()
        colours = images.expand(2 if twice else -1, 3, -1, -1)
        inputs = self.body(colours)[: len(images)].to(self.classifier.weight.dtype)
        with torch.autocast(images.device.type, enabled=False):  # as in ConvNet
            features = self.embedding(inputs)
            return features, self.classifier(features)


class Mirrored(nn.Module):
    """The mean features and logits of images and of their mirror images.

    Wen et al. (ECCV 2016, section 4.1) test faces so, with the two features side by side. As the classifiers here are
    linear, the mean logits are those of the mean features.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        views = self.model(images), self.model(images.flip(3))
        return tuple((seen + mirrored) / 2 for seen, mirrored in zip(*views, strict=True))


def _torchvision_network(name: str, pretrained: bool) -> nn.Module:
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about initialisations that will change
        try:
            network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        except (OSError, RuntimeError) as error:  # no network, no space, a broken file
            reason = " ".join(str(error).split())
            raise ModelError(
                f"the weights of {name} could not be downloaded or read ({reason})"
            ) from error
    for head in (
        "aux1",
        "aux2",
        "AuxLogits",
    ):  # the further classifiers of googlenet and inception_v3
        if hasattr(network, head):
            setattr(network, head, None)
            network.aux_logits = False
    return network


def pretrained_scaling(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels in [0, 1] for which torchvision's DEFAULT weights were trained."""
    import torchvision

    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return tuple(transform.mean), tuple(transform.std)


def _resnet18_small(*shape: int) -> Backbone:
    """resnet18 for small images: a first convolution of 3x3 without stride, and no pool after it."""
    model = Backbone("resnet18", *shape)
    model.body.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.body.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.body.maxpool = nn.Identity()
    return model


LENETPP = (Stage(32), Stage(32, pool=2), Stage(64), Stage(64, pool=2), Stage(128))
SHALLOW = (
    Stage(32),
    Stage(64, pool=2),
    Stage(128),
    Stage(256, pool=2),
    Stage(512),
    Stage(512, pool=2),
)
DEEP = (*SHALLOW, Stage(256), Stage(128), Stage(64, pool=2))
IMAGES = (
    Stage(24, 0, 2, 0),
    *(Stage(channels, pool, 3, 1) for channels in (64, 256, 256) for pool in (2, 0)),
)
FAST = (Stage(16, 2, padding=0), Stage(32, 2, padding=0), Stage(64, 0, 3, 1), Stage(64, 2, 3, 1))


def _conv_net(*stages: Stage, **options) -> Callable[..., ConvNet]:
    return functools.partial(ConvNet, stages=stages, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": _conv_net(*LENETPP, Stage(128, pool=2)),  # LeNet++ as in zhou2018
    "cnn-wen2016": _conv_net(
        *LENETPP, Stage(128, pool=3), prelu_per_channel=True, classifier_bias=False
    ),
    "bn-deep": _conv_net(*DEEP, batch_norm=True),
    "bn-shallow": _conv_net(*SHALLOW, batch_norm=True),
    "bn-fast": _conv_net(*FAST, batch_norm=True, pool_first=True),
    "bn-images": _conv_net(*IMAGES, batch_norm=True, pool_first=True, global_pool=True, dirac=True),
    "resnet18-small": _resnet18_small,
}


def is_known(name: str) -> bool:
    """Whether `name` is in MODELS or names a classification network of torchvision."""
    if name in MODELS:  # torchvision takes seconds to load
        return True
    import torchvision

    return name in torchvision.models.list_models(module=torchvision.models)


class Compiled(nn.Module):
    """`net`, compiled for batches of one size; batches of another size, such as an epoch's last, run uncompiled."""

    def __init__(self, net: nn.Module, batch_size: int):
        super().__init__()
        try:
            torch.compile(torch.neg)(
                next(net.parameters()).detach()
            )  # fails here, rather than within the first step
        except Exception as error:  # of torch's compiler, Triton's or the system's
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(f"--compile needs a C++ compiler that works: {reason}") from error
        self.net, self.batch_size = net, batch_size
        self.compiled = torch.compile(net, dynamic=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.compiled(images) if len(images) == self.batch_size else self.net(images)


def keep_(parameter: torch.Tensor) -> torch.Tensor:
    """The network's own initialisation, as a rule PyTorch's, which its layers have drawn already."""
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
    pretrained: bool = False,
) -> nn.Module:
    """Builds MODELS[name], or torchvision's network of that name, and initialises it by INITS[init].

    Raises ModelError if it cannot be built for such images, or its pretrained weights cannot be read or downloaded.
    """
    shape = num_classes, in_channels, image_size, feat_dim
    known = name in MODELS and not pretrained
    model = MODELS[name](*shape) if known else Backbone(name, *shape, pretrained)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters():
                INITS[init](parameter)
    return model
