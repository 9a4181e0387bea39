"""The files of a run: its log, metrics.csv, checkpoints and directory.

torch is imported where it is used: the processes that draw import this file and would wait for it.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from tqdm import tqdm

SPLITS = ("train", "val", "test")
FILES = "files.txt"  # the list of what runs have written to their directory, a path a line
LIST = "# What main.py has written here; a new run removes it"
EVENT_FILES = "tensorboard/events.out.tfevents.*"
EPOCH_FILES = ("train/epoch_*.*", "val/epoch_*.*", "test/epoch_*.*", "features/epoch_*.npz")
# The paths below --save-dir that a run, an evaluation, predict.py and plots write.
DIRECTORIES = ("train", "val", "test", "features", "tensorboard", "figures")
KNOWN = re.compile(
    r"files\.txt|log_[\w-]+\.txt|(metrics|predictions)\.csv|(args|run|evaluation)\.json|(checkpoint|best)\.pt"
    r"|(train|val|test)\.gif|(curves|roc|confusion)\.png|(report|compare)\.html"
    r"|(train|val|test)/epoch_[1-9]\d*\.(png|npz)|(val|test)/(images|features)\.npz"
    r"|features/(epoch_[1-9]\d*|test)\.npz|tensorboard/events\.out\.tfevents\.[\w.-]+"
    r"|figures/(curves|compare|(train|val|test)_(tsne_)?epoch(_\d+)+)\.(pdf|svg|png)"
)


class RunError(Exception):
    """What ends a run: one line for the user, and the exit status; 2 is a mistake of the user's."""

    status = 2


class Diverged(RunError):
    """A loss is no longer finite."""

    status = 3


class WriteError(RunError):
    """A file of the run could not be written: a full disk, a removed directory."""

    status = 1


class Stopped(RunError):
    """A signal has ended the run."""

    def __init__(self, number: int, epoch: int, save_dir: str):
        command = shell("python", "main.py", "--resume", "--save-dir", save_dir)
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after epoch {epoch}; to go on: {command}")
        self.status = 128 + number


def shell(*words: str) -> str:
    """A command that can be typed."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def check_finite(values: dict, epoch: int, args) -> None:
    """Raises Diverged, with the flags to change, if a number among the values is not finite."""
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    broken = [name for name, value in numbers.items() if not math.isfinite(value)]
    if not broken:
        return
    advice = "lower --lr-model"
    if args.weight_cent:
        advice += ", --lr-cent or --weight-cent (about 1 / --feat-dim)"
    raise Diverged(
        f"the training has diverged in epoch {epoch}: {', '.join(broken)} no longer finite, "
        f"with --weight-cent {args.weight_cent:g} --lr-model {args.lr_model:g} "
        f"--lr-cent {args.lr_cent:g}; {advice}"
    )


def passed(start: float) -> timedelta:
    """Whole seconds since time.monotonic() was `start`."""
    return timedelta(seconds=round(time.monotonic() - start))


def path(text: str) -> str:
    """A type for argparse: a path, in which ~ is the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one")
    return os.path.expanduser(text)


def directory(text: str) -> Path:
    """A type for argparse: the same, as a Path."""
    return Path(path(text))


def prepare_output() -> None:
    """Lets standard output and error take every letter, also where they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class Log:
    """Prints lines, above a progress bar; `open` starts a file of them and of earlier ones."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.file = io.BytesIO()  # until it is opened

    def __call__(self, *lines: str) -> None:
        for line in () if self.quiet else lines:
            try:
                tqdm.write(line)
                sys.stdout.flush()
            except OSError as error:
                reason = error.strerror
                raise WriteError(f"cannot write to the standard output: {reason}") from error
            rest = f"{line}\n".encode(errors="backslashreplace")  # a path that is not UTF-8
            try:
                while rest:  # a disk that fills up takes only part of it
                    rest = rest[self.file.write(rest) :]
            except OSError as error:
                raise _unwritable(Path(self.file.name), error) from error

    def open(self, path: Path, printed: bytes = b"") -> None:
        """Starts the file with `printed`, the log of a resumed run up to its checkpoint."""
        printed += self.file.getvalue()
        replace_file(path, lambda part: part.write_bytes(printed))
        self.file = open(path, "ab", buffering=0)

    def close(self) -> None:
        self.file.close()

    def position(self) -> int:
        return self.file.seek(0, os.SEEK_END)


def progress_bar(batches: Iterable, what: str, total: int, *, shown: bool = True) -> Iterable:
    """The batches, with a progress bar if the output is a terminal."""
    hidden = None if shown else True  # None: hidden unless it is a terminal
    return tqdm(batches, disable=hidden, leave=False, desc=what, total=total, unit="batch")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file and renames it to `path`: the old file or the new one.

    The temporary file is this process's own: drawing processes may outlive a killed run.
    """
    part = part_of(path, os.getpid())
    try:
        write(part)
        with open(part, "rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        record(path)
        _rename(part, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _rename(part: Path, path: Path) -> None:
    """Tries for two seconds: on Windows nothing can replace a file that a program is reading."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(part, path)
        time.sleep(0.1)
    os.replace(part, path)


def part_of(path: Path, process: int | str) -> Path:
    """The temporary file of a process that writes `path`."""
    return path.with_name(f".{path.name}.{process}.part")


def _unwritable(path: Path, error: OSError) -> WriteError:
    if not path.parent.exists():
        return WriteError(f"cannot write {path}: its directory was removed")
    return WriteError(f"cannot write {path}: {error.strerror or error}")


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_metrics(path: Path, history: Sequence[dict]) -> None:
    """The history as CSV, a row an epoch; what was not measured is left empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    replace_file(path, lambda part: part.write_bytes(table.getvalue().encode()))


def spreadsheet_text(text: str) -> str:
    """A cell that a spreadsheet shows: an apostrophe before what it would run as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def save_arrays(path: Path, arrays: dict) -> None:
    """Writes arrays by name, as .npz."""

    def write(part: Path) -> None:
        with open(part, "wb") as file:  # numpy adds .npz to a name, but not to a file
            np.savez(file, **arrays)

    replace_file(path, write)


def save_features(path: Path, splits: dict[str, dict], centers, names: dict | None = None) -> None:
    """Features (N, D), labels and predictions (N,), as train_features …, and centers (C, D)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = dict(names or {}, centers=centers.cpu().numpy())
    for split, values in splits.items():
        for name in ("features", "labels", "predictions"):
            arrays[f"{split}_{name}"] = values[name].cpu().numpy()
    save_arrays(path, arrays)


def files_in(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files of a run's directory and their names in it; behind no link to a directory."""
    below = [directory / name for name in DIRECTORIES]
    for each in (directory, *(each for each in below if not each.is_symlink())):
        for path in each.iterdir() if each.is_dir() else ():
            if path.is_symlink() or path.is_file():
                yield path.relative_to(directory).as_posix(), path


def start_list(directory: Path) -> None:
    """Creates the directory, in which what is written is listed from now on."""
    directory.mkdir(parents=True, exist_ok=True)
    if not recorded(directory):
        (directory / FILES).write_text(f"{LIST}\n", encoding="utf-8", newline="\n")


def record(path: Path) -> None:
    """Adds the file to the list of its run's directory, if it is in one."""
    for directory in (path.parent, path.parent.parent):
        name = path.relative_to(directory).as_posix()
        ours = recorded(directory)
        if ours and KNOWN.fullmatch(name) and name not in ours:
            with open(directory / FILES, "a", encoding="utf-8", newline="\n") as file:
                file.write(f"{name}\n")


def recorded(directory: Path) -> set[str]:
    """The list of files that runs have written to the directory, and its own name; or nothing."""
    lines = []
    with contextlib.suppress(OSError):
        lines = (directory / FILES).read_bytes().decode(errors="replace").splitlines()
    if lines[:1] != [LIST]:
        return set()
    return {FILES, *filter(KNOWN.fullmatch, lines)}


def read_args(directory: Path) -> dict:
    """args.json of a run of main.py; empty if there is none."""
    args = read_json(directory / "args.json")
    return args if {"recipe", "dataset", "model", "save_dir"} <= args.keys() else {}


def epoch_files(directory: Path, patterns: Sequence[str] = EPOCH_FILES) -> list[tuple[int, Path]]:
    """The files of single epochs, with their epochs, in ascending order."""
    found = []
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        number = re.fullmatch(r"epoch_([1-9]\d*)", path.stem)
        if number:
            found.append((int(number[1]), path))
    return sorted(found)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    import torch

    buffer = io.BytesIO()  # so that a full disk is an OSError, not an error within torch
    torch.save(checkpoint, buffer)
    replace_file(path, lambda part: part.write_bytes(buffer.getbuffer()))


def check_data(path: str, saved: dict, data: dict, to_train: bool) -> None:
    """RunError if the facts of a checkpoint's data are not those of the data given."""
    names = dict(classes="training classes", in_channels="images' channels")
    if to_train:
        names["images"] = "number of training images"
    for name, what in names.items():
        if name in saved and saved[name] != data[name]:  # older checkpoints lack channels
            shown = [str(each)[:200] for each in (saved[name], data[name])]
            raise RunError(f"the {what} must be {shown[0]}, as in {path}, got {shown[1]}")


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU; RunError if it is missing, damaged or not one of main.py."""
    import torch

    try:
        with zipfile.ZipFile(path) as records:  # torch would take flipped bits as they are
            damaged = records.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = dict(args=dict, data=dict, model=dict, epoch=int, history=list)
        kinds |= dict(centers=torch.Tensor)
        if not all(isinstance(checkpoint[name], kind) for name, kind in kinds.items()):
            raise ValueError("an entry of another kind")
        names = [*checkpoint["data"]["classes"], *checkpoint["data"].get("unseen", [])]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("wrong classes")
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:  # of zip, pickle and others, depending on what the file is
        reason = str(error).strip().partition("\n")[0].partition(".")[0] or type(error).__name__
        raise RunError(f"{path} is damaged or no checkpoint of main.py: {reason}") from error
    if checkpoint.get("partial"):
        raise RunError(f"{path} is from the middle of an epoch, which older versions could resume")
    return checkpoint


@contextlib.contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """RunError where an entry of a checkpoint, if there is one, is not as main.py writes it."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if not checkpoint:
            raise
        raise RunError(f"{checkpoint} is not as main.py wrote it: {error!r}") from error


def read_json(path: Path) -> dict:
    """A JSON file; empty if it is missing, damaged or no dict."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_bytes())
        if isinstance(values, dict):
            return values
    return {}


def read_facts(directory: Path) -> dict:
    return read_json(directory / "run.json")
