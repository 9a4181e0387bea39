"""Data sets: `create(...)` gives the batches of both splits, the class names and the image shape.

With `workers=0` a whole data set is kept on the device as uint8, and a batch is an index into it; with `workers=N` the
torchvision data set is read by N processes. Either way a batch is normalised on the device when it is drawn, and both
give the same batches for the same seed and the same pixels, bit for bit.
"""

import contextlib
import io
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset, default_collate

from processes import Ranks


class DatasetError(Exception):
    """The data cannot be used as given; the message is one line for the user."""


@dataclass(frozen=True)
class Spec:
    """How a data set is opened, and the mean and std of its pixels in [0, 1].

    `open` takes the root and an image size, which only sets without a size of their own heed, and returns the training
    and the test split: data sets of (uint8 image (C, H, W), label), with `targets` (all labels) and `classes` (names).
    """

    open: Callable[[Path, int], tuple[Dataset, Dataset]]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """This rank's share of a batch, on the device."""

    images: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,)
    size: int  # of the batch, over all ranks


class Data(NamedTuple):
    train: "Batches"
    test: "Batches"
    classes: list[str]
    in_channels: int
    image_size: int


def from_torchvision(
    name: str,
    num_classes: int,
    shape: tuple[int, int, int],
    splits: tuple[dict, dict] = (dict(train=True), dict(train=False)),
):
    """Opens the class of that name in torchvision.datasets, downloading the data where they are missing.

    `splits` are the arguments that choose the training and the test split, `shape` is (C, H, W).
    """

    def open_splits(root: Path, image_size: int) -> tuple[Dataset, Dataset]:
        import torchvision
        from torchvision.transforms import PILToTensor

        source = getattr(torchvision.datasets, name)
        created = [path for path in (root, *root.parents) if not path.exists()]
        opened = []
        for split in splits:
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints a line for each mirror that fails
                    opened.append(source(root, **split, transform=PILToTensor(), download=True))
            except Exception as error:  # whatever a missing network or a broken file raises in torchvision's readers
                _remove_empty(root / name, created)
                raise DatasetError(
                    f"{name} could be neither read from {root} nor downloaded to it ({_one_line(error)}); "
                    "--dataset digits needs no download"
                ) from error
            _complete(opened[-1], num_classes, shape, f"{name} in {root}")
        return tuple(opened)

    return open_splits


def _complete(split: Dataset, num_classes: int, shape: tuple[int, int, int], what: str) -> None:
    """Gives a torchvision data set `targets` and `classes` where it lacks them; DatasetError where it is broken."""
    split.targets = split.targets if hasattr(split, "targets") else split.labels
    split.classes = getattr(split, "classes", [str(label) for label in range(num_classes)])
    labels, images = torch.as_tensor(split.targets), tuple(split.data.shape)
    if len(labels) != images[0] or not images[0] or sorted((*images[1:], 1)[:3]) != sorted(shape):
        raise DatasetError(f"{what} is broken: images of shape {images}, {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DatasetError(f"{what} is broken: labels from {int(labels.min())} to {int(labels.max())}")


def open_digits(root: Path, image_size: int) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 real digits, 8x8 scaled up to 28x28; a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1)  # (N, 1, 8, 8) in 0..16
    images = F.interpolate(small, size=28, mode="bilinear").mul(255 / 16).round().to(torch.uint8)
    splits = []
    for rows in train_test_split(range(len(images)), test_size=360, stratify=digits.target, random_state=0):
        labels = torch.as_tensor(digits.target[sorted(rows)])
        splits.append(TensorDataset(images[sorted(rows)], labels))
        splits[-1].targets, splits[-1].classes = labels, [str(digit) for digit in range(10)]
    return tuple(splits)


def open_folder(root: Path, image_size: int) -> tuple[Dataset, Dataset]:
    """train/<class>/* and test/<class>/* of a directory, resized and cropped to squares of image_size pixels."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    read = ReadImage(_scan_folder(root))
    transform = Compose([Resize(image_size), CenterCrop(image_size), PILToTensor()])
    splits = []
    for split in (root / "train", root / "test"):
        try:
            splits.append(ImageFolder(split, transform, loader=read))
        except OSError as error:
            raise DatasetError(f"{split} must hold a directory of images for each class: {_one_line(error)}") from error
        if len(splits[-1].classes) < 2:
            raise DatasetError(f"{split} must hold at least two classes, got {splits[-1].classes[0]} alone")
    train, test = splits
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise DatasetError(f"train and test in {root} must have the same classes, but only one has {', '.join(odd)}")
    return train, test


SPECS = {
    "mnist": Spec(from_torchvision("MNIST", 10, (1, 28, 28)), (0.1307,), (0.3081,)),
    "fashion-mnist": Spec(from_torchvision("FashionMNIST", 10, (1, 28, 28)), (0.2860,), (0.3530,)),
    "cifar10": Spec(from_torchvision("CIFAR10", 10, (3, 32, 32)), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Spec(
        from_torchvision("CIFAR100", 100, (3, 32, 32)), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "digits": Spec(open_digits, (0.3053,), (0.3247,)),
    "folder": Spec(open_folder, (0.5,), (0.5,)),
}

# How pixels p in [0, 255] become network input: the mean to subtract from p / 255 and the std to divide by.
SCALINGS: dict[str, Callable[[Spec], tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "standard": lambda spec: (spec.mean, spec.std),
    "symmetric": lambda spec: ((127.5 / 255,), (128 / 255,)),  # (p - 127.5) / 128
    "unit": lambda spec: ((0.0,), (1.0,)),  # p / 255
}


class Normalise:
    """uint8 images (..., C, H, W) to float32: p / 255, less the mean, divided by the std of each channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: str | torch.device = "cpu"):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class BatchRows(Sampler):
    """The row numbers of each batch, in RandomSampler's order when shuffled; of each batch this rank's share."""

    def __init__(self, size: int, batch_size: int, shuffle: bool, device: str | torch.device, ranks: Ranks):
        self.size, self.batch_size, self.shuffle, self.device = size, batch_size, shuffle, device
        self.ranks, self.skip = ranks, 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = list(RandomSampler(range(self.size))) if self.shuffle else range(self.size)
        for batch in torch.tensor(rows).to(self.device).split(self.batch_size)[self.skip :]:
            yield self.ranks.share(batch)


class Batches:
    """All batches of a split, to be iterated over once an epoch."""

    def __init__(self, loader: DataLoader, rows: BatchRows, normalise: Normalise, device: str | torch.device):
        self.loader, self.rows, self.normalise, self.device = loader, rows, normalise, device

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        return self.after(0)

    def after(self, done: int) -> Iterator[Batch]:
        """A pass without its first `done` batches: the rest of an interrupted one, from the same random state."""
        self.rows.skip = done
        size, batch_size = self.rows.size, self.rows.batch_size
        for number, (images, labels) in enumerate(self.loader, done):
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield Batch(self.normalise(images), labels, min(batch_size, size - number * batch_size))

    def thumbnails(self, rows: Sequence[int], largest: int = 32) -> np.ndarray:
        """The images of these rows as in the data set, uint8 (N, C, H, W), with at most `largest` pixels a side."""
        dataset, kept = self.loader.dataset, []
        with ThreadPoolExecutor() as pool:
            for some in torch.as_tensor(rows).split(256):
                if isinstance(dataset, TensorDataset):
                    images = dataset.tensors[0][some.to(dataset.tensors[0].device)].cpu()
                else:
                    images = torch.stack(list(pool.map(lambda row: dataset[row][0], some.tolist())))
                size = [min(side, largest) for side in images.shape[2:]]
                if images.shape[2:] != tuple(size):
                    images = F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)
                kept.append(images)
        return torch.cat(kept).numpy()


def create(
    name: str,
    root: str,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
    *,
    image_size: int = 32,
    scaling: str = "standard",
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> Data:
    """Opens data set `name` below `root`, downloading it where torchvision can.

    `image_size` is for data sets without a size of their own: "folder".
    Raises DatasetError where the data are missing, broken or too large for the device.
    """
    spec, root = SPECS[name], Path(root)
    if root.exists() and not root.is_dir():
        raise DatasetError(f"--data-root must be a directory, got the file {root}")
    splits = spec.open(root, image_size)
    shape = tuple(splits[0][0][0].shape)
    if workers == 0:
        _check_memory(sum(map(len, splits)) * math.prod(shape), torch.device(device))
    normalise = Normalise(*SCALINGS[scaling](spec), device)
    batches = []
    for split, shuffle in zip(splits, (True, False), strict=True):
        # Testing has a generator of its own: how often one tests changes nothing in the training.
        common = dict(num_workers=workers, generator=None if shuffle else torch.Generator(),
                      worker_init_fn=_start_worker)  # fmt: skip
        rows = BatchRows(len(split), batch_size, shuffle, "cpu" if workers else device, ranks)
        if workers == 0:
            dataset = TensorDataset(*(each.to(device) for each in _load_all(split, shape)))
            loader = DataLoader(dataset, sampler=rows, batch_size=None, **common)
        else:
            pin = torch.device(device).type == "cuda"
            loader = DataLoader(split, batch_sampler=rows, pin_memory=pin, collate_fn=Collate(shape), **common)
        batches.append(Batches(loader, rows, normalise, device))
    return Data(*batches, list(splits[0].classes), shape[0], shape[1])


class Collate:
    """Items to a batch, which may be empty for some rank; a class, so that spawned workers can load it."""

    def __init__(self, shape: tuple[int, ...]):
        self.empty = torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)

    def __call__(self, items: list) -> list[torch.Tensor]:
        return default_collate(items) if items else [each.clone() for each in self.empty]


def _start_worker(worker: int) -> None:
    """Workers ignore SIGINT and put off SIGTERM, so that the main process can finish its current batch.

    Ctrl-C and a cluster's SIGTERM reach all processes of a run. A SIGTERM ends the worker ten seconds later, since
    Python also sends it to workers at its own exit. The death of the main process ends a worker at once: torch watches
    for that too, but not while the worker is starting.
    """
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


class ReadImage:
    """An image file as PIL image of a mode; a file that cannot be decoded is a DatasetError with its path."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, path: str):
        from PIL import Image

        try:
            with Image.open(path) as image:
                return image.convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DatasetError(f"cannot read the image {path}: {_one_line(error)}") from error


def _remove_empty(download: Path, created: list[Path]) -> None:
    """Takes away the directories that a failed download has made."""
    for path in (download / "raw", download, *created):
        with contextlib.suppress(OSError):
            path.rmdir()


def _scan_folder(root: Path) -> str:
    """Opens each image's header: "L" where all are grey, else "RGB"."""
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS

    for split in (root / "train", root / "test"):
        if not split.is_dir():
            raise DatasetError(f"--data-root must hold train/<class>/* and test/<class>/*, but {split} is missing")

    def is_grey(path: str) -> bool:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # a conversion would clip all but the darkest pixels to white
                    raise DatasetError(f"images must have at most 8 bits a channel, got mode {image.mode} in {path}")
                return image.mode in ("1", "L")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DatasetError(f"cannot read the image {path}: {_one_line(error)}") from error

    paths = [os.path.join(base, file) for base, _, files in os.walk(root, followlinks=True) for file in files]
    paths = [path for path in paths if path.lower().endswith(IMG_EXTENSIONS)]
    with ThreadPoolExecutor() as pool:
        return "L" if all(pool.map(is_grey, paths)) else "RGB"


def _load_all(split: Dataset, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, uint8 (N, C, H, W), and labels, int64 (N,)."""
    labels = torch.as_tensor(split.targets, dtype=torch.int64)
    if hasattr(split, "data"):  # torchvision's arrays: (N, H, W), (N, H, W, C) or (N, C, H, W)
        images = torch.as_tensor(split.data)
        if images.ndim == 4 and images.shape[1:] != shape:
            images = images.permute(0, 3, 1, 2).contiguous()
        return images.view(-1, *shape), labels
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda index: split[index][0], range(len(split))))), labels


def _check_memory(needed: int, device: torch.device) -> None:
    free = _free_memory(device)
    if needed > free:
        raise DatasetError(
            f"the data set takes {needed / 2**30:.1f} GiB on the device {device}, which has {free / 2**30:.1f} free; "
            "-j 4 reads it from disk with 4 workers instead"
        )


def _free_memory(device: torch.device) -> float:
    """Bytes, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, KeyError):
        facts = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(facts["MemAvailable:"])
    return math.inf


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
