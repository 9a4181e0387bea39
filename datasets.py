"""Data sets: `create(...)` returns the batches of each split, the class names and the image shape.

With `workers=0` a whole data set is kept on the device as uint8, and a batch is an index into it;
with `workers=N` N processes read it. Either way a batch is normalised on the device when it is
drawn, and both give the same batches for the same seed, bit for bit.
"""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from engine.batches import ALONE, Augment, Batches, BatchRows, Normalise
from engine.images import MODES, DatasetError, ReadImage, one_line, scan_folder, square
from engine.ranks import Ranks
from engine.sources import FromWorkers, OnDevice, check_memory


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


class Data(NamedTuple):
    train: "Batches"
    test: "Batches"
    unknown: (
        "Batches | None"  # the test images of the classes left out, labelled from len(classes) on
    )
    classes: list[str]  # those trained
    unseen: list[str]  # those left out
    in_channels: int
    image_size: int
    val: "Batches | None" = None

    def facts(self) -> dict:
        """What a checkpoint keeps of the data."""
        return dict(
            classes=self.classes,
            unseen=self.unseen,
            images=self.train.rows.size,
            in_channels=self.in_channels,
            image_size=self.image_size,
        )


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
                with contextlib.redirect_stdout(
                    io.StringIO()
                ):  # torchvision prints a line for each mirror that fails
                    opened.append(source(root, **split, transform=PILToTensor(), download=True))
            except Exception as error:  # whatever a missing network or a broken file raises in torchvision's readers
                _remove_empty(root / name, created)
                raise DatasetError(
                    f"{name} could be neither read from {root} nor downloaded to it ({one_line(error)}); "
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
        raise DatasetError(
            f"{what} is broken: labels from {int(labels.min())} to {int(labels.max())}"
        )


def open_digits(root: Path, image_size: int) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 real digits, 8x8 scaled up to 28x28; a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(
        1
    )  # (N, 1, 8, 8) in 0..16
    images = F.interpolate(small, size=28, mode="bilinear").mul(255 / 16).round().to(torch.uint8)
    splits = []
    for rows in train_test_split(
        range(len(images)), test_size=360, stratify=digits.target, random_state=0
    ):
        labels = torch.as_tensor(digits.target[sorted(rows)])
        splits.append(TensorDataset(images[sorted(rows)], labels))
        splits[-1].targets, splits[-1].classes = labels, [str(digit) for digit in range(10)]
    return tuple(splits)


def open_folder(root: Path, image_size: int) -> tuple[Dataset, Dataset]:
    """train/<class>/* and test/<class>/* of a directory, resized and cropped to squares of image_size pixels."""
    from torchvision.datasets import ImageFolder

    read, transform = ReadImage(scan_folder(root)), square(image_size)
    splits = []
    for split in (root / "train", root / "test"):
        try:
            splits.append(ImageFolder(split, transform, loader=read))
        except OSError as error:
            raise DatasetError(
                f"{split} must hold a directory of images for each class: {one_line(error)}"
            ) from error
        if len(splits[-1].classes) < 2:
            raise DatasetError(
                f"{split} must hold at least two classes, got {splits[-1].classes[0]} alone"
            )
    train, test = splits
    odd = [
        (Path(split.root).name, sorted(set(split.classes) - set(other.classes)))
        for split, other in ((train, test), (test, train))
    ]
    if only := " and ".join(
        f"only {split} has {', '.join(names)}" for split, names in odd if names
    ):
        raise DatasetError(f"train and test in {root} must have the same classes, but {only}")
    return train, test


def open_test_folder(root: Path, image_size: int, classes: list[str], in_channels: int) -> Dataset:
    """test/<class>/* alone, of some of a trained network's classes."""
    from torchvision.datasets import ImageFolder

    try:
        test = ImageFolder(root / "test", square(image_size), loader=ReadImage(MODES[in_channels]))
    except OSError as error:
        raise DatasetError(f"--data-root must hold test/<class>/*: {one_line(error)}") from error
    if odd := sorted(set(test.classes) - set(classes)):
        raise DatasetError(
            f"{root / 'test'} must hold classes of the trained network, but it has {', '.join(odd)}"
        )
    test.samples = [(path, classes.index(test.classes[label])) for path, label in test.samples]
    test.targets, test.classes = [label for _, label in test.samples], classes
    return test


SPECS = {
    "mnist": Spec(from_torchvision("MNIST", 10, (1, 28, 28)), (0.1307,), (0.3081,), flip=False),
    "fashion-mnist": Spec(from_torchvision("FashionMNIST", 10, (1, 28, 28)), (0.2860,), (0.3530,)),
    "cifar10": Spec(
        from_torchvision("CIFAR10", 10, (3, 32, 32)),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Spec(
        from_torchvision("CIFAR100", 100, (3, 32, 32)),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
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


def create(
    name: str,
    root: str | Path,
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
    ranks: Ranks = ALONE,
) -> Data:
    """Opens data set `name` below `root`, downloading it where torchvision can.

    `image_size` is for data sets without a size of their own: "folder". `scaling` is in SCALINGS, or
    the mean and std. `unseen` are the names or numbers of classes to leave out of `train` and `test`;
    their test images are `unknown`. `augment`, which shifts and flips, and `erase` change the
    training images as in Augment. `val_share` of each class's training images, drawn by `seed`,
    become `val`. `trained` are the facts() of a network to be tested, whose training images may be
    missing.
    Raises DatasetError if the data are missing, broken or too large for the device, or too few
    classes are left.
    """
    spec = SPECS[name]
    device = torch.device(device)
    splits = open_splits(spec, Path(root), image_size, unseen, trained)
    if val_share and not trained:
        splits["train"], splits["val"] = split_off(splits["train"], val_share, seed)
    shape = tuple(splits["train"][0][0].shape)
    if not workers:
        check_memory(sum(map(len, splits.values())) * math.prod(shape), device)
    normalise = Normalise(*moments(spec, scaling, shape[0]), device)
    batches = {}
    for split_name, split in splits.items():
        size = batch_size
        if split_name != "train" and device.type == "cuda":  # larger batches, of some 32 MiB
            size = max(batch_size, min(2000, 2**23 // math.prod(shape)))
        shuffle = split_name == "train"
        if workers:
            source = FromWorkers(split, shape, workers, pin=device.type == "cuda")
            rows = BatchRows(len(split), size, shuffle, "cpu", ranks)
        else:
            source = OnDevice(split, shape, device)
            rows = BatchRows(len(split), size, shuffle, device, ranks)
        paths = [path for path, _ in getattr(split, "samples", [])]
        batches[split_name] = Batches(rows, source, normalise, paths)
    if augment or erase:
        batches["train"].augment = Augment(
            seed, shift=augment, flip=augment and spec.flip, erase=erase, ranks=ranks
        )
    return Data(
        train=batches["train"],
        test=batches["test"],
        unknown=batches.get("unknown"),
        classes=list(splits["train"].classes),
        unseen=list(splits["unknown"].classes) if "unknown" in splits else [],
        in_channels=shape[0],
        image_size=shape[1],
        val=batches.get("val"),
    )


def open_splits(
    spec: Spec, root: Path, image_size: int, unseen: Sequence[str], trained: dict | None
) -> dict[str, Dataset]:
    """The splits "train", "test" and, with test images of classes left out, "unknown"."""
    if root.exists() and not root.is_dir():
        raise DatasetError(f"--data-root must be a directory, got the file {root}")
    if trained:  # names: a number may be another class's where some are missing
        unseen = trained.get("unseen", unseen)
    if trained and spec.open_test and not (root / "train").exists():
        classes = [*trained["classes"], *unseen]
        train = test = spec.open_test(root, image_size, classes, trained["in_channels"])
    else:
        train, test = spec.open(root, image_size)
    splits = dict(train=train, test=test)
    if unseen:
        seen, left_out = _divide(train.classes, unseen)
        splits["train"] = of_classes(train, seen)
        splits["test"] = of_classes(test, seen)
        unknown = of_classes(test, left_out, first_label=len(seen))
        if len(unknown):
            splits["unknown"] = unknown
    if not len(splits["test"]):
        raise DatasetError("--data-root must have test images of the trained classes, got none")
    return splits


class Rows(Dataset):
    """Some rows of a data set, with other targets and classes, and with all else that `create` reads."""

    def __init__(
        self, split: Dataset, rows: torch.Tensor, targets: torch.Tensor, classes: Sequence[str]
    ):
        self.split = split
        self.rows = rows.tolist()
        self.targets = targets
        self.classes = classes
        if hasattr(split, "samples"):
            self.samples = [split.samples[row] for row in self.rows]

    @property
    def data(self) -> torch.Tensor:
        """AttributeError where the images are not in memory."""
        return torch.as_tensor(self.split.data)[self.rows]

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
            raise DatasetError(
                f"--val-share {share:g} leaves no training image of class {name}, which has {len(rows)}"
            )
        drawn[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return tuple(
        Rows(split, rows, labels[rows], split.classes)
        for rows in ((~drawn).nonzero().flatten(), drawn.nonzero().flatten())
    )


def _divide(classes: Sequence[str], unseen: Sequence[str]) -> tuple[list[int], list[int]]:
    """The numbers of the classes to train and of those to leave out, which are given by name or else by number."""
    numbers = {str(number): number for number in range(len(classes))}
    numbers |= {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in unseen if name not in numbers]:
        shown = ", ".join(classes[:10]) + (
            f", … ({len(classes)} in all)" if len(classes) > 10 else ""
        )
        raise DatasetError(
            f"--unseen must be names or numbers of classes, got {unknown[0]}; the classes are {shown}"
        )
    left_out = sorted({numbers[name] for name in unseen})
    seen = [number for number in range(len(classes)) if number not in left_out]
    if len(seen) < 2:
        raise DatasetError(
            f"--unseen must leave at least two classes, got {len(left_out)} of {len(classes)}"
        )
    return seen, left_out


def _remove_empty(download: Path, created: list[Path]) -> None:
    """Removes the empty directories of a failed download."""
    for path in (download / "raw", download, *created):
        with contextlib.suppress(OSError):
            path.rmdir()
