"""Splits of data sets: items (uint8 image (C, H, W), label), with all `targets` and `classes`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from engine.images import DatasetError, ReadImage, find_images, some


class Folder(Dataset):
    """The images below class directories, and what was left out; without any, DatasetError."""

    def __init__(self, directory: Path, read: ReadImage | None = None, levels: int = 1):
        self.read = read
        found, left_out = find_images(directory, levels)
        self.classes = [name for name, paths in found.items() if paths]
        self.empty = [name for name, paths in found.items() if not paths]
        left_out["empty class directories"] = len(self.empty)
        counts = [f"{count:,} {what}" for what, count in left_out.most_common() if count]
        self.left_out = f" (left out: {some(counts)})" if counts else ""
        self.paths = [path for paths in found.values() for path in paths]
        self.targets = [label for label, name in enumerate(self.classes) for _ in found[name]]
        if not self.paths:
            raise DatasetError(
                f"{directory} must hold a directory of images for each class, got no images"
                f"{self.left_out}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.read(self.paths[row]), self.targets[row]


def in_memory(images: torch.Tensor, labels: torch.Tensor, classes=()) -> TensorDataset:
    """A split of uint8 images (N, C, H, W)."""
    split = TensorDataset(images, labels)
    split.targets = labels
    split.classes = list(classes)
    return split


def of_rows(split: Dataset, rows: torch.Tensor, targets: torch.Tensor) -> Dataset:
    """Some rows of a split, with targets of their own."""
    if isinstance(split, TensorDataset):
        return in_memory(split.tensors[0][rows], targets)
    part = Subset(split, rows.tolist())
    part.targets = targets
    part.paths = [split.paths[row] for row in part.indices] if hasattr(split, "paths") else []
    return part


def of_classes(split: Dataset, names: Sequence[str], first_label: int = 0) -> Dataset:
    """The images of the named classes, whose labels are first_label, first_label + 1, ..."""
    numbers = {name: number for number, name in enumerate(names, first_label)}
    labels = torch.tensor([numbers.get(name, -1) for name in split.classes])
    targets = labels[torch.as_tensor(split.targets)]
    rows = (targets >= 0).nonzero().flatten()
    return of_rows(split, rows, targets[rows])


def split_off(
    split: Dataset, classes: Sequence[str], share: float, seed: int
) -> tuple[Dataset, Dataset]:
    """The rest, and a share of each class drawn by `seed`, at least one image."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(split), dtype=torch.bool)
    for label, name in enumerate(classes):
        rows = (split.targets == label).nonzero().flatten()
        count = max(1, round(share * len(rows)))
        if count >= len(rows):
            raise DatasetError(
                f"--val-share {share:g} leaves no training image of {name}, which has {len(rows)}"
            )
        drawn[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    parts = (~drawn).nonzero().flatten(), drawn.nonzero().flatten()
    return tuple(of_rows(split, rows, split.targets[rows]) for rows in parts)
