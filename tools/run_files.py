"""The files of a run, which has its directory to itself; checkpoints are the ones that must be."""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import utils
from utils import Log, RunError, WriteError

EVALUATION_FILES = ("evaluation.json", "roc.png", "confusion.png", "features/test.npz", utils.FILES)
PART = re.compile(r"(\w+/)?\.(.+)\.\d+\.part")  # of a killed process


def check_save_dir(path: str, dataset: str, overwrite: bool, evaluate: bool) -> None:
    """RunError if `path` cannot be a run's directory or has others' files; creates nothing."""
    directory = Path(path)
    nearest = directory.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"--save-dir must be a writable directory, got {path}")
    if overwrite or not directory.is_dir():
        return
    others = {name for name, _ in utils.files_in(directory)} - utils.recorded(directory)
    for name in sorted(others):
        would_write = utils.KNOWN.fullmatch(name)
        if name.startswith("log_"):
            would_write = name == f"log_{dataset}.txt"
        if name in EVALUATION_FILES if evaluate else would_write:
            raise RunError(
                f"--save-dir must have no files of others, got {path} with {name}: choose another "
                "directory, or --overwrite"
            )


def clear(directory: Path, after: int | None = None) -> bool:
    """Removes what runs have written, or only that of epochs after `after`; was there any?"""
    ours = utils.recorded(directory) - {"args.json", utils.FILES}  # which are replaced
    removed = False
    for name, path in list(utils.files_in(directory)):
        part = PART.fullmatch(name)
        if part and utils.KNOWN.fullmatch((part[1] or "") + part[2]):
            path.unlink()
        number = re.search(r"/epoch_(\d+)\.", name)
        late = after is None or (number and int(number[1]) > after)
        if name in ours and late:
            path.unlink()
            removed = True
    return removed


def copy_epochs(source: Path, target: Path, last: int) -> None:
    """Copies what goes along with a run to another directory: the files of epochs up to `last` …"""
    paths = [path for epoch, path in utils.epoch_files(source) if epoch <= last]
    others = ["best.pt", "evaluation.json", "roc.png", utils.EVENT_FILES]
    for pattern in (*others, "val/[if]*.npz", "test/[if]*.npz"):  # images and features
        paths += source.glob(pattern)
    for path in paths:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        utils.replace_file(copy, lambda part, path=path: shutil.copyfile(path, part))


def source_of(args: argparse.Namespace) -> Path | None:
    """The directory of the run to resume, behind a link to its checkpoint."""
    return Path(args.resume).resolve().parent if args.resume else None


def is_moved(args: argparse.Namespace) -> bool:
    """Whether a resumed run goes on in another directory."""
    source = source_of(args)
    return source is not None and source != Path(args.save_dir).resolve()


@contextlib.contextmanager
def claim(save_dir: Path, log: Log) -> Iterator[Callable[[], None]]:
    """Creates the directory and locks it against other runs; RunError if one is using it.

    Yields a function that raises WriteError if the directory has been removed or replaced.
    """
    try:
        utils.start_list(save_dir)
    except OSError as error:
        raise RunError(f"--save-dir must be a writable directory, got {save_dir}") from error
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
            raise RunError(f"--save-dir {save_dir} is in use by another run") from None
        except OSError as error:  # many network disks have no locks
            log(f"--save-dir {save_dir} cannot be locked against other runs: {error.strerror}")
        yield check
    finally:
        with contextlib.suppress(OSError):  # processes that were forked meanwhile have it, too
            fcntl.flock(directory, fcntl.LOCK_UN)
        os.close(directory)


class NoFiles(contextlib.nullcontext):
    """RunFiles of the ranks other than 0, which write nothing."""

    directory = None

    def opened(self, *arguments) -> "NoFiles":
        return self

    def __enter__(self) -> "NoFiles":
        return self

    def save(self, *arguments) -> None:
        pass

    save_epoch = save
    write_rest = save
    finish = save


class RunFiles:
    """The files of a run in --save-dir.

    A file other than a checkpoint that cannot be written is tried again when the next epoch ends.
    """

    def __init__(self, args: argparse.Namespace, log: Log):
        self.args = args
        self.log = log
        self.directory = Path(args.save_dir)
        self.facts = None  # what run.json has
        self.board = None
        self.unwritten = {}  # what is to be written, by path

    @contextlib.contextmanager
    def opened(self, state, start: float) -> Iterator["RunFiles"]:
        """The context of a training that goes on from `state` and has begun at `start`."""
        self.start = start
        source = source_of(self.args)
        with contextlib.ExitStack() as context:
            self.check = context.enter_context(claim(self.directory, self.log))
            commands = [utils.shell("python", *sys.argv)]
            printed = b""
            if source:
                commands = utils.read_facts(source).get("commands", []) + commands
                self.log(f"Resuming after epoch {state.epoch}")
                log = source / f"log_{self.args.dataset}.txt"
                printed = log.read_bytes()[: state.log_bytes] if log.exists() else b""
            moved = is_moved(self.args)
            resumed = source and not moved
            if clear(self.directory, after=state.epoch if resumed else None) and not resumed:
                self.log(f"Replacing the earlier run in {self.directory}")
            if moved:
                copy_epochs(source, self.directory, state.epoch)
            utils.write_json(self.directory / "args.json", vars(self.args))
            self.log.open(self.directory / f"log_{self.args.dataset}.txt", printed)
            context.callback(self.log.close)
            if self.args.plot:
                self.facts = describe(self.args, commands)
            if self.args.tensorboard:
                from plots.tensorboard import Board

                board = Board(self.directory, vars(self.args), state.history)
                self.board = context.enter_context(board)
                for path in self.directory.glob(utils.EVENT_FILES):
                    utils.record(path)
            yield self

    def save(self, checkpoint: dict, name: str = "checkpoint.pt") -> None:
        """Writes a checkpoint, and metrics.csv from its history."""
        self.check()
        elapsed = time.monotonic() - self.start
        whole = dict(args=vars(self.args), elapsed=elapsed, log_bytes=self.log.position())
        utils.save_checkpoint(self.directory / name, checkpoint | whole)
        if checkpoint["history"]:
            self.write(utils.write_metrics, "metrics.csv", checkpoint["history"])
        if self.facts:
            self.write(utils.write_json, "run.json", self.facts | dict(elapsed=elapsed))

    def save_epoch(self, row: dict, splits: dict[str, dict], centers) -> None:
        """Writes the files of --save-features, --tensorboard, and those that failed before."""
        self.check()
        for name, (write, *arguments) in list(self.unwritten.items()):
            self.write(write, name, *arguments)
        if self.args.save_features:
            name = f"features/epoch_{row['epoch']}.npz"
            self.write(utils.save_features, name, splits, centers)
        if self.board:
            self.board.add_epoch(row)

    def write(self, write: Callable, name: str, *arguments) -> None:
        """Lets write(path, *arguments) write a file that may fail."""
        try:
            write(self.directory / name, *arguments)
            self.unwritten.pop(name, None)
        except (WriteError, OSError) as error:
            if name not in self.unwritten:
                self.log(f"{error}; it is tried again later")
            self.unwritten[name] = (write, *arguments)

    def write_rest(self) -> None:
        """Tries to write what is missing; WriteError if that fails."""
        for name, (write, *arguments) in self.unwritten.items():
            write(self.directory / name, *arguments)

    def finish(self, undrawn: Sequence[str] = ()) -> None:
        """The end of a finished run; WriteError if files or pictures are missing."""
        self.write_rest()
        if undrawn:
            command = utils.shell("python", "-m", "plots", str(self.directory))
            raise WriteError(f"{undrawn[0]}; to draw what is missing: {command}")
        if self.args.plot:
            self.log(f"Pictures in {self.directory}, page {self.directory / 'report.html'}")


def describe(args: argparse.Namespace, commands: list[str]) -> dict:
    """What run.json has of a run in addition to its settings: commands, versions and device."""
    import torch

    device = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available() and not args.use_cpu:
        device = torch.cuda.get_device_name(int(args.gpu))
    versions = dict(python=platform.python_version())
    for name in ("torch", "torchvision", "numpy"):
        versions[name] = importlib.metadata.version(name)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return dict(commands=commands, versions=versions, device=device, ranks=ranks)
