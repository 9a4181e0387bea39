"""Data sets: `create(...)` returns the batches of each split, the class names and the image shape.

With `workers=0` a whole data set is kept on the device as uint8, and a batch is an index into it;
with `workers=N` N processes read it. Either way a batch is normalised on the device when it is
drawn, and both give the same batches for the same seed, bit for bit.
"""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from engine.batches import ALONE, Augment, Batches, BatchRows, Normalise
from engine.images import (
    MODES,
    DatasetError,
    Found,
    ReadImage,
    find_images,
    height_and_width,
    in_threads,
    is_grey,
    one_line,
    some,
)
from engine.pair_lists import Pairs as Pairs
from engine.pair_lists import read_pairs as read_pairs
from engine.ranks import Ranks
from engine.sources import FromWorkers, OnDevice, check_memory
from engine.splits import Folder, of_classes, split_off

Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Spec:
    """How a data set is opened, and the mean and std of its pixels in [0, 1].

    `open` takes the root and an image size, for data sets that have none of their own, and returns
    the training and the test split, as in engine/splits.py. Classes that only the test has are
    unknown ones; with `new_classes` all of them are. `flip`: a mirrored image is of the same
    class. `open_test` also takes a trained network's channels, and returns the test split alone.
    """

    open: Callable[[Path, Size], tuple[Dataset, Dataset]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    new_classes: bool = False
    open_test: Callable[[Path, Size, int], Dataset] | None = None


class Data(NamedTuple):
    """The batches of each split (None: there is no such image), and what they are of."""

    train: Batches | None  # None for a test alone
    test: Batches | None  # of trained classes
    unknown: Batches | None  # test images of other classes, labelled from len(classes) on
    val: Batches | None
    classes: list[str]  # those trained
    unseen: list[str]  # those of `unknown`
    in_channels: int
    image_size: Size
    read: list[str]

    def facts(self) -> dict:
        """What a checkpoint keeps of the data."""
        return dict(
            classes=self.classes,
            unseen=self.unseen,
            images=self.train.rows.size if self.train else 0,
            in_channels=self.in_channels,
            image_size=list(self.image_size),
        )

    def lines(self) -> list[str]:
        """What was read and what was left out, for the log."""
        return self.read

    @property
    def test_images(self) -> int:
        return sum(split.rows.size for split in (self.test, self.unknown) if split)


# --------------------------------------------------------------------------------------- opening


def download(name: str, root: Path, **split) -> Dataset:
    """A split of that class in torchvision.datasets, downloaded where its files are missing."""
    import torchvision
    from torchvision.transforms import PILToTensor

    created = [path for path in (root, *root.parents) if not path.exists()]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a line for each mirror that fails
            source = getattr(torchvision.datasets, name)
            return source(root, **split, transform=PILToTensor(), download=True)
    except Exception as error:  # whatever a missing network or a broken file raises
        for path in (root / name / "raw", root / name, root / "omniglot-py", *created):
            with contextlib.suppress(OSError):  # which is not empty
                path.rmdir()
        raise DatasetError(
            f"{name} could be neither read from {root} nor downloaded to it ({one_line(error)}); "
            "--dataset digits needs no download"
        ) from error


def from_torchvision(
    name: str,
    num_classes: int,
    shape: tuple[int, int, int],
    splits: tuple[dict, dict] = (dict(train=True), dict(train=False)),
):
    """Opens the class of that name in torchvision.datasets, whose images are of `shape` (C, H, W).

    `splits` are the arguments that choose the training and the test split.
    """

    def open_splits(root: Path, image_size: Size) -> tuple[Dataset, Dataset]:
        opened = []
        for options in splits:
            split = download(name, root, **options)
            if not hasattr(split, "targets"):
                split.targets = split.labels
            if not hasattr(split, "classes"):
                split.classes = [str(label) for label in range(num_classes)]
            images, labels = split.data.shape, torch.as_tensor(split.targets)
            fits = len(labels) == images[0] and sorted((*images[1:], 1)[:3]) == sorted(shape)
            if not fits or labels.max() >= num_classes:
                raise DatasetError(
                    f"{name} in {root} is broken: images of shape {tuple(images)}, {len(labels)} "
                    f"labels up to {labels.max()}"
                )
            opened.append(split)
        return tuple(opened)

    return open_splits


def open_digits(root: Path, image_size: Size) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 real digits, 8x8 scaled up to 28x28; a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1)  # 0..16
    images = F.interpolate(small, size=28, mode="bilinear").mul(255 / 16).round().to(torch.uint8)
    every = range(len(images))
    splits = []
    for rows in train_test_split(every, test_size=360, stratify=digits.target, random_state=0):
        labels = torch.as_tensor(digits.target[sorted(rows)])
        split = TensorDataset(images[sorted(rows)], labels)
        split.targets = labels
        split.classes = [str(digit) for digit in range(10)]
        splits.append(split)
    return tuple(splits)


def open_folder(root: Path, image_size: Size) -> tuple[Dataset, Dataset]:
    """train/<class>/* and test/<class>/* of a directory; classes may be in one of them alone."""
    train = _find(root / "train")
    test = _find(root / "test")
    empty = [name for name, paths in train.classes.items() if not paths]
    if empty or len(train.classes) < 2:
        raise DatasetError(
            f"{root / 'train'} must hold at least two classes and images of each, got "
            f"{'none of ' if empty else ''}{some(empty or list(train.classes))}"
            f"{_counted(train.left_out)}"
        )
    grey = in_threads(is_grey, train.paths() + test.paths(), "Reading headers")
    read = ReadImage("L" if all(grey) else "RGB", image_size)
    return Folder(train, read), Folder(test, read)


def open_test_folder(root: Path, image_size: Size, in_channels: int) -> Dataset:
    """test/<class>/* alone, of any classes."""
    return Folder(_find(root / "test"), ReadImage(MODES[in_channels], image_size))


def _find(split: Path) -> Found:
    if not split.is_dir():
        raise DatasetError(
            f"--data-root must hold train/<class>/* and test/<class>/*, but {split} is missing"
        )
    found = find_images(split)
    if not found.paths():
        raise DatasetError(
            f"{split} must hold a directory of images for each class, but there are no images"
            f"{_counted(found.left_out)}"
        )
    return found


def _counted(left_out: Counter) -> str:
    counts = [f"{count:,} {what}" for what, count in left_out.most_common() if count]
    return f" (left out: {some(counts)})" if counts else ""


def open_omniglot(root: Path, image_size: Size) -> tuple[Dataset, Dataset]:
    """Characters of 30 alphabets for the training and of 20 others for the test.

    A class is a character, with its alphabet in the name: "Greek/character01".
    """
    read = ReadImage("L", image_size)
    splits = []
    for background in (True, False):
        downloaded = download("Omniglot", root, background=background)
        splits.append(Folder(find_images(Path(downloaded.target_folder), levels=2), read))
    return tuple(splits)


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
    "omniglot": Spec(open_omniglot, (0.92,), (0.22,), flip=False, new_classes=True),
    "digits": Spec(open_digits, (0.3053,), (0.3247,), flip=False),
    "folder": Spec(open_folder, (0.5,), (0.5,), open_test=open_test_folder),
}


# How pixels p become network input: the mean to subtract from p / 255, the std to divide by.
Moments = tuple[tuple[float, ...], tuple[float, ...]]
SCALINGS: dict[str, Callable[[Spec], Moments]] = {
    "standard": lambda spec: (spec.mean, spec.std),
    "symmetric": lambda spec: ((127.5 / 255,), (128 / 255,)),  # (p - 127.5) / 128
    "unit": lambda spec: ((0.0,), (1.0,)),  # p / 255
}


def moments(spec: Spec, scaling: str | Moments, in_channels: int) -> Moments:
    """Those of a scaling, by name or as they are; for grey images averaged over the channels."""
    values = SCALINGS[scaling](spec) if isinstance(scaling, str) else scaling
    return tuple((sum(each) / len(each),) if in_channels == 1 else each for each in values)


def create(
    name: str,
    root: str | Path,
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
    *,
    image_size: int | Sequence[int] = 32,
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

    `image_size`, a number or (H, W), is for data sets without a size of their own; `scaling` is in
    SCALINGS, or the mean and std. `unseen` are names or numbers of classes that are not trained;
    their test images are `unknown`, as are those of classes that `train` lacks. `augment` (shifts
    and flips) and `erase` are Augment's. `val_share` of each class's training images, drawn by
    `seed`, become `val`. `trained` are the facts() of a network to be tested: no training images.
    Raises DatasetError if the data are missing, broken or too large for the device.
    """
    spec = SPECS[name]
    device = torch.device(device)
    size = height_and_width(image_size)
    splits, classes, left_out = open_splits(spec, Path(root), size, unseen, trained)
    if val_share and not trained:
        splits["train"], splits["val"] = split_off(splits["train"], val_share, seed)
    shape = tuple(next(iter(splits.values()))[0][0].shape)
    if not workers:
        check_memory(sum(map(len, splits.values())) * math.prod(shape), device)
    normalise = Normalise(*moments(spec, scaling, shape[0]), device)
    test_size = batch_size
    if device.type == "cuda":  # which tests some 32 MiB at a time
        test_size = max(batch_size, min(2000, 2**23 // math.prod(shape)))
    batches = {}
    for key, split in splits.items():
        source = _source(split, shape, workers, device)
        size = batch_size if key == "train" else test_size
        where = "cpu" if workers else device
        rows = BatchRows(len(split), size, key == "train", where, ranks)
        paths = [path for path, _ in getattr(split, "samples", [])]
        batches[key] = Batches(rows, source, normalise, paths)
    if "train" in batches and (augment or erase):
        flip = augment and spec.flip
        batches["train"].augment = Augment(seed, shift=augment, flip=flip, erase=erase, ranks=ranks)
    return Data(
        **{key: batches.get(key) for key in ("train", "test", "unknown", "val")},
        classes=classes,
        unseen=list(splits["unknown"].classes) if "unknown" in splits else [],
        in_channels=shape[0],
        image_size=shape[1:],
        read=describe(splits, classes, left_out),
    )


def _source(split: Dataset, shape: tuple, workers: int, device: torch.device):
    if workers:
        return FromWorkers(split, shape, workers, pin=device.type == "cuda")
    return OnDevice(split, shape, device)


def open_splits(
    spec: Spec, root: Path, image_size: Size, unseen: Sequence[str], trained: dict | None
) -> tuple[dict[str, Dataset], list[str], dict[str, str]]:
    """Those of "train", "test", "unknown" with images; trained classes; what else there was."""
    if root.exists() and not root.is_dir():
        raise DatasetError(f"--data-root must be a directory, got the file {root}")
    train = None
    if trained and spec.open_test:
        test = spec.open_test(root, image_size, trained["in_channels"])
    else:
        train, test = spec.open(root, image_size)
    classes = trained["classes"] if trained else _trained_classes(train, test, unseen)
    others = [name for name in test.classes if name not in set(classes)]
    splits = dict(test=of_classes(test, classes), unknown=of_classes(test, others, len(classes)))
    if not trained:
        splits = dict(train=of_classes(train, classes)) | splits
    splits = {key: split for key, split in splits.items() if len(split)}
    if "test" not in splits and torch.as_tensor(test.targets).bincount().max() < 2:
        raise DatasetError(
            "the test must have images of trained classes or two images of another one, but "
            f"{root} has one image of each"
        )
    left_out = {
        name: _counted(getattr(split, "left_out", Counter()))
        for name, split in dict(train=train, test=test).items()
    }
    return splits, list(classes), left_out


def _trained_classes(train: Dataset, test: Dataset, unseen: Sequence[str]) -> list[str]:
    """Those of `train` without the ones to leave out, which are given by name or else by number."""
    names = [*train.classes, *test.classes]
    left_out = set()
    for name in unseen:
        if name not in names and name.isdecimal() and int(name) < len(train.classes):
            name = train.classes[int(name)]
        if name not in names:
            raise DatasetError(
                f"--unseen must be names or numbers of classes, got {name}; the classes are "
                f"{some(train.classes)}"
            )
        left_out.add(name)
    classes = [name for name in train.classes if name not in left_out]
    if len(classes) < 2:
        raise DatasetError(
            f"--unseen must leave at least two classes, got {len(classes)} of {len(train.classes)}"
        )
    return classes


def describe(
    splits: dict[str, Dataset], classes: Sequence[str], left_out: dict[str, str]
) -> list[str]:
    """A line for each split: how many images of which classes."""
    lines = []
    for key, split in splits.items():
        names = [*classes, *split.classes] if key == "unknown" else split.classes
        counts = Counter(names[label] for label in torch.as_tensor(split.targets).tolist())
        each = some([f"{name} {count:,}" for name, count in counts.items()])
        lines.append(f"{key}: {len(split):,} images of {len(counts):,} classes: {each}")
    return lines + [f"{key}{counted}" for key, counted in left_out.items() if counted]


def check_save_dir(root: str | Path, save_dir: str | Path) -> None:
    """Raises DatasetError if the files of a run would become images of the data."""
    target = Path(save_dir).resolve()
    for split in (Path(root, "train").resolve(), Path(root, "test").resolve()):
        if split.is_dir() and split in (target, target / split.name, *target.parents):
            raise DatasetError(
                f"--save-dir must not write into the images of --data-root, got {save_dir}"
            )
