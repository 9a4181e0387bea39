"""The pictures of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import utils
from plots.charts import draw_curves
from plots.film import draw_film
from plots.plotter import Plotter
from plots.points import draw_points, plane
from plots.report import write_page
from plots.saved import TEST_POINTS, TSNE_POINTS, sample


def plot_epoch(
    plotter: Plotter, save_dir: Path, epoch: int, splits: dict[str, dict], centers, data
) -> None:
    """Saves and draws <split>/epoch_<N> of each split, in a plane fitted to the training features.

    The picture of the test also shows the images of unknown classes, which data.unseen names; their
    labels follow those of data.classes. What cannot be written is tried again after the next epoch.
    """
    plotter.retry()
    project, axes = plane(splits["train"]["features"].cpu().numpy())
    centers = centers.cpu().numpy()
    for name, parts in pictured(splits).items():
        path = save_dir / name / f"epoch_{epoch}.npz"
        features = joined(splits, parts, "features")
        labels = joined(splits, parts, "labels").astype(np.int32)
        names = {"classes": list(data.classes), "unseen": np.array([], str)}
        if "unknown" in parts:
            names["unseen"] = list(data.unseen)
        title = f"{name}, epoch {epoch}"
        if name in splits:  # else there are images of unknown classes alone
            title += f": accuracy {splits[name]['accuracy']:.2f} %"
        shown = {
            "points": project(features).astype(np.float32),
            "labels": labels,
            "predictions": joined(splits, parts, "predictions").astype(np.int32),
            "centers": project(centers).astype(np.float32),
            "axes": list(axes),
            "title": title,
        }
        if plotter.save(path, shown | names):
            plotter(path.with_suffix(".png"), draw_points, path)
        if name == "train":
            continue
        if features.shape[1] > 2:  # what t-SNE starts from, of the latest test
            rows = sample(len(features), TSNE_POINTS)
            latest = {"features": features[rows], "labels": labels[rows], "centers": centers}
            plotter.save(path.with_name("features.npz"), latest | names | {"epoch": epoch})
        images = path.with_name("images.npz")
        if not images.exists() and images not in plotter.unsaved:  # for the page
            rows = sample(len(features), TEST_POINTS)
            found = thumbnails([getattr(data, part) for part in parts], rows)
            plotter.save(images, {"rows": rows, "images": found})


def pictured(splits: dict[str, dict]) -> dict[str, list[str]]:
    """The splits that each picture shows: unknown classes are part of the test."""
    parts = {name: [name] for name in splits if name != "unknown"}
    if "unknown" in splits:
        parts["test"] = [*parts.get("test", []), "unknown"]
    return parts


def joined(splits: dict[str, dict], parts: Sequence[str], key: str) -> np.ndarray:
    return np.concatenate([splits[part][key].cpu().numpy() for part in parts])


def thumbnails(splits: Sequence, rows: np.ndarray) -> np.ndarray:
    """The images of these rows, uint8 (N, C, H, W), counted through all `splits`; ascending."""
    found = []
    first = 0
    for split in splits:
        last = first + split.rows.size
        own = rows[(rows >= first) & (rows < last)] - first
        if len(own):
            found.append(split.thumbnails(own))
        first = last
    return np.concatenate(found)


def plot_run(
    plotter: Plotter,
    save_dir: Path,
    history: Sequence[dict],
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Draws curves, films, the page, and what a killed run left undrawn, until `stop` is True.

    Returns the errors of missing pictures.
    """
    plotter.retry(last=True)
    patterns = [f"{split}/epoch_*.npz" for split in utils.SPLITS]
    for _, points in utils.epoch_files(save_dir, patterns):
        picture = points.with_suffix(".png")
        if picture not in plotter.tasks and not picture.exists():
            plotter(picture, draw_points, points)
    plotter(save_dir / "curves.png", draw_curves, history)
    for split in utils.SPLITS:
        if not utils.epoch_files(save_dir / split, ["epoch_*.npz"]):
            continue
        plotter(save_dir / f"{split}.gif", draw_film, save_dir / split)
        if split != "train":  # a run that was stopped before its first test has no page yet
            plotter(save_dir / "report.html", write_page, [save_dir])
    return plotter.finish(stop)
