"""Batches of a split: their order, augmentation and normalisation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from engine.ranks import Ranks
from engine.sources import FromWorkers, OnDevice

ALONE = Ranks()


class Batch(NamedTuple):
    """This rank's share of a batch, on the device."""

    images: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,)
    size: int  # of the batch, over all ranks


class Normalise:
    """uint8 (..., C, H, W) to float32: p / 255, less the mean, divided by the std of a channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device="cpu"):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


@dataclass
class Augment:
    """Changes each image of a batch at random: uint8 (B, C, H, W) to the same, channels last.

    The numbers come from a CPU generator of their own: the same on any device and over ranks.

    Args:
        shift: move it by up to an eighth of its shorter side, mirrored at the border.
        flip: mirror it, or not.
        erase: side of a grey square as a share of the shorter side. Its center is anywhere in the
            image, so that a part may be outside (DeVries and Taylor's cutout, arXiv:1708.04552).
    """

    seed: int
    shift: bool = False
    flip: bool = False
    erase: float = 0.0
    ranks: Ranks = ALONE

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(rng=self.generator.get_state())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["rng"])

    def __call__(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """`images`: this rank's share of a batch of `size`."""
        height, width = images.shape[2:]
        device = images.device
        draws = self.ranks.share(self._draw(size, height, width)).to(device, non_blocking=True)
        down, right, flipped, *center = draws.unsqueeze(1).unbind(2)  # (B, 1) each
        along_height = torch.arange(height, device=device)
        along_width = torch.arange(width, device=device)
        rows = _mirrored(along_height + down, height)  # (B, H)
        columns = _mirrored(along_width + right, width)  # (B, W)
        columns = torch.where(flipped.bool(), columns.flip(1), columns)
        index = torch.arange(len(images), device=device).view(-1, 1, 1)
        changed = images[index, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
        if self.erase:
            reach = self.erase * min(height, width) / 2
            high = (along_height - center[0]).abs() < reach
            wide = (along_width - center[1]).abs() < reach
            changed.masked_fill_((high.unsqueeze(2) & wide.unsqueeze(1)).unsqueeze(1), 128)
        return changed

    def _draw(self, size: int, height: int, width: int) -> torch.Tensor:
        """Shift down, shift right, flip and, if asked for, the square's center of each image."""
        reach = self.shift * (min(height, width) // 8)
        shifts = torch.randint(-reach, reach + 1, (size, 2), generator=self.generator)
        flips = torch.randint(1 + self.flip, (size, 1), generator=self.generator)
        longer = max(height, width)
        centers = torch.randint(longer, (size, 2 if self.erase else 0), generator=self.generator)
        if self.erase:
            centers = centers * torch.tensor([height, width]) // longer
        return torch.cat([shifts, flips, centers], dim=1)


def _mirrored(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Positions outside of [0, side) are mirrored at the first or the last one."""
    return side - 1 - (side - 1 - positions.abs()).abs()


@dataclass
class BatchRows:
    """This rank's row numbers of each batch: tensors on the device, or lists for workers (None).

    Shuffled ones are in a DataLoader's order.
    """

    size: int
    batch_size: int
    shuffle: bool
    device: str | torch.device | None = None
    ranks: Ranks = ALONE

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor | list[int]]:
        """Draws nothing before its first batch: for its first pass a DataLoader makes two."""
        rows = torch.arange(self.size)
        if self.shuffle:  # tests draw nothing, so that --eval-freq does not change the training
            torch.empty((), dtype=torch.int64).random_()  # a DataLoader's seed for its workers
            seed = torch.empty((), dtype=torch.int64).random_().item()
            rows = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        for batch in rows.to(self.device).split(self.batch_size):
            share = self.ranks.share(batch)
            yield share if self.device else share.tolist()


@dataclass
class Batches:
    """All batches of a split; `augment` may be set, and `paths` are of the files, if any."""

    rows: BatchRows
    source: OnDevice | FromWorkers
    normalise: Normalise
    paths: Sequence[str] = ()
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        device = self.normalise.mean.device
        left = self.rows.size
        for images, labels in self.source.batches(self.rows):
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            size = min(self.rows.batch_size, left)
            left -= size
            if self.augment:
                images = self.augment(images, size)
            yield Batch(self.normalise(images), labels, size)

    def thumbnails(self, rows: Sequence[int], largest: int = 32) -> np.ndarray:
        """The images of these rows, uint8 (N, C, H, W), smaller where a side is above `largest`."""
        kept = []
        for some in torch.as_tensor(rows).split(256):
            images = self.source.images(some)
            size = [min(side, largest) for side in images.shape[2:]]
            if list(images.shape[2:]) != size:
                images = F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)
            kept.append(images.cpu())
        return torch.cat(kept).numpy()
