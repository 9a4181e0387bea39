"""The pictures of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import utils
from plots.charts import draw_curves
from plots.plotter import Plotter
from plots.points import draw_film, draw_points, plane
from plots.report import TEST_POINTS, write_page
from plots.saved import sample

TSNE_POINTS = 5_000  # of more images, a fixed sample


def plot_epoch(
    plotter: Plotter, save_dir: Path, epoch: int, splits: dict[str, dict], centers, data
) -> None:
    """Saves and draws <split>/epoch_<N> of each split, in a plane fitted to the training features.

    Images of unknown classes, of data.unseen, are shown with those of the test; their labels follow
    those of data.classes. What cannot be written is tried again after the next epoch.
    """
    plotter.retry()
    project, axes = plane(splits["train"]["features"].cpu().numpy())
    centers = centers.cpu().numpy()
    parts = {name: [name] for name in splits if name != "unknown"}
    if "unknown" in splits:
        parts["test"] = [name for name in ("test", "unknown") if name in splits]
    for name, together in parts.items():
        path = save_dir / name / f"epoch_{epoch}.npz"
        features, labels, predictions = (
            np.concatenate([splits[part][key].cpu().numpy() for part in together])
            for key in ("features", "labels", "predictions")
        )
        unseen = list(data.unseen) if "unknown" in together else []
        names = {"classes": list(data.classes), "unseen": np.array(unseen, str)}
        title = f"{name}, epoch {epoch}"
        if name in splits:  # else there are images of unknown classes alone
            title += f": accuracy {splits[name]['accuracy']:.2f} %"
        shown = {
            "points": project(features).astype(np.float32),
            "labels": labels.astype(np.int32),
            "predictions": predictions.astype(np.int32),
            "centers": project(centers).astype(np.float32),
            "axes": axes,
            "title": title,
        }
        if plotter.save(path, names | shown):
            plotter(path.with_suffix(".png"), draw_points, path)
        if name != "train":
            latest = {"features": features, "labels": labels, "centers": centers}
            save_test(plotter, path.parent, latest | names, [getattr(data, x) for x in together])


def save_test(plotter: Plotter, directory: Path, latest: dict, batches: Sequence) -> None:
    """Saves what t-SNE starts from and, once, the images for the page."""
    count, dimensions = latest["features"].shape
    if dimensions > 2:
        rows = sample(count, TSNE_POINTS)
        rowwise = {name: latest[name][rows] for name in ("features", "labels")}
        plotter.save(directory / "features.npz", latest | rowwise)
    path = directory / "images.npz"
    if not path.exists() and path not in plotter.unsaved:
        plotter.save(path, {"images": thumbnails(batches, sample(count, TEST_POINTS))})


def thumbnails(splits: Sequence, rows: np.ndarray) -> np.ndarray:
    """The images of these rows, uint8 (N, C, H, W), counted through all `splits`; ascending."""
    found = []
    for split in splits:
        own = rows[(rows >= 0) & (rows < split.rows.size)]
        if len(own):
            found.append(split.thumbnails(own))
        rows = rows - split.rows.size  # counted from the next split on
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
    plotter.retry()
    plotter(save_dir / "curves.png", draw_curves, history)
    for split in utils.SPLITS:
        sources = utils.epoch_files(save_dir / split, ["epoch_*.npz"])
        for _, source in sources:
            picture = source.with_suffix(".png")
            if picture not in plotter.drawings and not picture.exists():
                plotter(picture, draw_points, source)
        if sources:
            plotter(save_dir / f"{split}.gif", draw_film, save_dir / split)
            if split != "train":  # a run that was stopped before its first test has no page yet
                plotter(save_dir / "report.html", write_page, [save_dir])
    return plotter.finish(stop)
