"""Training and test of zhou2018's recipe on random images in MNIST's files, beside a plain script.

plain is a straightforward script: four workers that transform image by image, float32, nn.PReLU,
the matrix form of the loss, three .item() a batch. The other forms are main.py's settings, through
the Step, epoch and test that it uses; --recipe fast has a network and a batch size of its own.

The forms take turns, each with all images once; the first turn, in which libraries choose their
kernels and --compile compiles, is not counted. An epoch is that of MNIST's 60,000 and 10,000
images, in proportion. Each ratio is the median of the turns' ratios.
"""

import argparse
import statistics
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import cli
import datasets
import models
from center_loss import CenterLoss
from engine import epoch
from engine.cuda_graph import captured
from engine.device import multiplies_bfloat16
from engine.step import Step
from recipes import SCHEDULES, create_optimizers
from tools.bench.common import hardware, matrix_loss, positive, seconds_of

# main.py's flags; more on CUDA.
FORMS = {
    "default": [],
    "--amp": ["--amp"],
    "--amp --compile": ["--amp", "--compile"],
    "--recipe fast": ["--recipe", "fast"],
}
CUDA_FORMS = {
    "--no-cuda-graph": ["--no-cuda-graph"],
    "--amp --no-cuda-graph": ["--amp", "--no-cuda-graph"],
}
MNIST = 60_000  # training images; a sixth as many for the test

# Trains and tests once: seconds of each.
Pass = Callable[[], tuple[float, float]]


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="training and test, beside a plain script",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    add("--images", type=positive, help="of a turn (default: 2,560, on CUDA 60,000)")
    add("--turns", type=positive, default=5, help="(default: %(default)s)")
    add("--quick", action="store_true", help="a check, not a measurement; compiles nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.quick:
        args.images = 60
        args.turns = 1
    args.images = args.images or (MNIST if args.device == "cuda" else 2560)
    print(hardware())
    print(f"zhou2018's recipe, B = 128, {args.images:,} images, {args.device}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        write_mnist(Path(root), args.images)
        passes = {"plain": plain_pass(root, args.device)}
        for name, flags in chosen_forms(args).items():
            passes[name] = form_pass(root, flags, args.device)
        turns = []
        for _ in range(1 + args.turns):
            turns.append({name: train_and_test() for name, train_and_test in passes.items()})
    print_table(turns[1:], args.images)


def chosen_forms(args: argparse.Namespace) -> dict[str, list[str]]:
    """The forms that this machine can do; prints which are left out."""
    forms = FORMS | CUDA_FORMS if args.device == "cuda" else FORMS
    bfloat16 = multiplies_bfloat16(0 if args.device == "cuda" else None)
    chosen = {}
    for name, flags in forms.items():
        if "--amp" in flags and not bfloat16:
            print(f"left out: {name}, as the hardware has no bfloat16 multiplication")
        elif "--compile" in flags and args.quick:
            print(f"left out: {name}, as --quick compiles nothing")
        else:
            chosen[name] = flags
    return chosen


def print_table(turns: list[dict[str, tuple[float, float]]], images: int) -> None:
    """`turns`: by form, the seconds of training and test."""
    print("\n| form | training, ms/image | test, ms/image | epoch with test, s | plain / form |")
    print("| --- " + "| ---: " * 4 + "|")
    for name in turns[0]:
        train = statistics.median(turn[name][0] for turn in turns)
        test = statistics.median(turn[name][1] for turn in turns)
        ratio = statistics.median(sum(turn["plain"]) / sum(turn[name]) for turn in turns)
        per_image = f"{1e3 * train / images:.4f} | {1e3 * test / (images // 6):.4f}"
        both = (train + test) * MNIST / images
        print(f"| {name} | {per_image} | {both:,.2f} | {ratio:.2f} |")


def write_mnist(root: Path, images: int) -> None:
    """Random images and labels in the files that torchvision keeps of MNIST."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("t10k", images // 6)):
        pixels = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        header = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = random.integers(10, size=count, dtype=np.uint8)
        header = struct.pack(">HBBI", 0, 8, 1, count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def plain_network() -> nn.Sequential:
    layers = []
    for inside, outside in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inside, outside, 5, padding=2), nn.PReLU()]
        layers += [nn.Conv2d(outside, outside, 5, padding=2), nn.PReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 2), nn.PReLU())


def plain_loader(root: str, train: bool, device: str) -> torch.utils.data.DataLoader:
    from torchvision.datasets import MNIST as Digits
    from torchvision.transforms import Compose, Normalize, ToTensor

    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    return torch.utils.data.DataLoader(
        Digits(root, train=train, transform=transform),
        batch_size=128,
        shuffle=train,
        num_workers=4,
        pin_memory=device == "cuda",
        persistent_workers=True,  # their start is not a turn's time
    )


def plain_pass(root: str, device: str) -> Pass:
    body = plain_network().to(device)
    classifier = nn.Linear(2, 10).to(device)
    centers = nn.Parameter(torch.randn(10, 2, device=device))
    weights = [*body.parameters(), *classifier.parameters()]
    sgd = torch.optim.SGD(weights, 0.001, momentum=0.9, weight_decay=5e-4)
    sgd_centers = torch.optim.SGD([centers], 0.5)
    train_batches = plain_loader(root, True, device)
    test_batches = plain_loader(root, False, device)

    def train() -> None:
        sums = [0.0, 0.0, 0.0]
        for images, labels in train_batches:
            images = images.to(device)
            labels = labels.to(device)
            features = body(images)
            xent = F.cross_entropy(classifier(features), labels)
            center = matrix_loss(features, labels, centers)
            loss = xent + center
            sgd.zero_grad()
            sgd_centers.zero_grad()
            loss.backward()
            sgd.step()
            sgd_centers.step()
            for index, value in enumerate((loss, xent, center)):
                sums[index] += value.item()

    @torch.no_grad()
    def test() -> None:
        correct = 0
        for images, labels in test_batches:
            logits = classifier(body(images.to(device)))
            correct += (logits.argmax(1) == labels.to(device)).sum().item()

    return lambda: (seconds_of(train, device=device), seconds_of(test, device=device))


def form_pass(root: str, flags: list[str], device: str) -> Pass:
    """By main.py with these flags."""
    cpu = ["--use-cpu"] if device == "cpu" else []
    args = cli.parse_args(["--data-root", root, *flags, *cpu])
    data = datasets.create("mnist", root, args.batch_size, device=device)
    model = models.create(args.model).to(device, memory_format=torch.channels_last)
    center_loss = CenterLoss(use_gpu=False).to(device)
    net = models.Compiled(model, args.batch_size) if args.compile else model
    optimizers = create_optimizers(model, center_loss, args)
    schedule = SCHEDULES[args.schedule]
    scheduler = schedule.create(optimizers["optimizer_model"], args, 10**6, 10**6)
    step = Step(net, center_loss, optimizers, weight=args.weight_cent, amp=args.amp)
    if args.cuda_graph:
        step = captured(step, args.batch_size)

    def train() -> None:
        epoch.train_epoch(step, data.train, scheduler).results()

    def test() -> None:
        epoch.test(model, data.test, args.amp)

    return lambda: (seconds_of(train, device=device), seconds_of(test, device=device))
