"""Everything outside the training itself: the log, the run directory and its files, checkpoints.

torch is imported where it is used: the processes that draw import this file and would wait seconds for torch.
"""

import argparse
import contextlib
import csv
import functools
import glob
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
# What a run writes below its --save-dir; a new run there removes exactly these first. {} is the data set, * in
# EPOCH_FILES the epoch; FIGURE is a pattern for names in figures/, which plots.py draws.
EPOCH_FILES = (
    *(f"{split}/epoch_*.{kind}" for split in SPLITS for kind in ("png", "npz")),
    "features/epoch_*.npz",
)
EVENT_FILES = "tensorboard/events.out.tfevents.*"
TEST_FILES = (
    "val/images.npz",
    "val/features.npz",
    "test/images.npz",
    "test/features.npz",
)  # of all epochs
LOG = "log_{}.txt"
RUN_FILES = (
    "metrics.csv",
    "args.json",
    "run.json",
    "checkpoint.pt",
    "best.pt",
    "curves.png",
    "confusion.png",
    "roc.png",
    "evaluation.json",
    "features/test.npz",
    "predictions.csv",
    "report.html",
    "compare.html",
    *(f"{split}.gif" for split in SPLITS),
    *TEST_FILES,
    EVENT_FILES,
)
FIGURE = r"(curves|confusion|compare|(train|val|test|val_tsne|test_tsne)_epoch(_[1-9]\d*)+)\.(pdf|svg|png)"


class RunError(Exception):
    """What ends a run: the message is one line for the user, `status` the exit status. 2: a mistake of the user's."""

    status = 2


class Diverged(RunError):
    """A loss is no longer finite."""

    status = 3


class WriteError(RunError):
    """A file of the run could not be written: a full disk, a removed directory."""

    status = 1


class Stopped(RunError):
    """A signal has ended the run between two batches."""

    def __init__(self, number: int, run: dict, save_dir: str):
        done = f"epoch {run['epoch']}" + (
            f" and {run['partial']['batches']} batches" if run["partial"] else ""
        )
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {save_dir} holds all up to {done}; to go on: "
            f"python main.py --resume --save-dir {save_dir}"
        )
        self.status = 128 + number


# -------------------------------------------------------------------------------------------------------------- log


class Log:
    """Prints lines, above a progress bar if there is one; `open` starts a file of them, with the earlier ones."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.file, self.earlier = quiet, None, []

    def __call__(self, line: str) -> None:
        if self.quiet:
            return
        try:
            tqdm.write(line)
            sys.stdout.flush()
        except OSError as error:
            with contextlib.suppress(
                OSError
            ):  # what is left in the buffer must not fail again at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise WriteError(f"cannot write to the standard output: {error.strerror}") from error
        if self.file is None:
            self.earlier.append(line)
        else:
            self._write(line)

    def open(self, path: Path, printed: bytes = b"") -> None:
        """Starts the file with `printed`, the log of a resumed run up to its checkpoint."""
        if self.quiet:
            return
        start = printed + b"".join(map(_encoded, self.earlier))
        replace_file(path, lambda part: part.write_bytes(start))
        self.path, self.file = path, open(path, "ab", buffering=0)

    def close(self) -> None:
        self.file.close()
        self.file = None

    def position(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def _write(self, line: str) -> None:
        rest = _encoded(line)
        try:
            while rest:  # a disk that fills up takes only part of it
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode(errors="backslashreplace")  # a path that is not UTF-8


def progress_bar(
    batches: Iterable, what: str, total: int, done: int = 0, *, shown: bool = True
) -> Iterable:
    """The batches, with a progress bar on a terminal."""
    tqdm.monitor_interval = 0  # else it starts a thread, and workers are forked
    hidden = None if shown else True  # None: hidden unless the output is a terminal
    return tqdm(
        batches, disable=hidden, leave=False, desc=what, initial=done, total=total, unit="batch"
    )


# ------------------------------------------------------------------------------------------------------------ files


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file and renames it to `path`, which is at any time the old file or the new one.

    It creates no directory, so that a removed one is an error. The temporary file is this process's own, since drawing
    processes may outlive a killed run for a moment.
    """
    part = part_of(path, os.getpid())
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def part_of(path: Path, process: int | str) -> Path:
    """The temporary file of a process that writes `path`."""
    return path.with_name(f".{path.name}.{process}.part")


def _unwritable(path: Path, error: OSError) -> WriteError:
    reason = f"{error.strerror or error}; the earlier files are whole, --resume goes on from the last checkpoint"
    return WriteError(
        f"cannot write {path}: {reason if path.parent.exists() else 'its directory was removed'}"
    )


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of a file, at most `size`; none if there is no such file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read(size)
    return b""


def check_save_dir(path: str) -> None:
    """Raises RunError if `path` is not a writable directory and cannot become one; creates nothing."""
    nearest = Path(path).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise RunError(f"--save-dir must be a directory, got {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"--save-dir must be writable, got {path}: {nearest} is not")


@contextlib.contextmanager
def claim(save_dir: Path) -> Iterator[Callable[[], None]]:
    """Creates the directory and locks it against other runs; RunError if one is using it.

    Yields a function that raises WriteError if the directory has been removed or replaced by another.
    """
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save_dir).close()
    except OSError as error:
        raise RunError(
            f"--save-dir must be a writable directory, got {save_dir}: {error.strerror}"
        ) from error
    try:
        import fcntl
    except ImportError:  # Windows
        yield lambda: None
        return
    directory = os.open(save_dir, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(directory)
        raise RunError(
            f"--save-dir {save_dir} is in use by another run; give this one its own"
        ) from None
    # Forked workers outlive a killed run for seconds; they must not hold the lock against its --resume.
    held = [directory]
    os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in list(held)])

    def check() -> None:
        if not (save_dir.exists() and os.path.samestat(os.stat(save_dir), os.fstat(directory))):
            raise WriteError(
                f"--save-dir {save_dir} has been removed while the run was writing to it"
            )

    try:
        yield check
    finally:
        os.close(held.pop())


def clear(save_dir: Path, dataset: str, after: int | None = None) -> bool:
    """Removes an earlier run's files, or only those of epochs after `after`; returns whether there were any.

    Also removes half-written files of a killed run. `dataset` is that of the new run.
    """
    datasets = {dataset}
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError
    ):  # no args.json, or not one of ours
        datasets.add(str(json.loads((save_dir / "args.json").read_text())["dataset"]))
    names = [*RUN_FILES, *(glob.escape(LOG.format(dataset)) for dataset in datasets)]
    for name in (*names, *EPOCH_FILES):
        for part in save_dir.glob(str(part_of(Path(name), "*"))):
            if part.name.split(".")[-2].isdecimal():
                part.unlink()
    old = [path for epoch, path in epoch_files(save_dir) if epoch > (after or 0)]
    if after is None:
        old += [path for name in names for path in save_dir.glob(name) if not path.is_dir()]
        figure = re.compile(rf"{FIGURE}|\.{FIGURE}\.\d+\.part")
        old += [path for path in save_dir.glob("figures/*") if figure.fullmatch(path.name)]
    for path in old:
        path.unlink()
    return bool(old)


def epoch_files(directory: Path, patterns: Sequence[str] = EPOCH_FILES) -> list[tuple[int, Path]]:
    """The files of single epochs, with their epochs, in ascending order."""
    paths = (path for pattern in patterns for path in directory.glob(pattern))
    numbers = ((path.stem.removeprefix("epoch_"), path) for path in paths)
    return sorted(
        (int(number), path) for number, path in numbers if number.isdecimal() and number[0] != "0"
    )


def copy_epochs(source: Path, target: Path, last: int) -> None:
    """Copies what goes along with a run: the files of epochs up to `last`, best.pt, the test's and --tensorboard's."""
    paths = [path for epoch, path in epoch_files(source) if epoch <= last]
    patterns = ("best.pt", "evaluation.json", "roc.png", *TEST_FILES, EVENT_FILES)
    for path in (*paths, *(path for pattern in patterns for path in source.glob(pattern))):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        replace_file(copy, functools.partial(shutil.copyfile, path))


def write_json(path: Path, values: dict) -> None:
    replace_file(
        path, lambda part: part.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    )


def write_metrics(path: Path, history: Sequence[dict]) -> None:
    """The whole history as CSV, a row an epoch; what was not measured in an epoch is left empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    replace_file(path, lambda part: part.write_text(table.getvalue()))


def save_features(path: Path, splits: dict[str, dict], centers, **further) -> None:
    """features (N, D), labels and predictions (N,) of each split, as train_features and so on, and centers (C, D)."""
    if "features" not in splits.get(
        "train", splits.get("test")
    ):  # of an epoch that was begun without --save-features
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"centers": centers.cpu().numpy(), **further}
    for split, values in splits.items():
        arrays |= {
            f"{split}_{name}": values[name].cpu().numpy()
            for name in ("features", "labels", "predictions")
        }
    save_arrays(path, arrays)


def save_arrays(path: Path, arrays: dict) -> None:
    """Writes arrays by name, as .npz."""

    def write(part: Path) -> None:
        with open(part, "wb") as file:  # numpy adds .npz to a name, but not to a file
            np.savez(file, **arrays)

    replace_file(path, write)


def describe(args: argparse.Namespace, commands: list[str]) -> dict:
    """What run.json has of a run in addition to its settings: commands, versions and device."""
    import torch

    on_gpu = torch.cuda.is_available() and not args.use_cpu
    device = (
        torch.cuda.get_device_name(int(args.gpu))
        if on_gpu
        else f"CPU, threads: {torch.get_num_threads()}"
    )
    loaded = {
        name: sys.modules[name].__version__
        for name in ("torch", "torchvision", "numpy")
        if name in sys.modules
    }
    versions = dict(python=platform.python_version(), **loaded)
    return dict(
        commands=commands,
        versions=versions,
        device=device,
        ranks=int(os.environ.get("WORLD_SIZE", 1)),
    )


def read_facts(directory: Path) -> dict:
    """run.json; empty if it is missing or damaged."""
    with contextlib.suppress(ValueError):
        return json.loads(read_start(directory / "run.json", 2**20))
    return {}


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    import torch

    buffer = io.BytesIO()  # so that a full disk is an OSError, not an error within torch
    torch.save(checkpoint, buffer)
    replace_file(path, lambda part: part.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU; RunError if it is missing, damaged or not one of main.py."""
    import torch

    types = dict(
        args=dict,
        data=dict,
        epoch=int,
        partial=dict | None,
        history=list,
        centers=torch.Tensor,
        rng=torch.Tensor,
        model=dict,
        center_loss=dict,
        scheduler=dict,
        optimizer_model=dict,
    )
    try:
        with zipfile.ZipFile(
            path
        ) as records:  # torch would take flipped bits within a tensor as they are
            if damaged := records.testzip():
                raise RunError(f"the checkpoint {path} is damaged: wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:  # of zip, pickle and others, depending on where the file is damaged
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"cannot read the checkpoint {path}: {reason}") from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(name), kind) for name, kind in types.items()
    ):
        raise RunError(f"{path} is not a checkpoint of main.py")
    return checkpoint


def restore(path: str, run: dict, modules: dict, to_train: bool) -> dict:
    """Loads the checkpoint `path` into the modules; returns its values of the entries of `run`.

    Raises RunError if it is of other data, of another network or of another optimizer.
    """
    import torch

    checkpoint = load_checkpoint(path)
    data = checkpoint["data"]
    for name, what, needed in (
        ("classes", "training classes", True),
        ("in_channels", "images' channels", "in_channels" in data),  # those of older runs lack it
        ("images", "training images", to_train),
    ):
        if needed and data.get(name) != run["data"][name]:
            raise RunError(
                f"the {what} must be {data.get(name)}, as in {path}, got {run['data'][name]}"
            )
    _check_run(path, checkpoint, run["centers"])
    try:
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        return {name: checkpoint[name] for name in run} | dict(data=run["data"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"the checkpoint {path} does not fit this network and its optimizers"
        ) from error


def _check_run(path: str, saved: dict, centers) -> None:
    """Raises RunError, naming the entry, if a checkpoint holds what no run writes, such as after an edit by hand."""

    def is_partial(batches: int, samples: int, sums, kept: list | None, rng=None) -> bool:
        return (
            batches > 0
            and sums.shape == (3,)
            and (kept is None or [len(each) for each in kept] == 3 * [samples])
        )

    checks = dict(
        epoch=lambda: (
            [row["epoch"] for row in saved["history"]] == list(range(1, saved["epoch"] + 1))
        ),
        partial=lambda: saved["partial"] is None or is_partial(**saved["partial"]),
        centers=lambda: (
            saved["centers"].shape == centers.shape and saved["centers"].is_floating_point()
        ),
        elapsed=lambda: 0 <= saved["elapsed"] < 1e9,
        log_bytes=lambda: saved["log_bytes"] >= 0,
    )
    for name, holds in checks.items():
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            if holds():
                continue
        raise RunError(f"the checkpoint {path} is not as a run wrote it: wrong {name}")


# ------------------------------------------------------------------------------------------------------------- a run


class NoFiles(contextlib.nullcontext):
    """RunFiles of the ranks other than 0, which write nothing."""

    def save(self, run: dict, modules: dict, name: str = "checkpoint.pt") -> None:
        pass

    def save_epoch(self, row: dict, splits: dict[str, dict], centers) -> None:
        pass


class RunFiles:
    """The files of a run in --save-dir, which is locked within the context.

    Entering it removes an earlier run's files or, to resume, those of epochs after the checkpoint, and starts the log.
    """

    def __init__(self, args: argparse.Namespace, run: dict, log: Log, start: float):
        self.args, self.run, self.log, self.directory, self.start = (
            args,
            run,
            log,
            Path(args.save_dir),
            start,
        )
        self.context, self.board, self.facts = contextlib.ExitStack(), None, None

    def __enter__(self) -> "RunFiles":
        args, log_name = self.args, LOG.format(self.args.dataset)
        own = args.resume and Path(args.resume).resolve().parent == self.directory.resolve()
        with self.context:
            self.check = self.context.enter_context(claim(self.directory))
            if args.resume:
                self.log(f"Resuming after epoch {self.run['epoch']}")
                begun = self.run["partial"]
                if begun and begun["kept"] is None and (args.plot or args.save_features):
                    self.log(
                        f"Epoch {self.run['epoch'] + 1} was begun without --plot and --save-features: it has "
                        f"neither, as the features of its first {begun['batches']} batches are gone"
                    )
            printed = (
                read_start(Path(args.resume).with_name(log_name), self.run["log_bytes"])
                if args.resume
                else b""
            )
            if (
                clear(self.directory, args.dataset, after=self.run["epoch"] if own else None)
                and not own
            ):
                self.log(f"Replacing the earlier run in {self.directory}")
            if args.resume and not own:
                copy_epochs(Path(args.resume).parent, self.directory, self.run["epoch"])
            self.log.open(self.directory / log_name, printed)
            self.context.callback(self.log.close)
            write_json(self.directory / "args.json", vars(args))
            if args.plot:
                earlier = (
                    read_facts(Path(args.resume).parent).get("commands", []) if args.resume else []
                )
                self.facts = describe(args, [*earlier, shlex.join(["python", *sys.argv])])
            if args.tensorboard:
                self.board = self.context.enter_context(Board(self.directory, args, self.run))
            self.context = self.context.pop_all()  # all went well: the directory stays locked
        return self

    def __exit__(self, *error) -> None:
        self.context.close()

    def save(self, run: dict, modules: dict, name: str = "checkpoint.pt") -> None:
        """Writes metrics.csv and a checkpoint of `run` and the state dicts of `modules`."""
        self.check()
        run.update(elapsed=time.monotonic() - self.start, log_bytes=self.log.position())
        if run["history"]:
            write_metrics(self.directory / "metrics.csv", run["history"])
        if self.facts:
            write_json(self.directory / "run.json", self.facts | dict(elapsed=run["elapsed"]))
        states = {name: module.state_dict() for name, module in modules.items()}
        save_checkpoint(self.directory / name, dict(args=vars(self.args), **run, **states))

    def save_epoch(self, row: dict, splits: dict[str, dict], centers) -> None:
        """Writes the files of --save-features and --tensorboard."""
        self.check()
        if self.args.save_features:
            save_features(
                self.directory / "features" / f"epoch_{row['epoch']}.npz", splits, centers
            )
        if self.board:
            self.board.add_epoch(row)


class Board:
    """What --tensorboard writes: the settings as hparams, the metrics of each epoch and the pictures of --plot.

    Pictures are drawn in the background, so they are added when the next epoch ends or, the last ones, on leaving the
    context. The metrics of a resumed run's earlier epochs are added if they have not been recorded.
    """

    def __init__(self, directory: Path, args: argparse.Namespace, run: dict):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.directory, recorded = directory, list(directory.glob(EVENT_FILES))
        self.added = {
            path for epoch, path in self._pictures() if recorded and epoch <= run["epoch"]
        }
        self.writer = SummaryWriter(directory / "tensorboard", purge_step=run["epoch"] + 1)
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in vars(args).items()
        }
        for summary in hparams(
            settings, dict.fromkeys(["test_accuracy", "nearest_center_accuracy", "train_loss"])
        ):
            self.writer.file_writer.add_summary(summary)
        for row in [] if recorded else run["history"]:
            self._add_metrics(row)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error) -> None:
        try:
            self._add_pictures()
        finally:
            self.writer.close()

    def add_epoch(self, row: dict) -> None:
        self._add_metrics(row)
        self._add_pictures()
        self.writer.flush()

    def _add_metrics(self, row: dict) -> None:
        for name, value in row.items():
            if value is not None and name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])

    def _pictures(self) -> list[tuple[int, Path]]:
        return epoch_files(self.directory, [f"{split}/epoch_*.png" for split in SPLITS])

    def _add_pictures(self) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for epoch, path in self._pictures():
            if path not in self.added:
                image = Summary.Image(colorspace=3, encoded_image_string=path.read_bytes())
                summary = Summary(
                    value=[Summary.Value(tag=f"{path.parent.name} features", image=image)]
                )
                self.writer.file_writer.add_summary(summary, epoch)
                self.added.add(path)
