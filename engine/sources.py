"""Where the images of a batch come from: the device's memory, or processes that read them."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_convert

from engine.images import DatasetError, in_threads, one_line

Shape = tuple[int, int, int]  # (C, H, W)
Loaded = Iterator[tuple[torch.Tensor, torch.Tensor]]  # images, uint8 (B, C, H, W), and labels (B,)
SERVED = sys.platform == "linux"  # a fork of a process that has loaded macOS's frameworks may crash


class WorkerError(RuntimeError):
    """A worker of -j has died; the message is one line for the user."""


def open_source(split: Dataset, shape: Shape, workers: int, device: torch.device):
    """The batches of a split for `device`; images in memory need no workers."""
    if workers and not isinstance(split, TensorDataset):
        return FromWorkers(split, shape, workers, pin=device.type == "cuda")
    return OnDevice(split, shape, "cpu" if workers else device)


class OnDevice:
    """A split that is kept on the device as uint8."""

    def __init__(self, split: Dataset, shape: Shape, device: str | torch.device):
        self.device = device
        if isinstance(split, TensorDataset):
            images = split.tensors[0]
        else:
            images = _read(split, range(len(split)), shape)
        self.everything = images.to(device)
        self.labels = split.targets.to(device)

    def batches(self, rows: Iterable[torch.Tensor]) -> Loaded:
        return ((self.everything[some], self.labels[some]) for some in rows)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self.everything[rows]


def _read(split: Dataset, rows: Sequence[int], shape: Shape) -> torch.Tensor:
    """These images of a split, uint8 (N, C, H, W), each read to its place."""
    images = torch.empty(len(rows), *shape, dtype=torch.uint8)

    def read(place: int) -> None:
        images[place] = split[rows[place]][0]

    in_threads(read, range(len(rows)), "Reading images")
    return images


# ---------------------------------------------------------------------------------------- workers


class FromWorkers:
    """A split that is read by processes that live as long as the run.

    They are forked from a server without threads or, on Windows and macOS, start from nothing.
    Raises DatasetError if the server cannot start.
    """

    def __init__(self, split: Dataset, shape: Shape, workers: int, pin: bool):
        self.split = split
        self.shape = shape
        self.workers = workers
        self.pin = pin
        self.device = None  # of row numbers
        self.loader: DataLoader | None = None
        if SERVED:
            try:
                _start_server()
            except OSError as error:  # such as a socket whose path is too long
                raise DatasetError(
                    f"-j {workers}: no worker can start ({error}); a shorter TMPDIR may help"
                ) from error

    def batches(self, rows: Iterable[list[int]]) -> Loaded:
        """One pass. Raises DatasetError for an image that cannot be read, WorkerError."""
        try:
            for batch in self._iterate(rows):
                if isinstance(batch, str):
                    raise DatasetError(batch)
                yield batch
        except (EOFError, OSError, RuntimeError) as error:
            line = f"a worker of -j {self.workers} died ({one_line(error)}); fewer need less memory"
            raise WorkerError(line) from error

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return _read(self.split, rows.tolist(), self.shape)

    def _iterate(self, rows: Iterable[list[int]]) -> Iterator:
        """Starts the workers for the first pass, without the running script, which takes long."""
        if self.loader is not None:
            return iter(self.loader)
        self.loader = DataLoader(
            WholeBatches(self.split, self.shape),
            batch_sampler=rows,
            num_workers=self.workers,
            persistent_workers=True,
            pin_memory=self.pin,
            collate_fn=default_convert,
            worker_init_fn=_start_worker,
            multiprocessing_context="forkserver" if SERVED else "spawn",
            generator=torch.Generator(),  # so that the loader draws nothing from the training's
        )
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            batches = iter(self.loader)
        finally:
            sys.modules["__main__"] = script
        weakref.finalize(self.loader, _end_workers, batches)
        return batches


@dataclass
class WholeBatches:
    """A split of which a worker reads a batch at once: into shared memory, or a line of error."""

    split: Dataset
    shape: Shape

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor] | str:
        images = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        try:
            for place, row in enumerate(rows):
                images[place] = self.split[row][0]
            return [images.share_memory_(), self.split.targets[rows].share_memory_()]
        except DatasetError as error:
            return str(error)
        except RuntimeError as error:
            return (
                f"-j needs more shared memory (/dev/shm): {one_line(error)}; docker run "
                "--shm-size=2g or --ipc=host gives more, and -j 0 needs none"
            )


def _start_worker(worker: int) -> None:
    """Ignores signals to all processes of a run, which are for the main one, and dies with that.

    torch's own watch is of the worker's parent, here the server, which lives as long as a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_main, daemon=True).start()


def _die_with_main() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _end_workers(batches: Iterator) -> None:
    """Before Python ends them by SIGTERM, which they ignore, and waits for ever."""
    batches._shutdown_workers()
    for worker in batches._workers:
        worker.kill()


def _start_server() -> None:
    """Starts the process that workers are forked from, without signals."""
    multiprocessing.set_forkserver_preload(["torch.utils.data", "PIL.Image"])
    resource_tracker.ensure_running()  # the server's start would start it, and unblock the signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# ----------------------------------------------------------------------------------------- memory


def check_memory(needed: int, device: torch.device) -> None:
    """Raises DatasetError if so many bytes are not free, for the reading and on the device."""
    for where in (torch.device("cpu"), device):
        free = _free_memory(where)
        if needed > free:
            raise DatasetError(
                f"the data set takes {needed / 2**30:.1f} GiB on the device {where}, which has "
                f"{free / 2**30:.1f} free; -j 4 reads it from disk"
            )


def _free_memory(device: torch.device, groups: Path = Path("/sys/fs/cgroup")) -> float:
    """In bytes, within a container's limit; infinite if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [math.inf]
    with contextlib.suppress(OSError, KeyError):
        free.append(1024 * _numbers(Path("/proc/meminfo"))["MemAvailable:"])
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or no limit
            cache = _numbers((groups / used).with_name("memory.stat"))["inactive_file"]
            numbers = [int((groups / file).read_text()) for file in (limit, used)]
            free.append(numbers[0] - numbers[1] + cache)
    return min(free)


def _numbers(path: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
