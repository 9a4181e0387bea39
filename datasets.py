"""Data sets: `create(...)` returns the batches of each split, the class names and the image shape.

With `workers=0` a whole data set is kept on the device as uint8, and a batch is an index into it; with `workers=N` the
torchvision data set is read by N processes, which live as long as the run. Either way a batch is normalised on the
device when it is drawn, and both give the same batches for the same seed and the same pixels, bit for bit.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset, default_collate

from processes import Ranks


class DatasetError(Exception):
    """The data cannot be used as given; the message is one line for the user."""


@dataclass(frozen=True)
class Spec:
    """How a data set is opened, and the mean and std of its pixels in [0, 1].

    `open` takes the root and an image size, for data sets that have none of their own, and returns the training and the
    test split: data sets of (uint8 image (C, H, W), label), with `targets` (all labels) and `classes` (names).
    `flip`: a mirrored image is of the same class. `open_test` also takes a trained network's classes and channels, and
    returns the test split of a root without training images.
    """

    open: Callable[[Path, int], tuple[Dataset, Dataset]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    open_test: Callable[[Path, int, list[str], int], Dataset] | None = None


class Batch(NamedTuple):
    """This rank's share of a batch, on the device."""

    images: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,)
    size: int  # of the batch, over all ranks


class Data(NamedTuple):
    train: "Batches"
    test: "Batches"
    unknown: "Batches | None"  # the test images of the classes left out, labelled from len(classes) on
    classes: list[str]  # those trained
    unseen: list[str]  # those left out
    in_channels: int
    image_size: int
    val: "Batches | None" = None

    def facts(self) -> dict:
        """What a checkpoint keeps of the data."""
        return dict(classes=self.classes, unseen=self.unseen, images=self.train.rows.size,
                    in_channels=self.in_channels, image_size=self.image_size)  # fmt: skip


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
    """Gives a torchvision data set `targets` and `classes` where it lacks them; DatasetError if it is broken."""
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

    read, transform = ReadImage(_scan_folder(root)), square(image_size)
    splits = []
    for split in (root / "train", root / "test"):
        try:
            splits.append(ImageFolder(split, transform, loader=read))
        except OSError as error:
            raise DatasetError(f"{split} must hold a directory of images for each class: {_one_line(error)}") from error
        if len(splits[-1].classes) < 2:
            raise DatasetError(f"{split} must hold at least two classes, got {splits[-1].classes[0]} alone")
    train, test = splits
    odd = [(Path(split.root).name, sorted(set(split.classes) - set(other.classes)))
           for split, other in ((train, test), (test, train))]  # fmt: skip
    if only := " and ".join(f"only {split} has {', '.join(names)}" for split, names in odd if names):
        raise DatasetError(f"train and test in {root} must have the same classes, but {only}")
    return train, test


def open_test_folder(root: Path, image_size: int, classes: list[str], in_channels: int) -> Dataset:
    """test/<class>/* alone, of some of a trained network's classes."""
    from torchvision.datasets import ImageFolder

    try:
        test = ImageFolder(root / "test", square(image_size), loader=ReadImage(MODES[in_channels]))
    except OSError as error:
        raise DatasetError(f"--data-root must hold test/<class>/*: {_one_line(error)}") from error
    if odd := sorted(set(test.classes) - set(classes)):
        raise DatasetError(f"{root / 'test'} must hold classes of the trained network, but it has {', '.join(odd)}")
    test.samples = [(path, classes.index(test.classes[label])) for path, label in test.samples]
    test.targets, test.classes = [label for _, label in test.samples], classes
    return test


MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


def square(image_size: int) -> Callable:
    """From a PIL image to uint8 (C, image_size, image_size): resized by its shorter side and cropped to the middle."""
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    return Compose([Resize(image_size), CenterCrop(image_size), PILToTensor()])


SPECS = {
    "mnist": Spec(from_torchvision("MNIST", 10, (1, 28, 28)), (0.1307,), (0.3081,), flip=False),
    "fashion-mnist": Spec(from_torchvision("FashionMNIST", 10, (1, 28, 28)), (0.2860,), (0.3530,)),
    "cifar10": Spec(from_torchvision("CIFAR10", 10, (3, 32, 32)), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Spec(
        from_torchvision("CIFAR100", 100, (3, 32, 32)), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "digits": Spec(open_digits, (0.3053,), (0.3247,), flip=False),
    "folder": Spec(open_folder, (0.5,), (0.5,), open_test=open_test_folder),
}

# How pixels p in [0, 255] become network input: the mean to subtract from p / 255 and the std to divide by.
Moments = tuple[tuple[float, ...], tuple[float, ...]]
SCALINGS: dict[str, Callable[[Spec], Moments]] = {
    "standard": lambda spec: (spec.mean, spec.std),
    "symmetric": lambda spec: ((127.5 / 255,), (128 / 255,)),  # (p - 127.5) / 128
    "unit": lambda spec: ((0.0,), (1.0,)),  # p / 255
}


def moments(spec: Spec, scaling: str | Moments, in_channels: int) -> Moments:
    """The mean and std of a scaling, given by name or as they are; for grey images averaged over the channels."""
    values = SCALINGS[scaling](spec) if isinstance(scaling, str) else scaling
    return tuple((sum(each) / len(each),) if in_channels == 1 else each for each in values)


class Normalise:
    """uint8 images (..., C, H, W) to float32: p / 255, less the mean, divided by the std of each channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: str | torch.device = "cpu"):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class Augment:
    """Changes each image of a batch at random by itself: uint8 (B, C, H, W) to the same, channels last.

    The numbers are drawn for the whole batch from a CPU generator of their own: the same on any device, over ranks, and
    after a resume.

    Args:
        shift: move it by up to an eighth of its side in either direction, with reflection at the border.
        flip: mirror it, or not.
        erase: side of a grey square as a share of the image's, rounded to an odd number of pixels. Its center is
            anywhere in the image, so that a part of it may be outside (DeVries and Taylor's cutout, arXiv:1708.04552).
    """

    def __init__(self, seed: int, *, shift: bool = False, flip: bool = False, erase: float = 0.0,
                 ranks: Ranks = Ranks()):  # noqa: B008  (immutable)  # fmt: skip
        self.shift, self.flip, self.erase, self.ranks = shift, flip, erase, ranks
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(rng=self.generator.get_state())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["rng"])

    def __call__(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """`images`: this rank's share of a batch of `size`."""
        side, device = images.shape[-1], images.device
        reach = self.shift * (side // 8)
        shifts = torch.randint(-reach, reach + 1, (size, 2), generator=self.generator)
        flips = torch.randint(1 + self.flip, (size, 1), generator=self.generator)
        erased = torch.randint(side, (size, 2 if self.erase else 0), generator=self.generator)
        draws = self.ranks.share(torch.cat([shifts, flips, erased], dim=1)).to(device, non_blocking=True)
        down, right, flipped, *center = draws.unsqueeze(1).unbind(2)  # (B, 1) each
        along = torch.arange(side, device=device)
        rows, columns = ((side - 1 - (side - 1 - (along + shift).abs()).abs()) for shift in (down, right))  # (B, side)
        columns = torch.where(flipped.bool(), columns.flip(1), columns)
        index = torch.arange(len(images), device=device).view(-1, 1, 1)
        changed = images[index, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
        if self.erase:
            high, wide = ((along - middle).abs() < self.erase * side / 2 for middle in center)  # (B, side)
            changed.masked_fill_((high.unsqueeze(2) & wide.unsqueeze(1)).unsqueeze(1), 128)
        return changed


class BatchRows:
    """This rank's row numbers of each batch; shuffled ones are in a DataLoader's order."""

    def __init__(self, size: int, batch_size: int, shuffle: bool, device: str | torch.device, ranks: Ranks):
        self.size, self.batch_size, self.shuffle, self.device, self.ranks = size, batch_size, shuffle, device, ranks

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.after(0)

    def after(self, done: int, last: int | None = None) -> Iterator[torch.Tensor]:
        """The batches of a pass from `done` up to `last`."""
        rows = torch.arange(self.size)
        if self.shuffle:  # tests draw nothing, so that --eval-freq does not change the training
            torch.empty((), dtype=torch.int64).random_()  # a DataLoader's seed for its workers
            seed = torch.empty((), dtype=torch.int64).random_().item()
            rows = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        return map(self.ranks.share, rows.to(self.device).split(self.batch_size)[done:last])


# From the row numbers of each batch to its images, uint8 (B, C, H, W), and labels (B,).
Load = Callable[[Iterable[torch.Tensor]], Iterable[tuple[torch.Tensor, torch.Tensor]]]


class Batches:
    """All batches of a split, to be iterated over once an epoch; `augment` may be set to change their images."""

    def __init__(self, rows: BatchRows, load: Load, normalise: Normalise, device: str | torch.device):
        self.rows, self.load, self.normalise, self.device = rows, load, normalise, device
        self.augment: Augment | None = None
        self.paths: list[str] = []  # of the images' files, where each has one

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        return self.after(0)

    def after(self, done: int, last: int | None = None) -> Iterator[Batch]:
        """The batches of a pass from `done` up to `last`: the rest of an interrupted pass, from its random state.

        That state moves on as in a whole pass, even if no batch is left.
        """
        size, batch_size = self.rows.size, self.rows.batch_size
        for number, (images, labels) in enumerate(self.load(self.rows.after(done, last)), done):
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            joined = min(batch_size, size - number * batch_size)
            images = self.augment(images, joined) if self.augment else images
            yield Batch(self.normalise(images), labels, joined)

    def thumbnails(self, rows: Sequence[int], largest: int = 32) -> np.ndarray:
        """The images of these rows as in the data set, uint8 (N, C, H, W), with at most `largest` pixels a side."""
        kept = []
        for images, _ in self.load(torch.as_tensor(rows).split(256)):
            size = [min(side, largest) for side in images.shape[2:]]
            if list(images.shape[2:]) != size:
                images = F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)
            kept.append(images.cpu())
        return torch.cat(kept).numpy()


def in_memory(split: Dataset, shape: tuple[int, int, int], device: str | torch.device) -> Load:
    """Loads batches of a split that is kept on the device."""
    images, labels = (each.to(device) for each in _load_all(split, shape))
    return lambda batches: ((images[rows], labels[rows]) for rows in batches)


def by_workers(splits: Sequence[Dataset], workers: int, shape: tuple[int, int, int], pin: bool) -> list[Load]:
    """Load batches of each split, by worker processes that live as long as the run and read all.

    They are forked here, before the main process has threads, with which a fork may hang.
    """
    batches = []  # of the next pass
    loader = DataLoader(
        ConcatDataset(splits), batch_sampler=batches, num_workers=workers, persistent_workers=True, pin_memory=pin,
        collate_fn=Collate(shape), worker_init_fn=_start_worker, generator=torch.Generator(),
    )  # fmt: skip
    _start(loader)

    def load(first: int, rows: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches[:] = [(first + each).tolist() for each in rows]  # sending a tensor would start a thread
        try:
            yield from loader
        except DatasetError as error:  # its traceback refers to torch's frames and so keeps the workers
            error.args = (str(error).strip().rpartition("DatasetError: ")[2],)  # without the worker's traceback
            raise error.with_traceback(None) from None

    firsts = itertools.accumulate(map(len, splits[:-1]), initial=0)
    return [functools.partial(load, first) for first in firsts]


def create(
    name: str,
    root: str,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
    *,
    image_size: int = 32,
    scaling: str | Moments = "standard",
    unseen: Sequence[str] = (),
    augment: bool = False,
    erase: float = 0.0,
    val_share: float = 0.0,
    seed: int = 1,
    trained: dict | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> Data:
    """Opens data set `name` below `root`, downloading it where torchvision can.

    `image_size` is for data sets without a size of their own: "folder". `scaling` is in SCALINGS, or the mean and std.
    `unseen` are the names or numbers of classes to leave out of `train` and `test`; their test images are `unknown`.
    `augment`, which shifts and flips, and `erase` change the training images as in Augment. `val_share` of each class's
    training images, drawn by `seed`, become `val`. `trained` are the facts() of a network to be tested, whose training
    images may be missing.
    Raises DatasetError if the data are missing, broken or too large for the device, or too few classes are left.
    """
    spec, root = SPECS[name], Path(root)
    if root.exists() and not root.is_dir():
        raise DatasetError(f"--data-root must be a directory, got the file {root}")
    unseen = (trained or {}).get("unseen", unseen)  # names: a number may be another class's where some are missing
    if spec.open_test and "in_channels" in (trained or {}) and not (root / "train").exists():
        train = test = spec.open_test(root, image_size, [*trained["classes"], *unseen], trained["in_channels"])
    else:
        train, test = spec.open(root, image_size)
    splits = dict(train=train, test=test)
    if unseen:
        seen, unseen = _divide(train.classes, unseen)
        splits = dict(train=of_classes(train, seen), test=of_classes(test, seen),
                      unknown=of_classes(test, unseen, first_label=len(seen)))  # fmt: skip
    if not len(splits["test"]):
        raise DatasetError("--data-root must have test images of the trained classes, got none")
    if unseen and not len(splits["unknown"]):
        del splits["unknown"]
    if val_share and not trained:
        splits["train"], splits["val"] = split_off(splits["train"], val_share, seed)
    shape, cuda = tuple(train[0][0].shape), torch.device(device).type == "cuda"
    if workers == 0:
        _check_memory(sum(map(len, splits.values())) * math.prod(shape), torch.device(device))
        loads = [in_memory(split, shape, device) for split in splits.values()]
    else:
        loads = by_workers(list(splits.values()), workers, shape, pin=cuda)
    # A GPU tests in larger batches, as far as they take some 32 MiB.
    test_size = max(batch_size, min(2000, 2**23 // math.prod(shape))) if cuda else batch_size
    normalise, batches = Normalise(*moments(spec, scaling, shape[0]), device), {}
    for (name, split), load in zip(splits.items(), loads, strict=True):
        size = batch_size if name == "train" else test_size
        rows = BatchRows(len(split), size, name == "train", "cpu" if workers else device, ranks)
        batches[name] = Batches(rows, load, normalise, device)
        batches[name].paths = [path for path, _ in getattr(split, "samples", [])]
    if augment or erase:
        batches["train"].augment = Augment(seed, shift=augment, flip=augment and spec.flip, erase=erase, ranks=ranks)
    return Data(
        **{name: batches.get(name) for name in ("train", "test", "unknown", "val")},
        classes=list(splits["train"].classes),
        unseen=list(splits["unknown"].classes) if "unknown" in splits else [],
        in_channels=shape[0],
        image_size=shape[1],
    )


class Rows(Dataset):
    """Some rows of a data set, with other targets and classes, and with all else that `create` reads."""

    def __init__(self, split: Dataset, rows: torch.Tensor, targets: torch.Tensor, classes: Sequence[str]):
        self.split, self.rows, self.targets, self.classes = split, rows.tolist(), targets, classes
        if hasattr(split, "data"):
            self.data = torch.as_tensor(split.data)[rows]
        if hasattr(split, "samples"):
            self.samples = [split.samples[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.split[self.rows[index]][0], int(self.targets[index])


def of_classes(split: Dataset, numbers: list[int], first_label: int = 0) -> Rows:
    """The images of some classes of a split: these classes' numbers become labels first_label, first_label + 1, …"""
    labels = torch.full((len(split.classes),), -1)
    labels[numbers] = torch.arange(first_label, first_label + len(numbers))
    targets = labels[torch.as_tensor(split.targets)]
    rows = (targets >= 0).nonzero().flatten()
    return Rows(split, rows, targets[rows], [split.classes[number] for number in numbers])


def split_off(split: Dataset, share: float, seed: int) -> tuple[Rows, Rows]:
    """Splits off a share of each class, at least one image, drawn by `seed`; returns the rest and the share."""
    labels, generator = torch.as_tensor(split.targets), torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(split.classes):
        rows = (labels == label).nonzero().flatten()
        count = max(1, round(share * len(rows)))
        if count >= len(rows):
            raise DatasetError(f"--val-share {share:g} leaves no training image of class {name}, which has {len(rows)}")
        drawn[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return tuple(Rows(split, rows, labels[rows], split.classes)
                 for rows in ((~drawn).nonzero().flatten(), drawn.nonzero().flatten()))  # fmt: skip


def _divide(classes: Sequence[str], unseen: Sequence[str]) -> tuple[list[int], list[int]]:
    """The numbers of the classes to train and of those to leave out, which are given by name or else by number."""
    numbers = {str(number): number for number in range(len(classes))}
    numbers |= {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in unseen if name not in numbers]:
        shown = ", ".join(classes[:10]) + (f", … ({len(classes)} in all)" if len(classes) > 10 else "")
        raise DatasetError(f"--unseen must be names or numbers of classes, got {unknown[0]}; the classes are {shown}")
    left_out = sorted({numbers[name] for name in unseen})
    seen = [number for number in range(len(classes)) if number not in left_out]
    if len(seen) < 2:
        raise DatasetError(f"--unseen must leave at least two classes, got {len(left_out)} of {len(classes)}")
    return seen, left_out


class Collate:
    """Joins items to a batch, which is empty for some ranks; a class, so that spawned workers can load it."""

    def __init__(self, shape: tuple[int, ...]):
        self.empty = torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)

    def __call__(self, items: list) -> list[torch.Tensor]:
        return default_collate(items) if items else [each.clone() for each in self.empty]


STOPS = {signal.SIGINT, signal.SIGTERM}


def _start(loader: DataLoader) -> None:
    """Starts the workers with signals blocked, until _start_worker has installed their handlers."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        iter(loader)
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(worker: int) -> None:
    """Workers ignore SIGINT and put off SIGTERM, so that the main process can finish its current batch.

    Ctrl-C and a cluster's SIGTERM reach all processes of a run. A SIGTERM ends the worker ten seconds later, since
    Python also sends it to workers at its own exit. The death of the main process ends a worker at once: torch watches
    for that too, but not while the worker is starting.
    """
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class ReadImage:
    """An image file as PIL image of `mode`, "L" or "RGB": what an image viewer shows of it.

    Turned as its EXIF orientation says, transparency blended on white, of an animation the first frame, CMYK and other
    colour models converted by Pillow, without colour profiles. More than 8 bits a channel are refused where Pillow
    would clip them (grey; of 16-bit colours it takes the upper 8 bits).
    Raises DatasetError, with the path, where the file cannot be decoded or is refused.
    """

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, path: str):
        from PIL import Image, ImageOps

        with _opened(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # whatever broken EXIF data raise; viewers ignore these too
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.upper().endswith("A") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(self.mode)


@contextlib.contextmanager
def _opened(path: str):
    """The image, opened; DatasetError if it or what is done with it in the context fails."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # a conversion would clip all but the darkest pixels to white
                raise DatasetError(f"images must have at most 8 bits a channel, got mode {image.mode} in {path}")
            yield image
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file raises in Pillow's readers
        raise DatasetError(f"cannot read the image {path}: {_one_line(error)}") from error


def _remove_empty(download: Path, created: list[Path]) -> None:
    """Removes the empty directories of a failed download."""
    for path in (download / "raw", download, *created):
        with contextlib.suppress(OSError):
            path.rmdir()


def _scan_folder(root: Path) -> str:
    """Opens each image's header, which refuses what ReadImage does: "L" where all are grey, else "RGB"."""

    def is_grey(path: str) -> bool:
        with _opened(path) as image:
            return image.mode in ("1", "L")

    paths = [path for split in ("train", "test") for path in _image_paths(root / split)]
    with ThreadPoolExecutor() as pool:
        return "L" if all(list(pool.map(is_grey, paths))) else "RGB"


def _image_paths(split: Path) -> Iterator[str]:
    """The images below the class directories of a split, as ImageFolder finds them: through symbolic links.

    Raises DatasetError if links form a circle, in which ImageFolder would find the same images again and again.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not split.is_dir():
        raise DatasetError(f"--data-root must hold train/<class>/* and test/<class>/*, but {split} is missing")
    for each in (each for each in split.iterdir() if each.is_dir()):
        for base, _, files in os.walk(each, followlinks=True):
            above = Path(base).absolute().parents
            if os.path.islink(base) and any(os.path.samefile(base, parent) for parent in above):
                raise DatasetError(f"symbolic links below {split} must not form a circle: {base} links to one above it")
            yield from (os.path.join(base, file) for file in files if file.lower().endswith(IMG_EXTENSIONS))


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
    """In bytes; infinite if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, KeyError):
        facts = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(facts["MemAvailable:"])
    return math.inf


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
