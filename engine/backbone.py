"""torchvision's classification networks as networks of features and logits."""

import copy
import warnings

import torch
from torch import Tensor, nn

from engine.images import one_line

Size = tuple[int, int]  # height and width of an image in pixels


class ModelError(Exception):
    """The network cannot be built as asked; the message is one line for the user."""


def output_size(body: nn.Module, in_channels: int, image_size: Size) -> int:
    """How many numbers `body` makes of one image; ModelError if it cannot take such images."""
    try:
        images = torch.empty(1, in_channels, *image_size, device="meta")  # computes shapes alone
        return copy.deepcopy(body).to("meta")(images).numel()
    except (AssertionError, RuntimeError, ValueError) as error:
        size = " x ".join(map(str, image_size))
        reason = f"the network cannot take images of {size} pixels: {one_line(error)}"
        raise ModelError(reason) from error


class Backbone(nn.Module):
    """A torchvision classification network with an embedding for its last layer, and a classifier.

    Grey images become three equal channels. feat_dim 0: the features are the last layer's input.
    `pretrained`: with the weights that torchvision names DEFAULT.
    ModelError if the weights can be neither read nor downloaded, or it cannot take such images.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int,
        image_size: Size,
        feat_dim: int,
        pretrained: bool = False,
    ):
        super().__init__()
        if in_channels not in (1, 3):
            raise ModelError(f"{name} takes images of 1 or 3 channels, got {in_channels}")
        self.body = _torchvision_network(name, pretrained)
        modules = self.body.named_modules()
        layers = [each for each in modules if isinstance(each[1], nn.Linear | nn.Conv2d)]
        last, layer = layers[-1]
        parent, _, own = last.rpartition(".")
        setattr(self.body.get_submodule(parent), own, nn.Identity())
        width = layer.weight.shape[1]
        self.embedding = nn.Linear(width, feat_dim) if feat_dim else nn.Identity()
        self.classifier = nn.Linear(feat_dim or width, num_classes)
        output_size(self.body.eval(), 3, image_size)
        self.train()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colours = images.expand(-1, 3, -1, -1)
        # There may be one pixel left, and BatchNorm cannot train on one pixel of one image.
        if self.training and len(images) == 1 and not torch.distributed.is_initialized():
            inputs = self.body(colours.expand(2, -1, -1, -1))[:1]
        else:
            inputs = self.body(colours)
        with torch.autocast(images.device.type, enabled=False):  # as in ConvNet
            features = self.embedding(inputs.to(images.dtype))
            return features, self.classifier(features)


def _torchvision_network(name: str, pretrained: bool) -> nn.Module:
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about initialisations that will change
        try:
            network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        except (OSError, RuntimeError) as error:  # no network, no space, a broken file
            raise ModelError(
                f"the weights of {name} could not be downloaded or read ({one_line(error)})"
            ) from error
    for head in ("aux1", "aux2", "AuxLogits"):  # further classifiers of googlenet and inception_v3
        if hasattr(network, head):
            setattr(network, head, None)
            network.aux_logits = False
    return network


def pretrained_scaling(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels in [0, 1] for which the DEFAULT weights were trained."""
    import torchvision

    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return tuple(transform.mean), tuple(transform.std)
