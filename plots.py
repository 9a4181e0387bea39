"""Plots, drawn in background processes: features of each epoch, films, curves, confusion matrices, and the page.

python plots.py log/a                     draw missing pictures of a run with --plot, and log/a/report.html
python plots.py log/a --format pdf        figures for print, in log/a/figures; --epochs 1 5 30: panels in a row
python plots.py log/a log/b --compare     runs side by side with the same axes: log/a/compare.html, figures/compare.png
python plots.py log/a --projection tsne   t-SNE of the test features, where they have more than two dimensions
"""

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import ModuleType

import numpy as np

import report
import utils

# matplotlib is imported where it is used: main.py imports this file, but leaves drawing to other processes.

COLUMN = 3.15  # inches, 8 cm: the width of a paper's column
# Petroff's ten colours: at least 17 CIELAB units apart for red-green blind readers, too (matplotlib's own: 4.6).
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
HOLLOW = dict(color="0.5", markerfacecolor="none", markeredgewidth=0.5)  # points of unknown classes
TSNE_AXES = ("t-SNE 1\n(distances between clusters mean little)", "t-SNE 2")
PRINT_STYLE = {
    "font.size": 7, "axes.labelsize": 7, "axes.titlesize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "grid.linewidth": 0.4, "lines.linewidth": 1.0, "pdf.fonttype": 42, "svg.hashsalt": "center-loss",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- a run


def plot_epoch(plotter: "Plotter", save_dir: Path, epoch: int, splits: dict[str, dict], centers, data) -> None:
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
        features, labels, predictions = (np.concatenate([splits[each][key].cpu().numpy() for each in together])
                                         for key in ("features", "labels", "predictions"))  # fmt: skip
        shown = dict(points=project(features).astype(np.float32), labels=labels.astype(np.int32),
                     predictions=predictions.astype(np.int32), centers=project(centers).astype(np.float32),
                     classes=list(data.classes), axes=list(axes),
                     title=f"{name}, epoch {epoch}: accuracy {splits[name]['accuracy']:.2f} %")  # fmt: skip
        utils.save_arrays(path, shown)
        plotter(path.with_suffix(".png"), draw_points, path)
        if name != "train" and features.shape[1] > 2:  # what t-SNE starts from, of the latest test
            rows = report.sample(len(features), report.TSNE_POINTS)
            latest = dict(features=features[rows], labels=labels[rows], centers=centers, epoch=epoch)
            utils.save_arrays(path.with_name("features.npz"), latest | dict(classes=list(data.classes)))
        if name != "train" and not path.with_name("images.npz").exists():  # for the page
            rows = report.sample(len(features), report.TEST_POINTS)
            images = thumbnails([getattr(data, each) for each in together], rows)
            utils.save_arrays(path.with_name("images.npz"), dict(rows=rows, images=images))


def thumbnails(splits: Sequence, rows: np.ndarray) -> np.ndarray:
    """The images of these rows, uint8 (N, C, H, W), counted through all `splits`; ascending."""
    firsts = np.cumsum([0, *(split.rows.size for split in splits)])
    parts = np.split(rows, np.searchsorted(rows, firsts[1:-1]))
    found = [(split, part - first) for split, part, first in zip(splits, parts, firsts, strict=False) if len(part)]
    return np.concatenate([split.thumbnails(part) for split, part in found])


def plot_run(
    plotter: "Plotter", save_dir: Path, history: Sequence[dict], stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Draws curves, films, the page, and pictures that a killed run left undrawn, until `stop` returns True.

    Returns the errors of missing pictures.
    """
    for _, points in utils.epoch_files(save_dir, [f"{split}/epoch_*.npz" for split in utils.SPLITS]):
        if points.with_suffix(".png") not in plotter.paths and not points.with_suffix(".png").exists():
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
    report.write(part, runs, colors=palette(len(classes)), marks=marks(classes), short=shorten(classes, 20))


# ---------------------------------------------------------------------------------------- projection, colours, names


def plane(features: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[str, str]]:
    """A map of features (N, D) to points (N, 2), and the names of its axes.

    D = 2 is shown as it is; D > 2 by the first two principal components, fitted on `features`; D = 1 along a line.
    """
    if features.shape[1] == 2:
        return (lambda x: x), ("feature 1", "feature 2")
    if features.shape[1] == 1:
        return (lambda x: np.pad(x, ((0, 0), (0, 1)))), ("feature 1", "")
    mean = features.mean(0, dtype=np.float64)
    variances, components = np.linalg.eigh(np.cov((features - mean).T))  # ascending
    shares, components = 100 * variances[:-3:-1] / max(variances.sum(), 1e-30), components[:, :-3:-1]  # (D, 2)
    largest = np.abs(components).argmax(0)
    components = components * np.sign(components[largest, [0, 1]])  # else their arbitrary sign may flip
    names = tuple(f"principal component {i} ({share:.0f} % of the variance)" for i, share in enumerate(shares, 1))
    return (lambda x: (x - mean) @ components), names


def limits(*clouds: np.ndarray) -> np.ndarray:
    """Axis limits [[x0, x1], [y0, y1]] around all finite points, neither side much shorter than the other."""
    points = np.concatenate(clouds)
    points = points[np.isfinite(points).all(1)]
    middle, half = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0) / 2
    half = 1.05 * np.maximum(half, max(0.85 * half.max(), 1e-6))
    return np.stack([middle - half, middle + half], axis=1)


def palette(count: int) -> list[str]:
    """A colour for each class: the ten of COLORS, then darker and lighter shades of them."""
    base = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS]) / 255
    shades = -(-count // len(base))
    colors = []
    for label in range(count):
        color, shade = base[label % len(base)], label // len(base)
        if shade % 2:  # darker and lighter in turn, ever further from the colour itself
            color = color * (1 - 0.7 * (shade + 1) / (shades + 1))
        else:
            color = 1 - (1 - color) * (1 - 0.7 * shade / (shades + 1))
        colors.append("#" + "".join(f"{round(255 * part):02x}" for part in color))
    return colors


def marks(classes: Sequence[str]) -> list[str]:
    """The text at each center: the classes' names if all are short, else their numbers."""
    return list(classes) if max(map(len, classes)) <= 3 else [str(label) for label in range(len(classes))]


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Cuts the names to at most `width` characters, near the middle, so that different names stay different.

    If no cut does that, all get as many more characters as it takes.
    """
    for room in range(width, max(map(len, names), default=0)):
        for tail in sorted(range(room), key=lambda tail: abs(tail - room // 2)):
            short = [
                name if len(name) <= room else name[: room - 1 - tail] + "…" + name[len(name) - tail :]
                for name in names
            ]
            if len(set(short)) == len(set(names)):
                return short
    return list(names)


def drawable(names: Sequence[str]) -> list[str]:
    r"""The names as text for matplotlib: without formulas, and with a font for every letter.

    Letters that no font of the system has become \u4e2d, with a warning; bytes that are not UTF-8 become \xe9. Call
    this before axes and texts are created, since that is when they get their fonts.
    """
    from matplotlib import rcParams

    names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
    families, missing = _fonts_for(frozenset("".join(names)), tuple(rcParams["font.family"]))
    rcParams["font.family"] = list(families)
    if missing:
        some = " ".join(sorted(missing)[:10]) + " …" * (len(missing) > 10)
        warnings.warn(f"No font of this system has {some}: pictures show their numbers, such as \\u4e2d", stacklevel=2)

    def show(letter: str) -> str:
        odd = letter in missing or unicodedata.category(letter) == "Cc"
        return letter.encode("unicode_escape").decode() if odd else letter

    return ["".join(map(show, name)).replace("$", r"\$") for name in names]


@functools.cache
def _fonts_for(letters: frozenset[str], families: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The font families, plus those of the system that have further letters; and the letters that none has."""
    from matplotlib import font_manager

    def letters_of(path: str) -> set[str]:
        with contextlib.suppress(OSError, RuntimeError):  # FreeType cannot use the font
            font = font_manager.get_font(path)
            return {letter for letter in missing if font.scalable and ord(letter) in font.get_charmap()}
        return set()

    def default_of(family: str) -> str:
        return font_manager.findfont(font_manager.FontProperties(family=[family]))

    missing = {letter for letter in letters if unicodedata.category(letter) != "Cc"}
    for family in families:
        missing -= letters_of(default_of(family))
    paths = font_manager.findSystemFonts() if missing else []
    for path in sorted(paths, key=lambda path: ("Regular" not in path, path)):
        if letters_of(path):
            font_manager.fontManager.addfont(path)
            family = font_manager.get_font(path).family_name
            if found := letters_of(default_of(family)):  # not its bold alone
                missing -= found
                families = (*families, family)
    return families, frozenset(missing)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure, in inches, and its axes (rows, columns); without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=options.pop("layout", "constrained"))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, part: Path, format: str = "") -> None:
    """Saves a figure as PNG or, for print, in `format`: cropped, at 600 dpi, the same file for the same data."""
    if not format:
        return figure.savefig(part, format="png")
    undated = dict(pdf=dict(CreationDate=None), svg=dict(Date=None)).get(format)
    figure.savefig(part, format=format, dpi=600, bbox_inches="tight", pad_inches=0.01, metadata=undated)


class Scatter:
    """Points coloured by class, and a mark at each center, in `axes`; `show` sets them, for each frame of a film."""

    def __init__(self, axes, shown: dict, axis_limits: np.ndarray, small: bool = False):
        classes, self.axes = [str(name) for name in shown["classes"]], axes
        self.colors = palette(len(classes))
        axes.set(xlabel=shown["axes"][0], ylabel=shown["axes"][1], xlim=axis_limits[0], ylim=axis_limits[1])
        axes.set(aspect="equal", axisbelow=True)
        axes.ticklabel_format(scilimits=(-2, 4))  # with few ticks, so that labels do not overlap
        axes.locator_params("x", nbins=4 if small else 7)
        axes.grid(color="0.92")
        size = float(np.clip(250 / max(len(shown["points"]), 1) ** 0.5, 1.0, 5.0)) * (0.6 if small else 1)
        styles = [dict(color=color, markersize=size, markeredgewidth=0) for color in self.colors]
        self.points = [axes.plot([], [], ".", rasterized=True, **style)[0] for style in styles]
        self.unknown = axes.plot([], [], "o", rasterized=True, markersize=0.8 * size, **HOLLOW)[0]
        text = (6 if small else 8) * (1 if len(classes) <= 20 else 0.75)
        self.centers = [
            axes.text(0, 0, mark, fontsize=text, ha="center", va="center", clip_on=True,
                      bbox=dict(boxstyle="circle,pad=0.15", facecolor="#ffffffb0", edgecolor=color, linewidth=text / 7))
            for mark, color in zip(drawable(marks(classes)), self.colors, strict=True)
        ]  # fmt: skip

    def show(self, shown: dict) -> None:
        points, labels = shown["points"], shown["labels"]
        for label, line in enumerate(self.points):
            line.set_data(*points[labels == label].T)
        self.unknown.set_data(*points[labels >= len(self.points)].T)
        for text, center in zip(self.centers, shown["centers"], strict=True):
            text.set_position(center)
            text.set_visible(bool(np.isfinite(center).all()))


def has_unknown(shown: dict) -> bool:
    """Whether some of the points are of unknown classes."""
    return bool((shown["labels"] >= len(shown["classes"])).any())


def add_legend(axes, shown: dict, small: bool = False) -> None:
    """Names up to 40 classes outside of `axes`: on the right or, for more than 12 in print (`small`), below."""
    classes = [str(name) for name in shown["classes"]]
    if len(classes) > 40:
        return
    below, colors = small and len(classes) > 12, palette(len(classes))
    handles = [axes.plot([], [], "o", color=color, markersize=3 if small else 5)[0] for color in colors]
    handles += axes.plot([], [], "o", markerfacecolor="white", markeredgecolor="black", markersize=4 if small else 6)
    names = [
        name if name.startswith(mark) else f"{mark} {name}"
        for mark, name in zip(marks(classes), shorten(classes, 14 if small else 20), strict=True)
    ]
    options = dict(handletextpad=0.2, frameon=False, labelspacing=0.3, columnspacing=1.0, borderaxespad=0)
    if below:
        columns = max(1, 60 // (max(map(len, names)) + 3))
        options |= dict(loc="outside lower center", ncols=columns)
    else:
        options |= dict(loc="center left", bbox_to_anchor=(1.02, 0.5))
        if not small:
            options |= dict(fontsize=min(9, 260 / (len(classes) + 1)))  # points; a picture is 374 points high
    names = [*drawable(names), "center"]
    if has_unknown(shown):
        handles += axes.plot([], [], "o", markersize=3 if small else 5, **HOLLOW)
        names.append("unknown")
    owner = axes.figure if below else axes
    owner.legend(handles, names, **options)


def limits_of(clouds: Sequence[dict]) -> np.ndarray:
    """Axis limits around all points and centers of these epochs."""
    return limits(*(shown[name] for shown in clouds for name in ("points", "centers")))


# ---------------------------------------------------------------------------------------------------------- pictures


def draw_points(part: Path, source: Path) -> None:
    """Draws all points of an epoch, as PNG."""
    shown = report.read_arrays(source, report.ARRAYS)
    figure, ((axes,),) = new_figure(6.4, 5.2, layout="compressed")
    add_legend(axes, shown)
    Scatter(axes, shown, limits_of([shown])).show(shown)
    axes.set_title(str(shown["title"]), fontsize=11)
    save(figure, part)


def draw_film(part: Path, directory: Path) -> None:
    """Draws all epochs of `directory` as a GIF with the same axes in every frame."""
    from PIL import Image

    sources = [path for _, path in utils.epoch_files(directory, ["epoch_*.npz"])]
    corners = []
    for source in sources:
        shown = report.read_arrays(source, report.ARRAYS)
        corners.append(limits_of([shown]).T)
    axis_limits = np.stack([np.min(corners, axis=(0, 1)), np.max(corners, axis=(0, 1))], axis=1)
    figure, ((axes,),) = new_figure(6.4, 5.2, layout="compressed")
    figure.set_dpi(80)
    add_legend(axes, shown)
    scatter = Scatter(axes, shown, axis_limits)
    axes.set_title(str(shown["title"]), fontsize=11)
    figure.draw_without_rendering()  # computes the layout, which is then frozen for all frames
    figure.set_layout_engine("none")
    film = Image.new("P", (1, 1))
    film.putpalette(film_palette(scatter.colors).tobytes())

    def frame(source: Path) -> Image.Image:
        shown = report.read_arrays(source, report.ARRAYS)
        scatter.show(shown)
        axes.set_title(str(shown["title"]), fontsize=11)
        figure.canvas.draw()
        drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        return drawn.quantize(palette=film, dither=Image.Dither.NONE)

    frames = map(frame, sources)  # drawn one by one as Pillow asks for them
    milliseconds = [min(max(12000 // len(sources), 100), 400)] * (len(sources) - 1) + [3000]
    next(frames).save(part, format="GIF", save_all=True, append_images=frames, duration=milliseconds, loop=0)


def film_palette(colors: Sequence[str]) -> np.ndarray:
    """256 colours, uint8 (256, 3), for all frames of a film: greys, and tints of the colours, "#rrggbb"."""
    values = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors]) / 255  # (C, 3)
    tints = np.linspace(1, 0.25, np.clip(240 // len(values), 1, 4))  # 1: the colour itself, 0: white
    mixed = 1 - tints[:, None, None] * (1 - values)
    shades = np.concatenate([np.linspace(0, 1, 16).repeat(3).reshape(16, 3), mixed.reshape(-1, 3)])[:256]
    return np.pad((255 * shades).round().astype(np.uint8), ((0, 256 - len(shades)), (0, 0)))


def draw_panels(
    part: Path, panels: Sequence[tuple[str, dict]], columns: int, format: str, own_axes: bool = False
) -> None:
    """Draws epochs, of one run or several, for print. `panels`: the label and arrays of each."""
    from matplotlib import rc_context

    width, rows = min(columns * 2.3, 6.9) if columns > 1 else COLUMN, -(-len(panels) // columns)
    with rc_context(PRINT_STYLE):
        titles = drawable([label for label, _ in panels])
        figure, grid = new_figure(width, width / columns * rows + 0.4, rows, columns, layout="compressed",
                                  sharex=not own_axes, sharey=not own_axes)  # fmt: skip
        common = limits_of([shown for _, shown in panels])
        for axes, title, (_, shown) in zip(grid.flat, titles, panels, strict=False):
            short = [str(name).replace("principal component", "PC") for name in shown["axes"]]
            axis_limits = limits_of([shown]) if own_axes else common
            Scatter(axes, shown | dict(axes=short), axis_limits, small=True).show(shown)
            if not own_axes:
                axes.label_outer()
            if len(panels) > 1:
                axes.set_title(title)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        add_legend(grid[0, -1], max((shown for _, shown in panels), key=has_unknown), small=True)
        save(figure, part, format)


def draw_curves(part: Path, history: Sequence[dict], format: str = "") -> None:
    """Draws losses and error rates over the epochs, from the rows of metrics.csv: as PNG, or for print in `format`."""
    from matplotlib import rc_context

    with rc_context(PRINT_STYLE if format else {}):
        figure, grid = new_figure(COLUMN, 4.2, 2, 1, sharex=True) if format else new_figure(9, 4.2, 1, 2)
        losses, errors = grid.flat
        for axes, column, name, style in (
            (losses, "train_loss", "training: total", "-"),
            (losses, "train_xent", "training: cross-entropy", "--"),
            (losses, "train_center", "training: λ · center loss", ":"),
            (losses, "val_xent", "validation: cross-entropy", "-o"),
            (losses, "test_xent", "test: cross-entropy", "-o"),
            (errors, "train_accuracy", "training: softmax", "-"),
            (errors, "val_accuracy", "validation: softmax", "-o"),
            (errors, "val_nearest_center_accuracy", "validation: nearest center", "--s"),
            (errors, "test_accuracy", "test: softmax", "-o"),
            (errors, "nearest_center_accuracy", "test: nearest center", "--s"),
        ):
            measured = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
            if axes is errors:
                measured = [(epoch, 100 - accuracy) for epoch, accuracy in measured]
            if measured and (column != "train_center" or any(value > 0 for _, value in measured)):  # λ = 0 has none
                color = COLORS[dict(train=0, val=8, test=6).get(column[: column.find("_")], 4)]
                axes.plot(*zip(*measured, strict=True), style, label=name, color=color, markersize=2 if format else 3)
        losses.set(ylabel="loss")
        errors.set(xlabel="epoch", ylabel="error rate (%)")
        if not format:
            losses.set(xlabel="epoch")
        for axes in (losses, errors):
            log_axis(axes)
            axes.grid(color="0.92")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize="small")
        save(figure, part, format)


def log_axis(axes) -> None:
    """A logarithmic y axis with plain numbers; a value of 0 lies below it."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.ones(1)])
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return
    low, high = positive.min() / 1.3, positive.max() * 1.3
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low, high)
    decades = np.log10(high / low)
    subs = (1,) if decades > 3 else (1, 2, 5) if decades > 0.7 else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=list(subs)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def draw_confusion(part: Path, counts: np.ndarray, classes: Sequence[str], title: str = "", format: str = "") -> None:
    """Draws a confusion matrix, counts (true class, predicted class): as PNG, or for print in `format`."""
    from matplotlib import rc_context

    count = len(classes)
    side = 5.2 if count <= 20 or count > 40 else 0.26 * count
    if format:
        side = COLUMN if count <= 12 else 2 * COLUMN
    with rc_context(PRINT_STYLE if format else {}):
        names = drawable(shorten(classes, 20)) if count <= 40 else []
        figure, ((axes,),) = new_figure(side * 1.15, side, layout="compressed")
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
        axes.set(xlabel="predicted class", ylabel="true class", title=title)
        if count <= 40:
            size = min(72 * 0.75 * side / count * 0.62, 7 if format else 9)  # points; a cell has room for one line
            axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
            axes.set_yticks(range(count), names, fontsize=size)
        if count <= 25:
            for row, column in zip(*counts.nonzero(), strict=True):
                color, number = "white" if shares[row, column] > 50 else "black", str(counts[row, column])
                room = min(size, 72 * 0.6 * side / count / (0.62 * len(number)))
                axes.text(column, row, number, ha="center", va="center", color=color, fontsize=room)
        save(figure, part, format)


def draw_roc(part: Path, fars: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Draws the true positive rate of each curve over the false accept rate, logarithmic, as PNG."""
    figure, ((axes,),) = new_figure(6.4, 4.8)
    for (name, curve), color in zip(curves.items(), palette(len(curves)), strict=True):
        axes.plot(fars, curve, label=name, color=color)
    axes.plot(fars, fars, ":", color="black", label="chance")
    axes.set(xscale="log", xlim=(fars[0], 1), ylim=(0, 1.01), title="verification")
    axes.set(xlabel="false accept rate (pairs of two classes)", ylabel="true accept rate (pairs of one class)")
    axes.grid(color="0.92")
    axes.legend(fontsize="small", frameon=False)
    save(figure, part)


def draw_tsne(part: Path, source: Path, format: str) -> None:
    """Draws t-SNE of test features and centers, for print; seeded, so that it is always the same."""
    from sklearn.manifold import TSNE

    saved = report.read_arrays(source, ("features", "labels", "centers", "classes"))
    together, count = np.concatenate([saved["features"], saved["centers"]]), len(saved["features"])
    points = TSNE(init="pca", perplexity=min(30, (len(together) - 1) / 3), random_state=0).fit_transform(together)
    shown = saved | dict(points=points[:count], centers=points[count:], axes=TSNE_AXES)
    draw_panels(part, [("", shown)], 1, format)


# ------------------------------------------------------------------------------------------------------ command line


def figures(run: report.Run, epochs: Sequence[int] | None, format: str) -> list[tuple]:
    """The figures for print of a run: points of the epochs, by default of the last, curves and confusion matrix.

    Each is a tuple, as in the functions below: the path, the function that draws it, and its further arguments.
    """
    directory, drawings = run.directory / "figures", []
    for split, files in run.files.items():
        numbers = [number for number in epochs or [max(files)] if split == "train" or number in files]
        if panels := [(f"epoch {number}", run.epoch(split, number)) for number in numbers]:
            path = directory / f"{split}_epoch_{'_'.join(map(str, numbers))}.{format}"
            drawings.append((path, draw_panels, panels, min(len(panels), 3), format))
    last, count = run.last(), len(run.classes)
    known = last["labels"] < count
    pairs = last["labels"][known] * count + last["predictions"][known]
    confusion = np.bincount(pairs, minlength=count**2).reshape(count, count)
    drawings.append((directory / f"curves.{format}", draw_curves, run.history, format))
    drawings.append((directory / f"confusion.{format}", draw_confusion, confusion, run.classes, "", format))
    return drawings


def tsne(run: report.Run, format: str) -> list[tuple]:
    if run.args["feat_dim"] in (1, 2):
        raise utils.RunError(f"--projection tsne needs more than two dimensions, got {run.args['feat_dim']} in "
                             f"{run.directory}, which are drawn as they are")  # fmt: skip
    source = run.directory / run.tested / "features.npz"
    epoch = int(report.read_arrays(source, ["epoch"])["epoch"])
    return [(run.directory / "figures" / f"{run.tested}_tsne_epoch_{epoch}.{format}", draw_tsne, source, format)]


def compared(runs: Sequence[report.Run], epochs: Sequence[int] | None, format: str, own_axes: bool) -> list[tuple]:
    """The page and the figure of several runs: a column each, a row for each epoch, by default for the last ones."""
    report.check_comparable(runs)
    directory, names = runs[0].directory, report.names(runs)
    chosen = [[number] * len(runs) for number in epochs or ()] or [[max(run.files[run.tested]) for run in runs]]
    panels = [
        (f"{name}, epoch {number}" if epochs else name, run.epoch(run.tested, number))
        for numbers in chosen
        for run, name, number in zip(runs, names, numbers, strict=True)
    ]
    page = (directory / "compare.html", write_page, [run.directory for run in runs])
    return [page, (directory / "figures" / f"compare.{format}", draw_panels, panels, len(runs), format, own_axes)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plots.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.error = lambda message: parser.exit(2, f"plots.py: error: {message}\n")
    add = parser.add_argument
    add("directories", nargs="+", type=Path, metavar="DIR", help="--save-dir of a run with --plot")
    add("--compare", action="store_true", help="one page and one figure of all the runs, with the same axes")
    add("--own-axes", action="store_true", help="give each panel of the figure of --compare its own axes")
    add("--format", choices=("pdf", "svg", "png"), help="draw figures for print, in DIR/figures")
    add("--epochs", nargs="+", type=int, metavar="N", help="epochs to draw; several become panels (default: last)")
    add("--projection", choices=("pca", "tsne"), default="pca", help="of features with more than two dimensions in the "
        "figures; pca is that of the pictures (default: %(default)s)")  # fmt: skip
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.epochs and not (args.format or args.compare):
        parser.error("--epochs goes with --format or --compare")
    if args.projection == "tsne" and (args.compare or args.epochs):
        parser.error("--projection tsne shows a run's last tested epoch: it goes without --compare and --epochs")
    if args.own_axes and not args.compare:
        parser.error("--own-axes goes with --compare")
    if args.compare and len(args.directories) < 2:
        parser.error(f"--compare needs two runs or more, got {args.directories[0]} alone")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    errors, drawings, format = [], [], args.format or "png"
    try:
        with Plotter(lambda line: print(f"plots.py: {line}", file=sys.stderr)) as plotter:
            runs = [report.read_run(directory) for directory in args.directories]
            if args.compare:
                drawings = compared(runs, args.epochs, format, args.own_axes)
            elif args.projection == "tsne":
                drawings = [drawing for run in runs for drawing in tsne(run, format)]
            elif args.format:
                drawings = [drawing for run in runs for drawing in figures(run, args.epochs, format)]
            else:
                for run in runs:
                    errors += plot_run(plotter, run.directory, run.history)
                    print(f"Pictures in {run.directory}, page {run.directory / 'report.html'}")
            for path, *drawing in drawings:
                path.parent.mkdir(exist_ok=True)
                plotter(path, *drawing)
            errors += plotter.finish()
    except KeyboardInterrupt:
        print("plots.py: interrupted", file=sys.stderr)
        return 130
    except (utils.RunError, OSError) as error:
        print(f"plots.py: error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    for path, *_ in drawings:
        print(path)
    return 1 if errors else 0


# ------------------------------------------------------------------------------------------ background processes


class Plotter:
    """Draws in background processes while the training goes on; `finish` waits for them, logs and returns their errors.

    An interrupt in its context kills them, and so does `finish` if asked to stop.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self.log, self.pool, self.tasks, self.drawers = log, None, [], set()

    def __enter__(self) -> "Plotter":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if kind is KeyboardInterrupt:
            self._kill()
        if self.pool:
            self.pool.shutdown()  # at the interpreter's end its thread might close what Python then still writes to

    @property
    def paths(self) -> set[Path]:
        return {path for path, _ in self.tasks}

    def __call__(self, path: Path, draw: Callable, *arguments) -> None:
        """Lets draw(part, *arguments) write `path`."""
        if self.pool is None:
            workers = max(1, min(4, (os.cpu_count() or 1) // 2))
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_drawing)
        before = set(active_children())
        try:
            with _without_main():
                task = self.pool.submit(draw_to, path, draw, *arguments)
        except BrokenProcessPool as error:  # a drawing process has died: the training goes on without pictures
            task = Future()
            task.set_exception(error)
        self.drawers |= set(active_children()) - before
        self.tasks.append((path, task))

    def finish(self, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Waits until all is drawn or `stop` returns True; returns the error of each missing picture."""
        pending = {task for _, task in self.tasks}
        while pending and not stop():
            pending = wait(pending, timeout=0.1).not_done
        if pending:
            self._kill()
        failed = [(path, "stopped" if task in pending else task.exception()) for path, task in self.tasks]
        errors = [f"{path}: {' '.join(str(error).split())}" for path, error in failed if error]
        notes = set().union(*(task.result() for _, task in self.tasks if task not in pending and not task.exception()))
        for line in (*sorted(notes), *(f"A picture could not be drawn: {error}" for error in errors)):
            self.log(line)
        self.tasks = []
        return errors

    def _kill(self) -> None:
        for drawer in self.drawers:
            drawer.kill()
            drawer.join()
            for path, _ in self.tasks:
                utils.part_of(path, drawer.pid).unlink(missing_ok=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A process spawned in its context does not import the running script, main.py, and so not torch: seconds."""
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def draw_to(path: Path, draw: Callable, *arguments) -> set[str]:
    """Lets draw(part, *arguments) write `path`; returns its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # pyparsing's are both
        utils.replace_file(path, lambda part: draw(part, *arguments))
    return {str(warning.message) for warning in caught}


def _start_drawing() -> None:
    """Ignores Ctrl-C and SIGTERM, which reach all processes of a run, to finish the current picture.

    The process watches for the end of a killed run itself, since nothing else would end it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)  # the training goes first
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


if __name__ == "__main__":
    import plots  # this file again: its functions must have a name that the background processes can import

    sys.exit(plots.main())
