"""What a run with --plot has written, read again; loads neither torch nor matplotlib."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils

# Of more images, a fixed sample is shown.
TEST_POINTS = 10_000
TRAIN_POINTS = 5_000
TSNE_POINTS = 5_000
# What <split>/epoch_<N>.npz holds.
ARRAYS = ("points", "labels", "predictions", "centers", "classes", "axes", "title")


@dataclass
class Run:
    """What a run has written to its directory."""

    directory: Path
    args: dict
    history: list[dict]  # the rows of metrics.csv; None where nothing was measured
    facts: dict  # run.json: commands, versions, device, elapsed seconds
    log: str
    files: dict[str, dict[int, Path]]  # of each split of the run, its points by epoch
    classes: list[str]
    unseen: list[str]  # the test classes that were not trained; their labels follow

    @property
    def tested(self) -> str:
        """The split the epochs were tested on: "val" with validation images, else "test"."""
        return "test" if "test" in self.files else "val"

    def last(self) -> dict[str, np.ndarray]:
        """The arrays of the last tested epoch."""
        return self.epoch(self.tested, max(self.files[self.tested]))

    def epoch(self, split: str, number: int) -> dict[str, np.ndarray]:
        """The arrays of an epoch; RunError if it has none, or a damaged file."""
        if number not in self.files[split]:
            known = ", ".join(map(str, self.files[split]))
            directory = self.directory / split
            raise utils.RunError(
                f"--epochs must be among those of {directory}, {known}, got {number}"
            )
        return read_epoch(self.files[split][number])


def read_run(directory: Path) -> Run:
    """Reads the files of a run; RunError if the directory has no run, or one without --plot."""
    try:
        args = json.loads((directory / "args.json").read_text())
        history = read_history(directory / "metrics.csv")
        log = read_log(directory, args["dataset"])
        facts = utils.read_facts(directory)
    except OSError as error:
        raise utils.RunError(
            f"{directory} is no run: {error.strerror}: {error.filename}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise utils.RunError(
            f"{directory} is no run: args.json, metrics.csv or run.json is damaged"
        ) from error
    files = {}
    for split in utils.SPLITS:
        epochs = dict(utils.epoch_files(directory / split, ["epoch_*.npz"]))
        if epochs:
            files[split] = epochs
    if "train" not in files or len(files) < 2:
        raise utils.RunError(f"{directory} has no points of a tested epoch: train with --plot")
    run = Run(directory, args, history, facts, log, files, [], [])
    last = run.last()
    run.classes = last["classes"].tolist()
    run.unseen = last["unseen"].tolist()
    return run


def read_log(directory: Path, dataset: str) -> str:
    """The log; args.json may be anyone's, so that only a file that is there can be meant."""
    logs = {path.name: path for path in directory.glob("log_*.txt")}
    path = logs.get(f"log_{dataset}.txt")
    return path.read_text(encoding="utf-8", errors="replace") if path else ""


def read_history(path: Path) -> list[dict]:
    """The rows of metrics.csv: a whole number for the epoch, else a number or None."""
    history = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            values = {name: measured(cell) for name, cell in row.items()}
            values["epoch"] = int(row["epoch"])
            history.append(values)
    if not history:
        raise ValueError("no epoch")
    return history


def measured(cell: str) -> float | None:
    """A cell of metrics.csv; None where it is empty or, as JSON has no such numbers, not finite."""
    return float(cell) if cell and math.isfinite(float(cell)) else None


def read_arrays(path: Path, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; RunError if it is missing, damaged or lacks one of the names."""
    try:
        with np.load(path) as arrays:
            arrays = dict(arrays)
    except Exception as error:  # of zip, numpy and others, depending on where the file is damaged
        raise utils.RunError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise utils.RunError(
            f"{path} has no {', '.join(missing)}: train again, with --plot of this version"
        )
    return arrays


def read_epoch(path: Path, names: Sequence[str] = ARRAYS) -> dict[str, np.ndarray]:
    """The arrays of an epoch, and `unseen`, the names of the classes whose labels follow `classes`.

    Earlier versions wrote no such names: there, all of these are the class "unknown".
    """
    shown = read_arrays(path, names)
    if "unseen" not in shown:
        count = len(shown["classes"])
        shown["unseen"] = np.array(["unknown"] * bool((shown["labels"] >= count).any()), str)
        shown["labels"] = np.minimum(shown["labels"], count)
    return shown


def names_of(runs: Sequence[Run]) -> list[str]:
    """The directories of the runs, with as much of the paths as makes them different."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts))):
        short = ["/".join(each[-length:]) for each in parts]
        if len(set(short)) == len(short):
            break
    return short


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises RunError unless the runs have the same data set, classes and test labels."""
    first = what_was_tested(runs[0])
    for run in runs[1:]:
        for what, value in what_was_tested(run).items():
            if value != first[what]:
                raise utils.RunError(
                    f"--compare needs runs of the same data, but {runs[0].directory} and "
                    f"{run.directory} differ in their {what}"
                )


def what_was_tested(run: Run) -> dict:
    labels = run.last()["labels"].tolist()
    classes = run.classes + run.unseen
    return {"dataset": run.args["dataset"], "classes": classes, "test images": labels}


def sample(count: int, limit: int) -> np.ndarray:
    """Ascending row numbers: all `count` of them, or a fixed random sample of `limit`."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])
