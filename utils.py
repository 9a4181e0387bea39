"""Everything outside the training itself: command line, log, run directory, checkpoints, signals, ranks."""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

# What a run writes below its --save-dir; a new run there takes exactly these away first.
RUN_FILES = ("log_*.txt", "metrics.csv", "args.json", "checkpoint.pt", "train.gif", "test.gif", "curves.png",
             "train/epoch_*.*", "test/epoch_*.*", "features/epoch_*.npz", "tensorboard/events.*")  # fmt: skip


class RunError(Exception):
    """What ends a run: the message is one line for the user, `status` the exit status. 2: a mistake of the user's."""

    status = 2


class Diverged(RunError):
    """A loss is no longer finite."""

    status = 3


class Stopped(RunError):
    """A signal has ended the run between two batches."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 128 + number


# ----------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n" if Ranks.of_environment().rank == 0 else None)


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite int or float of at least low, or above it, and at most high."""
    rule = f"must be {'an integer' if kind is int else 'a number'} {'above' if above else 'of at least'} {low}"
    rule += f" and at most {high}" if high < math.inf else ""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and low <= value <= high and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"{rule}, got {text}")

    return convert


def gpu_index(text: str) -> str:
    """A type for argparse: the index of one GPU."""
    indices = text.replace(" ", "").split(",")
    if len(indices) > 1 and all(index.isdecimal() for index in indices):
        raise argparse.ArgumentTypeError(
            f"takes one index, got {text}; for several GPUs: CUDA_VISIBLE_DEVICES={','.join(indices)} "
            f"torchrun --standalone --nproc_per_node={len(indices)} main.py and the other flags"
        )
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the index of a GPU, such as 0, got {text}")
    return text


# -------------------------------------------------------------------------------------------------------------- log


class Log:
    """Prints lines, above a progress bar where there is one, and from `open` on writes them, earlier ones too."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.file, self.earlier = quiet, None, []

    def __call__(self, line: str) -> None:
        if self.quiet:
            return
        tqdm.write(line)
        sys.stdout.flush()
        if self.file is None:
            self.earlier.append(line)
        else:
            print(line, file=self.file, flush=True)

    def open(self, path: Path, keep: int = 0) -> None:
        """Starts the file behind its first `keep` bytes: what a checkpoint has recorded, 0 for a new run."""
        if self.quiet:
            return
        self.file = open(path, "r+" if path.exists() else "w", encoding="utf-8")
        self.file.truncate(keep)
        self.file.seek(0, os.SEEK_END)
        for line in self.earlier:
            print(line, file=self.file, flush=True)

    def position(self) -> int:
        return self.file.tell()


# ------------------------------------------------------------------------------------------------------------ files


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path`, then renames it: `path` is the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_save_dir(path: str) -> None:
    """Raises RunError where `path` is no writable directory and cannot become one; creates nothing."""
    nearest = Path(path).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise RunError(f"--save-dir must be a directory, got {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"--save-dir must be writable, got {path}: {nearest} is not")


@contextlib.contextmanager
def claim(save_dir: Path) -> Iterator[None]:
    """Creates the directory and, in its context, keeps other runs out of it; RunError where one is in it."""
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save_dir).close()
    except OSError as error:
        raise RunError(f"--save-dir must be a writable directory, got {save_dir}: {error.strerror}") from error
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    directory = os.open(save_dir, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(directory)
        raise RunError(f"--save-dir {save_dir} is in use by another run; give this one its own") from None
    try:
        yield
    finally:
        os.close(directory)


def clear(save_dir: Path) -> bool:
    """Takes away an earlier run's files; tells whether there were any."""
    old = [path for pattern in RUN_FILES for path in save_dir.glob(pattern)]
    for path in old:
        path.unlink()
    return bool(old)


def write_json(path: Path, values: dict) -> None:
    replace_file(path, lambda part: part.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n"))


def write_metrics(path: Path, history: Sequence[dict]) -> None:
    """The whole history as CSV, a row an epoch; what was not measured in an epoch is left empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    replace_file(path, lambda part: part.write_text(table.getvalue()))


def save_features(path: Path, splits: dict[str, dict], centers: torch.Tensor) -> None:
    """features (N, D), labels and predictions (N,) of each split, as train_features and so on, and centers (C, D)."""
    import numpy as np

    arrays = {"centers": centers.cpu().numpy()}
    for split, values in splits.items():
        arrays |= {f"{split}_{name}": values[name].cpu().numpy() for name in ("features", "labels", "predictions")}

    def write(part: Path) -> None:
        with open(part, "wb") as file:  # numpy adds .npz to a name, but not to a file
            np.savez(file, **arrays)

    replace_file(path, write)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    buffer = io.BytesIO()  # so that a full disk is Python's own OSError, not an error within torch
    torch.save(checkpoint, buffer)
    replace_file(path, lambda part: part.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU; RunError where it is missing, damaged or not one of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:  # of zip, pickle and others, depending on where the file is damaged
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"cannot read the checkpoint {path}: {reason}") from error
    needed = {"epoch", "args", "model", "center_loss", "history", "partial", "centers", "rng"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise RunError(f"{path} is not a checkpoint of main.py")
    return checkpoint


# -------------------------------------------------------------------------------------------- signals and processes


class StopRequest:
    """In its context, the first SIGINT or SIGTERM only sets `signal`, which the training looks at between batches.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Ranks(NamedTuple):
    """This process among those that torchrun has started; one alone without it."""

    rank: int = 0
    size: int = 1
    local: int | None = None  # on this machine

    @classmethod
    def of_environment(cls) -> "Ranks":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else cls()

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """In its context, the ranks can speak to each other: NCCL between GPUs, gloo between CPUs."""
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield
        finally:
            if self.size > 1:
                dist.destroy_process_group()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets rank 0 through, and then the others: for downloads."""
        if self.size > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, number: int | None) -> int:
        """The largest of the ranks' numbers, of which None is 0."""
        if self.size == 1:
            return number or 0
        largest = torch.tensor(number or 0)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, which may have different numbers of them, in the order of the ranks."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def check_equal(self, name: str, values: torch.Tensor) -> None:
        """Raises RunError where a rank's values differ, as far as their sums tell."""
        sums = torch.stack([values.double().sum(), values.double().square().sum()]).cpu()
        if len(self.gather(sums.unsqueeze(0)).unique(dim=0)) > 1:
            raise RunError(f"the ranks' {name} are no longer the same")


class Plotter:
    """Draws in background processes, off the training's way; `finish` waits for them and returns their errors."""

    def __init__(self):
        self.pool, self.tasks = None, []

    def __call__(self, path: Path, draw: Callable, *arguments) -> None:
        """Lets draw(part, *arguments) write `path`."""
        if self.pool is None:
            from concurrent.futures import ProcessPoolExecutor

            workers = max(1, min(4, (os.cpu_count() or 1) // 2))
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_drawing)
        self.tasks.append((path, self.pool.submit(_draw, path, draw, arguments)))

    def finish(self) -> list[str]:
        errors = [f"{path}: {task.exception()}" for path, task in self.tasks if task.exception()]
        self.tasks = []
        return errors


def _draw(path: Path, draw: Callable, arguments: tuple) -> None:
    replace_file(path, lambda part: draw(part, *arguments))


def _start_drawing() -> None:
    """Ctrl-C reaches all processes of a terminal, but the pictures in hand are finished; a killed run is missed by
    nobody else, so that its drawers watch for its end themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
