"""Networks: images (B, C, H, W) to features (B, D) and logits (B, num_classes).

MODELS maps a name to its constructor(num_classes, in_channels, image_size (H, W), feat_dim). Each
ends in an embedding and a linear classifier. Other names are torchvision's classification networks.
"""

import math
from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor, nn

from engine.backbone import Backbone, ModelError, Size, output_size
from engine.backbone import pretrained_scaling as pretrained_scaling
from engine.images import height_and_width, one_line
from engine.layers import GlobalMax, PReLU, Residual, SmallConv2d

# Their order is that of state dicts and of the random numbers that they draw.
Layers = list[nn.Module]


def conv_bn(inputs: int, outputs: int, kernel: int = 5) -> Layers:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def conv_pool_bn(inputs: int, outputs: int, kernel: int, padding: int) -> Layers:
    """The pool comes first, so that BatchNorm and ReLU have a quarter of the pixels."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
    return [convolution, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU()]


def one_slope(channels: int) -> PReLU:
    """One for all channels; PReLU(channels) has one for each."""
    return PReLU()


def lenetpp(in_channels: int, activation: Callable, last_pool: int = 2) -> Layers:
    """LeNet++ (Wen et al., Table 1)."""

    def layer(inputs: int, outputs: int) -> Layers:
        return [nn.Conv2d(inputs, outputs, 5, padding=2), activation(outputs)]

    return [
        *layer(in_channels, 32),
        *layer(32, 32),
        nn.MaxPool2d(2),
        *layer(32, 64),
        *layer(64, 64),
        nn.MaxPool2d(2),
        *layer(64, 128),
        *layer(128, 128),
        nn.MaxPool2d(last_pool, stride=2),
    ]


def shallow(in_channels: int) -> Layers:
    """zahn2024-v1.2's."""
    return [
        *conv_bn(in_channels, 32),
        *conv_bn(32, 64),
        nn.MaxPool2d(2),
        *conv_bn(64, 128),
        *conv_bn(128, 256),
        nn.MaxPool2d(2),
        *conv_bn(256, 512),
        *conv_bn(512, 512),
        nn.MaxPool2d(2),
    ]


def deep(in_channels: int) -> Layers:
    """zahn2024-v1.0's and -v1.1's."""
    return [
        *shallow(in_channels),
        *conv_bn(512, 256),
        *conv_bn(256, 128),
        *conv_bn(128, 64),
        nn.MaxPool2d(2),
    ]


def fast(in_channels: int) -> Layers:
    return [
        *conv_pool_bn(in_channels, 16, kernel=5, padding=0),
        *conv_pool_bn(16, 32, kernel=5, padding=0),
        *conv_bn(32, 64, kernel=3),
        *conv_pool_bn(64, 64, kernel=3, padding=1),
    ]


def colour(in_channels: int) -> Layers:
    """As in Jordan, arXiv:2404.00498: the first layer takes patches of 2x2 pixels apart."""
    layers = [
        nn.Conv2d(in_channels, 24, 2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        *conv_pool_bn(24, 64, kernel=3, padding=1),
        *conv_bn(64, 64, kernel=3),
        *conv_pool_bn(64, 256, kernel=3, padding=1),
        *conv_bn(256, 256, kernel=3),
        *conv_pool_bn(256, 256, kernel=3, padding=1),
        *conv_bn(256, 256, kernel=3),
        GlobalMax(),
    ]
    begin_as_patches(layers[0].weight)
    for layer in layers[1:]:
        if isinstance(layer, nn.Conv2d):  # begins as the identity of its input
            nn.init.dirac_(layer.weight[: layer.in_channels])
    return layers


def begin_as_patches(weight: Tensor) -> None:
    """Filters (N, C, H, W) become the basis of the discrete cosine transform, then its negative."""

    def basis(size: int) -> Tensor:  # a vector a row
        index = torch.arange(size)
        vectors = torch.cos(math.pi / size * index.unsqueeze(1) * (index + 0.5))
        return vectors / vectors.norm(dim=1, keepdim=True)

    patches = reduce(torch.kron, map(basis, weight.shape[1:]))
    patches = patches.view(-1, *weight.shape[1:])
    filters = torch.cat([patches, -patches])[: len(weight)]
    with torch.no_grad():
        weight[: len(filters)] = filters


class ConvNet(nn.Module):
    """Convolutions, an embedding and a linear classifier on it.

    `layers` creates the convolutions for so many channels, `activation` that of the embedding.
    Without `classifier_bias` class centers spread on a circle, else on rays to one side.
    ModelError if the images are too small for the layers, or feat_dim is 0.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: Size,
        feat_dim: int,
        *,
        layers: Callable[[int], Layers],
        activation: Callable[[int], nn.Module] | None = None,
        classifier_bias: bool = True,
    ):
        super().__init__()
        if not feat_dim:
            raise ModelError("--feat-dim must be at least 1 for a network of models.py, got 0")
        self.body = nn.Sequential(*layers(in_channels))
        self.embedding = nn.Linear(output_size(self.body, in_channels, image_size), feat_dim)
        if activation:
            self.embedding = nn.Sequential(self.embedding, activation(feat_dim))
        self.classifier = nn.Linear(feat_dim, num_classes, bias=classifier_bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.body(images).flatten(1).to(images.dtype)
        # bfloat16 would round the features to a visible grid.
        with torch.autocast(images.device.type, enabled=False):
            features = self.embedding(inputs)
            return features, self.classifier(features)


def resnet18_small(*shape) -> Backbone:
    """The first convolution is of 3x3, without stride and pool."""
    model = Backbone("resnet18", *shape)
    model.body.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.body.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.body.maxpool = nn.Identity()
    return model


def faces(in_channels: int) -> Layers:
    """wen2016's, as in the authors' Caffe files."""

    def layer(inputs: int, outputs: int) -> Layers:
        return [nn.Conv2d(inputs, outputs, 3), PReLU(outputs)]

    return [
        *layer(in_channels, 32),
        *layer(32, 64),
        nn.MaxPool2d(2),
        Residual(64),
        *layer(64, 128),
        nn.MaxPool2d(2),
        Residual(128),
        Residual(128),
        *layer(128, 256),
        nn.MaxPool2d(2),
        Residual(256),
        Residual(256),
        Residual(256),
        Residual(256),
        Residual(256),
        *layer(256, 512),
        nn.MaxPool2d(2),
        Residual(512),
        Residual(512),
        Residual(512),
    ]


def face_resnet(*shape) -> ConvNet:
    """For 112 x 96 pixels and feat_dim 512 in wen2016; it begins as there."""
    model = ConvNet(*shape, layers=faces)
    initialise(model, "xavier")
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": partial(ConvNet, layers=partial(lenetpp, activation=one_slope), activation=one_slope),
    "cnn-wen2016": partial(
        ConvNet,
        layers=partial(lenetpp, activation=PReLU, last_pool=3),
        activation=PReLU,
        classifier_bias=False,
    ),
    "bn-deep": partial(ConvNet, layers=deep),
    "bn-shallow": partial(ConvNet, layers=shallow),
    "bn-fast": partial(ConvNet, layers=fast),
    "bn-images": partial(ConvNet, layers=colour),
    "resnet18-small": resnet18_small,
    "face-resnet": face_resnet,
}


def is_known(name: str) -> bool:
    if name in MODELS:  # torchvision takes seconds to load
        return True
    import torchvision

    return name in torchvision.models.list_models(module=torchvision.models)


class Mirrored(nn.Module):
    """Features of images and of their mirror images: their "mean" (B, D), or "concat" (B, 2 D).

    Wen et al. (ECCV 2016, section 4.1) test faces by the latter. Logits are the mean of both.
    """

    def __init__(self, model: nn.Module, mode: str = "mean"):
        super().__init__()
        if mode not in MIRRORS:
            raise ModelError(f"mirror must be one of {', '.join(MIRRORS)}, got {mode}")
        self.model = model
        self.mode = mode

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.model(images)
        mirrored_features, mirrored_logits = self.model(images.flip(3))
        logits = (logits + mirrored_logits) / 2
        if self.mode == "concat":
            return torch.cat([features, mirrored_features], 1), logits
        return (features + mirrored_features) / 2, logits

    def centers(self, centers: Tensor) -> Tensor:
        """Class centers (C, D) among these features."""
        return torch.cat([centers, centers], 1) if self.mode == "concat" else centers


MIRRORS = ("mean", "concat")


class Compiled(nn.Module):
    """Compiled for batches of one size; an epoch's last, smaller one runs uncompiled."""

    def __init__(self, net: nn.Module, batch_size: int):
        super().__init__()
        try:  # here, rather than within the first step
            torch.compile(torch.neg)(next(net.parameters()).detach())
        except Exception as error:  # of torch's compiler, Triton's or the system's
            raise ModelError(f"--compile needs a C++ compiler: {one_line(error)}") from error
        self.net = net
        self.batch_size = batch_size
        self.compiled = torch.compile(net, dynamic=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.compiled(images) if len(images) == self.batch_size else self.net(images)


def xavier_(parameter: Tensor) -> Tensor:
    """Caffe's "xavier" (wen2016): weights uniform within sqrt(3 / fan_in), biases zero."""
    if parameter.ndim == 1:
        return nn.init.zeros_(parameter)
    bound = math.sqrt(3 / parameter[0].numel())
    return nn.init.uniform_(parameter, -bound, bound)


INITS = {"default": nn.Identity(), "xavier": xavier_}  # "default": as the layers have drawn it


def initialise(model: nn.Module, init: str) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, SmallConv2d):
            for parameter in module.parameters():
                INITS[init](parameter)


def create(
    name: str,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int | Size = 28,
    feat_dim: int = 2,
    init: str = "default",
    pretrained: bool = False,
) -> nn.Module:
    """MODELS[name], or torchvision's network of that name, initialised by INITS[init].

    `image_size` is (H, W), or one number for squares. ModelError if it cannot take such images, or
    the pretrained weights cannot be read or downloaded.
    """
    size = height_and_width(image_size)
    if name in MODELS and not pretrained:
        model = MODELS[name](num_classes, in_channels, size, feat_dim)
    else:
        model = Backbone(name, num_classes, in_channels, size, feat_dim, pretrained)
    initialise(model, init)
    return model
