"""A step against its formulas, and on a device that has no values to ask for."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from small import make_batches, make_step

import center_loss
import cli
import models
import recipes
from engine.step import Step


@pytest.mark.parametrize("weight, smoothing", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2)])
def test_a_step_is_one_update_of_network_and_centers(weight, smoothing):
    step = make_step(weight, label_smoothing=smoothing)
    images, labels, _ = make_batches(1)[0]
    net = copy.deepcopy(step.net)
    centers = step.center_loss.centers.detach().clone()
    output = step(images, labels)

    features, logits = net(images)
    targets = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    xent = -(targets * logits.log_softmax(1)).sum(1).mean()
    center = weight * (features - centers[labels]).pow(2).sum(1).mean()
    correct = (logits.argmax(1) == labels).double().mean()
    assert output.means.tolist() == pytest.approx([xent.item(), center.item(), correct.item()])
    assert torch.equal(output.features, features)
    assert torch.equal(output.predictions, logits.argmax(1))
    assert not any(each.requires_grad for each in output)

    (xent + center).backward()
    for after, before in zip(step.net.parameters(), net.parameters(), strict=True):
        assert torch.allclose(after, before - 0.1 * before.grad, atol=1e-6)
    for label in range(3 if weight else 0):
        own = features.detach()[labels == label]
        centers[label] -= 0.5 * 2 * (centers[label] - own).sum(0) / len(labels)
    assert torch.allclose(step.center_loss.centers, centers, atol=1e-6)


def test_one_optimizer_with_lr_ratio_takes_the_same_step():
    images, labels, _ = make_batches(1)[0]
    one = make_step(lr_ratio=5.0)
    parameters = [*one.net.parameters(), *one.center_loss.parameters()]
    one.optimizers = dict(model=torch.optim.SGD(parameters, 0.1))
    two = make_step()
    one(images, labels)
    two(images, labels)
    assert torch.allclose(one.center_loss.centers, two.center_loss.centers, atol=1e-6)


def test_a_rank_adds_its_share_of_the_joined_batch():
    images, labels, _ = make_batches(1)[0]
    xent = [make_step(0.0)(images, labels, size).means[0].item() for size in (5, 20)]
    assert xent[1] == pytest.approx(xent[0] / 4)


# ------------------------------------------------- tensors without values: as a GPU that waits

OPTIONS = {
    **{f"recipe {name}": ["--recipe", name] for name in recipes.RECIPES},
    **{f"distance {name}": ["--distance", name] for name in center_loss.DISTANCES},
    **{f"centers {name}": ["--center-update", name] for name in center_loss.CENTER_UPDATES},
    "class average": ["--class-average"],
    "radius": ["--radius", "0.5"],
    "scale": ["--loss-scale", "0.5"],
    "softmax only": ["--weight-cent", "0"],
    "smoothed labels": ["--label-smoothing", "0.1"],
    "amp": ["--amp"],
}


@pytest.fixture
def no_autocast(monkeypatch):
    """The meta device has none; it also has no fused optimizers, which only a GPU is given."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def take_step_on_meta(flags, step_class=Step):
    """Takes a step of the flags' network, loss and optimizers on tensors without values."""
    args = cli.parse_args(flags)
    channels, size = (3, 32) if args.augment else (1, 28)
    if args.image_size != 32:
        size = args.image_size
    model = models.create(args.model, 10, channels, size, args.feat_dim)
    loss = recipes.create_center_loss(10, model.classifier.in_features, args)
    model.to("meta")
    loss.to("meta")
    optimizers = recipes.create_optimizers(model, loss, args)
    step = recipes.create_step(model, loss, optimizers, args)
    step.__class__ = step_class
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.empty(4, channels, height, width, device="meta")
    return step(images, torch.empty(4, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_asks_the_device_for_nothing(name, no_autocast):
    output = take_step_on_meta(OPTIONS[name])
    assert output.means.is_meta and output.means.shape == (3,)


class Waits(Step):
    def __call__(self, images, labels, size=None):
        output = super().__call__(images, labels, size)
        self.last = output.means[0].item()
        return output


class Branches(Step):
    def __call__(self, images, labels, size=None):
        if (labels > 3).any():
            return None
        return super().__call__(images, labels, size)


class Mixes(Step):
    def __call__(self, images, labels, size=None):
        return super().__call__(images + torch.ones(images.shape), labels, size)


@pytest.mark.parametrize("fault", [Waits, Branches, Mixes])
def test_the_device_without_values_shows_a_step_that_asks(fault, no_autocast):
    with pytest.raises((RuntimeError, NotImplementedError)):
        take_step_on_meta([], fault)
