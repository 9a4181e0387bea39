"""Data sets: `create(...)` gives the train and test loaders, the class names and the image shape.

With `workers=0` a whole data set lies on the device as normalised tensors and a batch is an index into them;
with `workers=N` the torchvision data set is read by N processes. Both draw the same batches for the same seed and
hold the same pixels, bit for bit.
"""

import contextlib
import io
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, default_collate


class DatasetError(Exception):
    """The data cannot be used as given; the message is one line for the user."""


@dataclass(frozen=True)
class Spec:
    """Facts of a data set. `source` is its class in torchvision.datasets; mean and std are of pixels in [0, 1]."""

    source: str
    num_classes: int | None
    in_channels: int | None
    image_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


SPECS = {
    "mnist": Spec("MNIST", 10, 1, 28, (0.1307,), (0.3081,)),
    "fashion-mnist": Spec("FashionMNIST", 10, 1, 28, (0.2860,), (0.3530,)),
    "cifar10": Spec("CIFAR10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Spec("CIFAR100", 100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": Spec("Digits", 10, 1, 28, (0.3053,), (0.3247,)),
    "folder": Spec("ImageFolder", None, None, None, (0.5,), (0.5,)),
}

# How pixels p in [0, 255] become network input: the mean and std (of p / 255) that are taken off and divided by.
SCALINGS: dict[str, Callable[[Spec], tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "standard": lambda spec: (spec.mean, spec.std),
    "symmetric": lambda spec: ((127.5 / 255,), (128 / 255,)),  # (p - 127.5) / 128
    "unit": lambda spec: ((0.0,), (1.0,)),  # p / 255
}


class Data(NamedTuple):
    train: DataLoader
    test: DataLoader
    train_rows: "BatchRows"
    classes: list[str]
    in_channels: int
    image_size: int


class Digits(Dataset):
    """scikit-learn's 1,797 real digits, 8x8 scaled up to 28x28; a fixed stratified split of 1,437 and 360."""

    classes = [str(digit) for digit in range(10)]

    def __init__(self, root: Path, train: bool, transform: Callable):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        rows = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
        rows = sorted(rows[0] if train else rows[1])
        small = torch.as_tensor(digits.images[rows], dtype=torch.float32).unsqueeze(1)  # (N, 1, 8, 8) in 0..16
        images = F.interpolate(small, size=28, mode="bilinear").mul(255 / 16).round()
        self.data = images.to(torch.uint8).squeeze(1).numpy()
        self.targets = digits.target[rows].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class Normalise:
    """uint8 images (..., C, H, W) to float32: p / 255, less the mean, divided by the std of each channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class TensorBatches(Dataset):
    """Images and labels as tensors; the index is a whole batch of row numbers."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[rows], self.labels[rows]


class BatchRows(Sampler):
    """Row numbers of each batch, in RandomSampler's order when shuffled; of each batch this rank's share.

    Every row of every batch goes to exactly one rank, so that all ranks together take the steps of one process.
    `skip` leaves out the first batches of the next pass: the rest of an interrupted epoch.
    """

    def __init__(
        self, size: int, batch_size: int, shuffle: bool, device: str | torch.device, rank: int = 0, world_size: int = 1
    ):
        self.size, self.batch_size, self.shuffle, self.device = size, batch_size, shuffle, device
        self.rank, self.world_size, self.skip = rank, world_size, 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = list(RandomSampler(range(self.size))) if self.shuffle else range(self.size)
        batches = torch.tensor(rows).to(self.device).split(self.batch_size)
        skip, self.skip = self.skip, 0
        for batch in batches[skip:]:
            yield batch[self.rank :: self.world_size]


def create(
    name: str,
    root: str,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
    *,
    image_size: int = 32,
    scaling: str = "standard",
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """Opens data set `name` below `root`, downloading it where torchvision can.

    `image_size` is for "folder" alone, whose images are resized and cropped to squares of that many pixels.
    Raises DatasetError where the data are missing, broken or too large for the device.
    """
    import torchvision

    spec, root = SPECS[name], Path(root)
    if root.exists() and not root.is_dir():
        raise DatasetError(f"--data-root must be a directory, got the file {root}")
    if name == "folder":
        mode = _scan_folder(root)
        in_channels = len(mode)
    else:
        image_size, in_channels, mode = spec.image_size, spec.in_channels, None
    normalise = Normalise(*SCALINGS[scaling](spec))
    splits = [_open(name, root, train, image_size, mode) for train in (True, False)]
    classes = list(splits[0].classes)
    if splits[1].classes != splits[0].classes:
        odd = sorted(set(splits[0].classes) ^ set(splits[1].classes))
        raise DatasetError(f"train and test in {root} must have the same classes, but only one has {', '.join(odd)}")

    if workers == 0:
        _check_memory(sum(map(len, splits)) * in_channels * image_size**2 * 4, torch.device(device))
    loaders, all_rows = [], []
    for split, shuffle in zip(splits, (True, False), strict=True):
        # Testing has a generator of its own: how often one tests changes nothing in the training.
        common = dict(num_workers=workers, generator=None if shuffle else torch.Generator(),
                      worker_init_fn=_start_worker)  # fmt: skip
        if workers == 0:
            images, labels = _load_all(split)
            dataset = TensorBatches(normalise(images).to(device), labels.to(device))
            rows = BatchRows(len(split), batch_size, shuffle, device, rank, world_size)
            loaders.append(DataLoader(dataset, sampler=rows, batch_size=None, **common))
        else:
            split.transform = torchvision.transforms.Compose([split.transform, normalise])
            rows = BatchRows(len(split), batch_size, shuffle, "cpu", rank, world_size)
            pin = torch.device(device).type == "cuda"
            collate = Collate(in_channels, image_size)
            loaders.append(DataLoader(split, batch_sampler=rows, pin_memory=pin, collate_fn=collate, **common))
        all_rows.append(rows)
    return Data(*loaders, all_rows[0], classes, in_channels, image_size)


class Collate:
    """Items to a batch, which of some rank may be empty; a class, so that workers can be spawned with it."""

    def __init__(self, in_channels: int, image_size: int):
        self.empty = torch.empty(0, in_channels, image_size, image_size), torch.empty(0, dtype=torch.int64)

    def __call__(self, items: list) -> list[torch.Tensor]:
        return default_collate(items) if items else [each.clone() for each in self.empty]


def _start_worker(worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach all processes of a run; the main one heeds them and needs its batch still.

    A SIGTERM ends the worker ten seconds later, for it is also how Python takes leave of workers at its exit. So does
    the main process's death at once: torch looks for it too, but not where that came while the worker was starting.
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


def _open(name: str, root: Path, train: bool, image_size: int, mode: str | None) -> Dataset:
    """The data set of one split, whose items are (uint8 tensor (C, H, W), label)."""
    import torchvision
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    if name == "folder":
        split = root / ("train" if train else "test")
        transform = Compose([Resize(image_size), CenterCrop(image_size), PILToTensor()])
        try:
            dataset = torchvision.datasets.ImageFolder(split, transform, loader=ReadImage(mode))
        except OSError as error:
            raise DatasetError(f"{split} must hold a directory of images for each class: {_one_line(error)}") from error
        if len(dataset.classes) < 2:
            raise DatasetError(f"{split} must hold at least two classes, got {dataset.classes[0]} alone")
        return dataset
    if name == "digits":
        return Digits(root, train, PILToTensor())

    source = getattr(torchvision.datasets, SPECS[name].source)
    created = [path for path in (root, *root.parents) if not path.exists()]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision tells of each mirror that fails
            dataset = source(root, train=train, transform=PILToTensor(), download=True)
    except Exception as error:  # whatever a missing network or a broken file raises in torchvision's readers
        _remove_empty(root / source.__name__, created)
        raise DatasetError(
            f"{name} could be neither read from {root} nor downloaded to it ({_one_line(error)}); "
            "--dataset digits needs no download"
        ) from error
    spec, shape = SPECS[name], tuple(dataset.data.shape)
    labels = torch.as_tensor(dataset.targets)
    if len(shape) < 3 or shape[1:3] != (spec.image_size,) * 2 or len(labels) != shape[0] or shape[0] == 0:
        raise DatasetError(f"{name} in {root} is broken: images of shape {shape}, {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= spec.num_classes:
        raise DatasetError(f"{name} in {root} is broken: labels from {int(labels.min())} to {int(labels.max())}")
    return dataset


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


def _load_all(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, uint8 (N, C, H, W), and labels, int64 (N,)."""
    labels = torch.as_tensor(dataset.targets)
    if hasattr(dataset, "data"):  # torchvision's arrays: (N, H, W) grey or (N, H, W, 3)
        images = torch.as_tensor(dataset.data)
        return (images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()), labels
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda index: dataset[index][0], range(len(dataset))))), labels


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
