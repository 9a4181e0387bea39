"""Points coloured by class: pictures and films of epochs, panels of several, t-SNE."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import utils
from plots.looks import COLUMN, Looks, edge, new_figure, shorten
from plots.saved import read_epoch

NAMED = 40  # classes; of more, the legend names none
MARKED = 100  # centers; of more, none has its number


def plane(features: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[str, str]]:
    """A map of features (N, D) to points (N, 2), and the names of its axes.

    D = 2 is shown as it is; D > 2 by the first two principal components, fitted on `features`;
    D = 1 along a line.
    """
    dimensions = features.shape[1]
    if dimensions <= 2:
        return (lambda x: x @ np.eye(dimensions, 2)), ("feature 1", "feature 2" * (dimensions - 1))
    mean = features.mean(0, dtype=np.float64)
    variances, components = np.linalg.eigh(np.cov((features - mean).T))  # ascending
    components = components[:, :-3:-1]  # (D, 2)
    largest = np.abs(components).argmax(0)
    components = components * np.sign(components[largest, [0, 1]])  # else the sign is arbitrary
    shares = 100 * variances[:-3:-1] / max(variances.sum(), 1e-30)
    names = [f"PC {i} ({shares[i - 1]:.0f} % of the variance)" for i in (1, 2)]
    return (lambda x: (x - mean) @ components), tuple(names)


def limits(clouds: Sequence[dict]) -> np.ndarray:
    """Axis limits [[x0, x1], [y0, y1]] around all points and centers, neither side much shorter."""
    points = np.concatenate([cloud[name] for cloud in clouds for name in ("points", "centers")])
    middle = (points.max(0) + points.min(0)) / 2
    half = np.ptp(points, axis=0) / 2
    half = 1.05 * np.maximum(half, max(0.85 * half.max(), 1e-6))
    return np.stack([middle - half, middle + half], axis=1)


class Scatter:
    """Points coloured by class, and a mark at each center; `show` sets them, as for a film."""

    def __init__(self, axes, shown: dict, axis_limits: np.ndarray, small: bool = False):
        self.axes = axes
        self.looks = Looks(shown)
        axes.set(xlim=axis_limits[0], ylim=axis_limits[1], aspect="equal", axisbelow=True)
        axes.set(xlabel=shown["axes"][0], ylabel=shown["axes"][1])
        axes.ticklabel_format(scilimits=(-2, 4))  # with few ticks, so that labels do not overlap
        axes.locator_params("x", nbins=4 if small else 7)
        axes.grid(color="0.92")
        size = np.clip(250 / len(shown["points"]) ** 0.5, 1.0, 5.0)
        if small:
            size *= 0.6
        self.points = []
        for label, looks in enumerate(self.looks.styles()):
            scale = 0.5 if label < len(self.looks.known) else 0.8  # else one cannot see through
            self.points += axes.plot([], [], rasterized=True, markersize=scale * size, **looks)
        self.crosses = axes.plot([], [], **self.looks.cross(3 if small else 5))[0]
        self.marks = []
        if self.looks.has_known and len(self.looks.known) <= MARKED:
            size = 8 if len(self.looks.known) <= 20 and not small else 6
            place = {"textcoords": "offset points", "ha": "center", "va": "center"}
            looks = {"fontsize": size, "path_effects": edge(size / 4), "in_layout": False}
            for mark in self.looks.marks:
                self.marks.append(axes.annotate(mark, (0, 0), (0, 0), **place, **looks))
        self.show(shown)

    def show(self, shown: dict) -> None:
        for label, line in enumerate(self.points):
            line.set_data(*shown["points"][shown["labels"] == label].T)
        centers = shown["centers"]
        self.crosses.set_data(*centers.T)
        for text, center in zip(self.marks, centers, strict=False):
            away = center - centers.mean(0)  # beside the center, which so hides no points
            text.xy = center
            text.set_position(1.2 * text.get_fontsize() * away / max(np.hypot(*away), 1e-30))
        self.axes.set_title(str(shown["title"]))


def add_legend(axes, shown: dict, small: bool = False) -> None:
    """Names up to 40 classes outside of `axes`: on the right or, of many in print, below."""
    looks = Looks(shown)
    entries = legend_entries(looks, 14 if small else 20)
    if not entries:
        return
    size = 3 if small else 5
    entries["center" if looks.has_known else "trained center"] = looks.cross(size)
    handles = [axes.plot([], [], **{"markersize": size} | look)[0] for look in entries.values()]
    options = {"handletextpad": 0.2, "labelspacing": 0.3, "columnspacing": 1.0}
    options |= {"handles": handles, "labels": list(entries), "frameon": False, "borderaxespad": 0}
    if small and len(entries) > 13:
        columns = max(1, 60 // (max(map(len, entries)) + 3))
        axes.figure.legend(loc="outside lower center", ncols=columns, **options)
        return
    if not small:
        options["fontsize"] = min(9, 260 / len(entries))  # points; a picture is 374 points high
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), **options)


def legend_entries(looks: Looks, width: int) -> dict[str, dict]:
    """The names and styles of the classes that have points; of many unknown ones, their number."""
    short = shorten(looks.names, width)
    styles = looks.styles()
    count = len(looks.known)
    entries = {}
    if looks.has_known and count <= NAMED:
        for mark, name, style in zip(looks.marks, short, styles, strict=False):
            entries[name if name.startswith(mark) else f"{mark} {name}"] = style
    if len(entries) + len(looks.unseen) <= NAMED:
        return entries | dict(zip(short[count:], styles[count:], strict=True))
    return entries | {f"{len(looks.unseen)} unknown classes": styles[-1] | {"color": "0.5"}}


def draw_scatter(shown: dict, axis_limits: np.ndarray):
    figure, ((axes,),) = new_figure(6.4, 5.2)
    add_legend(axes, shown)
    return figure, Scatter(axes, shown, axis_limits)


def draw_points(part: Path, source: Path) -> None:
    """Draws all points of an epoch, as PNG."""
    shown = read_epoch(source)
    figure, _ = draw_scatter(shown, limits([shown]))
    figure.savefig(part, format="png")


def draw_film(part: Path, directory: Path) -> None:
    """Draws all epochs of `directory` as a GIF, with the same axes in every frame."""
    from PIL import Image

    sources = [path for _, path in utils.epoch_files(directory, ["epoch_*.npz"])]
    corners = np.concatenate([limits([read_epoch(source)]).T for source in sources])
    axis_limits = np.stack([corners.min(0), corners.max(0)], axis=1)
    figure, scatter = draw_scatter(read_epoch(sources[-1]), axis_limits)
    figure.set_dpi(80)
    figure.draw_without_rendering()  # computes the layout, which is then frozen for all frames
    figure.set_layout_engine("none")

    def frame(source: Path) -> Image.Image:
        scatter.show(read_epoch(source))
        figure.canvas.draw()
        return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")

    colors = frame(sources[-1]).quantize(256, method=Image.Quantize.FASTOCTREE)
    frames = (frame(source).quantize(palette=colors, dither=0) for source in sources)
    milliseconds = min(max(12000 // len(sources), 100), 400)
    durations = [milliseconds] * (len(sources) - 1) + [3000]
    options = {"save_all": True, "append_images": frames, "duration": durations, "loop": 0}
    next(frames).save(part, format="GIF", **options)


def draw_panels(
    part: Path,
    panels: Sequence[tuple[str, dict]],
    columns: int,
    format: str,
    own_axes: bool = False,
) -> None:
    """Draws epochs, of one run or several, for print. `panels`: the label and arrays of each."""
    width = min(columns * 2.3, 6.9) if columns > 1 else COLUMN
    rows = -(-len(panels) // columns)
    size = (width, width / columns * rows + 0.4, rows, columns)
    figure, grid = new_figure(*size, format)
    for axes, (title, shown) in zip(grid.flat, panels, strict=False):
        together = [shown] if own_axes else [each for _, each in panels]
        Scatter(axes, shown | {"title": title}, limits(together), small=True)
        if not own_axes:
            axes.label_outer()
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    add_legend(grid[0, -1], panels[0][1], small=True)
    figure.savefig(part, format=format)


def draw_tsne(part: Path, source: Path, format: str) -> None:
    """Draws t-SNE of test features and centers, for print; seeded, so always the same."""
    from sklearn.manifold import TSNE

    saved = read_epoch(source, ("features", "labels", "centers", "classes"))
    count = len(saved["features"])
    together = np.concatenate([saved["features"], saved["centers"]])
    perplexity = min(30, (len(together) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(together)
    names = ("t-SNE 1\n(distances between clusters mean little)", "t-SNE 2")
    shown = saved | {"points": points[:count], "centers": points[count:], "axes": names}
    draw_panels(part, [("", shown)], 1, format)
