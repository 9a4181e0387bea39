"""Points of made-up epochs, and the figures that are drawn of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import utils
from plots import Plotter, charts, plot_epoch, plot_run, points
from plots.report import write_page

SETTINGS = {"recipe": "images", "dataset": "folder", "model": "small", "save_dir": "log"}


def cloud(classes=3, per_class=20, dim=2, seed=0):
    """Features, labels and centers of classes far apart."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(classes, dim)) * 5
    labels = np.repeat(np.arange(classes), per_class)
    return centers[labels] + random.normal(size=(len(labels), dim)) * 0.1, labels, centers


def write_epoch(path, features, labels, centers, classes=None, **further):
    """Writes <split>/epoch_<N>.npz; returns `path`."""
    arrays = {
        "points": features,
        "labels": labels,
        "predictions": np.minimum(labels, len(centers) - 1),
        "centers": centers,
        "classes": classes or [str(label) for label in range(len(centers))],
        "axes": ["feature 1", "feature 2"],
        "title": "train, epoch 1: accuracy 9.99 %",
    }
    utils.save_arrays(path, arrays | further)
    return path


def record_figures(monkeypatch) -> list:
    """A list to which each figure that is drawn from now on is added, with its axes."""
    figures = []

    def new_figure(*args, original=points.new_figure, **options):
        figures.append(original(*args, **options))
        return figures[-1]

    for module in (charts, points):
        monkeypatch.setattr(module, "new_figure", new_figure)
    return figures


def inside(figure, texts) -> list:
    """The boxes of these texts, in pixels, all of them within the figure."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    width, height = figure.canvas.get_width_height()
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    return boxes


class Undrawn(Plotter):
    """Saves arrays, but draws nothing."""

    def __call__(self, path, draw, *arguments) -> None:
        pass


class Images:
    """Stands for the batches of a split: as many images as there are labels, 8 x 8, of noise."""

    def __init__(self, count: int, seed: int):
        self.rows = np.arange(count)
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), np.uint8)

    def thumbnails(self, rows) -> np.ndarray:
        return self.images[rows]


def make_run(
    directory: Path,
    classes=("ant", "bee", "cat"),
    unseen=(),
    tested=("train", "test"),
    epochs=3,
    dim=2,
    scale=1.0,
    plotter=None,
) -> Path:
    """The files of a run with --plot, as main.py writes them; 8 images of a class, 5 in a test.

    Without a plotter its arrays and its page alone.
    """
    directory.mkdir()
    is_drawn = plotter is not None
    plotter = plotter or Undrawn()
    known = len(classes)
    data = SimpleNamespace(classes=list(classes), unseen=list(unseen))
    ranges = {"train": (0, known, 8), "test": (0, known, 5), "val": (0, known, 5)}
    ranges["unknown"] = (known, known + len(unseen), 5)
    rows = []
    for epoch in range(1, epochs + 1):
        splits = {}
        for name in tested:
            first, last, count = ranges[name]
            features, labels, centers = cloud(known + len(unseen), count, dim, seed=epoch)
            chosen = (labels >= first) & (labels < last)
            features = torch.from_numpy(scale * features[chosen])
            labels = torch.from_numpy(labels[chosen])
            predictions = (labels + (torch.arange(len(labels)) % 4 == 0)) % known
            splits[name] = {"features": features, "labels": labels, "predictions": predictions}
            if name != "unknown":
                splits[name]["accuracy"] = 75.0 + epoch
            setattr(data, name, Images(len(labels), seed=first))
        plot_epoch(
            plotter, directory, epoch, splits, torch.from_numpy(scale * centers[:known]), data
        )
        rows.append({"epoch": epoch, "train_loss": 2 / epoch, "train_accuracy": 75.0 + epoch})
        rows[-1]["test_accuracy"] = 75.0 + epoch if "test" in tested else None
    utils.write_json(directory / "args.json", SETTINGS)
    commands = ["python main.py --plot", "python main.py --resume --max-epoch 3"]
    utils.write_json(directory / "run.json", {"commands": commands, "elapsed": 1.5})
    utils.write_metrics(directory / "metrics.csv", rows)
    (directory / "log_folder.txt").write_text("Currently using CPU\n")
    if is_drawn:
        with plotter:
            assert plot_run(plotter, directory, rows) == []
    else:
        write_page(directory / "report.html", [directory])
    return directory
