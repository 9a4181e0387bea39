"""Optimizers and schedules: parameter groups, rates and momenta as the flags say."""

import pytest
import torch

import cli
import models
import recipes
from center_loss import CenterLoss


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--schedule", "step", "--stepsize", "2"], [1, 1, 0.5, 0.5, 0.25]),
        (["--schedule", "step", "--stepsize", "0"], [1, 1, 1, 1, 1]),
        (
            ["--schedule", "milestones", "--milestones", "3", "9", "--gamma", "0.8"],
            [1, 0.8, 0.8, 0.64, 0.64],
        ),
    ],
)
def test_schedules_count_epochs_or_steps(flags, expected):
    """Three steps an epoch; the rate in each epoch's last step."""
    args = cli.parse_args(["--lr-model", "1", *flags])
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], args.lr_model)
    schedule, rates = recipes.SCHEDULES[args.schedule].create(sgd, args, 3, 15), []
    for _ in range(5):
        for _ in range(3):
            sgd.step()
            rate = sgd.param_groups[0]["lr"]
            schedule.step()
        rates.append(rate)
    assert rates == pytest.approx(expected)


def test_onecycle_is_as_long_as_the_run(run):
    for flags, steps in ((["--max-iter", "7"], 7), (["--max-epoch", "4"], 12)):
        assert run("--schedule", "onecycle", *flags)[0] == 0
        assert (
            torch.load("log/checkpoint.pt", weights_only=True)["scheduler"]["total_steps"] == steps
        )


def test_onecycle_leaves_each_group_its_peak_and_its_momentum():
    flags = [
        "--recipe",
        "wen2016",
        "--schedule",
        "onecycle",
        "--momentum",
        "0",
        "--momentum-cent",
        "0.5",
    ]
    args = cli.parse_args(flags)
    model, loss = models.create("cnn-wen2016"), CenterLoss(10, 2, use_gpu=False)
    (sgd,) = recipes.create_optimizers(model, loss, args).values()
    schedule, seen = recipes.SCHEDULES["onecycle"].create(sgd, args, 3, args.max_iter), []
    for _ in range(args.max_iter - 1):
        sgd.step()
        schedule.step()
        seen.append([(group["lr"], group["momentum"]) for group in sgd.param_groups])
    for group, peak, momentum in zip(
        zip(*seen, strict=True), (0.01, 0.02, 0.01), (0, 0, 0.5), strict=True
    ):
        rates, momenta = zip(*group, strict=True)
        assert max(rates) == pytest.approx(peak, rel=1e-4) and set(momenta) == {momentum}


def test_caffe_biases_and_one_optimizer_make_parameter_groups():
    args = cli.parse_args(["--recipe", "wen2016"])
    model, loss = models.create("cnn-wen2016"), CenterLoss(10, 2, use_gpu=False)
    (sgd,) = recipes.create_optimizers(model, loss, args).values()
    weights, biases, centers = sgd.param_groups
    assert len(biases["params"]) == 7 and (biases["lr"], biases["weight_decay"]) == (0.02, 0.0)
    assert (weights["lr"], weights["weight_decay"], weights["momentum"]) == (0.01, 5e-4, 0.9)
    assert centers["params"] == [loss.centers] and (
        centers["weight_decay"],
        centers["momentum"],
    ) == (0.0, 0.9)


@pytest.mark.parametrize("optimizer", sorted(recipes.OPTIMIZERS))
def test_a_checkpoint_of_another_device_does_not_choose_the_kernels(optimizer):
    """A GPU's is fused, and has AdamW's count of steps on the device; a CPU's is not."""
    args = cli.parse_args(["--optimizer", optimizer])
    model, loss = torch.nn.Linear(2, 3), CenterLoss(3, 2, use_gpu=False)
    ours, theirs = (
        recipes.create_optimizers(model, loss, args)["optimizer_model"] for _ in range(2)
    )
    kernels = {
        name: ours.param_groups[0][name]
        for name in ("foreach", "fused", "capturable")
        if name in ours.defaults
    }
    theirs.param_groups[0].update({name: name != "foreach" for name in kernels}, lr=0.25)
    model(torch.randn(4, 2)).sum().backward()
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.25 and ours.param_groups[0].items() >= kernels.items()
    ours.step()
    with pytest.raises(ValueError):
        ours.load_state_dict(dict(state={}, param_groups=[]))
