"""Data sets: `create(...)` returns the batches of each split, the class names and the image shape.

With `workers=0` a whole data set is kept on the device as uint8, and a batch is an index into it;
with `workers=N` N processes read image files. Both give the same batches, bit for bit.
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
    ReadImage,
    height_and_width,
    in_threads,
    is_grey,
    one_line,
    some,
)
from engine.pair_lists import Pairs as Pairs
from engine.pair_lists import read_pairs as read_pairs
from engine.ranks import Ranks
from engine.sources import check_memory, open_source
from engine.splits import Folder, in_memory, of_classes, split_off

Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Spec:
    """How a data set is opened, and the mean and std of its pixels in [0, 1].

    `open` takes the root and an image size, for data sets that have none of their own, and returns
    the training and the test split, as in engine/splits.py; `open_test`, the test split alone, for
    a network of so many channels. `flip`: a mirrored image is of the same class.
    """

    open: Callable[[Path, Size], tuple[Dataset, Dataset]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
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


def download(name: str, root: Path, **split) -> Dataset:
    """A split of that class in torchvision.datasets, downloaded where its files are missing."""
    import torchvision

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a line for each mirror that fails
            return getattr(torchvision.datasets, name)(root, **split, download=True)
    except Exception as error:  # whatever a missing network or a broken file raises
        raise DatasetError(
            f"{name} could be neither read from {root} nor downloaded ({one_line(error)}); "
            "--dataset digits needs no download"
        ) from error


def from_torchvision(
    name: str,
    num_classes: int,
    shape: tuple[int, int, int],
    splits: tuple[dict, dict] = (dict(train=True), dict(train=False)),
):
    """Opens the class of that name in torchvision.datasets, of images (C, H, W), by `splits`."""

    def open_split(root: Path, options: dict) -> TensorDataset:
        split = download(name, root, **options)
        images = torch.as_tensor(split.data)
        if images.shape[-1] == shape[0]:  # (N, H, W, C)
            images = images.movedim(-1, 1)
        labels = torch.as_tensor(split.targets if hasattr(split, "targets") else split.labels)
        classes = getattr(split, "classes", map(str, range(num_classes)))
        return in_memory(images.reshape(-1, *shape), labels, classes)

    def open_splits(root: Path, image_size: Size) -> tuple[TensorDataset, TensorDataset]:
        return tuple(open_split(root, options) for options in splits)

    return open_splits


def open_digits(root: Path, image_size: Size) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 real digits, 8x8 scaled up to 28x28; a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = torch.as_tensor(digits.target)
    small = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1)  # 0..16
    images = F.interpolate(small, size=28, mode="bilinear").mul(255 / 16).round().to(torch.uint8)
    parts = train_test_split(range(len(images)), test_size=360, stratify=labels, random_state=0)
    classes = [str(digit) for digit in range(10)]
    return tuple(in_memory(images[sorted(rows)], labels[sorted(rows)], classes) for rows in parts)


def open_folder(root: Path, image_size: Size) -> tuple[Folder, Folder]:
    """train/<class>/* and test/<class>/* of a directory; classes may be in one of them alone."""
    train = Folder(root / "train")
    test = Folder(root / "test")
    if train.empty or len(train.classes) < 2:
        got = f"none of {some(train.empty)}" if train.empty else some(train.classes)
        raise DatasetError(
            f"{root / 'train'} must hold two classes and images of each, got {got}{train.left_out}"
        )
    grey = in_threads(is_grey, train.paths + test.paths, "Reading headers")
    train.read = ReadImage("L" if all(grey) else "RGB", image_size)
    test.read = train.read
    return train, test


def open_test_folder(root: Path, image_size: Size, in_channels: int) -> Folder:
    """test/<class>/* alone, of any classes."""
    return Folder(root / "test", ReadImage(MODES[in_channels], image_size))


def open_omniglot(root: Path, image_size: Size) -> tuple[Folder, Folder]:
    """Characters of 30 alphabets for the training, as "Greek/character01", of 20 for the test."""
    read = ReadImage("L", image_size)
    splits = [download("Omniglot", root, background=background) for background in (True, False)]
    return tuple(Folder(Path(split.target_folder), read, levels=2) for split in splits)


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
    "omniglot": Spec(open_omniglot, (0.92,), (0.22,), flip=False),
    "digits": Spec(open_digits, (0.3053,), (0.3247,), flip=False),
    "folder": Spec(open_folder, (0.5,), (0.5,), open_test=open_test_folder),
}


# How pixels p become network input: the mean to subtract from p / 255, the std to divide by.
Moments = tuple[tuple[float, ...], tuple[float, ...]]
SCALINGS: dict[str, Moments | None] = {
    "standard": None,  # those of the data set
    "symmetric": ((127.5 / 255,), (128 / 255,)),  # (p - 127.5) / 128
    "unit": ((0.0,), (1.0,)),  # p / 255
}


def moments(spec: Spec, scaling: str | Moments, in_channels: int) -> Moments:
    """Those of a scaling, by name or as they are; for grey images averaged over the channels."""
    values = SCALINGS[scaling] if isinstance(scaling, str) else scaling
    values = values or (spec.mean, spec.std)
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
    SCALINGS, or the mean and std. Classes that `unseen` names or numbers are not trained; their
    test images are `unknown`, as are those of classes that `train` lacks. `augment` (shifts and
    flips) and `erase` are Augment's. `val_share` of each class's training images, drawn by `seed`,
    become `val`. `trained`: facts() of a network to be tested, without training images.
    Raises DatasetError if the data are missing, broken or too large for the device.
    """
    spec = SPECS[name]
    device = torch.device(device)
    size = height_and_width(image_size)
    parts, classes, unseen, lines = _open_parts(spec, Path(root), size, unseen, trained)
    if val_share and not trained:
        parts["train"], parts["val"] = split_off(parts["train"], classes, val_share, seed)
    shape = tuple(next(iter(parts.values()))[0][0].shape)
    if not workers:
        check_memory(sum(map(len, parts.values())) * math.prod(shape), device)
    normalise = Normalise(*moments(spec, scaling, shape[0]), device)
    batches = dict.fromkeys(("train", "test", "unknown", "val"))
    for key, part in parts.items():
        size = batch_size
        if key != "train" and device.type == "cuda":  # which tests some 32 MiB at a time
            size = max(batch_size, min(2000, 2**23 // math.prod(shape)))
        source = open_source(part, shape, workers, device)
        rows = BatchRows(len(part), size, key == "train", source.device, ranks)
        batches[key] = Batches(rows, source, normalise, getattr(part, "paths", []))
    if batches["train"] and (augment or erase):
        flip = augment and spec.flip
        batches["train"].augment = Augment(seed, augment, flip, erase, ranks)
    return Data(*batches.values(), classes, unseen, shape[0], shape[1:], lines)


def _open_parts(
    spec: Spec, root: Path, image_size: Size, unseen: Sequence[str], trained: dict | None
) -> tuple[dict[str, Dataset], list[str], list[str], list[str]]:
    """Those of "train", "test" and "unknown" with images; trained and other classes; the log."""
    train = None
    if trained and spec.open_test:
        test = spec.open_test(root, image_size, trained["in_channels"])
    else:
        train, test = spec.open(root, image_size)
    classes = trained["classes"] if trained else _trained_classes(train, test, unseen)
    known = set(classes)
    others = [name for name in test.classes if name not in known]
    parts = {} if trained else dict(train=of_classes(train, classes))
    parts["test"] = of_classes(test, classes)
    parts["unknown"] = of_classes(test, others, len(classes))
    parts = {key: part for key, part in parts.items() if len(part)}
    if "test" not in parts and parts["unknown"].targets.bincount().max() < 2:
        raise DatasetError(
            "the test must have images of trained classes or two images of another one, got one "
            f"of {some(others)}"
        )
    lines = describe(parts, [*classes, *others], dict(train=train, test=test))
    return parts, classes, others, lines


def _trained_classes(train: Dataset, test: Dataset, unseen: Sequence[str]) -> list[str]:
    """Those of `train` without the ones to leave out, which are given by name or else by number."""
    names = {*train.classes, *test.classes}
    numbers = {str(number): name for number, name in enumerate(train.classes)}
    left_out = [name if name in names else numbers.get(name, name) for name in unseen]
    classes = [name for name in train.classes if name not in left_out]
    strangers = [name for name in left_out if name not in names]
    if strangers:
        raise DatasetError(
            f"--unseen must be of the classes {some(train.classes)} or their numbers, got "
            f"{some(strangers)}"
        )
    if len(classes) < 2:
        raise DatasetError(
            f"--unseen must leave at least two classes, got {len(classes)} of {len(train.classes)}"
        )
    return classes


def describe(
    parts: dict[str, Dataset], names: Sequence[str], opened: dict[str, Dataset | None]
) -> list[str]:
    """How many images of which classes each part has, and what was left out at the opening."""
    lines = []
    for key, part in parts.items():
        counts = Counter(names[label] for label in part.targets.tolist())
        each = some([f"{name} {count:,}" for name, count in counts.items()])
        lines.append(f"{key}: {len(part):,} images of {len(counts):,} classes: {each}")
    rest = {key: getattr(split, "left_out", "") for key, split in opened.items()}
    return lines + [f"{key}{left_out}" for key, left_out in rest.items() if left_out]


def check_save_dir(root: str | Path, save_dir: str | Path) -> None:
    """Raises DatasetError if the files of a run would become images of the data."""
    target = Path(save_dir).resolve()
    for split in (Path(root, "train").resolve(), Path(root, "test").resolve()):
        if split.is_dir() and split in (target, target / split.name, *target.parents):
            raise DatasetError(
                f"--save-dir must not write into the images of --data-root, got {save_dir}"
            )
