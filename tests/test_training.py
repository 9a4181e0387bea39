"""A step against its formulas, an epoch against its parts, a captured step against its eager self; no files."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from stand_in import StandIn, captured
from torch import nn

import cli
from center_loss import CenterLoss
from engine import cuda_graph, epoch, metrics, step
from engine.ranks import Ranks
from models import MODELS
from recipes import SCHEDULES, create_optimizers


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.classifier = nn.Linear(6, 2), nn.Linear(2, 3)

    def forward(self, images):
        features = self.embedding(images.flatten(1))
        return features, self.classifier(features)


def make_step(weight=0.3, **options):
    torch.manual_seed(0)
    net, center_loss = Network(), CenterLoss(3, 2, use_gpu=False)
    optimizers = dict(
        model=torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        cent=torch.optim.SGD(center_loss.parameters(), 0.5),
    )
    return step.Step(net, center_loss, optimizers, weight=weight, **options)


def make_batches(count, size=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 1, 2, 3, generator=generator),
            torch.randint(3, (size,), generator=generator),
            size,
        )
        for _ in range(count)
    ]


def constant(step):
    return torch.optim.lr_scheduler.ConstantLR(step.optimizers["model"], 1.0)


@pytest.mark.parametrize("weight, smoothing", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2)])
def test_a_step_is_one_update_of_network_and_centers(weight, smoothing):
    step, (images, labels, _) = make_step(weight, label_smoothing=smoothing), make_batches(1)[0]
    net, centers = copy.deepcopy(step.net), step.center_loss.centers.detach().clone()
    output = step(images, labels)
    features, logits = net(images)
    targets = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    xent = -(targets * logits.log_softmax(1)).sum(1).mean()
    center = weight * (features - centers[labels]).pow(2).sum(1).mean()
    assert output.xent.item() == pytest.approx(
        xent.item()
    ) and output.center.item() == pytest.approx(center.item())
    assert torch.equal(output.features, features) and torch.equal(
        output.predictions, logits.argmax(1)
    )
    assert not any(each.requires_grad for each in output)
    (xent + center).backward()
    for after, before in zip(step.net.parameters(), net.parameters(), strict=True):
        assert torch.allclose(after, before - 0.1 * before.grad, atol=1e-6)
    for label in range(3 if weight else 0):
        own = features.detach()[labels == label]
        centers[label] -= 0.5 * 2 * (centers[label] - own).sum(0) / len(labels)
    assert torch.allclose(step.center_loss.centers, centers, atol=1e-6)


def test_one_optimizer_with_lr_ratio_takes_the_same_step():
    one, two, (images, labels, _) = make_step(lr_ratio=5.0), make_step(), make_batches(1)[0]
    one.optimizers = dict(
        model=torch.optim.SGD([*one.net.parameters(), *one.center_loss.parameters()], 0.1)
    )
    for step in (one, two):
        step(images, labels)
    assert torch.allclose(one.center_loss.centers, two.center_loss.centers, atol=1e-6)


def test_an_epoch_sums_up_its_steps_and_the_rest_of_a_stopped_one_ends_as_the_whole():
    batches = [*make_batches(3), *make_batches(1, size=2)]
    whole, alone, parts = make_step(), make_step(), make_step()
    epoch = epoch.train_epoch(whole, batches, constant(whole), keep=True)
    outputs = [alone(images, labels) for images, labels, _ in batches]
    assert (epoch.batches, epoch.samples) == (4, 17)
    results = epoch.results()
    assert results["xent"] == pytest.approx(
        sum(5 * o.xent.item() for o in outputs[:3]) / 17 + 2 / 17 * outputs[3].xent
    )
    assert results["loss"] == results["xent"] + results["center"]
    assert torch.equal(results["features"], torch.cat([output.features for output in outputs]))
    assert (
        results["accuracy"]
        == 100 * (results["predictions"] == results["labels"]).double().mean().item()
    )

    begun = epoch.train_epoch(
        parts, batches, constant(parts), keep=True, stop=lambda p: p.epoch.batches == 2
    )
    assert (begun.batches, begun.samples) == (2, 10)
    saved = epoch.Epoch(**vars(begun))
    rest = epoch.train_epoch(parts, batches[2:], constant(parts), saved, keep=True)
    assert torch.equal(rest.sums, epoch.sums) and all(map(torch.equal, rest.kept, epoch.kept))
    assert (rest.batches, rest.samples) == (4, 17)


def test_progress_has_the_losses_of_the_step_and_the_means_of_the_pass():
    batches, seen, step, alone = make_batches(2), [], make_step(), make_step()
    epoch.train_epoch(
        step, batches, constant(step), stop=lambda progress: seen.append(progress.losses())
    )
    first, second = (alone(images, labels) for images, labels, _ in batches)
    assert seen[1] == pytest.approx(
        (
            second.xent.item(),
            second.center.item(),
            (first.xent + second.xent).item() / 2,
            (first.center + second.center).item() / 2,
        )
    )


def test_a_test_has_the_metrics_of_slow_loops_and_trains_nothing():
    step, batches = make_step(), make_batches(3)
    before = copy.deepcopy(step.net.state_dict())
    tested = epoch.test(step.net, batches)
    rows = [
        (image[None], label)
        for images, labels, _ in batches
        for image, label in zip(images, labels, strict=True)
    ]
    right = [step.net(image)[1].argmax().item() == label.item() for image, label in rows]
    losses = [-step.net(image)[1].log_softmax(1)[0, label].item() for image, label in rows]
    assert tested["accuracy"] == pytest.approx(100 * sum(right) / 15)
    assert tested["xent"] == pytest.approx(sum(losses) / 15, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in step.net.state_dict().items())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_step_reads_nothing_back_from_the_device(name, monkeypatch):
    """The label check of the loss is for the CPU alone, and left out here as it is on a GPU."""
    step = make_step()
    step.net = MODELS[name](3, 1, 28, 2)
    monkeypatch.setattr(step.center_loss, "_check_labels", lambda labels, features: labels)
    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_: pytest.fail("waits for the device"))
    step(torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 2, 0]))


def test_a_rank_adds_its_share_of_the_joined_batch():
    step, (images, labels, _) = make_step(weight=0.0, ranks=Ranks(0, 1)), make_batches(1)[0]
    assert step(images, labels, size=20).xent.item() == pytest.approx(
        make_step(0.0)(images, labels).xent.item() / 4
    )


def test_a_class_that_a_cut_pass_has_not_seen_has_a_finite_mean():
    means = metrics.class_means(
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, 2, 2]), 3
    )
    assert means.tolist() == [[1, 2], [0, 0], [4, 5]]


# ------------------------------------------------------------------------------------------------------- captured steps

SCHEDULED = {
    "two optimizers": ["--stepsize", "1"],
    "softmax only": ["--stepsize", "1", "--weight-cent", "0"],
    "smoothed labels": ["--stepsize", "1", "--label-smoothing", "0.3"],
    "one optimizer": ["--recipe", "wen2016", "--milestones", "4", "8", "--lr-model", "0.3"],
    "adamw, one cycle": ["--recipe", "fast", "--no-amp", "--lr-model", "0.1"],
}


def train(flags, capture=lambda step: step):
    """Three epochs of three full batches and a smaller one: what is kept of each, and the step."""
    torch.manual_seed(0)
    args = cli.parse_args(["--lr-model", "0.1", *flags])
    net, center_loss = Network(), CenterLoss(3, 2, use_gpu=False, center_update=args.center_update)
    optimizers = create_optimizers(net, center_loss, args)
    step = capture(
        step.Step(
            net,
            center_loss,
            optimizers,
            weight=args.weight_cent,
            label_smoothing=args.label_smoothing,
        )
    )
    scheduler = SCHEDULES[args.schedule].create(optimizers["optimizer_model"], args, 4, 12)
    batches = [*make_batches(3), *make_batches(1, size=2)]
    return [
        epoch.train_epoch(step, batches, scheduler, keep=True).results() for _ in range(3)
    ], step


def agree(ours, theirs) -> bool:
    same = all(
        torch.allclose(one["features"], two["features"], atol=1e-5)
        and one["loss"] == pytest.approx(two["loss"])
        for one, two in zip(ours[0], theirs[0], strict=True)
    )
    weights = [[*step.net.parameters(), step.center_loss.centers] for _, step in (ours, theirs)]
    return same and all(
        torch.allclose(one, two, atol=1e-5) for one, two in zip(*weights, strict=True)
    )


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_captured_step_trains_as_the_eager_one_over_a_whole_schedule(name):
    notices = []
    ours = train(SCHEDULED[name], lambda step: captured(step, 5, notices.append))
    assert agree(ours, train(SCHEDULED[name])) and notices == []
    assert ours[1].graph.replays == 9 - cuda_graph.CapturedStep.EAGER
    for group in (
        ours[1].optimizers["optimizer_model"].param_groups
    ):  # as schedulers and checkpoints need it
        assert isinstance(group["lr"], float) and group["lr"] < group["initial_lr"]


class FrozenRates(cuda_graph.CapturedStep):
    def _rates_in_tensors(self, **options):
        return contextlib.nullcontext()


class StaleBatch(StandIn):
    def record(self, function, *tensors):
        super().record(function, *(each.clone() for each in tensors))


@pytest.mark.parametrize("fault", [dict(kind=FrozenRates), dict(graph=StaleBatch)])
def test_the_stand_in_shows_a_frozen_rate_and_a_stale_batch(fault):
    flags = SCHEDULED["two optimizers"]
    assert not agree(train(flags, lambda step: captured(step, 5, **fault)), train(flags))


class NoCapture(StandIn):
    def record(self, function, *tensors):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_capture_that_fails_is_told_in_a_line_and_the_training_goes_on():
    notices, flags = [], SCHEDULED["one optimizer"]
    assert agree(
        train(flags, lambda step: captured(step, 5, notices.append, graph=NoCapture)), train(flags)
    )
    assert notices == ["The training goes on without a CUDA graph: operation not permitted"]


def test_a_schedule_of_another_number_than_the_rate_acts(monkeypatch):
    def cyclic(optimizer, args, epoch, run):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, run, cycle_momentum=True)

    monkeypatch.setitem(SCHEDULES, "onecycle", SCHEDULES["onecycle"]._replace(create=cyclic))
    notices, flags = [], SCHEDULED["adamw, one cycle"]
    assert agree(train(flags, lambda step: captured(step, 5, notices.append)), train(flags))
    assert len(notices) == 1 and "without a CUDA graph" in notices[0]


def test_on_the_cpu_a_step_stays_as_it_is():
    step = make_step()
    assert cuda_graph.captured(step, 5) is step
