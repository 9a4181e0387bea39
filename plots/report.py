"""The page of a run, report.html: one file that opens from the disk, without a server or a network.

Its HTML, CSS and scripts are in page/; `write_page` joins them and the data of the runs.
Importing this loads neither torch nor matplotlib.
"""

import base64
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from plots.looks import Looks
from plots.saved import (
    TEST_POINTS,
    TRAIN_POINTS,
    Run,
    names_of,
    read_arrays,
    read_run,
    sample,
)

PAGE = Path(__file__).parent / "page"
# In this order they become one script; `start` is called by the last.
SCRIPTS = ("base", "data", "view", "points", "panels", "epochs", "legend", "curves", "confusion")
SCRIPTS += ("run", "start")
EPOCHS = 100  # of more, as many evenly spaced ones
SPRITE_BYTES = 3_000_000  # of the test images; above it they become JPEG
LOG_CHARACTERS = 200_000  # of a longer log, the end
GRID = 65_534  # steps between the smallest and the largest coordinate of an epoch
NOT_FINITE = GRID + 1


def write_page(part: Path, directories: Sequence[Path]) -> None:
    """Writes the page of a run, or of several of the same data side by side."""
    runs = [read_run(directory) for directory in directories]
    part.write_text(page_of(runs), encoding="utf-8")


def page_of(runs: Sequence[Run]) -> str:
    """The HTML text of the page."""
    packed = [pack_run(run) for run in runs]
    for run, name in zip(packed, names_of(runs), strict=True):
        run["name"] = name
        if run is not packed[0] and run["images"] == packed[0]["images"]:
            run["images"] = "as the first run"  # they are stored once
    looks = Looks(runs[0].last())
    data = {
        "names": looks.known + looks.unseen,
        "known": len(looks.known),
        "colors": looks.colors,
        "marks": looks.marks,
        "short": looks.short(20),
        "runs": packed,
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    parts = {
        # A class may be called </script>: within the page's <script>, JSON has no "<".
        "json": text.replace("<", "\\u003c"),
        "css": read_part("page.css"),
        "js": "\n\n".join(read_part(f"{name}.js") for name in SCRIPTS),
    }
    return re.sub(r"{{(css|js|json)}}", lambda name: parts[name[1]], read_part("page.html"))


def read_part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8").strip()


def pack_run(run: Run) -> dict:
    splits = {split: pack_split(run, split) for split in ("train", run.tested)}
    return {
        "args": run.args,
        "facts": run.facts,
        "history": run.history,
        "log": run.log[-LOG_CHARACTERS:],
        "axes": [str(name) for name in run.last()["axes"]],
        "splits": splits,
        "tested": run.tested,
        "images": pack_images(run, splits[run.tested]["rows"]),
    }


def pack_split(run: Run, split: str) -> dict:
    """The points and centers of a split over the epochs; of a test also the rows of its images."""
    numbers = list(run.files[split])
    epochs = [numbers[index] for index in spaced(len(numbers))]
    count = len(run.epoch(split, epochs[-1])["labels"])
    rows = sample(count, TRAIN_POINTS if split == "train" else TEST_POINTS)
    kept = {"grids": [], "centers": []}
    values = {"points": [], "labels": [], "predictions": []}
    for number in epochs:
        shown = run.epoch(split, number)
        labels = shown["labels"]
        if len(labels) != count:
            raise utils.RunError(
                f"the data of {run.directory} have changed during the run: {len(labels)} {split} "
                f"images in epoch {number}, {count} in epoch {epochs[-1]}"
            )
        order = rows
        if split == "train":  # shuffled in each epoch; by class, labels take no room
            order = rows[np.argsort(labels[rows], kind="stable")]
        points, grid = quantise(shown["points"][order])
        kept["grids"].append(grid)
        kept["centers"].append([finite_or_none(center) for center in shown["centers"]])
        values["points"].append(points)
        values["labels"].append(labels[order])
        values["predictions"].append(shown["predictions"][order])
    for name, stack in values.items():
        kept[name] = pack(np.stack(stack))
    kept["epochs"] = epochs
    kept["rows"] = [] if split == "train" else rows.tolist()
    kept["count"] = len(rows)
    kept["of"] = count
    return kept


def spaced(count: int) -> list[int]:
    """At most EPOCHS of `count` indices, evenly spaced, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, EPOCHS)).round().astype(int).tolist()))


def finite_or_none(center: np.ndarray) -> list[float] | None:
    return center.tolist() if np.isfinite(center).all() else None


def quantise(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Points (N, 2) as whole steps (2, N) of a grid: [low x, step x, low y, step y].

    x = low + steps * step. A point that is not finite becomes NOT_FINITE.
    """
    finite = np.isfinite(points).all(1)
    low = high = np.zeros(2)
    if finite.any():
        low = points[finite].min(0).astype(np.float64)
        high = points[finite].max(0).astype(np.float64)
    step = np.maximum(high - low, 1e-30) / GRID
    steps = np.full(points.shape, float(NOT_FINITE))
    steps[finite] = ((points[finite] - low) / step).round()
    return steps.T, [low[0], step[0], low[1], step[1]]


def pack(values: np.ndarray) -> str:
    """Integers below 65,536: all low bytes, then all high ones, compressed, in base64."""
    pairs = np.ascontiguousarray(values, dtype="<u2").view(np.uint8).reshape(-1, 2)
    return base64.b64encode(zlib.compress(pairs.T.tobytes(), 9)).decode()


def pack_images(run: Run, rows: Sequence[int]) -> dict | None:
    """The test images of these rows, in one image; None if the run has kept others, or none."""
    path = run.directory / run.tested / "images.npz"
    if not path.exists():
        return None
    saved = read_arrays(path, ("rows", "images"))
    if saved["rows"].tolist() != list(rows):
        return None
    images = saved["images"]  # uint8 (N, C, H, W)
    count, channels, height, width = images.shape
    columns = int(np.ceil(count**0.5))
    padded = np.pad(images, ((0, -count % columns), (0, 0), (0, 0), (0, 0)))
    tiles = padded.reshape(-1, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    source = encode(tiles.reshape(-1, columns * width, channels))
    return {"source": source, "columns": columns, "width": width, "height": height}


def encode(pixels: np.ndarray) -> str:
    """Pixels (H, W, C) as an address with the image in it: PNG or, if that is too large, JPEG."""
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3])
    attempts = [("JPEG", {"quality": quality}) for quality in (90, 75, 50, 30)]
    if pixels.size < 4 * SPRITE_BYTES:
        attempts.insert(0, ("PNG", {"optimize": True}))
    for format, options in attempts:
        file = io.BytesIO()
        image.save(file, format, **options)
        if file.tell() <= SPRITE_BYTES:
            break
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
