"""Training steps and epochs of zhou2018's recipe, on random images in MNIST's files, against a plain script.

plain is a straightforward script: four workers that transform image by image, float32, nn.PReLU, the matrix form of
the loss, three .item() per batch, cuDNN's benchmarking. The other forms are main.py's settings, through the
Step, epoch and test that it uses. An epoch is counted as 469 steps and the test of 10,000 images. The clock runs from
the end of the warm-up to the end of the last batch; compilation is not counted. The forms take turns,
and each ratio is the median of the turns' ratios. The peak is that of a large matrix product in the form's precision,
in the same turns. Memory is what a form's first pass allocates on the GPU. Last comes a process of --recipe fast, on as
many images as MNIST has, each step of which is printed.
"""

import argparse
import functools
import statistics
import struct
import subprocess
import sys
import tempfile
import time
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
from engine import epoch as epoch_
from engine.cuda_graph import captured
from engine.step import Step
from recipes import SCHEDULES, create_optimizers
from tools.bench.common import hardware, matrix_loss, positive, synchronize

FORMS = {"default": [], "--amp": ["--amp"], "--amp --compile": ["--amp", "--compile"]}
CUDA_FORMS = {"--no-cuda-graph": ["--no-cuda-graph"]}
WARM_UP = 10  # batches before the clock starts: four workers have read eight ahead


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="steps and epochs, against a plain script and the machine's peak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    add("--batch-size", type=positive, default=128, metavar="B", help="(default: %(default)s)")
    add("--steps", type=positive, help="of each form in a turn (default: 20, on CUDA 469)")
    add("--turns", type=positive, default=5, help="(default: %(default)s)")
    add(
        "--quick", action="store_true", help="one turn of 3 small steps: a check, not a measurement"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.quick:
        args.steps, args.turns, args.batch_size = 3, 1, 16
    args.steps = args.steps or (469 if args.device == "cuda" else 20)
    size = 256 if args.quick else 8192 if args.device == "cuda" else 2048
    print(hardware())
    work = step_flops(args.batch_size)
    print(
        f"zhou2018's recipe, B = {args.batch_size}, {args.device}: {work / 1e9:.1f} GFLOP a step\n",
        flush=True,
    )

    with tempfile.TemporaryDirectory() as root:
        write_mnist(
            Path(root),
            args.batch_size * (WARM_UP + args.steps),
            args.batch_size * (WARM_UP + args.steps // 3),
        )
        passes = {"plain": plain_passes(root, args)}
        forms = FORMS if args.device == "cpu" else FORMS | CUDA_FORMS
        passes |= {name: product_passes(root, flags, args) for name, flags in forms.items()}
        if args.device == "cpu":
            passes["--amp, torch's PReLU"] = product_passes(root, ["--amp"], args, own_prelu=False)
        first = {name: run() for name, run in passes.items()}  # compilation, cuDNN's choice, memory
        turns = []
        for _ in range(args.turns):
            peaks = {
                dtype: matmul_flops(dtype, size, args.device)
                for dtype in (torch.float32, torch.bfloat16)
            }
            turns.append((peaks, {name: run() for name, run in passes.items()}))

    print(
        "| form | step, ms | steps/s | images/s | test, ms/image | epoch with test, s | plain / form | % of peak |"
    )
    print("| --- " + "| ---: " * 7 + "|")
    for name in passes:
        dtype = torch.bfloat16 if "--amp" in name else torch.float32
        step, test = (
            statistics.median(times[name][index] for _, times in turns) for index in (0, 1)
        )
        ratio = statistics.median(
            epoch_seconds(*times["plain"]) / epoch_seconds(*times[name]) for _, times in turns
        )
        share = statistics.median(work / times[name][0] / peaks[dtype] for peaks, times in turns)
        print(
            f"| {name} | {1e3 * step:,.2f} | {1 / step:,.2f} | {args.batch_size / step:,.0f} | {1e3 * test:.3f} "
            f"| {epoch_seconds(step, test):,.2f} | {ratio:.2f} | {100 * share:.0f} |"
        )
    for dtype in (torch.float32, torch.bfloat16):
        peak = statistics.median(peaks[dtype] for peaks, _ in turns)
        print(
            f"\npeak, {dtype}: {peak / 1e9:,.0f} GFLOP/s in a product of {size} x {size} matrices",
            end="",
        )
    print(f"\ncompilation: {first['--amp --compile'][2] - first['--amp'][2]:.0f} s")
    if args.device == "cuda":
        print(
            "memory, MiB: "
            + ", ".join(f"{name} {times[3] / 2**20:,.0f}" for name, times in first.items())
        )
    print(start_of_fast(args))


def start_of_fast(args: argparse.Namespace) -> str:
    """Seconds since the start of a process: for imports alone, and until --recipe fast has taken its steps."""

    def output_of(*command: str) -> list[tuple[float, str]]:
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True
        ) as process:
            lines = [(time.perf_counter() - begun, line) for line in process.stdout]
        if process.returncode:
            sys.exit(f"{' '.join(command)} has ended with status {process.returncode}")
        return [*lines, (time.perf_counter() - begun, "")]

    with tempfile.TemporaryDirectory() as root:
        write_mnist(Path(root), *((512, 256) if args.quick else (60_000, 10_000)))
        (imports, _), *_ = output_of("-c", "import torch, torchvision")
        flags = [
            "--recipe",
            "fast",
            "--data-root",
            root,
            "--save-dir",
            f"{root}/log",
            "--print-freq",
            "1",
        ]
        lines = output_of(
            cli.__file__.replace("cli.py", "main.py"),
            *flags,
            *["--use-cpu"] * (args.device == "cpu"),
        )
    steps = [seconds for seconds, line in lines if line.startswith("Batch")]
    return (
        f"--recipe fast, s: imports alone {imports:.1f}, first step {steps[0]:.1f}, last step {steps[-1]:.1f}, "
        f"prompt {lines[-1][0]:.1f}"
    )


def epoch_seconds(step: float, test: float, *_) -> float:
    """Of MNIST's 60,000 and 10,000 images at B = 128, from the seconds of a step and of the test of an image."""
    return 469 * step + 10_000 * test


def step_flops(batch_size: int) -> int:
    """Of one forward and backward pass, a multiplication with its addition being two."""
    from torch.utils.flop_counter import FlopCounterMode

    model, images = models.create("cnn"), torch.zeros(batch_size, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        features, logits = model(images)
        (features.sum() + logits.sum()).backward()
    return counter.get_total_flops()


def matmul_flops(dtype: torch.dtype, size: int, device: str) -> float:
    """Per second: the best of a few products, on a GPU in TF32 for float32, as its convolutions are."""
    matrix, seconds = torch.randn(size, size, device=device).to(dtype), []
    torch.backends.cuda.matmul.allow_tf32 = True
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * size**3 / min(seconds)


def write_mnist(root: Path, train: int, test: int) -> None:
    """Random images and labels in the files that torchvision keeps of MNIST."""
    raw, random = root / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", test)):
        for name, high, shape in (
            ("images-idx3", 256, (count, 28, 28)),
            ("labels-idx1", 10, (count,)),
        ):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            values = random.integers(high, size=shape, dtype=np.uint8)
            (raw / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())


class Clock:
    """Passes batches through; measures the seconds per image, from the end of the warm-up to that of the last batch."""

    def __init__(self, batches, args: argparse.Namespace):
        self.batches, self.device, self.warm_up = batches, args.device, WARM_UP * args.batch_size

    def __iter__(self):
        seen, skipped = 0, None
        for number, batch in enumerate(self.batches, 1):
            if skipped is None and seen >= self.warm_up:
                synchronize(self.device)
                start, skipped = time.perf_counter(), seen
            yield batch
            seen += len(batch[0])
            if number == len(
                self.batches
            ):  # before workers end: that happens once an epoch, and is not a step's time
                synchronize(self.device)
                self.seconds = (time.perf_counter() - start) / (seen - skipped)


# Trains and tests once: seconds of a step, of the test of an image, of all with the warm-up; bytes allocated on a GPU.
Pass = Callable[[], tuple[float, float, float, int]]


def plain_passes(root: str, args: argparse.Namespace) -> Pass:
    from torchvision.datasets import MNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    trainloader, testloader = (
        torch.utils.data.DataLoader(
            MNIST(root, train=train, transform=transform),
            args.batch_size,
            shuffle=train,
            num_workers=4,
            pin_memory=args.device == "cuda",
        )
        for train in (True, False)
    )
    layers = []
    for inside, outside in ((1, 32), (32, 64), (64, 128)):
        layers += [
            nn.Conv2d(inside, outside, 5, padding=2),
            nn.PReLU(),
            nn.Conv2d(outside, outside, 5, padding=2),
        ]
        layers += [nn.PReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 2), nn.PReLU()).to(args.device)
    classifier, centers = (
        nn.Linear(2, 10).to(args.device),
        nn.Parameter(torch.randn(10, 2).to(args.device)),
    )
    sgd = torch.optim.SGD(
        [*body.parameters(), *classifier.parameters()], 0.001, momentum=0.9, weight_decay=5e-4
    )
    sgd_centers = torch.optim.SGD([centers], 0.5)

    def train(batches) -> None:
        torch.backends.cudnn.benchmark = True
        sums = [0.0, 0.0, 0.0]
        for images, labels in batches:
            images, labels = images.to(args.device), labels.to(args.device)
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
    def test(batches) -> None:
        right = 0
        for images, labels in batches:
            images, labels = images.to(args.device), labels.to(args.device)
            right += (classifier(body(images)).argmax(1) == labels).sum().item()

    return functools.partial(timed, train, test, trainloader, testloader, args)


def product_passes(
    root: str, flags: list[str], args: argparse.Namespace, own_prelu: bool = True
) -> Pass:
    """By main.py with these flags."""
    settings = cli.parse_args(["--data-root", root, "--batch-size", str(args.batch_size), *flags])
    data = datasets.create("mnist", root, args.batch_size, device=args.device)
    model = models.create(settings.model).to(args.device, memory_format=torch.channels_last)
    if not own_prelu:
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                module.__class__ = nn.PReLU
    center_loss = CenterLoss(use_gpu=False).to(args.device)
    net = models.Compiled(model, args.batch_size) if settings.compile else model
    optimizers = create_optimizers(model, center_loss, settings)
    scheduler = SCHEDULES[settings.schedule].create(
        optimizers["optimizer_model"], settings, 10**6, 10**6
    )
    step = Step(net, center_loss, optimizers, weight=settings.weight_cent, amp=settings.amp)
    if settings.cuda_graph:
        step = captured(step, args.batch_size)

    def train(batches) -> None:
        torch.backends.cudnn.benchmark = False
        epoch_.train_epoch(step, batches, scheduler).results()

    def test(batches) -> None:
        epoch_.test(model, batches, settings.amp)

    return functools.partial(timed, train, test, data.train, data.test, args)


def timed(train, test, trainloader, testloader, args) -> tuple[float, float, float, int]:
    begun, memory = time.perf_counter(), 0
    training_clock, test_clock = Clock(trainloader, args), Clock(testloader, args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        memory = -torch.cuda.memory_allocated()
    train(training_clock)
    test(test_clock)
    if args.device == "cuda":
        memory += torch.cuda.max_memory_allocated()
    step = training_clock.seconds * args.batch_size
    return step, test_clock.seconds, time.perf_counter() - begun, memory
