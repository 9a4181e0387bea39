"""The pictures of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import utils
from plots import report
from plots.charts import *
from plots.looks import *
from plots.plotter import Plotter
from plots.points import *


def plot_epoch(
    plotter: "Plotter", save_dir: Path, epoch: int, splits: dict[str, dict], centers, data
) -> None:
    """Saves and draws <split>/epoch_<N> of each split, projected to a plane fitted on the training features.

    Images of unknown classes, labelled from len(data.classes) on, follow those of the test.
    """
    if "features" not in splits["train"]:  # of an epoch that was begun without --plot
        return
    project, axes = plane(splits["train"]["features"].cpu().numpy())
    centers = centers.cpu().numpy()
    for name in [name for name in splits if name != "unknown"]:
        (save_dir / name).mkdir(exist_ok=True)
        path = save_dir / name / f"epoch_{epoch}.npz"
        together = [name, "unknown"] if name == "test" and "unknown" in splits else [name]
        features, labels, predictions = (
            np.concatenate([splits[each][key].cpu().numpy() for each in together])
            for key in ("features", "labels", "predictions")
        )
        shown = dict(
            points=project(features).astype(np.float32),
            labels=labels.astype(np.int32),
            predictions=predictions.astype(np.int32),
            centers=project(centers).astype(np.float32),
            classes=list(data.classes),
            axes=list(axes),
            title=f"{name}, epoch {epoch}: accuracy {splits[name]['accuracy']:.2f} %",
        )
        utils.save_arrays(path, shown)
        plotter(path.with_suffix(".png"), draw_points, path)
        if name != "train" and features.shape[1] > 2:  # what t-SNE starts from, of the latest test
            rows = report.sample(len(features), report.TSNE_POINTS)
            latest = dict(
                features=features[rows], labels=labels[rows], centers=centers, epoch=epoch
            )
            utils.save_arrays(
                path.with_name("features.npz"), latest | dict(classes=list(data.classes))
            )
        if name != "train" and not path.with_name("images.npz").exists():  # for the page
            rows = report.sample(len(features), report.TEST_POINTS)
            images = thumbnails([getattr(data, each) for each in together], rows)
            utils.save_arrays(path.with_name("images.npz"), dict(rows=rows, images=images))


def thumbnails(splits: Sequence, rows: np.ndarray) -> np.ndarray:
    """The images of these rows, uint8 (N, C, H, W), counted through all `splits`; ascending."""
    firsts = np.cumsum([0, *(split.rows.size for split in splits)])
    parts = np.split(rows, np.searchsorted(rows, firsts[1:-1]))
    found = [
        (split, part - first)
        for split, part, first in zip(splits, parts, firsts, strict=False)
        if len(part)
    ]
    return np.concatenate([split.thumbnails(part) for split, part in found])


def plot_run(
    plotter: "Plotter",
    save_dir: Path,
    history: Sequence[dict],
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Draws curves, films, the page, and pictures that a killed run left undrawn, until `stop` returns True.

    Returns the errors of missing pictures.
    """
    for _, points in utils.epoch_files(
        save_dir, [f"{split}/epoch_*.npz" for split in utils.SPLITS]
    ):
        if (
            points.with_suffix(".png") not in plotter.paths
            and not points.with_suffix(".png").exists()
        ):
            plotter(points.with_suffix(".png"), draw_points, points)
    plotter(save_dir / "curves.png", draw_curves, history)
    for split in utils.SPLITS:
        if utils.epoch_files(save_dir / split, ["epoch_*.npz"]):
            plotter(save_dir / f"{split}.gif", draw_film, save_dir / split)
            if split != "train":  # a run that was stopped before its first test has no page yet
                plotter(save_dir / "report.html", write_page, [save_dir])
    return plotter.finish(stop)


def write_page(part: Path, directories: Sequence[Path]) -> None:
    """Writes the page of a run, or of several side by side."""
    runs = [report.read_run(directory) for directory in directories]
    classes = runs[0].classes
    report.write(
        part, runs, colors=palette(len(classes)), marks=marks(classes), short=shorten(classes, 20)
    )
