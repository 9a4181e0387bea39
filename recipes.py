"""Recipes, optimizers and schedules.

A recipe is an entry of RECIPES: defaults of flags, which flags on the command line override.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.optim import lr_scheduler

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
RECIPES["fast"] = dict(
    model="bn-fast",
    batch_size=256,
    weight_cent=0.01,
    optimizer="adamw",
    lr_model=0.02,
    schedule="onecycle",
    max_epoch=3,
    eval_freq=1,
    amp="auto",
)
RECIPES["digits"] = dict(
    dataset="digits",
    init="xavier",
    weight_cent=0.1,
    lr_model=0.01,
    batch_size=16,
    max_epoch=12,
)
RECIPES["images"] = dict(
    model="bn-images",
    feat_dim=64,
    augment=True,
    erase=0.25,
    batch_size=128,
    weight_cent=0.003,
    label_smoothing=0.1,
    optimizer="adamw",
    lr_model=0.005,
    weight_decay=0.1,
    schedule="onecycle",
    max_epoch=28,
    eval_freq=1,
    mirror=True,
    amp="auto",
)

# From parameter groups and the flags' values.
OPTIMIZERS = {
    "sgd": lambda groups, args: torch.optim.SGD(
        groups, args.lr_model, args.momentum, weight_decay=args.weight_decay
    ),
    "adamw": lambda groups, args: torch.optim.AdamW(
        groups, args.lr_model, weight_decay=args.weight_decay
    ),
}


class Schedule(NamedTuple):
    """A learning rate schedule; it takes a step after each training step."""

    create: Callable  # from the optimizer, the flags' values, and the training steps of an epoch and of the whole run
    fixed_length: bool = (
        False  # the schedule depends on how long the run is, so that a resumed run keeps its length
    )


SCHEDULES = {
    "step": Schedule(
        lambda optimizer, args, epoch, run: lr_scheduler.StepLR(
            optimizer, args.stepsize * epoch or sys.maxsize, args.gamma
        )
    ),
    "milestones": Schedule(
        lambda optimizer, args, epoch, run: lr_scheduler.MultiStepLR(
            optimizer, args.milestones, args.gamma
        )
    ),
    "onecycle": Schedule(
        lambda optimizer, args, epoch, run: lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in optimizer.param_groups], run, cycle_momentum=False
        ),
        fixed_length=True,
    ),
}


def create_optimizers(model, center_loss, args) -> dict[str, torch.optim.Optimizer]:
    """The network's optimizer and, unless it has the centers as well, theirs; by their names in a checkpoint."""
    parameters = dict(model.named_parameters())
    biases = [
        parameters.pop(name)
        for name in list(parameters)
        if args.caffe_biases and name.endswith(".bias")
    ]
    groups = [dict(params=list(parameters.values()))]
    if biases:
        groups.append(dict(params=biases, lr=2 * args.lr_model, weight_decay=0.0))
    if args.one_optimizer:
        groups.append(
            dict(params=center_loss.parameters(), momentum=args.momentum_cent, weight_decay=0.0)
        )
    optimizers = dict(optimizer_model=OPTIMIZERS[args.optimizer](groups, args))
    if not args.one_optimizer:
        sgd = torch.optim.SGD(
            center_loss.parameters(), lr=args.lr_cent, momentum=args.momentum_cent
        )
        optimizers["optimizer_cent"] = sgd
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = (
                group["params"][0].is_cuda or None
            )  # whose rates a CUDA graph can read from tensors
        optimizer.register_load_state_dict_pre_hook(keep_kernels)
    return optimizers


def keep_kernels(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """The loaded state with the kernels of this optimizer, as the checkpoint may be from another device."""
    kernels = ("foreach", "fused", "capturable")
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [saved | {name: own[name] for name in kernels if name in own} for saved, own in groups]
    return state | dict(param_groups=groups)
