"""The command line: its flags, and the reference systems as values of them.

A recipe is an entry of RECIPES that sets the defaults of other flags, each of which wins where it is given.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable

import torch
from torch.optim import lr_scheduler

import datasets
import models
import utils
from processes import Ranks


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n" if Ranks.of_environment().rank == 0 else None)


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite int or float of at least low, or above it, and at most high."""
    rule = f"must be {'an integer' if kind is int else 'a number'} {'above' if above else 'of at least'} {low}"
    rule += f" and at most {high}" if high < math.inf else ""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and low <= value <= high and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"{rule}, got {text}")

    return convert


def gpu_index(text: str) -> str:
    """A type for argparse: the index of one GPU."""
    indices = text.replace(" ", "").split(",")
    if len(indices) > 1 and all(index.isdecimal() for index in indices):
        raise argparse.ArgumentTypeError(
            f"takes one index, got {text}; for several GPUs: CUDA_VISIBLE_DEVICES={','.join(indices)} "
            f"torchrun --standalone --nproc_per_node={len(indices)} main.py and the other flags"
        )
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the index of a GPU, such as 0, got {text}")
    return text


# The reference systems, and `fast`, as defaults of the flags. zhou2018 is what the parser itself has.
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
    amp=True,
)

# Factories from (parameter groups, args), and from (optimizer, args, steps an epoch). All schedules step by iteration.
OPTIMIZERS = {
    "sgd": lambda groups, args: torch.optim.SGD(groups, args.lr_model, args.momentum, weight_decay=args.weight_decay),
    "adamw": lambda groups, args: torch.optim.AdamW(groups, args.lr_model, weight_decay=args.weight_decay),
}
SCHEDULES = {
    "step": lambda optimizer, args, steps: lr_scheduler.StepLR(
        optimizer, args.stepsize * steps or sys.maxsize, args.gamma
    ),
    "milestones": lambda optimizer, args, steps: lr_scheduler.MultiStepLR(optimizer, args.milestones, args.gamma),
    "onecycle": lambda optimizer, args, steps: lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], args.max_iter or args.max_epoch * steps,
        cycle_momentum=args.optimizer == "adamw",  # SGD has those of its flags
    ),
}


def create_optimizers(model, center_loss, args) -> dict[str, torch.optim.Optimizer]:
    """The network's optimizer and, unless it has both, the centers'; named as in a checkpoint."""
    parameters = dict(model.named_parameters())
    biases = [parameters.pop(name) for name in list(parameters) if args.caffe_biases and name.endswith(".bias")]
    groups = [dict(params=list(parameters.values()))]
    if biases:
        groups.append(dict(params=biases, lr=2 * args.lr_model, weight_decay=0.0))
    if args.one_optimizer:
        groups.append(dict(params=center_loss.parameters(), momentum=args.momentum_cent, weight_decay=0.0))
        return dict(optimizer_model=OPTIMIZERS[args.optimizer](groups, args))
    return dict(
        optimizer_model=OPTIMIZERS[args.optimizer](groups, args),
        optimizer_cent=torch.optim.SGD(center_loss.parameters(), lr=args.lr_cent, momentum=args.momentum_cent),
    )


# What a resumed or evaluated run may have otherwise than its checkpoint.
FREE_ON_RESUME = set(
    "resume evaluate save_dir data_root workers gpu use_cpu max_epoch plot save_features tensorboard eval_freq "
    "print_freq".split()
)


# fmt: off  (a flag a line, where it fits)
def build_parser(description: str = "") -> Parser:
    parser = Parser(prog="main.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)

    def group(title: str):
        section = parser.add_argument_group(title)

        def add(*names: str, help: str, **options) -> None:
            with_default = "default" in options and "action" not in options
            section.add_argument(*names, help=help + " (default: %(default)s)" * with_default, **options)

        return add

    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = group("experiment")
    add("--recipe", choices=sorted(RECIPES), default="zhou2018", help="system that sets the other flags' defaults")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1, help="of the network, the centers and the batches")
    add("--max-epoch", type=number(int, 1), default=100, help="epochs")
    add("--max-iter", type=number(int, 0), default=0, help="steps, in place of --max-epoch; 0: as many as that says")

    add = group("data")
    add("-d", "--dataset", choices=sorted(datasets.SPECS), default="mnist", help="data set")
    add("--data-root", default="data", help="directory of the data sets, downloaded to it on first use; for --dataset "
        "folder the directory that holds train/<class>/* and test/<class>/*")
    add("--image-size", type=number(int, 8, 1024), default=32, help="pixels a side, for --dataset folder")
    add("--scaling", choices=sorted(datasets.SCALINGS), default="standard", help="of pixels p: by the data set's mean "
        "and deviation, 0.5 and 0.5 for folder (standard), (p - 127.5) / 128 (symmetric), p / 255 (unit)")
    add("--batch-size", type=number(int, 1, 10**9), default=128, help="images a step, over all ranks")
    add("-j", "--workers", type=number(int, 0), default=0, help="processes that read images; 0: none, all images "
        "lie on the device")

    add = group("network")
    add("--model", choices=sorted(models.MODELS), default="cnn", help="network")
    add("--feat-dim", type=number(int, 1, 10**6), default=2, help="D, dimensions of the features")
    add("--init", choices=sorted(models.INITS), default="default", help="first weights and centers")

    add = group("loss: cross-entropy + λ · center loss")
    add("--weight-cent", type=number(float, 0), default=1.0, help="λ, weight of the center loss; 0: softmax only")
    add("--distance", choices=["squared", "euclidean"], default="squared", help="of a feature from its center")
    add("--loss-scale", type=number(float, 0, above=True), default=1.0, help="factor of the center loss")
    add("--class-average", **switch, help="divide a sample's term by the number of its class in the batch")
    add("--center-update", choices=["gradient", "paper"], default="gradient", help="or the paper's Eq. 4")

    add = group("optimization")
    add("--optimizer", choices=sorted(OPTIMIZERS), default="sgd", help="of the network; the centers have SGD")
    add("--lr-model", type=number(float, 0, above=True), default=0.001, help="learning rate of the network; for "
        "onecycle its peak")
    add("--lr-cent", type=number(float, 0), default=0.5, help="α, learning rate of the centers")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of the network's SGD")
    add("--momentum-cent", type=number(float, 0, 1), default=0.0, help="of the centers' SGD")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of the network")
    add("--caffe-biases", **switch, help="biases have twice the learning rate and no weight decay")
    add("--one-optimizer", **switch, help="the centers are in the network's SGD and follow its schedule")
    add("--schedule", choices=sorted(SCHEDULES), default="step", help="of the learning rate")
    add("--stepsize", type=number(int, 0), default=20, help="epochs between two factors gamma, for step; "
        "0: constant")
    add("--milestones", type=number(int, 1), nargs="+", default=[5000, 8000], metavar="ITERATION",
        help="training steps after which to apply gamma, for milestones")
    add("--gamma", type=number(float, 0, 100, above=True), default=0.5, help="factor of the learning rate")

    add = group("output")
    add("--save-dir", default="log", help="directory of the run's files")
    add("--eval-freq", type=number(int, 0), default=10, help="epochs between two tests; 0: only after the last")
    add("--print-freq", type=number(int, 1), default=50, help="steps between two lines")
    add("--plot", **switch, help="plot the features of each epoch")
    add("--save-features", **switch, help="write the features of each epoch to features/epoch_<N>.npz")
    add("--tensorboard", **switch, help="write the figures of each epoch for TensorBoard")
    add("--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="go on from a checkpoint, or from the one in --save-dir, with that run's flags")
    add("--evaluate", metavar="CHECKPOINT", help="test the network of a checkpoint, without training; with "
        "--plot draw confusion.png")

    add = group("machine")
    add("--gpu", type=gpu_index, default="0", help="index of the GPU; where there is none, the CPU is used")
    add("--use-cpu", **switch, help="use the CPU")
    add("--amp", **switch, help="run the convolutions in bfloat16")
    add("--compile", **switch, help="compile the network")
    add("--deterministic", action="store_true", help="the same figures each time on the same GPU; slower")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None, description: str = "") -> argparse.Namespace:
    """The flags, on top of their recipe's defaults or, to resume or evaluate, of their values in the checkpoint."""
    parser, local = build_parser(description), Ranks.of_environment().local
    if local is not None:
        parser.set_defaults(gpu=None)
    args = parser.parse_args(argv, argparse.Namespace(max_epoch=None))  # None where it is not given
    if args.evaluate == "":
        parser.error("--evaluate must be the path of a checkpoint, got an empty one")
    path = args.evaluate or args.resume
    if args.evaluate and args.resume is not None:
        parser.error("--evaluate tests and --resume trains on: give one of them")
    try:
        if path is None:
            parser.set_defaults(**RECIPES[args.recipe])
            if args.max_epoch:  # it wins over a recipe's steps
                parser.set_defaults(max_iter=0)
            args = parser.parse_args(argv)
        else:
            path = path or os.path.join(args.save_dir, "checkpoint.pt")
            saved = utils.load_checkpoint(path)["args"]
            parser.set_defaults(**saved | dict(save_dir=os.path.dirname(path) or ".", gpu=args.gpu))
            if args.evaluate:
                parser.set_defaults(plot=False, tensorboard=False)
            args = parser.parse_args(argv)
            args.resume = None if args.evaluate else path
            fixed = saved.keys() - FREE_ON_RESUME
            if saved.get("max_iter") or saved.get("schedule") == "onecycle":  # the length of these is a part of them
                fixed.add("max_epoch")
            for name in sorted(fixed):
                if getattr(args, name) != saved[name]:
                    flag = "--" + name.replace("_", "-")
                    parser.error(f"{flag} must be {saved[name]}, as in {path}, got {getattr(args, name)}")
        if args.plot or not args.evaluate:
            utils.check_save_dir(args.save_dir)
    except utils.RunError as error:
        parser.error(str(error))
    if args.one_optimizer and args.optimizer != "sgd":
        parser.error(f"--one-optimizer goes with --optimizer sgd, got {args.optimizer}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package that is not here: pip install tensorboard")
    if local is not None and args.gpu:
        parser.error(f"--gpu must be left out under torchrun, whose local ranks are the indices, got {args.gpu}")
    args.gpu = args.gpu or str(local)
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if gpus and int(args.gpu) >= gpus:
        parser.error(f"--gpu must be below {gpus}, the number of GPUs here, got {args.gpu}")
    return args
