"""Training and test of zhou2018's recipe on random images in MNIST's files, beside a plain script.

plain is a straightforward script: four workers that transform image by image, the textbook form of
the loss, .item() after each batch. The other forms are main.py's settings; --recipe fast has a
network and a batch size of its own.

The forms take turns, each with all images once; the first turn, in which libraries choose their
kernels, is not counted. An epoch is that of MNIST's 60,000 and 10,000 images, in proportion.
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
from torch.utils.data import DataLoader

import cli
import datasets
import models
from engine import epoch
from engine.device import multiplies_bfloat16
from recipes import create_center_loss, create_optimizers, create_scheduler, create_step
from tools.bench import hardware, matrix_loss, positive, seconds_of

FORMS = (
    "--recipe zhou2018",
    "--no-cuda-graph",
    "--amp",
    "--amp --no-cuda-graph",
    "--amp --compile",
    "--recipe fast",
)
MNIST = 60_000  # training images; a sixth as many for the test


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=positive, help="default: 2,560, on CUDA 60,000")
    parser.add_argument("--turns", type=positive, default=5)


def run(args: argparse.Namespace) -> None:
    if args.quick:
        args.images = 60
        args.turns = 1
    images = args.images or (MNIST if args.device == "cuda" else 2560)
    print(hardware())
    print(
        f"{images:,} images, {args.device}\n\n| form | training, ms/image | test, ms/image ", end=""
    )
    print("| epoch with test, s | plain / form |\n| --- " + "| ---: " * 4 + "|", flush=True)
    with tempfile.TemporaryDirectory() as root:
        write_mnist(Path(root), images)
        forms = {"plain": plain(root, args.device)}
        for flags in FORMS:
            if reason := why_not(flags, args):
                print(f"| {flags} | {reason} | | | |")
            else:
                forms[flags] = form(root, flags.split(), args.device)
        turns = []
        for _ in range(1 + args.turns):
            turns.append({name: take_turn(*each, args.device) for name, each in forms.items()})
    for name in forms:
        train, test = (statistics.median(turn[name][part] for turn in turns[1:]) for part in (0, 1))
        ratio = statistics.median(sum(turn["plain"]) / sum(turn[name]) for turn in turns[1:])
        cells = f"{1e3 * train / images:.4f} | {1e3 * test / (images // 6):.4f}"
        print(f"| {name} | {cells} | {(train + test) * MNIST / images:,.2f} | {ratio:.2f} |")


def why_not(flags: str, args: argparse.Namespace) -> str:
    """Why a form is left out, if it is."""
    if "--amp" in flags and not multiplies_bfloat16(0 if args.device == "cuda" else None):
        return "the hardware does not multiply bfloat16"
    if "--no-cuda-graph" in flags and args.device == "cpu":
        return "no GPU"
    if "--compile" in flags and args.quick:
        return "--quick compiles nothing"
    return ""


def take_turn(train: Callable, test: Callable, device: str) -> tuple[float, float]:
    return seconds_of(train, device), seconds_of(test, device)


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


def plain(root: str, device: str) -> tuple[Callable, Callable]:
    """Its training and test."""
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]

    def loader(train: bool) -> DataLoader:
        images = datasets.MNIST(root, train, transform=transforms.Compose(steps))
        options = dict(num_workers=4, persistent_workers=True, pin_memory=device == "cuda")
        return DataLoader(images, 128, shuffle=train, **options)

    batches = loader(train=True)
    test_batches = loader(train=False)
    model = models.create("cnn").to(device)
    centers = nn.Parameter(torch.randn(10, 2, device=device))
    groups = [dict(params=model.parameters()), dict(params=[centers], lr=0.5, momentum=0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)

    def train() -> None:
        for images, labels in batches:
            labels = labels.to(device)
            features, logits = model(images.to(device))
            loss = F.cross_entropy(logits, labels) + matrix_loss(features, labels, centers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def test() -> None:
        for images, labels in test_batches:
            _, logits = model(images.to(device))
            (logits.argmax(1) == labels.to(device)).sum().item()

    return train, test


def form(root: str, flags: list[str], device: str) -> tuple[Callable, Callable]:
    """Training and test by main.py with these flags."""
    machine = ["--use-cpu"] if device == "cpu" else []
    args = cli.parse_args(["--data-root", root, "--save-dir", f"{root}/log", *flags, *machine])
    data = datasets.create("mnist", root, args.batch_size, device=device)
    model = models.create(args.model).to(device, memory_format=torch.channels_last)
    center_loss = create_center_loss(10, 2, args).to(device)
    net = models.Compiled(model, args.batch_size) if args.compile else model
    optimizers = create_optimizers(model, center_loss, args)
    step = create_step(net, center_loss, optimizers, args)
    scheduler = create_scheduler(optimizers, args, 10**6, 10**6)

    def train() -> None:
        epoch.train_epoch(step, data.train, scheduler)

    def test() -> None:
        outputs = epoch.predict(model, data.test, args.amp)
        epoch.measure(outputs, center_loss.centers.detach())

    return train, test
