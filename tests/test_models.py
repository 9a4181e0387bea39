"""Networks: sizes as the references state them, any input, initialisation, forward's contract."""

import math

import pytest
import torch
from torch import nn

import models


def shapes(model, kind):
    return [tuple(module.weight.shape) for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    "name, image_size, in_channels, channels, embedding",
    [
        ("cnn", 28, 1, [32, 32, 64, 64, 128, 128], 1152),
        ("cnn", 32, 3, [32, 32, 64, 64, 128, 128], 2048),
        ("cnn-wen2016", 28, 1, [32, 32, 64, 64, 128, 128], 1152),
        ("bn-deep", 28, 1, [32, 64, 128, 256, 512, 512, 256, 128, 64], 64),
        ("bn-deep", 32, 3, [32, 64, 128, 256, 512, 512, 256, 128, 64], 256),
        ("bn-shallow", 28, 1, [32, 64, 128, 256, 512, 512], 4608),
    ],
)
def test_layers_are_those_of_the_reference(name, image_size, in_channels, channels, embedding):
    model = models.create(name, 10, in_channels, image_size)
    inputs = [in_channels, *channels[:-1]]
    assert shapes(model, nn.Conv2d) == [(c, i, 5, 5) for i, c in zip(inputs, channels, strict=True)]
    assert shapes(model, nn.Linear) == [(2, embedding), (10, 2)]
    if name.startswith("bn"):
        assert shapes(model, nn.BatchNorm2d) == [(c,) for c in channels] and not shapes(model, nn.PReLU)
        assert all(conv.bias is None for conv in model.modules() if isinstance(conv, nn.Conv2d))
    else:
        per_channel = name == "cnn-wen2016"
        assert shapes(model, nn.PReLU) == [((c if per_channel else 1),) for c in [*channels, 2]]
        assert all((m.weight == 0.25).all() for m in model.modules() if isinstance(m, nn.PReLU))
    assert (model.classifier.bias is None) == (name == "cnn-wen2016")


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize("channels, size, classes, dim", [(1, 28, 10, 2), (3, 32, 100, 5), (3, 40, 3, 1)])
def test_forward_gives_features_and_the_logits_of_them(name, channels, size, classes, dim):
    model = models.create(name, classes, channels, size, dim).eval()
    features, logits = model(torch.randn(3, channels, size, size))
    assert features.shape == (3, dim) and logits.shape == (3, classes)
    assert torch.equal(logits, model.classifier(features))


def test_default_init_draws_layer_by_layer_from_the_global_generator():
    torch.manual_seed(7)
    model = models.create("cnn")
    torch.manual_seed(7)
    for (out, inside), layer in zip([(32, 1), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)],
                                    [m for m in model.modules() if isinstance(m, nn.Conv2d)], strict=True):  # fmt: skip
        oracle = nn.Conv2d(inside, out, 5)
        assert torch.equal(oracle.weight, layer.weight) and torch.equal(oracle.bias, layer.bias)
    for oracle, layer in ((nn.Linear(1152, 2), model.embedding[0]), (nn.Linear(2, 10), model.classifier)):
        assert torch.equal(oracle.weight, layer.weight) and torch.equal(oracle.bias, layer.bias)


def test_xavier_is_uniform_within_its_bound_and_has_zero_biases():
    model = models.create("cnn-wen2016", init="xavier")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = math.sqrt(3 / layer.weight[0].numel())
            assert layer.weight.abs().max() <= bound
            if layer.weight.numel() > 500:
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert layer.bias is None or (layer.bias == 0).all()
        elif isinstance(layer, nn.PReLU):
            assert (layer.weight == 0.25).all()


@pytest.mark.parametrize("name, smallest", [("cnn", 8), ("cnn-wen2016", 12), ("bn-deep", 16), ("bn-shallow", 8)])
def test_images_too_small_for_the_pools_are_refused(name, smallest):
    models.create(name, image_size=smallest)
    with pytest.raises(models.ModelError, match=f"images of {smallest - 1} pixels"):
        models.create(name, image_size=smallest - 1)
