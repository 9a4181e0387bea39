"""Where the images of a batch come from: the device's memory, or processes that read them."""

import atexit
import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_convert

from engine.images import DatasetError, in_threads, one_line

Shape = tuple[int, int, int]  # (C, H, W)
Loaded = Iterator[tuple[torch.Tensor, torch.Tensor]]  # images, uint8 (B, C, H, W), and labels (B,)


class WorkerError(RuntimeError):
    """A worker of -j has died; the message is one line for the user."""


class OnDevice:
    """A split that is kept on the device as uint8."""

    def __init__(self, split: Dataset, shape: Shape, device: str | torch.device):
        self.everything = _load_all(split, shape).to(device)
        self.labels = torch.as_tensor(split.targets, dtype=torch.int64).to(device)

    def batches(self, rows: Sequence[torch.Tensor]) -> Loaded:
        return ((self.everything[some], self.labels[some]) for some in rows)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self.everything[rows]


class FromWorkers:
    """A split that is read by worker processes, which live as long as the run.

    They are forked from a server, a process without threads that has loaded what they need, or, on
    Windows and macOS, start from nothing. Raises DatasetError if the server cannot start.
    """

    def __init__(self, split: Dataset, shape: Shape, workers: int, pin: bool):
        if getattr(split, "data", None) is not None:  # such as torchvision's
            images = TensorDataset(_load_all(split, shape))  # whose module is loaded, unlike theirs
            images.targets = split.targets
            split = images
        self.split = split
        self.shape = shape
        self.workers = workers
        self.pin = pin
        self.loader: DataLoader | None = None
        if SERVED:
            try:
                _start_server()
            except OSError as error:  # such as a socket whose path is too long
                raise DatasetError(
                    f"-j {workers}: no worker can start ({error}); -j 0 needs none, and a shorter "
                    f"TMPDIR may help, now {multiprocessing.util.get_temp_dir()}"
                ) from error

    def batches(self, rows: Sequence[torch.Tensor]) -> Loaded:
        """One pass. Raises DatasetError for an image that cannot be read, WorkerError."""
        if self.loader is None:
            self.loader = self._loader(rows)
        try:
            with _without_main():  # the first pass starts the workers
                batches = iter(self.loader)
                RUNNING.add(batches)
            for batch in batches:
                if isinstance(batch, str):
                    raise DatasetError(batch)
                yield batch
        except (EOFError, OSError, RuntimeError) as error:
            raise WorkerError(
                f"a worker of -j {self.workers} died ({one_line(error)}); fewer need less memory"
            ) from error

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return _read(self.split, rows.tolist(), self.shape)

    def _loader(self, rows: Sequence[torch.Tensor]) -> DataLoader:
        return DataLoader(
            WholeBatches(self.split, self.shape),
            batch_sampler=Lists(rows),
            num_workers=self.workers,
            persistent_workers=True,
            pin_memory=self.pin,
            collate_fn=default_convert,
            worker_init_fn=_start_worker,
            multiprocessing_context="forkserver" if SERVED else "spawn",
            generator=torch.Generator(),  # so that the loader draws nothing from the training's
        )


def _load_all(split: Dataset, shape: Shape) -> torch.Tensor:
    """All images of a split, uint8 (N, C, H, W)."""
    images = getattr(split, "data", None)
    if images is None:
        return _read(split, range(len(split)), shape)
    images = torch.as_tensor(images)  # torchvision's: (N, H, W), (N, H, W, C) or (N, C, H, W)
    if images.ndim == 4 and images.shape[1:] != shape:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images.view(-1, *shape)


def _read(split: Dataset, rows: Sequence[int], shape: Shape) -> torch.Tensor:
    """These images of a split, uint8 (N, C, H, W), each read to its place."""
    images = torch.empty(len(rows), *shape, dtype=torch.uint8)

    def read(place: int) -> None:
        images[place] = split[rows[place]][0]

    in_threads(read, range(len(rows)), "Reading images")
    return images


# ---------------------------------------------------------------------------------------- workers

SERVED = sys.platform == "linux"  # a fork of a process that has loaded macOS's frameworks may crash
RUNNING = weakref.WeakSet()  # iterators of loaders


class Lists:
    """Row numbers as lists, since tensors would go to a worker through shared memory.

    An iterator draws nothing before its first batch: for its first pass a DataLoader makes two.
    """

    def __init__(self, rows: Sequence[torch.Tensor]):
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        for some in self.rows:
            yield some.tolist()


class WholeBatches(Dataset):
    """A split of which a worker reads a batch at once: into shared memory, or a line of error."""

    def __init__(self, split: Dataset, shape: Shape):
        self.split = split
        self.shape = shape

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor] | str:
        images = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        try:
            for place, row in enumerate(rows):
                images[place] = self.split[row][0]
            labels = torch.tensor([int(self.split.targets[row]) for row in rows])
            return [images.share_memory_(), labels.share_memory_()]
        except DatasetError as error:
            return str(error)
        except RuntimeError as error:
            return (
                "the workers of -j need more shared memory (/dev/shm): a smaller -j or "
                "--batch-size needs less, docker run --shm-size=2g or --ipc=host gives more, -j 0 "
                f"needs none ({one_line(error)})"
            )

    def __reduce__(self):  # plainly, since tensors would else go through shared memory
        return _unpickled, (pickle.dumps((self.split, self.shape)),)


def _unpickled(data: bytes) -> WholeBatches:
    return WholeBatches(*pickle.loads(data))


def _start_worker(worker: int) -> None:
    """A worker ignores signals, which are for the main process, and dies with that.

    Ctrl-C and a cluster's SIGTERM reach all processes of a run, whose current batch may take long.
    torch watches for the death of the main process too, but only every five seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_main, daemon=True).start()


def _die_with_main() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _start_server() -> None:
    """Starts the process that workers are forked from; signals are blocked in it and in them."""
    multiprocessing.set_forkserver_preload(["torch.utils.data", "PIL.Image"])
    resource_tracker.ensure_running()  # the server's start would start it, and unblock the signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A process that starts in its context does not import the running script, which takes long."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@atexit.register
def _end_workers() -> None:
    """Ends the workers, before Python does so by SIGTERM and waits for ever."""
    for batches in RUNNING:
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()


# ----------------------------------------------------------------------------------------- memory


def check_memory(needed: int, device: torch.device) -> None:
    """Raises DatasetError if so many bytes are not free, for the reading and on the device."""
    for where in (torch.device("cpu"), device):
        free = _free_memory(where)
        if needed > free:
            raise DatasetError(
                f"the data set takes {needed / 2**30:.1f} GiB on the device {where}, which has "
                f"{free / 2**30:.1f} free; -j 4 reads it from disk with 4 workers instead"
            )


def _free_memory(device: torch.device) -> float:
    """In bytes; infinite if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [math.inf]
    with contextlib.suppress(OSError, KeyError):
        free.append(1024 * _numbers(Path("/proc/meminfo"))["MemAvailable:"])
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        free += _limits(Path("/sys/fs/cgroup"), groups)
    return min(free)


def _limits(root: Path, groups: Sequence[str]) -> Iterator[float]:
    """What the control groups of this process, such as a container's, leave to it, in bytes.

    `groups` are lines "number:controllers:path"; version 2 names no controller. In a container the
    path may be the host's: its own group is the root.
    """
    names = {"": ("", "memory.max", "memory.current")}
    names["memory"] = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
    for line in groups:
        _, controller, path = line.split(":", 2)
        if controller in names:
            base, limit, used = names[controller]
            group = root / base / path.strip("/")
            for each in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
                    cache = _numbers(each / "memory.stat").get("inactive_file", 0)
                    free = int((each / limit).read_text()) - int((each / used).read_text())
                    yield free + cache


def _numbers(path: Path) -> dict[str, int]:
    """The lines of a file of names and numbers."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
