"""Lists of pairs of images, as of LFW."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.images import ENDINGS, DatasetError, one_line, some


class Pairs(NamedTuple):
    """Pairs of images, to be told apart."""

    paths: list[str]  # of the images, each once
    first: np.ndarray  # (P,) the places in `paths`
    second: np.ndarray  # (P,)
    same: np.ndarray  # (P,) whether both are of one class
    folds: np.ndarray  # (P,) from 0


def read_pairs(path: str | Path, root: str | Path) -> Pairs:
    """Reads LFW's pairs.txt, of images root/name/name_0001.*, or lines `path path 0|1` below root.

    LFW's first line says how many folds there are and how many pairs of each kind in each. Without
    it there are ten, each with the next tenth of either kind.
    Raises DatasetError for a line of another form, missing images, and a fold with one kind alone.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"--pairs: cannot read {path}: {one_line(error)}") from error
    head = lines[0].split() if lines else []
    is_lfw = len(head) in (1, 2) and "".join(head).isdecimal()
    names = []  # of the two images
    same = []
    for number, line in enumerate(lines[is_lfw:], 1 + is_lfw):
        if words := line.split("\t" if "\t" in line else None):
            try:
                first, second, last = _lfw_pair(*words) if is_lfw else words
                same.append(bool((0, 1).index(int(last))))
                names.append((first, second))
            except (TypeError, ValueError):
                form = "name i j or name i name j" if is_lfw else "path path 0|1"
                raise DatasetError(
                    f"--pairs: line {number} of {path} must be {form}, got {line!r}"
                ) from None
    files = {name: _file(Path(root, name)) for pair in names for name in pair}
    if missing := [name for name, file in files.items() if file is None]:
        raise DatasetError(f"--pairs names images that {root} does not hold: {some(missing)}")
    places = {name: place for place, name in enumerate(files)}
    first, second = np.array([[places[name] for name in pair] for pair in names]).reshape(-1, 2).T
    same = np.array(same, bool)
    folds = _folds(same, head if is_lfw else [], path)
    return Pairs(list(files.values()), first, second, same, folds)


def _lfw_pair(name: str, number: str, *other: str) -> tuple[str, str, int]:
    name_2, number_2 = (name, *other) if len(other) == 1 else other
    first = f"{name}/{name}_{int(number):04d}"
    return first, f"{name_2}/{name_2}_{int(number_2):04d}", int(len(other) == 1)


def _file(path: Path) -> str | None:
    """The file of that path, or of that path and the ending of an image."""
    files = (f"{path}{ending}" for ending in ("", *ENDINGS))
    return next((file for file in files if os.path.isfile(file)), None)


def _folds(same: np.ndarray, head: list[str], path: str | Path) -> np.ndarray:
    if len(head) == 2:
        folds = np.arange(len(same)) // max(2 * int(head[1]), 1)
        complete = len(same) == 2 * int(head[0]) * int(head[1])
    else:
        folds = np.zeros(len(same), int)
        complete = True
        for kind in (False, True):
            count = int((same == kind).sum())
            folds[same == kind] = 10 * np.arange(count) // max(count, 1)
    kinds = [len(set(same[folds == fold])) for fold in set(folds)]
    if not complete or len(kinds) < 2 or min(kinds) < 2:
        raise DatasetError(
            f"--pairs: {path} must have at least two folds, complete and with pairs of both kinds, "
            f"got {int(same.sum())} pairs of one class and {int((~same).sum())} of two"
        )
    return folds
