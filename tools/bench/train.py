"""Training and test of zhou2018's recipe on random images in MNIST's files, beside a plain script.

plain is a straightforward script: four workers that transform image by image, the textbook form of
the loss, .item() after each batch. The other forms are main.py's settings; --recipe fast has a
network and a batch size of its own.

The forms take turns, each with all images once; the first turn, in which libraries choose their
kernels, is not counted. An epoch is that of MNIST's 60,000 and 10,000 images, in proportion.
"""

import argparse
import statistics
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
from tools.bench import DEVICE, clock, matrix_loss

MNIST = 60_000  # training images; a sixth as many for the test


def run(args: argparse.Namespace) -> None:
    images = MNIST if DEVICE == "cuda" else 2560
    if args.quick:
        images = 60
        args.turns = 1
    print(f"{images:,} images, {DEVICE}")
    with tempfile.TemporaryDirectory() as root:
        write_mnist(Path(root), images)
        forms = {"plain": plain(root)}
        for flags in chosen_forms(args.quick):
            forms[flags] = form(root, flags.split())
        turns = {name: [] for name in forms}
        for _ in range(1 + args.turns):
            for name, (train, test) in forms.items():
                start = clock()
                train()
                trained = clock()
                test()
                turns[name].append((trained - start, clock() - trained))
    print("\n| form | training, ms/image | test, ms/image | epoch with test, s | plain / form |")
    print("| --- " + "| ---: " * 4 + "|")
    for name in forms:
        train, test = map(statistics.median, zip(*turns[name][1:], strict=True))
        pairs = zip(turns["plain"][1:], turns[name][1:], strict=True)
        ratio = statistics.median(sum(plain) / sum(own) for plain, own in pairs)
        cells = f"{1e3 * train / images:.4f} | {1e3 * test / (images // 6):.4f}"
        print(f"| {name} | {cells} | {(train + test) * MNIST / images:,.2f} | {ratio:.2f} |")


def chosen_forms(quick: bool) -> list[str]:
    """The flags of main.py to compare: what this machine can do."""
    forms = ["--recipe zhou2018", "--recipe fast"]
    if DEVICE == "cuda":
        forms.append("--no-cuda-graph")
    if not multiplies_bfloat16(0 if DEVICE == "cuda" else None):
        print("--amp is left out: the hardware does not multiply bfloat16")
    else:
        forms.append("--amp")
        if not quick:
            forms.append("--amp --compile")
    return forms


def write_mnist(root: Path, images: int) -> None:
    """Random images and labels in the files that torchvision keeps of MNIST."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("t10k", images // 6)):
        for name, shape, end in (("images", (count, 28, 28), 256), ("labels", (count,), 10)):
            header = np.array([0x800 + len(shape), *shape], ">i4")  # 8: bytes
            values = random.integers(end, size=shape, dtype=np.uint8)
            path = raw / f"{split}-{name}-idx{len(shape)}-ubyte"
            path.write_bytes(header.tobytes() + values.tobytes())


def plain(root: str) -> tuple[Callable, Callable]:
    """Its training and test."""
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]

    def loader(train: bool) -> DataLoader:
        images = datasets.MNIST(root, train, transform=transforms.Compose(steps))
        options = dict(num_workers=4, persistent_workers=True, pin_memory=DEVICE == "cuda")
        return DataLoader(images, 128, shuffle=train, **options)

    batches = loader(train=True)
    test_batches = loader(train=False)
    model = models.create("cnn").to(DEVICE)
    centers = nn.Parameter(torch.randn(10, 2, device=DEVICE))
    groups = [dict(params=model.parameters()), dict(params=[centers], lr=0.5, momentum=0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)

    def train() -> None:
        for images, labels in batches:
            labels = labels.to(DEVICE)
            features, logits = model(images.to(DEVICE))
            loss = F.cross_entropy(logits, labels) + matrix_loss(features, labels, centers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def test() -> None:
        for images, labels in test_batches:
            _, logits = model(images.to(DEVICE))
            (logits.argmax(1) == labels.to(DEVICE)).sum().item()

    return train, test


def form(root: str, flags: list[str]) -> tuple[Callable, Callable]:
    """Training and test by main.py with these flags."""
    args = cli.parse_args(["--data-root", root, "--save-dir", f"{root}/log", *flags])
    data = datasets.create("mnist", root, args.batch_size, device=DEVICE)
    model = models.create(args.model).to(DEVICE, memory_format=torch.channels_last)
    center_loss = create_center_loss(10, 2, args).to(DEVICE)
    optimizers = create_optimizers(model, center_loss, args)
    step = create_step(model, center_loss, optimizers, args)
    scheduler = create_scheduler(optimizers, args, 10**6, 10**6)

    def train() -> None:
        epoch.train_epoch(step, data.train, scheduler)

    def test() -> None:
        outputs = epoch.predict(model, data.test, args.amp)
        epoch.measure(outputs, center_loss.centers.detach())

    return train, test
