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

from plots.looks import Looks
from plots.saved import Run, names_of, read_arrays, read_run, sample

PAGE = Path(__file__).parent / "page"
SCRIPTS = "base data view points panels epochs legend curves confusion run start"  # in this order
TEST_POINTS = 10_000  # of more images, a fixed sample
TRAIN_POINTS = 5_000
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
    packed = [pack_run(run, name) for run, name in zip(runs, names_of(runs), strict=True)]
    for run in packed[1:]:
        if run["images"] == packed[0]["images"]:
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
    files = {path.name: path.read_text(encoding="utf-8").strip() for path in PAGE.iterdir()}
    parts = {
        # A class may be called </script>: within the page's <script>, JSON has no "<".
        "json": text.replace("<", "\\u003c"),
        "css": files["page.css"],
        "js": "\n\n".join(files[f"{name}.js"] for name in SCRIPTS.split()),
    }
    return re.sub(r"{{(css|js|json)}}", lambda name: parts[name[1]], files["page.html"])


def pack_run(run: Run, name: str) -> dict:
    splits = {split: pack_split(run, split) for split in ("train", run.tested)}
    return {
        "name": name,
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
    numbers = np.array(list(run.files[split]))
    spaced = np.linspace(0, len(numbers) - 1, min(len(numbers), EPOCHS)).round().astype(int)
    epochs = numbers[spaced].tolist()
    count = len(run.epoch(split, epochs[-1])["labels"])
    rows = sample(count, TRAIN_POINTS if split == "train" else TEST_POINTS)
    values = {name: [] for name in ("points", "labels", "predictions", "grids", "centers")}
    for number in epochs:
        shown = run.epoch(split, number)
        order = rows
        if split == "train":  # shuffled in each epoch; by class, labels take no room
            order = rows[np.argsort(shown["labels"][rows], kind="stable")]
        points, grid = quantise(shown["points"][order])
        values["points"].append(points)
        values["grids"].append(grid)
        values["labels"].append(shown["labels"][order])
        values["predictions"].append(shown["predictions"][order])
        centers = [center if np.isfinite(center).all() else None for center in shown["centers"]]
        values["centers"].append(
            [center if center is None else center.tolist() for center in centers]
        )
    for name in ("points", "labels", "predictions"):
        values[name] = pack(np.stack(values[name]))
    shown_rows = [] if split == "train" else rows.tolist()
    return values | {"epochs": epochs, "rows": shown_rows, "count": len(rows), "of": count}


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
    saved = read_arrays(path, ("rows", "images")) if path.exists() else {"rows": None}
    if not np.array_equal(saved["rows"], rows):
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
    for format, quality in (("PNG", None), ("JPEG", 80), ("JPEG", 40)):
        file = io.BytesIO()
        image.save(file, format, quality=quality)
        if file.tell() <= SPRITE_BYTES:
            break
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
