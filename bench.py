"""Measures speed and memory, and prints ratios against a plain baseline written here.

    python bench.py loss              the center loss as the number of classes grows, 10 to 1,000,000
    python bench.py loss --quick      the same for small numbers, in seconds
    python bench.py loss --ranks 2    sparse gradients on two gloo processes, 1,000 against 1,000,000 classes
    python bench.py train             steps and epochs of zhou2018's recipe, plain and by main.py's settings
    python bench.py plot              pictures and films of 60,000 points
    python bench.py start             what the imports cost

`loss` measures one whole step of the center loss alone: zero_grad, forward, backward, division of the center
gradient by λ, SGD step of the centers. Three forms of it are compared, on the same random batches:

    matrix    the textbook form: all B x C distances by |x|^2 + |c|^2 - 2xc, of which a mask keeps B
    dense     CenterLoss(sparse=False): B distances, a center gradient of size C x D
    sparse    CenterLoss(sparse=True): B distances, a center gradient of at most B rows

Time is the median over steps. Memory is what the first step needs at its peak on top of centers and batch:
on the CPU the growth of the process's peak resident memory, measured in a process of its own for each row and
form (resolution about 1 MiB); on CUDA that of the allocator's peak. Ratios are of two figures of one run.

`train` trains on random images in MNIST's files, through main.py's own train and test, on few batches; an epoch is
reckoned from their medians as 469 steps and the test of 10,000 images. `plain` is how one would write it at first:
four workers that transform image by image, float32, nn.PReLU, the matrix form of the loss, three `.item()` a batch.
The start of the workers is not counted, nor is compilation. The forms take turns, and each ratio is the median of the
turns' ratios. The peak is that of a large matrix product in the form's precision on this machine, in the same turns.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import datasets
import main as product
import models
import plots
import recipes
from center_loss import CenterLoss
from processes import Ranks, StopRequest

# A forked child starts at once, because it has torch already; elsewhere a child has to import it again.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
WEIGHT, ALPHA = 0.01, 0.5  # λ and the centers' learning rate; neither matters for the cost


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu, as there is no GPU that torch can use, got cuda")
    args.run(args)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def hardware() -> str:
    """One line that says where a figure comes from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1]
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0].strip() if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {model}, {threads}, {gpu}"


# ------------------------------------------------------------------------------------------------ loss


def add_loss(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("loss", help="time and memory of a step as the number of classes grows")
    parser.add_argument(
        "--classes", type=positive, nargs="+", metavar="C", help="numbers of classes to measure"
    )
    parser.add_argument("--feat-dim", type=positive, default=128, metavar="D", help="features (default: 128)")
    parser.add_argument(
        "--batch-size", type=positive, default=128, metavar="B", help="samples over all ranks (default: 128)"
    )
    parser.add_argument(
        "--threads", type=positive, help="CPU threads over all ranks (default: torch's choice)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--ranks", type=positive, default=1, help="gloo processes on this CPU (default: 1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each figure (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="few classes and steps: a check, not a measurement"
    )
    parser.set_defaults(run=bench_loss)


def bench_loss(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.seconds = 0.2
    print(hardware())
    if args.ranks > 1:
        args.classes = args.classes or ([10, 1000] if args.quick else [1000, 1_000_000])
        bench_loss_on_ranks(args)
        return
    args.classes = args.classes or ([10, 1000] if args.quick else [10**power for power in range(1, 7)])
    print(f"one step of the loss, B = {args.batch_size}, D = {args.feat_dim}, float32, {args.device}\n")
    forms = list(FORMS)
    print(
        f"| classes | {' | '.join(f'{form}, ms' for form in forms)} | matrix/dense | matrix/sparse "
        f"| {' | '.join(f'{form}, MiB' for form in forms)} |"
    )
    print("| ---: " * (2 * len(forms) + 3) + "|")
    times = {}
    for num_classes in args.classes:
        memory = {}
        for form in forms:
            times[num_classes, form], memory[form] = measure_apart(form, num_classes, args)
        ms = [times[num_classes, form] for form in forms]
        print(
            f"| {num_classes:,} | {' | '.join(f'{value:,.2f}' for value in ms)} "
            f"| {ms[0] / ms[1]:,.1f} | {ms[0] / ms[2]:,.1f} "
            f"| {' | '.join('< 1' if value < 1 else f'{value:,.0f}' for value in memory.values())} |",
            flush=True,
        )
    print_growth({num_classes: times[num_classes, "sparse"] for num_classes in args.classes})


def print_growth(sparse: dict[int, float]) -> None:
    """The figure that sparse gradients are for: how time grows from 1,000 classes to the most."""
    many = max(sparse)
    few = 1000 if 1000 in sparse and many > 1000 else min(sparse)
    print(f"\nsparse, {many:,} against {few:,} classes: {sparse[many] / sparse[few]:.2f} times the time")


def measure_apart(form: str, num_classes: int, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds and MiB of one form; NaN where the memory did not suffice."""
    if args.device == "cuda":  # its allocator counts for itself, and CUDA does not survive a fork
        return measure(form, num_classes, args)
    try:
        with ProcessPoolExecutor(1, get_context(START_METHOD)) as pool:
            return pool.submit(measure, form, num_classes, args).result()
    except (BrokenProcessPool, RuntimeError):  # killed for its memory, or refused it
        return float("nan"), float("nan")


def measure(form: str, num_classes: int, args: argparse.Namespace) -> tuple[float, float]:
    FORMS[form](10, args)()  # threads, libraries and their memory are there before anything is measured
    step = FORMS[form](num_classes, args)
    before = peak_memory(args.device, reset=True)
    step()
    memory = peak_memory(args.device) - before
    return median_times([step], args)[0], memory / 2**20


def peak_memory(device: str, reset: bool = False) -> int:
    """The most bytes used so far; reset sets the count back to what is used now, where it can be."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def median_times(steps: list[Callable[[], None]], args: argparse.Namespace, least: int = 3) -> list[float]:
    """Median milliseconds of each step; the steps take turns, so that a disturbance meets all alike."""
    taken: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + args.seconds * len(steps)
    while len(taken[0]) < least or (time.perf_counter() < end and len(taken[0]) < 1000):
        for step, times in zip(steps, taken, strict=True):
            start = time.perf_counter()
            step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


def batches(num_classes: int, args: argparse.Namespace) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that returns one of 32 random batches after another."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(32):
        features = torch.randn(args.batch_size, args.feat_dim, generator=generator).to(args.device)
        labels = torch.randint(num_classes, (args.batch_size,), generator=generator).to(args.device)
        drawn.append((features.requires_grad_(), labels))
    turn = iter(range(sys.maxsize))

    def draw() -> tuple[Tensor, Tensor]:
        features, labels = drawn[next(turn) % len(drawn)]
        features.grad = None
        return features, labels

    return draw


def matrix_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    squares = features.pow(2).sum(1, keepdim=True) + centers.pow(2).sum(1)
    distances = squares - 2 * features @ centers.T  # (B, C)
    mask = labels[:, None] == torch.arange(len(centers), device=centers.device)
    return (distances * mask).clamp(1e-12, 1e12).sum() / len(features)


def matrix_step(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
    centers = nn.Parameter(torch.randn(num_classes, args.feat_dim).to(args.device))
    optimizer = torch.optim.SGD([centers], lr=ALPHA)
    draw = batches(num_classes, args)

    def step() -> None:
        features, labels = draw()
        optimizer.zero_grad()
        (WEIGHT * matrix_loss(features, labels, centers)).backward()
        centers.grad.mul_(1 / WEIGHT)
        optimizer.step()

    return step


def center_loss_step(sparse: bool) -> Callable[[int, argparse.Namespace], Callable[[], None]]:
    def make(num_classes: int, args: argparse.Namespace) -> Callable[[], None]:
        center_loss = CenterLoss(num_classes, args.feat_dim, use_gpu=False, sparse=sparse).to(args.device)
        optimizer = torch.optim.SGD(center_loss.parameters(), lr=ALPHA)
        draw = batches(num_classes, args)

        def step() -> None:
            features, labels = draw()
            optimizer.zero_grad()
            (WEIGHT * center_loss(features, labels)).backward()
            center_loss.rescale_center_grad(WEIGHT)
            optimizer.step()

        return step

    return make


FORMS = {"matrix": matrix_step, "dense": center_loss_step(False), "sparse": center_loss_step(True)}


def bench_loss_on_ranks(args: argparse.Namespace) -> None:
    print(
        f"one sparse step of the loss on {args.ranks} gloo processes, B = {args.batch_size} over all, "
        f"D = {args.feat_dim}, float32, cpu\n"
    )
    threads = max(1, torch.get_num_threads() // args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            measure_on_rank, (args, threads, folder), nprocs=args.ranks, start_method=START_METHOD
        )
        times = json.loads(Path(folder, "times.json").read_text())
    print("| classes | sparse, ms |\n| ---: | ---: |")
    for num_classes, ms in zip(args.classes, times, strict=True):
        print(f"| {num_classes:,} | {ms:.2f} |")
    print_growth(dict(zip(args.classes, times, strict=True)))


def measure_on_rank(rank: int, args: argparse.Namespace, threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    args.device, args.batch_size = "cpu", max(1, args.batch_size // args.ranks)
    steps = [FORMS["sparse"](num_classes, args) for num_classes in args.classes]
    for step in steps:
        step()
    # Every rank must take the same number of steps, so the count is fixed and no rank's clock decides.
    count, args.seconds = (10 if args.quick else 500), 0.0
    times = median_times(steps, args, least=count)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------- train

FLAGS = {"default": [], "--amp": ["--amp"], "--amp --compile": ["--amp", "--compile"]}


def add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="steps and epochs, against a plain script and the machine's peak")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="B", help="(default: 128)")
    parser.add_argument("--steps", type=positive, help="of each form in a turn (default: 15, on CUDA 469)")
    parser.add_argument("--turns", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--quick", action="store_true", help="one turn of 3 small steps: a check, not a measurement")
    parser.set_defaults(run=bench_train)


def bench_train(args: argparse.Namespace) -> None:
    torch.backends.cudnn.benchmark = True
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as convolutions, float32 or not, have it there
    if args.quick:
        args.steps, args.turns, args.batch_size = 3, 1, 16
    args.steps = args.steps or (469 if args.device == "cuda" else 15)
    size = 256 if args.quick else 8192 if args.device == "cuda" else 2048
    print(hardware())
    work = step_flops(args.batch_size)
    print(f"zhou2018's recipe, B = {args.batch_size}, {args.device}: {work / 1e9:.1f} GFLOP a step\n", flush=True)

    with tempfile.TemporaryDirectory() as root:
        write_mnist(Path(root), args.batch_size * args.steps, args.batch_size * -(-args.steps // 3))
        passes = {"plain": plain_passes(root, args)}
        passes |= {name: product_passes(root, flags, args) for name, flags in FLAGS.items()}
        first = {name: run() for name, run in passes.items()}  # compilation, cuDNN's choice, memory
        turns = []
        for _ in range(args.turns):
            peaks = {dtype: matmul_flops(dtype, size, args.device) for dtype in (torch.float32, torch.bfloat16)}
            turns.append((peaks, {name: run() for name, run in passes.items()}))

    print("| form | step, ms | steps/s | images/s | test, ms/image | epoch with test, s | plain / form | % of peak |")
    print("| --- " + "| ---: " * 7 + "|")
    for name in passes:
        dtype = torch.bfloat16 if "--amp" in name else torch.float32
        step = statistics.median(times[name][0] for _, times in turns)
        test = statistics.median(times[name][1] for _, times in turns)
        ratio = statistics.median(epoch_seconds(*times["plain"]) / epoch_seconds(*times[name]) for _, times in turns)
        share = statistics.median(work / times[name][0] / peaks[dtype] for peaks, times in turns)
        print(f"| {name} | {1e3 * step:,.2f} | {1 / step:,.2f} | {args.batch_size / step:,.0f} | {1e3 * test:.3f} "
              f"| {epoch_seconds(step, test):,.2f} | {ratio:.2f} | {100 * share:.0f} |")  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        peak = statistics.median(peaks[dtype] for peaks, _ in turns)
        print(f"\npeak, {dtype}: {peak / 1e9:,.0f} GFLOP/s in a product of {size} x {size} matrices", end="")
    extra = first["--amp --compile"][0] - statistics.median(times["--amp --compile"][0] for _, times in turns)
    print(f"\ncompilation: {extra * args.steps:.0f} s")


def epoch_seconds(step: float, test: float) -> float:
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
    """Per second: the best of a few products."""
    matrix, seconds = torch.randn(size, size, device=device).to(dtype), []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def write_mnist(root: Path, train: int, test: int) -> None:
    """Random images and labels in the files that torchvision keeps of MNIST."""
    raw, random = root / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", test)):
        for name, high, shape in (("images-idx3", 256, (count, 28, 28)), ("labels-idx1", 10, (count,))):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            values = random.integers(high, size=shape, dtype=np.uint8)
            (raw / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())


def plain_passes(root: str, args: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """A function that trains and tests once: the seconds of a step and of the test of an image."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    trainloader, testloader = (
        torch.utils.data.DataLoader(MNIST(root, train=train, transform=transform), args.batch_size, shuffle=train,
                                    num_workers=4, pin_memory=args.device == "cuda")
        for train in (True, False)
    )  # fmt: skip
    layers = []
    for inside, outside in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inside, outside, 5, padding=2), nn.PReLU(), nn.Conv2d(outside, outside, 5, padding=2)]
        layers += [nn.PReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 2), nn.PReLU()).to(args.device)
    classifier, centers = nn.Linear(2, 10).to(args.device), nn.Parameter(torch.randn(10, 2).to(args.device))
    sgd = torch.optim.SGD([*body.parameters(), *classifier.parameters()], 0.001, momentum=0.9, weight_decay=5e-4)
    sgd_centers = torch.optim.SGD([centers], 0.5)

    def run() -> tuple[float, float]:
        start, sums = None, [0.0, 0.0, 0.0]
        for images, labels in trainloader:
            start = start or time.perf_counter()  # the workers have started
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
        step = (time.perf_counter() - start) / len(trainloader)
        start, right = None, 0
        with torch.no_grad():
            for images, labels in testloader:
                start = start or time.perf_counter()
                images, labels = images.to(args.device), labels.to(args.device)
                right += (classifier(body(images)).argmax(1) == labels).sum().item()
        return step, (time.perf_counter() - start) / len(testloader.dataset)

    return run


def product_passes(root: str, flags: list[str], args: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """The same by main.py with these flags."""
    settings = recipes.parse_args(["--data-root", root, "--batch-size", str(args.batch_size), *flags])
    data = datasets.create("mnist", root, args.batch_size, device=args.device)
    ranks, stop, epochs = Ranks(), StopRequest(), itertools.count(1)
    model, net, center_loss, optimizers, scheduler = product.build(settings, data, torch.device(args.device), ranks)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        product.train(net, center_loss, list(optimizers.values()), scheduler, data.train, settings, ranks,
                      lambda line: None, stop, next(epochs))  # fmt: skip
        middle = time.perf_counter()
        product.test(model, data.test, settings, ranks)
        return (middle - start) / len(data.train), (time.perf_counter() - middle) / len(data.test.dataset)

    return run


# ------------------------------------------------------------------------------------------------ plot


def add_plot(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plot", help="pictures and films, against a plain way to draw them")
    parser.add_argument("--points", type=positive, default=60_000, help="of a picture (default: 60,000)")
    parser.add_argument("--frames", type=positive, default=100, help="of a film (default: 100)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each picture's figure (default: 5)")
    parser.add_argument("--quick", action="store_true", help="few points: a check, not a measurement")
    parser.set_defaults(run=bench_plot, device="cpu")


def bench_plot(args: argparse.Namespace) -> None:
    if args.quick:
        args.points, args.frames, args.seconds = 600, 3, 0.1
    print(hardware())
    print(f"{args.points:,} points in 10 classes\n")
    random = np.random.default_rng(0)
    centers, labels = 5 * random.normal(size=(10, 2)), random.integers(10, size=args.points)
    features = centers[labels] + random.normal(size=(args.points, 2))
    classes = [str(label) for label in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def save(epoch: int = 1) -> None:  # what the training waits for
            growing = torch.as_tensor(features, dtype=torch.float32) * (1 + epoch / args.frames)
            train = dict(features=growing, labels=torch.as_tensor(labels), accuracy=0.0)
            test = train | {name: train[name][: args.points // 6] for name in ("features", "labels")}
            splits = dict(train=train, test=test)
            plots.plot_epoch(lambda *task: None, folder, epoch, splits, torch.as_tensor(centers), classes)

        save()
        pictures = {
            "plain": lambda: plain_picture(folder / "plain.png", features, labels),
            "ours": lambda: plots.draw_points(folder / "ours.png", folder / "train" / "epoch_1.npz"),
        }
        test_picture = functools.partial(plots.draw_points, folder / "test.png", folder / "test" / "epoch_1.npz")
        for draw in pictures.values():
            draw()  # matplotlib is loaded
        *times, test_time, save_time = median_times([*pictures.values(), test_picture, save], args)
        print("| picture | ms | KB | plain / form |\n| --- | ---: | ---: | ---: |")
        for name, ms in zip(pictures, times, strict=True):
            size = (folder / f"{name}.png").stat().st_size
            print(f"| {name} | {ms:,.0f} | {size / 1e3:,.0f} | {times[0] / ms:.2f} |")

        for epoch in range(2, args.frames + 1):
            save(epoch)
        films = {"all frames in memory": film_in_memory, "ours": plots.draw_film}
        print(f"\n| film of {args.frames} frames | s | MiB at its peak | KB |\n| --- | ---: | ---: | ---: |")
        for name, write in films.items():
            with ProcessPoolExecutor(1, get_context(START_METHOD)) as pool:
                seconds, memory = pool.submit(measure_film, write, folder).result()
            size = (folder / "film.gif").stat().st_size
            print(f"| {name} | {seconds:,.2f} | {memory / 2**20:,.0f} | {size / 1e3:,.0f} |")
    background = times[1] + test_time
    print(
        f"\nthe pictures of an epoch: {save_time:.1f} ms of the training's own time, which are 5 % of an epoch of "
        f"{save_time / 50:.2f} s, and {background:.0f} ms of another process, with which they are 5 % of one of "
        f"{(save_time + background) / 50:.1f} s where no core is to spare"
    )


def plain_picture(path: Path, features: np.ndarray, labels: np.ndarray) -> None:
    """A scatter a class, as one would write it at first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for label in range(10):
        own = features[labels == label]
        pyplot.scatter(own[:, 0], own[:, 1], c=f"C{label}", s=1)
    pyplot.legend([str(label) for label in range(10)], loc="upper right")
    pyplot.savefig(path, bbox_inches="tight")
    pyplot.close()


def film_in_memory(path: Path, directory: Path) -> None:
    """The same frames as ours, all of them drawn before Pillow writes the first."""
    from PIL import Image

    shown = dict(np.load(max(directory.glob("*.npz"), key=lambda path: path.stat().st_mtime)))  # of widest axes
    scatter, frames = plots.Scatter(shown, plots.limits(shown["points"]), dpi=80), []
    for source in sorted(directory.glob("*.npz"), key=lambda path: int(path.stem.partition("_")[2])):
        scatter.show(dict(np.load(source)))
        scatter.figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(scatter.figure.canvas.buffer_rgba())).convert("RGB"))
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)


def measure_film(write: Callable[[Path, Path], None], folder: Path) -> tuple[float, int]:
    """Seconds, and bytes at the peak on top of what a single picture takes."""
    plots.draw_points(folder / "first.png", folder / "train" / "epoch_1.npz")
    before, start = peak_memory("cpu"), time.perf_counter()
    write(folder / "film.gif", folder / "train")
    return time.perf_counter() - start, peak_memory("cpu") - before


# ----------------------------------------------------------------------------------------------- start

HEAVY = ("torchvision", "matplotlib", "sklearn", "scipy", "PIL", "pandas", "tensorboard", "onnx", "sympy",
         "torch._dynamo", "torch._inductor", "torch.onnx")  # fmt: skip
STARTS = {
    "import torch": "import torch",
    "from center_loss import CenterLoss": "from center_loss import CenterLoss",
    "main.py -h": "import main; main.cli(['-h'])",
    "main.py --batch-size 0": "import main; main.cli(['--batch-size', '0'])",
}


def add_start(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("start", help="seconds until a module is imported, a help or an error printed")
    parser.add_argument("--turns", type=positive, default=7, help="(default: 7)")
    parser.add_argument("--quick", action="store_true", help="one turn: a check, not a measurement")
    parser.set_defaults(run=bench_start)


def bench_start(args: argparse.Namespace) -> None:
    print(hardware())
    print(f"looked for: {', '.join(HEAVY)}\n")
    seconds, heavy = {name: [] for name in STARTS}, {}
    for _ in range(1 if args.quick else args.turns):
        for name, code in STARTS.items():
            start = time.perf_counter()
            heavy[name] = start_apart(code)
            seconds[name].append(time.perf_counter() - start)
    torch_alone = statistics.median(seconds["import torch"])
    print("| start | s | s on top of torch | heavy modules loaded |\n| --- | ---: | ---: | --- |")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"| {name} | {median:.2f} | {median - torch_alone:+.2f} | {', '.join(heavy[name]) or 'none'} |")


def start_apart(code: str) -> list[str]:
    """Runs the code in a process of its own; which of HEAVY it has loaded."""
    report = f"lambda: print('', *(name for name in {HEAVY} if name in sys.modules))"
    program = f"import atexit, sys; atexit.register({report})\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.splitlines()[-1].split()


COMMANDS = (add_loss, add_train, add_plot, add_start)

if __name__ == "__main__":
    main()
