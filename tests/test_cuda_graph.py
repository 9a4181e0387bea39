"""A captured step against its eager self, by a stand-in for the graph."""

import contextlib
import copy

import pytest
import torch
from small import Network, make_batches, make_step
from stand_in import StandIn, captured

import cli
from center_loss import CenterLoss
from engine import cuda_graph, epoch
from engine.cuda_graph import CapturedStep
from engine.step import Step
from recipes import SCHEDULES, create_optimizers

SCHEDULED = {
    "two optimizers": ["--stepsize", "1"],
    "softmax only": ["--stepsize", "1", "--weight-cent", "0"],
    "smoothed labels": ["--stepsize", "1", "--label-smoothing", "0.3"],
    "one optimizer": ["--recipe", "wen2016", "--milestones", "4", "8", "--lr-model", "0.3"],
    "adamw, one cycle": ["--recipe", "fast", "--no-amp", "--lr-model", "0.1"],
}
BATCHES = [*make_batches(3), *make_batches(1, size=2)]


def create(flags, capture=lambda step: step):
    """A step of the small network, and its schedule of three epochs of BATCHES."""
    torch.manual_seed(0)
    args = cli.parse_args(["--lr-model", "0.1", *flags])
    net = Network()
    loss = CenterLoss(3, 2, use_gpu=False, center_update=args.center_update)
    optimizers = create_optimizers(net, loss, args)
    options = dict(weight=args.weight_cent, label_smoothing=args.label_smoothing)
    step = capture(Step(net, loss, optimizers, **options))
    return step, SCHEDULES[args.schedule].create(optimizers["optimizer_model"], args, 4, 12)


def train(flags, capture=lambda step: step):
    """Three epochs: what is kept of each, and the step."""
    step, scheduler = create(flags, capture)
    return [epoch.train_epoch(step, BATCHES, scheduler, keep=True) for _ in range(3)], step


def agree(ours, theirs) -> bool:
    for one, two in zip(ours[0], theirs[0], strict=True):
        if not torch.allclose(one["features"], two["features"], atol=1e-5):
            return False
        if one["loss"] != pytest.approx(two["loss"]):
            return False
    return same_weights(ours[1], theirs[1])


def same_weights(ours: Step, theirs: Step) -> bool:
    weights = [[*step.net.parameters(), step.center_loss.centers] for step in (ours, theirs)]
    return all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*weights, strict=True))


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_captured_step_trains_as_the_eager_one_over_a_whole_schedule(name):
    notices = []
    ours = train(SCHEDULED[name], lambda step: captured(step, 5, notices.append))
    assert agree(ours, train(SCHEDULED[name])) and notices == []
    assert ours[1].graph.replays == 9 - CapturedStep.EAGER
    for group in ours[1].optimizers["optimizer_model"].param_groups:  # as checkpoints need it
        assert isinstance(group["lr"], float) and group["lr"] < group["initial_lr"]


class FrozenRates(CapturedStep):
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
    notices = []
    flags = SCHEDULED["one optimizer"]
    ours = train(flags, lambda step: captured(step, 5, notices.append, graph=NoCapture))
    assert agree(ours, train(flags))
    assert notices == ["The training goes on without a CUDA graph: operation not permitted"]


def test_a_schedule_of_another_number_than_the_rate_acts(monkeypatch):
    def cyclic(optimizer, args, per_epoch, steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, cycle_momentum=True)

    monkeypatch.setitem(SCHEDULES, "onecycle", SCHEDULES["onecycle"]._replace(create=cyclic))
    notices = []
    flags = SCHEDULED["adamw, one cycle"]
    assert agree(train(flags, lambda step: captured(step, 5, notices.append)), train(flags))
    assert len(notices) == 1 and "without a CUDA graph" in notices[0]


class KeepsGraph(CapturedStep):
    def _start_anew(self, *loaded):
        if not loaded:
            super()._start_anew()


@pytest.mark.parametrize("kind, same", [(CapturedStep, True), (KeepsGraph, False)])
def test_an_optimizer_that_is_loaded_after_the_capture_goes_on_from_what_it_loaded(kind, same):
    """Its momentum is then in other tensors than those that the graph updates."""
    steps = []
    for capture in (lambda step: step, lambda step: captured(step, 5, kind=kind)):
        step, scheduler = create(SCHEDULED["two optimizers"], capture)
        epoch.train_epoch(step, BATCHES, scheduler)
        saved = {name: copy.deepcopy(each.state_dict()) for name, each in step.optimizers.items()}
        epoch.train_epoch(step, BATCHES, scheduler)
        for name, optimizer in step.optimizers.items():
            optimizer.load_state_dict(saved[name])
        for _ in range(2):
            epoch.train_epoch(step, BATCHES, scheduler)
        steps.append(step)
    assert same_weights(*steps) == same


def test_a_graph_is_made_on_the_steps_device():
    devices = []
    step = make_step()
    step.center_loss.to("meta")
    CapturedStep(step, 5, print, devices.append)
    assert devices == [torch.device("meta")]


def test_on_the_cpu_a_step_stays_as_it_is():
    step = make_step()
    assert cuda_graph.captured(step, 5) is step
