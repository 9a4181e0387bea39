"""What a run with --plot has written, read again; loads neither torch nor matplotlib."""

import csv
import json
import math
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
    facts: dict  # run.json: commands, versions, device, elapsed seconds
    log: str
    files: dict[str, dict[int, Path]]  # of each split of the run, its points by epoch

    @property
    def tested(self) -> str:
        """The split the epochs were tested on: "val" with validation images, else "test"."""
        return "test" if "test" in self.files else "val"

    def last(self) -> dict[str, np.ndarray]:
        """The arrays of the last tested epoch."""
        return self.epoch(self.tested, max(self.files[self.tested]))

    def epoch(self, split: str, number: int) -> dict[str, np.ndarray]:
        if number not in self.files[split]:
            known = f"{', '.join(map(str, self.files[split]))} of {self.directory / split}"
            raise utils.RunError(f"--epochs must be among {known}, got {number}")
        return read_epoch(self.files[split][number])


def read_run(directory: Path) -> Run:
    """Reads the files of a run; RunError if the directory has no run, or one without --plot."""
    try:
        args = json.loads((directory / "args.json").read_text())
        # args.json may be anyone's: only a log that lies in the directory can be meant.
        logs = {path.name: path for path in directory.glob("log_*.txt")}
        path = logs.get(f"log_{args['dataset']}.txt")
        log = path.read_text(encoding="utf-8", errors="replace") if path else ""
        history = read_history(directory / "metrics.csv")
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise utils.RunError(f"{directory} is no run: args.json, metrics.csv: {reason}") from error
    files = {}
    for split in utils.SPLITS:
        epochs = dict(utils.epoch_files(directory / split, ["epoch_*.npz"]))
        if epochs:
            files[split] = epochs
    if "train" not in files or len(files) < 2:
        raise utils.RunError(f"{directory} has no points of a tested epoch: train with --plot")
    return Run(directory, args, history, utils.read_facts(directory), log, files)


def read_history(path: Path) -> list[dict]:
    """The rows of metrics.csv; None where nothing, or no finite number, was measured."""
    history = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            values = {name: float(cell or "nan") for name, cell in row.items()}
            values = {name: x if math.isfinite(x) else None for name, x in values.items()}
            history.append(values | {"epoch": int(row["epoch"])})
    if not history:
        raise ValueError("no epochs")
    return history


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; RunError if it is missing, damaged or lacks one of the names."""
    try:
        with np.load(path) as arrays:
            arrays = dict(arrays)
    except Exception as error:  # of zip, numpy and others, depending on where the file is damaged
        raise utils.RunError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise utils.RunError(f"{path} has no {', '.join(missing)}: train again, with --plot")
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
    """The names of the directories of the runs, or their paths where two have the same name."""
    paths = [run.directory.resolve() for run in runs]
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else list(map(str, paths))


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises RunError unless the runs have the same data set, classes and test labels."""
    first = runs[0].last()
    for run in runs[1:]:
        differing = [
            name
            for name in ("classes", "unseen", "labels")
            if not np.array_equal(run.last()[name], first[name])
        ]
        if run.args["dataset"] != runs[0].args["dataset"]:
            differing.insert(0, "dataset")
        if differing:
            raise utils.RunError(
                f"--compare needs runs of the same data, but {runs[0].directory} and "
                f"{run.directory} differ in their {differing[0]}"
            )


def sample(count: int, limit: int) -> np.ndarray:
    """Ascending row numbers: all `count` of them, or a fixed random sample of `limit`."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])
