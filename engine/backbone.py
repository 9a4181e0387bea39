"""torchvision's classification networks as networks of features and logits."""

import warnings

import torch
from torch import Tensor, nn

Size = tuple[int, int]  # height and width of an image in pixels


class ModelError(Exception):
    """The network cannot be built as asked; the message is one line for the user."""


def shown(size: Size) -> str:
    """A size as a user writes it: one number for a square, else H x W."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


class Backbone(nn.Module):
    """A torchvision classification network with an embedding for its last layer, and a classifier.

    Args:
        name: as in torchvision.models.
        num_classes, in_channels, image_size: as in every constructor of models.MODELS; grey images
            become three equal channels.
        feat_dim: 0: no embedding, the features are the last layer's input.
        pretrained: with the weights that torchvision names DEFAULT, downloaded where missing.

    Raises ModelError if the weights can be neither read nor downloaded, or the network cannot take
    such images.
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
        self.body = _torchvision_network(name, pretrained)
        modules = self.body.named_modules()
        layers = [each for each in modules if isinstance(each[1], nn.Linear | nn.Conv2d)]
        last, layer = layers[-1]
        parent, _, own = last.rpartition(".")
        setattr(self.body.get_submodule(parent), own, nn.Identity())
        width = layer.weight.shape[1]
        self.embedding = nn.Linear(width, feat_dim) if feat_dim else nn.Identity()
        self.classifier = nn.Linear(feat_dim or width, num_classes)
        self._check(name, in_channels, image_size)

    def _check(self, name: str, in_channels: int, image_size: Size) -> None:
        if in_channels not in (1, 3):
            raise ModelError(f"{name} takes images of 1 or 3 channels, got {in_channels}")
        try:
            with torch.no_grad():
                self.eval()(torch.zeros(1, in_channels, *image_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"{name} cannot take images of {shown(image_size)} pixels, unlike those of "
                f"--image-size 224: {reason}"
            ) from error
        self.train()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self._last_inputs(images.expand(-1, 3, -1, -1)).to(images.dtype)
        with torch.autocast(images.device.type, enabled=False):  # as in ConvNet
            features = self.embedding(inputs)
            return features, self.classifier(features)

    def _last_inputs(self, colours: Tensor) -> Tensor:
        # There may be one pixel left, and BatchNorm cannot train on one pixel of one image.
        if self.training and len(colours) == 1 and not torch.distributed.is_initialized():
            return self.body(colours.expand(2, -1, -1, -1))[:1]
        return self.body(colours)


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
