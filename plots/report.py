"""The page of a run, report.html: one file that opens from the disk, without a server or a network.

Its HTML, CSS and scripts are in page/; `write_page` joins them and the data of the runs.
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
from plots.looks import Looks, shorten
from plots.saved import Run, read_epoch, read_run, sample

PAGE = Path(__file__).parent / "page"
SCRIPTS = "base data view points panels epochs legend curves confusion run start"  # in this order
TEST_POINTS = 10_000  # of more images, a fixed sample
TRAIN_POINTS = 5_000
EPOCHS = 100  # of more, as many evenly spaced ones
SPRITE_BYTES = 3_000_000  # of the test images; above it they become JPEG
GRID = 65_535  # steps between the smallest and the largest coordinate of an epoch


def write_page(part: Path, directories: Sequence[Path]) -> None:
    """Writes the page of a run, or of several of the same data side by side."""
    runs = [read_run(directory) for directory in directories]
    looks = Looks(runs[0].last())
    data = {
        "names": looks.names,
        "known": len(looks.known),
        "colors": looks.colors,
        "marks": looks.marks,
        "short": shorten(looks.names, 20),
        "runs": [pack_run(run) for run in runs],
        "images": pack_images(runs[0]),
    }
    text = json.dumps(data, allow_nan=False)
    files = {path.name: path.read_text(encoding="utf-8").strip() for path in PAGE.iterdir()}
    parts = {
        # A class may be called </script>: within the page's <script>, JSON has no "<".
        "json": text.replace("<", "\\u003c"),
        "css": files["page.css"],
        "js": "\n\n".join(files[f"{name}.js"] for name in SCRIPTS.split()),
    }
    page = re.sub(r"{{(css|js|json)}}", lambda name: parts[name[1]], files["page.html"])
    part.write_text(page, encoding="utf-8")


def pack_run(run: Run) -> dict:
    return {
        "name": run.name,
        "args": run.args,
        "facts": utils.read_facts(run.directory),
        "history": run.history,
        "log": run.log,
        "axes": run.last()["axes"].tolist(),
        "splits": {split: pack_split(run, split) for split in ("train", run.tested)},
        "tested": run.tested,
    }


def pack_split(run: Run, split: str) -> dict:
    """The points and centers of a split over the epochs; of a test also the rows of its images."""
    numbers = list(run.files[split])
    step = -(-len(numbers) // EPOCHS)
    epochs = numbers[(len(numbers) - 1) % step :: step]
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
        values["centers"].append(shown["centers"].tolist())
    for name in ("points", "labels", "predictions"):
        packed = zlib.compress(np.array(values[name], "<u2").tobytes(), 9)
        values[name] = base64.b64encode(packed).decode()
    counts = {"epochs": epochs, "count": len(rows), "of": count}
    return values | counts | {"rows": [] if split == "train" else rows.tolist()}


def quantise(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Points (N, 2) as whole steps (2, N) of a grid: [low x, step x, low y, step y].

    x = low + steps * step.
    """
    low = points.min(0).astype(np.float64)
    step = np.maximum(np.ptp(points, axis=0).astype(np.float64), 1e-30) / GRID
    return ((points - low) / step).round().T, [low[0], step[0], low[1], step[1]]


def pack_images(run: Run) -> dict | None:
    """The test images of the page, in one image; None if the run has kept none."""
    from PIL import Image

    path = run.directory / run.tested / "images.npz"
    if not path.exists():
        return None
    images = read_epoch(path, ["images"])["images"]  # uint8 (N, C, H, W)
    count, channels, height, width = images.shape
    columns = int(np.ceil(count**0.5))
    padded = np.pad(images, ((0, -count % columns), (0, 0), (0, 0), (0, 0)))
    tiles = padded.reshape(-1, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    image = Image.fromarray(tiles.reshape(-1, columns * width, channels).squeeze())
    for format in ("PNG", "JPEG"):
        file = io.BytesIO()
        image.save(file, format)
        if file.tell() <= SPRITE_BYTES:
            break
    text = base64.b64encode(file.getvalue()).decode()
    source = f"data:image/{format.lower()};base64,{text}"
    return {"source": source, "columns": columns, "width": width, "height": height}
