"""The files of a run: its log, metrics.csv, checkpoints and directory.

torch is imported where it is used: the processes that draw import this file and would wait for it.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

SPLITS = ("train", "val", "test")
# The list of the files that the runs in a directory have written, a path a line.
FILES = "files.txt"
EVENT_FILES = "tensorboard/events.out.tfevents.*"
TEST_FILES = ("val/images.npz", "val/features.npz", "test/images.npz", "test/features.npz")
# What a run writes for each epoch, and what it writes besides; patterns below --save-dir.
EPOCH_FILES = ("train/epoch_*.*", "val/epoch_*.*", "test/epoch_*.*", "features/epoch_*.npz")
RUN_FILES = (
    *("log_*.txt", "metrics.csv", "args.json", "run.json", "checkpoint.pt", "best.pt", FILES),
    *("evaluation.json", "roc.png", "confusion.png", "predictions.csv", "features/test.npz"),
    *("curves.png", "report.html", "compare.html", "train.gif", "val.gif", "test.gif"),
    *(*TEST_FILES, EVENT_FILES),
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
        command = shlex.join(["python", "main.py", "--resume", "--save-dir", save_dir])
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after epoch {epoch}; to go on: {command}")
        self.status = 128 + number


# ----------------------------------------------------------------------------------------- the log


class Log:
    """Prints lines, above a progress bar if there is one; `open` starts a file of them.

    The file gets the lines that were printed before it was opened, too.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.file = None
        self.earlier = []

    def __call__(self, line: str) -> None:
        if self.quiet:
            return
        try:
            tqdm.write(line)
            sys.stdout.flush()
        except OSError as error:
            raise WriteError(f"cannot write to the standard output: {error.strerror}") from error
        if self.file is None:
            self.earlier.append(line)
        else:
            self._write(line)

    def open(self, path: Path, printed: bytes = b"") -> None:
        """Starts the file with `printed`, the log of a resumed run up to its checkpoint."""
        replace_file(path, lambda part: part.write_bytes(printed))
        self.file = open(path, "ab", buffering=0)
        for line in self.earlier:
            self._write(line)

    def close(self) -> None:
        self.file.close()
        self.file = None

    def position(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def _write(self, line: str) -> None:
        rest = f"{line}\n".encode(errors="backslashreplace")  # a path that is not UTF-8
        try:
            while rest:  # a disk that fills up takes only part of it
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise _unwritable(Path(self.file.name), error) from error


def progress_bar(
    batches: Iterable, what: str, total: int, unit: str = "batch", *, shown: bool = True
) -> Iterable:
    """The batches, with a progress bar if the output is a terminal."""
    hidden = None if shown else True  # None: hidden unless it is a terminal
    return tqdm(batches, disable=hidden, leave=False, desc=what, total=total, unit=unit)


# --------------------------------------------------------------------------------- a file, written


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file and renames it to `path`: the old file or the new one.

    It creates no directory, so that a removed one is an error. The temporary file is this process's
    own, since drawing processes may outlive a killed run for a moment.
    """
    part = part_of(path, os.getpid())
    try:
        write(part)
        with open(part, "rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        _rename(part, path)
        record(path)
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
    """The whole history as CSV, a row an epoch; what was not measured in an epoch is left empty."""
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


def save_features(path: Path, splits: dict[str, dict], centers, **further) -> None:
    """Features (N, D), labels and predictions (N,), as train_features …, and centers (C, D)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"centers": centers.cpu().numpy(), **further}
    for split, values in splits.items():
        for name in ("features", "labels", "predictions"):
            arrays[f"{split}_{name}"] = values[name].cpu().numpy()
    save_arrays(path, arrays)


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of a file, at most `size`; none if there is no such file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read(size)
    return b""


# ----------------------------------------------------------------------------------- the directory


def record(path: Path) -> None:
    """Adds the file to the list of its run's directory, if it is in one."""
    for directory in (path.parent, path.parent.parent):
        listed = directory / FILES
        if listed.exists() and path.name != FILES:
            name = path.relative_to(directory).as_posix()
            if is_known(name) and name not in recorded(directory):
                with open(listed, "a", encoding="utf-8", newline="\n") as file:
                    file.write(f"{name}\n")
            return


def recorded(directory: Path) -> set[str]:
    """The files that runs have written to the directory, as far as they still have known names."""
    listed = read_start(directory / FILES, 2**26).decode(errors="replace").splitlines()
    if not listed and read_args(directory):  # a run before there was a list
        return {path.relative_to(directory).as_posix() for path in _known_files(directory)}
    return {name for name in listed if is_known(name)}


def is_known(name: str) -> bool:
    """Whether a path below --save-dir is one that a run writes."""
    patterns = (*EPOCH_FILES, *RUN_FILES, "figures/*.pdf", "figures/*.svg", "figures/*.png")
    path = Path(name)
    return ".." not in path.parts and any(
        len(path.parts) == pattern.count("/") + 1 and path.match(pattern) for pattern in patterns
    )


def _known_files(directory: Path) -> list[Path]:
    found = (path for pattern in (*EPOCH_FILES, *RUN_FILES) for path in directory.glob(pattern))
    return [path for path in found if not path.is_dir()]


def read_args(directory: Path) -> dict:
    """args.json of a run of main.py; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        args = json.loads((directory / "args.json").read_text(encoding="utf-8"))
        if isinstance(args, dict) and {"recipe", "dataset", "model", "save_dir"} <= args.keys():
            return args
    return {}


def check_save_dir(path: str, overwrite: bool) -> None:
    """RunError if `path` cannot be a run's directory or has others' files; creates nothing."""
    directory = Path(path)
    nearest = directory.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise RunError(f"--save-dir must be a directory, got {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"--save-dir must be writable, got {path}: {nearest} is not")
    ours = recorded(directory)
    names = sorted(each.relative_to(directory).as_posix() for each in _known_files(directory))
    foreign = [name for name in names if name not in ours and name != FILES]
    if foreign and not overwrite:
        raise RunError(
            f"--save-dir must have no files of others that a run would replace, got {path} with "
            f"{foreign[0]}: choose another directory, or --overwrite"
        )


def clear(directory: Path, after: int | None = None) -> bool:
    """Removes an earlier run's files, or only those of epochs after `after`; were there any?

    Only files that a run is known to have written go, none behind a symbolic link to a directory.
    """
    names = recorded(directory)
    late = {path for epoch, path in epoch_files(directory) if epoch > (after or 0)}
    removed = False
    for name in sorted(names - {FILES}):
        path = directory / name
        for part in path.parent.glob(part_of(path, "*").name):  # of a killed run
            part.unlink()
        inside = path.parent.resolve() == directory.resolve() / Path(name).parent
        if inside and (after is None or path in late) and path.is_file():
            path.unlink()
            removed = True
    return removed


def epoch_files(directory: Path, patterns: Sequence[str] = EPOCH_FILES) -> list[tuple[int, Path]]:
    """The files of single epochs, with their epochs, in ascending order."""
    found = []
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        number = re.fullmatch(r"epoch_([1-9]\d*)", path.stem)
        if number:
            found.append((int(number[1]), path))
    return sorted(found)


def copy_epochs(source: Path, target: Path, last: int) -> None:
    """Copies what goes along with a run to another directory: the files of epochs up to `last` …"""
    paths = [path for epoch, path in epoch_files(source) if epoch <= last]
    for pattern in ("best.pt", "evaluation.json", "roc.png", *TEST_FILES, EVENT_FILES):
        paths += source.glob(pattern)
    for path in paths:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        replace_file(copy, lambda part, path=path: shutil.copyfile(path, part))


@contextlib.contextmanager
def claim(save_dir: Path, log: Log) -> Iterator[Callable[[], None]]:
    """Creates the directory and locks it against other runs; RunError if one is using it.

    Yields a function that raises WriteError if the directory has been removed or replaced.
    """
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save_dir).close()
        (save_dir / FILES).touch()
    except OSError as error:
        reason = f"got {save_dir}: {error.strerror}"
        raise RunError(f"--save-dir must be a writable directory, {reason}") from error
    try:
        import fcntl
    except ImportError:  # Windows
        yield lambda: None
        return
    directory = os.open(save_dir, os.O_RDONLY)

    def check() -> None:
        exists = save_dir.exists() and os.path.samestat(save_dir.stat(), os.fstat(directory))
        if not exists:
            raise WriteError(f"--save-dir {save_dir} was removed while the run was writing to it")

    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = "is in use by another run; give this one its own"
            raise RunError(f"--save-dir {save_dir} {reason}") from None
        except OSError as error:  # many network disks have no locks
            log(f"--save-dir {save_dir} cannot be locked against other runs: {error.strerror}")
        yield check
    finally:
        os.close(directory)


# ------------------------------------------------------------------------------------- checkpoints


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

    types = dict(args=dict, data=dict, epoch=int, history=list, centers=torch.Tensor)
    types |= dict(rng=torch.Tensor, model=dict, center_loss=dict, scheduler=dict)
    try:
        with zipfile.ZipFile(path) as records:  # torch would take flipped bits as they are
            damaged = records.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, kind in types.items():
            if not isinstance(checkpoint[name], kind):
                raise ValueError(f"wrong {name}")
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:  # of zip, pickle and others, depending on what the file is
        reason = str(error).strip().partition("\n")[0].partition(".")[0] or type(error).__name__
        raise RunError(f"{path} is damaged or no checkpoint of main.py: {reason}") from error
    if checkpoint.get("partial"):
        raise RunError(
            f"{path} was written in the middle of an epoch, by an older version that could go on "
            "from there: resume from a checkpoint of a whole epoch, or start anew"
        )
    return checkpoint


# -------------------------------------------------------------------------------------------- a run


class NoFiles(contextlib.nullcontext):
    """RunFiles of the ranks other than 0, which write nothing."""

    def save(self, *arguments, **options) -> None:
        pass

    save_epoch = save
    finish = save


class RunFiles:
    """The files of a run in --save-dir, which is locked within the context.

    Entering it removes an earlier run's files or, to resume, those of epochs after the checkpoint,
    and starts the log. A file other than a checkpoint that cannot be written is tried again when
    the next epoch ends; `finish` raises WriteError if it still cannot.
    """

    def __init__(self, args: argparse.Namespace, state, log: Log, start: float):
        self.args = args
        self.epoch = state.epoch
        self.history = state.history
        self.log_bytes = state.log_bytes
        self.log = log
        self.start = start
        self.directory = Path(args.save_dir)
        self.context = contextlib.ExitStack()
        self.facts = None  # what run.json has
        self.board = None
        self.unwritten = {}  # what is to be written, by path

    def __enter__(self) -> "RunFiles":
        with self.context:
            self.check = self.context.enter_context(claim(self.directory, self.log))
            source = Path(self.args.resume).resolve().parent if self.args.resume else None
            printed = self._begin(source) if source else self._begin_anew()
            self.log.open(self.directory / f"log_{self.args.dataset}.txt", printed)
            self.context.callback(self.log.close)
            write_json(self.directory / "args.json", vars(self.args))
            if self.args.plot:
                earlier = read_facts(source).get("commands", []) if source else []
                command = shlex.join(["python", *sys.argv])
                self.facts = describe(self.args, [*earlier, command])
            if self.args.tensorboard:
                from plots.tensorboard import Board

                board = Board(self.directory, self.args, self.epoch, self.history)
                self.board = self.context.enter_context(board)
            self.context = self.context.pop_all()  # all went well: the directory stays locked
        return self

    def _begin(self, source: Path) -> bytes:
        """Makes the directory that of the resumed run; returns its log."""
        self.log(f"Resuming after epoch {self.epoch}")
        printed = read_start(source / f"log_{self.args.dataset}.txt", self.log_bytes)
        if source == self.directory.resolve():
            clear(self.directory, after=self.epoch)
        else:
            self._begin_anew()
            copy_epochs(source, self.directory, self.epoch)
        return printed

    def _begin_anew(self) -> bytes:
        if clear(self.directory):
            self.log(f"Replacing the earlier run in {self.directory}")
        return b""

    def __exit__(self, *error) -> None:
        self.context.close()

    def save(self, checkpoint: dict, name: str = "checkpoint.pt") -> None:
        """Writes a checkpoint, and metrics.csv from its history."""
        self.check()
        elapsed = time.monotonic() - self.start
        whole = dict(args=vars(self.args), elapsed=elapsed, log_bytes=self.log.position())
        save_checkpoint(self.directory / name, checkpoint | whole)
        if checkpoint["history"]:
            self._try(write_metrics, "metrics.csv", checkpoint["history"])
        if self.facts:
            self._try(write_json, "run.json", self.facts | dict(elapsed=elapsed))

    def save_epoch(self, row: dict, splits: dict[str, dict], centers) -> None:
        """Writes the files of --save-features, --tensorboard, and those that failed before."""
        for write, name, *arguments in list(self.unwritten.values()):
            self._try(write, name, *arguments)
        if self.args.save_features:
            self._try(save_features, f"features/epoch_{row['epoch']}.npz", splits, centers)
        if self.board:
            self.board.add_epoch(row)

    def finish(self, undrawn: Sequence[str] = ()) -> None:
        """Tries to write what is missing; WriteError if that fails or pictures are undrawn."""
        for write, name, *arguments in self.unwritten.values():
            write(self.directory / name, *arguments)
        if undrawn:
            command = shlex.join(["python", "-m", "plots", str(self.directory)])
            raise WriteError(f"{undrawn[0]}; to draw what is missing: {command}")
        if self.args.plot:
            self.log(f"Pictures in {self.directory}, page {self.directory / 'report.html'}")

    def _try(self, write: Callable, name: str, *arguments) -> None:
        try:
            write(self.directory / name, *arguments)
            self.unwritten.pop(name, None)
        except (WriteError, OSError) as error:
            if name not in self.unwritten:
                self.log(f"{error}; it is tried again after the next epoch")
            self.unwritten[name] = (write, name, *arguments)


def describe(args: argparse.Namespace, commands: list[str]) -> dict:
    """What run.json has of a run in addition to its settings: commands, versions and device."""
    import torch

    on_gpu = torch.cuda.is_available() and not args.use_cpu
    device = f"CPU, threads: {torch.get_num_threads()}"
    if on_gpu:
        device = torch.cuda.get_device_name(int(args.gpu))
    versions = dict(python=platform.python_version())
    for name in ("torch", "torchvision", "numpy"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return dict(commands=commands, versions=versions, device=device, ranks=ranks)


def read_facts(directory: Path) -> dict:
    """run.json; empty if it is missing or damaged."""
    with contextlib.suppress(ValueError):
        return json.loads(read_start(directory / "run.json", 2**20))
    return {}
