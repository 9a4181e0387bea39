"""Lists of pairs of images, as of LFW."""

import os
from collections.abc import Sequence
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
    it there are ten, each with the next tenth of either kind. Raises DatasetError.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"--pairs: cannot read {path}: {one_line(error)}") from error
    head = lines[0].split() if lines else []
    is_lfw = len(head) in (1, 2) and "".join(head).isdecimal()
    form = "name i j or name i name j" if is_lfw else "path path 0|1"
    pairs = []
    for number, line in enumerate(lines[is_lfw:], 1 + is_lfw):
        words = line.split("\t" if "\t" in line else None)
        try:
            pairs += [(_lfw_pair if is_lfw else _pair)(*words)] if words else []
        except (TypeError, ValueError):
            raise DatasetError(
                f"--pairs: line {number} of {path} must be {form}, got {line!r}"
            ) from None
    files = {name: _file(Path(root, name)) for *names, _ in pairs for name in names}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise DatasetError(f"--pairs names images that {root} does not hold: {some(missing)}")
    places = {name: place for place, name in enumerate(files)}
    first = np.array([places[name] for name, _, _ in pairs])
    second = np.array([places[name] for _, name, _ in pairs])
    same = np.array([is_same for _, _, is_same in pairs], bool)
    folds = _folds(same, head if is_lfw else [], path)
    return Pairs(list(files.values()), first, second, same, folds)


def _pair(first: str, second: str, same: str) -> tuple[str, str, bool]:
    return first, second, bool(["0", "1"].index(same))


def _lfw_pair(name: str, number: str, *other: str) -> tuple[str, str, bool]:
    same = len(other) == 1
    name_2, number_2 = (name, *other) if same else other
    first = f"{name}/{name}_{int(number):04d}"
    return first, f"{name_2}/{name_2}_{int(number_2):04d}", same


def _file(path: Path) -> str | None:
    """The file, whose ending may be left out."""
    files = (f"{path}{ending}" for ending in ("", *ENDINGS))
    return next((file for file in files if os.path.isfile(file)), None)


def _folds(same: np.ndarray, head: Sequence[str], path: str | Path) -> np.ndarray:
    folds = np.zeros(len(same), int)
    complete = True
    if len(head) == 2:
        count, of_kind = map(int, head)
        complete = len(same) == 2 * count * of_kind
        folds = np.arange(len(same)) // max(2 * of_kind, 1)
    else:
        for kind in (False, True):
            rows = (same == kind).nonzero()[0]
            folds[rows] = 10 * np.arange(len(rows)) // max(len(rows), 1)
    kinds = [len(set(same[folds == fold])) for fold in set(folds)]
    if not complete or len(kinds) < 2 or min(kinds) < 2:
        raise DatasetError(
            f"--pairs: {path} must have at least two folds, complete and with pairs of both kinds, "
            f"got {int(same.sum())} pairs of one class and {int((~same).sum())} of two"
        )
    return folds
