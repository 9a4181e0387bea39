"""What a run with --plot has written, read again; loads neither torch nor matplotlib."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils

# What <split>/epoch_<N>.npz holds.
ARRAYS = ("points", "labels", "predictions", "centers", "classes", "axes", "title")


@dataclass
class Run:
    """What a run has written to its directory."""

    directory: Path
    args: dict
    history: list[dict]  # the rows of metrics.csv; None where nothing was measured
    log: str
    files: dict[str, dict[int, Path]]  # of each split of the run, its points by epoch

    @property
    def name(self) -> str:
        return "/".join(self.directory.resolve().parts[-2:])

    @property
    def tested(self) -> str:
        """The split the epochs were tested on: "val" with validation images, else "test"."""
        return "test" if "test" in self.files else "val"

    def last_epoch(self) -> int:
        return max(self.files[self.tested])

    def last(self) -> dict[str, np.ndarray]:
        """The arrays of the last tested epoch."""
        return self.epoch(self.tested, self.last_epoch())

    def epoch(self, split: str, number: int) -> dict[str, np.ndarray]:
        if number not in self.files[split]:
            known = f"{', '.join(map(str, self.files[split]))} of {self.directory / split}"
            raise utils.RunError(f"--epochs must be among {known}, got {number}")
        return read_epoch(self.files[split][number])


def read_run(directory: Path) -> Run:
    """Reads the files of a run; RunError if the directory has no run, or one without --plot."""
    args = utils.read_args(directory)
    if not args:
        raise utils.RunError(f"{directory} is no run of main.py: it has no args.json of one")
    files = {}
    for split in utils.SPLITS:
        epochs = dict(utils.epoch_files(directory / split, ["epoch_*.npz"]))
        if epochs:
            files[split] = epochs
    if "train" not in files or len(files) < 2:
        raise utils.RunError(f"{directory} has no points of a tested epoch: train with --plot")
    logs = directory.glob("log_*.txt")
    log = "".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)
    return Run(directory, args, read_history(directory / "metrics.csv"), log, files)


def read_history(path: Path) -> list[dict]:
    """The rows of metrics.csv; None where nothing was measured."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    history = []
    for row in rows:
        values = {name: float(cell) if cell else None for name, cell in row.items()}
        history.append(values | {"epoch": int(row["epoch"])})
    return history


def read_epoch(path: Path, names: Sequence[str] = ARRAYS) -> dict[str, np.ndarray]:
    """The arrays of an epoch; RunError if the file is damaged or lacks one of the names.

    `unseen`, which earlier versions did not write, names the classes whose labels follow `classes`.
    """
    try:
        with np.load(path) as arrays:
            shown = {name: arrays[name] for name in names}
            shown["unseen"] = arrays["unseen"] if "unseen" in arrays else np.array([], str)
    except Exception as error:  # of zip, numpy and others, depending on where the file is damaged
        raise utils.RunError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return shown


def check_comparable(runs: Sequence[Run]) -> None:
    for run in runs[1:]:
        if data_of(run) != data_of(runs[0]):
            raise utils.RunError(
                "--compare needs runs of the same data set, classes and test images, but those "
                f"of {runs[0].directory} and {run.directory} differ"
            )


def data_of(run: Run) -> list:
    last = run.last()
    return [run.args["dataset"], *(last[name].tolist() for name in ("classes", "unseen", "labels"))]


def sample(count: int, limit: int) -> np.ndarray:
    """Ascending row numbers: all `count` of them, or a fixed random sample of `limit`."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])
