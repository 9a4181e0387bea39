"""The page of a run, report.html: one file that opens from the disk, without a server or a network.

Its HTML, CSS and script are in page/; `write` puts them and the data of the runs into one file.
Importing this loads neither torch nor matplotlib.
"""

import base64
import csv
import io
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils

PAGE = Path(__file__).parent / "page"
TEST_POINTS, TRAIN_POINTS, TSNE_POINTS = 10_000, 5_000, 5_000  # of more, a fixed sample
EPOCHS = 100  # of more, as many evenly spaced ones
SPRITE_BYTES = 3_000_000  # of the test images; above it they become JPEG
LOG_CHARACTERS = 200_000  # of a longer log, the end
GRID = 65_534  # steps between the smallest and the largest coordinate of an epoch; one more means "not finite"
ARRAYS = (
    "points",
    "labels",
    "predictions",
    "centers",
    "classes",
    "axes",
    "title",
)  # of <split>/epoch_<N>.npz


@dataclass
class Run:
    """What a run with --plot has written to its directory. Labels from len(classes) on are of unknown classes."""

    directory: Path
    args: dict
    history: list[dict]  # the rows of metrics.csv; None where nothing was measured
    facts: dict  # run.json: commands, versions, device, elapsed seconds
    log: str
    files: dict[str, dict[int, Path]]  # of each split of the run, its points by epoch
    classes: list[str]

    @property
    def tested(self) -> str:
        """The split that the epochs were tested on: "val" for a run with validation images, else "test"."""
        return "test" if "test" in self.files else "val"

    def last(self) -> dict[str, np.ndarray]:
        """The arrays of the last tested epoch."""
        return self.epoch(self.tested, max(self.files[self.tested]))

    def epoch(self, split: str, number: int) -> dict[str, np.ndarray]:
        """The arrays of an epoch; RunError if it has none, or a damaged file."""
        if number not in self.files[split]:
            known = ", ".join(map(str, self.files[split]))
            raise utils.RunError(
                f"--epochs must be among those of {self.directory / split}, {known}, got {number}"
            )
        return read_arrays(self.files[split][number], ARRAYS)


def read_run(directory: Path) -> Run:
    """Reads the files of a run; RunError if the directory has no run, or one without --plot."""
    try:
        args = json.loads((directory / "args.json").read_text())
        with open(directory / "metrics.csv", newline="") as file:
            rows = [
                {name: measured(value) for name, value in row.items()}
                for row in csv.DictReader(file)
            ]
        history = [row | dict(epoch=int(row["epoch"])) for row in rows]
        log = utils.read_start(directory / f"log_{args['dataset']}.txt", 2**30).decode(
            errors="replace"
        )
        facts = utils.read_facts(directory)
    except OSError as error:
        raise utils.RunError(
            f"{directory} is no run: {error.strerror}: {error.filename}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise utils.RunError(
            f"{directory} is no run: args.json, metrics.csv or run.json is damaged"
        ) from error
    files = {
        split: dict(utils.epoch_files(directory / split, ["epoch_*.npz"])) for split in utils.SPLITS
    }
    files = {split: numbers for split, numbers in files.items() if numbers}
    if "train" not in files or len(files) < 2:
        raise utils.RunError(f"{directory} has no points of a tested epoch: train with --plot")
    run = Run(directory, args, history, facts, log, files, [])
    run.classes = [str(name) for name in run.last()["classes"]]
    return run


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
    if missing := [name for name in names if name not in arrays]:
        raise utils.RunError(
            f"{path} has no {', '.join(missing)}: train again, with --plot of this version"
        )
    return arrays


def names(runs: Sequence[Run]) -> list[str]:
    """The names of the runs: their directories, with as much of the paths as makes them different."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts))):
        short = ["/".join(each[-length:]) for each in parts]
        if len(set(short)) == len(short):
            break
    return short


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises RunError unless the runs have the same data set, classes and test labels."""
    labels = [run.last()["labels"] for run in runs]
    for run, tested in zip(runs, labels, strict=True):
        for what, mine, first in (
            ("dataset", run.args["dataset"], runs[0].args["dataset"]),
            ("classes", run.classes, runs[0].classes),
            ("test images", tested.tolist(), labels[0].tolist()),
        ):
            if mine != first:
                raise utils.RunError(
                    f"--compare needs runs of the same data, but {runs[0].directory} and "
                    f"{run.directory} differ in their {what}"
                )


def sample(count: int, limit: int) -> np.ndarray:
    """Ascending row numbers: all `count` of them, or a fixed random sample of `limit`."""
    return (
        np.arange(count)
        if count <= limit
        else np.sort(np.random.default_rng(0).permutation(count)[:limit])
    )


def pack(values: np.ndarray) -> str:
    """Integers below 65,536, for the page: all low bytes, then all high bytes, compressed by zlib, in base64."""
    pairs = np.ascontiguousarray(values, dtype="<u2").view(np.uint8).reshape(-1, 2)
    return base64.b64encode(zlib.compress(pairs.T.tobytes(), 9)).decode()


def quantise(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Points (N, 2) as integers (2, N), and with x = low + integer * step of both axes: [low x, step x, low y, step y].

    A point that is not finite becomes GRID + 1.
    """
    finite = np.isfinite(points).all(1)
    low, high = (
        (points[finite].min(0), points[finite].max(0))
        if finite.any()
        else (np.zeros(2), np.zeros(2))
    )
    low, step = low.astype(np.float64), np.maximum(high.astype(np.float64) - low, 1e-30) / GRID
    steps = np.full(points.shape, GRID + 1.0)
    steps[finite] = ((points[finite] - low) / step).round()
    return steps.T, [low[0], step[0], low[1], step[1]]


def pack_split(run: Run, split: str) -> dict:
    """The points and centers of a split over the epochs; for test images also their rows, to find the images.

    All unknown classes get the label len(run.classes).
    """
    numbers = list(run.files[split])
    epochs = [numbers[index] for index in spaced(len(numbers))]
    last = run.epoch(split, epochs[-1])
    rows = sample(len(last["labels"]), TRAIN_POINTS if split == "train" else TEST_POINTS)
    kept = dict(epochs=[], grids=[], centers=[], points=[], labels=[], predictions=[])
    for number in epochs:
        shown = run.epoch(split, number)
        if len(shown["labels"]) != len(last["labels"]):
            raise utils.RunError(
                f"the data of {run.directory} have changed during the run: {len(shown['labels'])} {split} images in "
                f"epoch {number}, {len(last['labels'])} in epoch {epochs[-1]}"
            )
        # Training images are shuffled in each epoch; by class, their labels take no room.
        order = rows[np.argsort(shown["labels"][rows], kind="stable")] if split == "train" else rows
        points, grid = quantise(shown["points"][order])
        centers = [
            [float(x), float(y)] if np.isfinite([x, y]).all() else None for x, y in shown["centers"]
        ]
        for name, value in dict(epochs=number, grids=grid, centers=centers, points=points).items():
            kept[name].append(value)
        kept["labels"].append(np.minimum(shown["labels"][order], len(run.classes)))
        kept["predictions"].append(shown["predictions"][order])
    packed = {name: pack(np.stack(kept.pop(name))) for name in ("points", "labels", "predictions")}
    return (
        kept
        | packed
        | dict(
            rows=[] if split == "train" else rows.tolist(), count=len(rows), of=len(last["labels"])
        )
    )


def spaced(count: int) -> list[int]:
    """At most EPOCHS of `count` indices, evenly spaced, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, EPOCHS)).round().astype(int).tolist()))


def pack_images(run: Run, rows: Sequence[int]) -> dict | None:
    """The test images of these rows, side by side in one image; None if the run has kept others, or none."""
    from PIL import Image

    path = run.directory / run.tested / "images.npz"
    if not path.exists():
        return None
    saved = read_arrays(path, ("rows", "images"))
    images = saved["images"]  # uint8 (N, C, H, W)
    if saved["rows"].tolist() != list(rows):
        return None
    count, channels, height, width = images.shape
    columns = int(np.ceil(count**0.5))
    padded = np.concatenate([images, np.zeros((-count % columns, *images.shape[1:]), np.uint8)])
    tiles = padded.reshape(-1, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = tiles.reshape(-1, columns * width, channels)
    sprite = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels[:, :, :3])
    lossless = (
        [("PNG", dict(optimize=True))] if pixels.size < 4 * SPRITE_BYTES else []
    )  # else too large
    for format, options in (
        *lossless,
        *(("JPEG", dict(quality=quality)) for quality in (90, 75, 50, 30)),
    ):
        file = io.BytesIO()
        sprite.save(file, format, **options)
        if file.tell() <= SPRITE_BYTES:
            break
    source = f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return dict(source=source, columns=columns, width=width, height=height)


def pack_run(run: Run) -> dict:
    splits = {split: pack_split(run, split) for split in ("train", run.tested)}
    return dict(
        args=run.args,
        facts=run.facts,
        history=run.history,
        log=run.log[-LOG_CHARACTERS:],
        axes=[str(name) for name in run.last()["axes"]],
        splits=splits,
        tested=run.tested,
        images=pack_images(run, splits[run.tested]["rows"]),
    )


def write(part: Path, runs: Sequence[Run], **looks: Sequence[str]) -> None:
    """Writes the page of a run, or of several of the same data.

    `looks`: the color, the mark at the center and the short name of each class, as in the pictures.
    """
    packed = [pack_run(run) | dict(name=name) for run, name in zip(runs, names(runs), strict=True)]
    for run in packed[1:]:
        if run["images"] == packed[0]["images"]:
            run["images"] = "as the first run"  # they are stored once
    data = dict(classes=runs[0].classes, runs=packed, **looks)
    # A class may be called </script>: within the page's <script>, JSON has no "<".
    parts = dict(
        json=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    )
    parts |= {
        kind: (PAGE / f"report.{kind}").read_text(encoding="utf-8").strip()
        for kind in ("html", "css", "js")
    }
    part.write_text(
        re.sub(r"{{(css|js|json)}}", lambda name: parts[name[1]], parts["html"]), encoding="utf-8"
    )
