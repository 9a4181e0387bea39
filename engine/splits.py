"""Splits of data sets: items (uint8 image (C, H, W), label), with all `targets` and `classes`."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from engine.images import DatasetError, Found, ReadImage


class Folder(Dataset):
    """Image files by class; `left_out` says what else there was."""

    def __init__(self, found: Found, read: ReadImage):
        self.read = read
        self.classes = [name for name, paths in found.classes.items() if paths]
        self.left_out = found.left_out
        self.left_out["empty class directories"] += len(found.classes) - len(self.classes)
        self.samples = [
            (path, label) for label, name in enumerate(self.classes) for path in found.classes[name]
        ]
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[row]
        return self.read(path), label


class Rows(Dataset):
    """Some rows of a split, with other targets and classes."""

    def __init__(
        self, split: Dataset, rows: torch.Tensor, targets: torch.Tensor, classes: Sequence[str]
    ):
        self.split = split
        self.rows = rows.tolist()
        self.targets = targets
        self.classes = list(classes)
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


def of_classes(split: Dataset, names: Sequence[str], first_label: int = 0) -> Dataset:
    """The images of the named classes, whose labels are first_label, first_label + 1, ..."""
    if list(names) == list(split.classes) and first_label == 0:
        return split
    numbers = {name: number for number, name in enumerate(names, first_label)}
    labels = torch.tensor([numbers.get(name, -1) for name in split.classes])
    targets = labels[torch.as_tensor(split.targets)]
    rows = (targets >= 0).nonzero().flatten()
    return Rows(split, rows, targets[rows], names)


def split_off(split: Dataset, share: float, seed: int) -> tuple[Rows, Rows]:
    """The rest, and a share of each class drawn by `seed`, at least one image."""
    labels = torch.as_tensor(split.targets)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(split.classes):
        rows = (labels == label).nonzero().flatten()
        count = max(1, round(share * len(rows)))
        if count >= len(rows):
            raise DatasetError(
                f"--val-share {share:g} leaves no training image of {name}, which has {len(rows)}"
            )
        drawn[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    parts = (~drawn).nonzero().flatten(), drawn.nonzero().flatten()
    return tuple(Rows(split, rows, labels[rows], split.classes) for rows in parts)
