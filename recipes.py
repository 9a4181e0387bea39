"""Recipes, and what their values build: losses, optimizers, schedules.

A recipe is an entry of RECIPES: defaults of flags, which flags on the command line override.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import datasets
import models
from center_loss import CenterLoss
from engine.cuda_graph import captured
from engine.device import choose_device, make_deterministic, multiplies_bfloat16
from engine.ranks import Ranks
from engine.step import Step

# The reference systems and our own settings; zhou2018's are the parser's own defaults.
RECIPES = {
    "zhou2018": {},
    "wen2016": dict(
        model="cnn-wen2016",
        init="xavier",
        scaling="symmetric",
        loss_scale=0.5,
        center_update="paper",
        weight_cent=0.01,
        lr_model=0.01,
        lr_cent=0.01,
        momentum_cent=0.9,
        caffe_biases=True,
        one_optimizer=True,
        schedule="milestones",
        milestones=[5000, 8000],
        gamma=0.8,
        max_iter=10000,
    ),
    "zahn2024-v1.0": dict(
        model="bn-deep",
        scaling="unit",
        batch_size=256,
        loss_scale=0.5,
        class_average=True,
        weight_decay=0.0,
        gamma=0.8,
        max_epoch=500,
    ),
}
RECIPES["zahn2024-v1.1"] = RECIPES["zahn2024-v1.0"] | dict(distance="euclidean")
RECIPES["zahn2024-v1.2"] = RECIPES["zahn2024-v1.1"] | dict(model="bn-shallow")
SHORT = dict(model="bn-fast", optimizer="adamw", lr_model=0.02, schedule="onecycle")
RECIPES["fast"] = SHORT | dict(
    batch_size=256, weight_cent=0.01, max_epoch=3, eval_freq=1, amp="auto"
)
RECIPES["digits"] = SHORT | dict(
    dataset="digits", augment=True, batch_size=64, weight_cent=0.1, max_epoch=20
)
RECIPES["images"] = RECIPES["fast"] | dict(
    model="bn-images",
    feat_dim=64,
    augment=True,
    erase=0.25,
    batch_size=128,
    weight_cent=0.003,
    label_smoothing=0.1,
    lr_model=0.005,
    weight_decay=0.1,
    max_epoch=28,
    mirror="mean",
)
# The authors' faces, and the settings of docs/results.md for a few hundred photos.
RECIPES["faces"] = RECIPES["wen2016"] | dict(
    dataset="folder",
    model="face-resnet",
    feat_dim=512,
    image_size=[112, 96],
    augment=True,
    mirror="mean",
    batch_size=256,
    weight_cent=0.008,
    lr_model=0.1,
    lr_cent=0.1,
    milestones=[16000, 24000],
    gamma=0.1,
    max_iter=28000,
)
RECIPES["faces-small"] = RECIPES["images"] | dict(
    dataset="folder", image_size=[56, 48], batch_size=32, max_epoch=40, eval_freq=None
)


def sgd(groups: list[dict], args: argparse.Namespace) -> Optimizer:
    return torch.optim.SGD(groups, args.lr_model, args.momentum, weight_decay=args.weight_decay)


def adamw(groups: list[dict], args: argparse.Namespace) -> Optimizer:
    return torch.optim.AdamW(groups, args.lr_model, weight_decay=args.weight_decay)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def step(optimizer: Optimizer, args: argparse.Namespace, per_epoch: int, steps: int) -> LRScheduler:
    every = args.stepsize * per_epoch or sys.maxsize
    return lr_scheduler.StepLR(optimizer, every, args.gamma)


def milestones(
    optimizer: Optimizer, args: argparse.Namespace, per_epoch: int, steps: int
) -> LRScheduler:
    return lr_scheduler.MultiStepLR(optimizer, args.milestones, args.gamma)


def onecycle(
    optimizer: Optimizer, args: argparse.Namespace, per_epoch: int, steps: int
) -> LRScheduler:
    peaks = [group["lr"] for group in optimizer.param_groups]
    return lr_scheduler.OneCycleLR(optimizer, peaks, steps, cycle_momentum=False)


class Schedule(NamedTuple):
    """A learning rate schedule, which takes a step after each training step."""

    # From the optimizer, the flags, the steps of an epoch and those of the whole run.
    create: Callable[[Optimizer, argparse.Namespace, int, int], LRScheduler]
    fixed_length: bool = False  # it depends on the run's length, which a resumed run must keep


SCHEDULES = {
    "step": Schedule(step),
    "milestones": Schedule(milestones),
    "onecycle": Schedule(onecycle, fixed_length=True),
}


def prepare_device(args: argparse.Namespace, log: Callable[[str], object]) -> torch.device:
    device = choose_device(args.gpu, args.use_cpu)
    log("Currently using CPU" if device.type == "cpu" else f"Currently using GPU: {args.gpu}")
    if args.deterministic:
        make_deterministic()
    if args.amp and not multiplies_bfloat16(device.index):
        log("--amp is slow here: the hardware does not multiply bfloat16; --no-amp is faster")
    return device


def create_data(
    args: argparse.Namespace, device: torch.device, ranks: Ranks, saved: dict | None
) -> datasets.Data:
    """The data set; to evaluate, what the network of the checkpoint `saved` can be tested on."""
    names = ("image_size", "unseen", "augment", "erase", "val_share", "seed")
    return datasets.create(
        args.dataset,
        args.data_root,
        args.batch_size,
        args.workers,
        device,
        scaling=models.pretrained_scaling(args.model) if args.pretrained else args.scaling,
        trained=saved["data"] if args.evaluate else None,
        ranks=ranks,
        **{name: getattr(args, name) for name in names},
    )


def epochs_per_test(args: argparse.Namespace, data: datasets.Data) -> int:
    """--eval-freq or, where it is not given, 10; 0: only the last epoch is tested.

    Without that flag every epoch is tested if that chooses the best one, or for --plot if a test
    takes less than a tenth of an epoch, by the number of images: not by time, so that a resumed run
    tests after the same epochs. Training an image takes three times as long.
    """
    if args.eval_freq is not None:
        return args.eval_freq
    images = data.test_images * (2 if args.mirror else 1)
    cheap = images < 3 * data.train.rows.size / 10
    return 1 if data.val or (args.plot and cheap) else 10


def create_center_loss(num_classes: int, feat_dim: int, args: argparse.Namespace) -> CenterLoss:
    center_loss = CenterLoss(
        num_classes,
        feat_dim,
        use_gpu=False,
        distance=args.distance,
        radius=args.radius,
        scale=args.loss_scale,
        class_average=args.class_average,
        center_update=args.center_update,
    )
    models.INITS[args.init](center_loss.centers)
    return center_loss


def create_step(
    model: nn.Module,
    center_loss: CenterLoss,
    optimizers: dict[str, Optimizer],
    args: argparse.Namespace,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    notice: Callable[[str], object] = print,
) -> Step:
    """One update; on a single GPU a CUDA graph, unless --no-cuda-graph."""
    net = ranks.parallel(model)
    if args.compile and not args.evaluate:
        net = models.Compiled(net, len(ranks.share(torch.empty(args.batch_size))))
    step = Step(
        net,
        center_loss,
        optimizers,
        weight=args.weight_cent,
        lr_ratio=args.lr_cent / args.lr_model if args.one_optimizer else 1.0,
        label_smoothing=args.label_smoothing,
        amp=args.amp,
        ranks=ranks,
    )
    return captured(step, args.batch_size, notice) if args.cuda_graph else step


def create_scheduler(
    optimizers: dict[str, Optimizer],
    args: argparse.Namespace,
    per_epoch: int,
    steps: int,
    notice: Callable[[str], object] = print,
) -> LRScheduler:
    """The schedule of the network's rate; `notice` hears if the run is too short for it."""
    schedule = SCHEDULES[args.schedule]
    if schedule.fixed_length and steps < 10 and not args.evaluate:
        notice(
            f"--schedule {args.schedule} has only {steps} steps: a smaller --batch-size or a "
            "larger --max-epoch trains better"
        )
    return schedule.create(optimizers["optimizer_model"], args, per_epoch, steps)


def create_optimizers(
    model: nn.Module, center_loss: nn.Module, args: argparse.Namespace
) -> dict[str, Optimizer]:
    """The network's optimizer and, unless it has the centers, too, theirs."""
    weights = []
    biases = []
    for name, parameter in model.named_parameters():
        is_bias = args.caffe_biases and name.endswith(".bias")
        (biases if is_bias else weights).append(parameter)
    groups = [dict(params=weights)]
    if biases:
        groups.append(dict(params=biases, lr=2 * args.lr_model, weight_decay=0.0))
    centers = center_loss.parameters()
    if args.one_optimizer:
        groups.append(dict(params=centers, momentum=args.momentum_cent, weight_decay=0.0))
    optimizers = dict(optimizer_model=OPTIMIZERS[args.optimizer](groups, args))
    if not args.one_optimizer:
        optimizers["optimizer_cent"] = torch.optim.SGD(centers, args.lr_cent, args.momentum_cent)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:  # a CUDA graph needs rates in tensors, as fused ones
            group["fused"] = group["params"][0].is_cuda or None
        optimizer.register_load_state_dict_pre_hook(keep_kernels)
    return optimizers


def keep_kernels(optimizer: Optimizer, state: dict) -> dict:
    """The loaded state with the kernels of this optimizer: it may be from another device."""
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        kernels = {name: own[name] for name in ("foreach", "fused", "capturable") if name in own}
        groups.append(saved | kernels)
    return state | dict(param_groups=groups)
