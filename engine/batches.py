"""Batches on the device or from workers: augmentation and normalisation."""

import contextlib
import functools
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from engine.images import DatasetError
from engine.ranks import Ranks


class Batch(NamedTuple):
    """This rank's share of a batch, on the device."""

    images: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,)
    size: int  # of the batch, over all ranks


class Normalise:
    """uint8 images (..., C, H, W) to float32: p / 255, less the mean, divided by the std of each channel."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: str | torch.device = "cpu"
    ):
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

    def __init__(
        self,
        seed: int,
        *,
        shift: bool = False,
        flip: bool = False,
        erase: float = 0.0,
        ranks: Ranks = Ranks(),
    ):  # noqa: B008  (immutable)
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
        draws = self.ranks.share(torch.cat([shifts, flips, erased], dim=1)).to(
            device, non_blocking=True
        )
        down, right, flipped, *center = draws.unsqueeze(1).unbind(2)  # (B, 1) each
        along = torch.arange(side, device=device)
        rows, columns = (
            (side - 1 - (side - 1 - (along + shift).abs()).abs()) for shift in (down, right)
        )  # (B, side)
        columns = torch.where(flipped.bool(), columns.flip(1), columns)
        index = torch.arange(len(images), device=device).view(-1, 1, 1)
        changed = images[index, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
        if self.erase:
            high, wide = (
                (along - middle).abs() < self.erase * side / 2 for middle in center
            )  # (B, side)
            changed.masked_fill_((high.unsqueeze(2) & wide.unsqueeze(1)).unsqueeze(1), 128)
        return changed


class BatchRows:
    """This rank's row numbers of each batch; shuffled ones are in a DataLoader's order."""

    def __init__(
        self, size: int, batch_size: int, shuffle: bool, device: str | torch.device, ranks: Ranks
    ):
        self.size, self.batch_size, self.shuffle, self.device, self.ranks = (
            size,
            batch_size,
            shuffle,
            device,
            ranks,
        )

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

    def __init__(
        self, rows: BatchRows, load: Load, normalise: Normalise, device: str | torch.device
    ):
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
            images, labels = (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
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


def by_workers(
    splits: Sequence[Dataset], workers: int, shape: tuple[int, int, int], pin: bool
) -> list[Load]:
    """Load batches of each split, by worker processes that live as long as the run and read all.

    They are forked here, before the main process has threads, with which a fork may hang.
    """
    batches = []  # of the next pass
    loader = DataLoader(
        ConcatDataset(splits),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=pin,
        collate_fn=Collate(shape),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    _start(loader)

    def load(
        first: int, rows: Iterable[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches[:] = [
            (first + each).tolist() for each in rows
        ]  # sending a tensor would start a thread
        try:
            yield from loader
        except (
            DatasetError
        ) as error:  # its traceback refers to torch's frames and so keeps the workers
            error.args = (
                str(error).strip().rpartition("DatasetError: ")[2],
            )  # without the worker's traceback
            raise error.with_traceback(None) from None

    firsts = itertools.accumulate(map(len, splits[:-1]), initial=0)
    return [functools.partial(load, first) for first in firsts]


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
