"""Drawing: the points of an epoch, films of them, curves and confusion matrices, in background processes."""

import contextlib
import functools
import os
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import ModuleType

import numpy as np

import utils


def plot_epoch(plotter: "Plotter", save_dir: Path, epoch: int, splits: dict[str, dict], centers, classes) -> None:
    """Draws <split>/epoch_<N>.png of each split; the plane that they show is fitted on the training features."""
    if "features" not in splits["train"]:  # of an epoch that was begun without them
        return
    project, axes = plane(splits["train"]["features"].cpu().numpy())
    for name, split in splits.items():
        if name == "unknown":  # shown with the test
            continue
        shown = [split, splits["unknown"]] if name == "test" and "unknown" in splits else [split]
        (save_dir / name).mkdir(exist_ok=True)
        points = save_dir / name / f"epoch_{epoch}.npz"
        title = f"{name}, epoch {epoch}: accuracy {split['accuracy']:.2f} %"
        arrays = [np.concatenate([each[key].cpu().numpy() for each in shown]) for key in ("features", "labels")]
        arrays.append(centers.cpu().numpy())
        utils.replace_file(points, functools.partial(save_points, *arrays, classes, project, axes, title))
        plotter(points.with_suffix(".png"), draw_points, points)


def plot_run(
    plotter: "Plotter", save_dir: Path, history: Sequence[dict], stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Draws curves.png, the films, and pictures that a killed run has left undrawn, until all is drawn or `stop` says
    to leave it; returns what is missing."""
    for _, points in utils.epoch_files(save_dir, ["t*/epoch_*.npz", "val/epoch_*.npz"]):
        if points.with_suffix(".png") not in plotter.paths and not points.with_suffix(".png").exists():
            plotter(points.with_suffix(".png"), draw_points, points)
    plotter(save_dir / "curves.png", draw_curves, history)
    for split in ("train", "val", "test"):
        if utils.epoch_files(save_dir / split, ["epoch_*.npz"]):
            plotter(save_dir / f"{split}.gif", draw_film, save_dir / split)
    return plotter.finish(stop)


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
    components = components * np.sign(components[largest, [0, 1]])  # else their sign, which means nothing, may flip
    names = tuple(f"principal component {i} ({share:.0f} % of the variance)" for i, share in enumerate(shares, 1))
    return (lambda x: (x - mean) @ components), names


def limits(*clouds: np.ndarray) -> np.ndarray:
    """Axis limits [[x0, x1], [y0, y1]] around all finite points, neither side shorter than half of the other."""
    points = np.concatenate(clouds)
    points = points[np.isfinite(points).all(1)]
    middle, half = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0) / 2
    half = 1.05 * np.maximum(half, max(half.max() / 2, 1e-6))
    return np.stack([middle - half, middle + half], axis=1)


def drawable(names: Sequence[str], length: int | None = None) -> list[str]:
    r"""The names as text for matplotlib, which takes none of it for a formula and has a font for every letter.

    Letters that no font of the system has become \u4e2d, with a warning; bytes that are not UTF-8 become \xe9. Longer
    names are cut to `length`.
    """
    names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
    letters = frozenset("".join(names))
    if missing := _letters_without_font(letters):
        some = " ".join(sorted(missing)[:10]) + " …" * (len(missing) > 10)
        warnings.warn(f"No font of this system has {some}: pictures show their numbers, such as \\u4e2d", stacklevel=2)

    def show(letter: str) -> str:
        odd = letter in missing or unicodedata.category(letter) == "Cc"
        return letter.encode("unicode_escape").decode() if odd else letter

    names = ["".join(map(show, name)) for name in names]
    names = [name if len(name) <= (length or len(name)) else name[: length - 1] + "…" for name in names]
    return [name.replace("$", r"\$") for name in names]


@functools.cache
def _letters_without_font(letters: frozenset[str]) -> frozenset[str]:
    """Lets matplotlib fall back on the system's fonts for letters that its own lacks; gives those that none has."""
    from matplotlib import font_manager, rcParams

    def letters_of(path: str) -> set[str]:
        with contextlib.suppress(OSError, RuntimeError):  # a font that FreeType cannot draw with
            font = font_manager.get_font(path)
            return {letter for letter in missing if font.scalable and ord(letter) in font.get_charmap()}
        return set()

    def default_of(family: str) -> str:
        return font_manager.findfont(font_manager.FontProperties(family=[family]))

    missing = {letter for letter in letters if unicodedata.category(letter) != "Cc"}
    for family in rcParams["font.family"]:
        missing -= letters_of(default_of(family))
    paths = font_manager.findSystemFonts() if missing else []
    for path in sorted(paths, key=lambda path: ("Regular" not in path, path)):
        if letters_of(path):
            font_manager.fontManager.addfont(path)
            family = font_manager.get_font(path).family_name
            if found := letters_of(default_of(family)):  # not its bold alone
                missing -= found
                rcParams["font.family"] += [family]
    return frozenset(missing)


def save_points(features: np.ndarray, labels: np.ndarray, centers: np.ndarray, classes: Sequence[str],
                project: Callable, axes: Sequence[str], title: str, part: Path) -> None:  # fmt: skip
    """What one picture shows, as .npz: pictures are drawn elsewhere, and a film once all its epochs are known.

    Labels from len(classes) on are of unknown classes.
    """
    with open(part, "wb") as file:
        np.savez(file, points=project(features).astype(np.float32), labels=labels.astype(np.int32), title=title,
                 centers=project(centers).astype(np.float32), classes=list(classes), axes=list(axes))  # fmt: skip


class Scatter:
    """A figure of points coloured by class, with centers; `show` draws into it, again and again for a film."""

    def __init__(self, shown: dict, axis_limits: np.ndarray, dpi: int):
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        classes, axis_names = shown["classes"], shown["axes"]
        count = len(classes)
        if count <= 20:
            colors = colormaps["tab10" if count <= 10 else "tab20"](range(count))
        else:
            colors = colormaps["turbo"](np.linspace(0, 1, count))
        self.colors = np.asarray(colors)
        self.figure = Figure(figsize=(6.4, 5.2), dpi=dpi)
        FigureCanvasAgg(self.figure)
        with_legend = count <= 25  # more do not fit beside the points
        self.axes = self.figure.add_axes((0.11, 0.1, 0.68 if with_legend else 0.85, 0.82))
        self.axes.set(xlabel=axis_names[0], ylabel=axis_names[1], xlim=axis_limits[0], ylim=axis_limits[1])
        self.axes.set(aspect="equal", axisbelow=True)
        self.axes.grid(color="0.92")
        size = float(np.clip(250 / max(len(shown["points"]), 1) ** 0.5, 1.0, 5.0))
        style = dict(markersize=size, markeredgewidth=0)
        self.points = [self.axes.plot([], [], ".", color=color, **style)[0] for color in colors]
        hollow = dict(color="0.5", markerfacecolor="none", markeredgewidth=0.5)
        self.unknown = self.axes.plot([], [], "o", markersize=1.2 * size, **hollow)[0]
        self.centers = self.axes.scatter(np.zeros(count), np.zeros(count), c=colors, s=30 if with_legend else 12,
                                         edgecolors="black", linewidths=0.8, zorder=3)  # fmt: skip
        if with_legend:
            marks = [self.axes.plot([], [], "o", color=color, markersize=5)[0] for color in colors]
            marks += self.axes.plot([], [], "o", markerfacecolor="white", markeredgecolor="black")
            names = drawable([*classes, "center"], length=14)
            if (shown["labels"] >= count).any():
                marks, names = [*marks, *self.axes.plot([], [], "o", markersize=5, **hollow)], [*names, "unknown"]
            self.axes.legend(marks, names, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False,
                             fontsize=9 if count <= 20 else 7, handletextpad=0.2)  # fmt: skip

    def show(self, shown: dict) -> None:
        points, labels = shown["points"], shown["labels"]
        for label, line in enumerate(self.points):
            line.set_data(*points[labels == label].T)
        self.unknown.set_data(*points[labels >= len(self.points)].T)
        self.centers.set_offsets(shown["centers"])
        self.axes.set_title(str(shown["title"]), fontsize=11)


def draw_points(part: Path, source: Path) -> None:
    """Draws what save_points has written, every point of it, as PNG."""
    shown = dict(np.load(source))
    scatter = Scatter(shown, limits(shown["points"], shown["centers"]), dpi=150)
    scatter.show(shown)
    scatter.figure.savefig(part, format="png")


def draw_film(part: Path, directory: Path) -> None:
    """Draws all epochs that save_points has written to `directory` as a GIF with the same axes in every frame."""
    from PIL import Image

    sources = [path for _, path in utils.epoch_files(directory, ["epoch_*.npz"])]
    corners = []
    for source in sources:
        shown = dict(np.load(source))
        corners.append(limits(shown["points"], shown["centers"]).T)
    axis_limits = np.stack([np.min(corners, axis=(0, 1)), np.max(corners, axis=(0, 1))], axis=1)
    scatter = Scatter(shown, axis_limits, dpi=80)
    palette = Image.new("P", (1, 1))
    palette.putpalette(film_palette(scatter.colors).tobytes())

    def frame(source: Path) -> Image.Image:
        scatter.show(dict(np.load(source)))
        scatter.figure.canvas.draw()
        drawn = Image.fromarray(np.asarray(scatter.figure.canvas.buffer_rgba())).convert("RGB")
        return drawn.quantize(palette=palette, dither=Image.Dither.NONE)

    frames = map(frame, sources)  # drawn one by one as Pillow asks for them
    milliseconds = [min(max(12000 // len(sources), 100), 400)] * (len(sources) - 1) + [3000]
    next(frames).save(part, format="GIF", save_all=True, append_images=frames, duration=milliseconds, loop=0)


def film_palette(colors: np.ndarray) -> np.ndarray:
    """256 colours, uint8 (256, 3), for all frames of a film: greys, and tints of the colours (C, 4) of [0, 1]."""
    tints = np.linspace(1, 0.25, np.clip(240 // len(colors), 1, 4))  # 1: the colour itself, 0: white
    mixed = 1 - tints[:, None, None] * (1 - colors[:, :3])
    shades = np.concatenate([np.linspace(0, 1, 16).repeat(3).reshape(16, 3), mixed.reshape(-1, 3)])[:256]
    return np.pad((255 * shades).round().astype(np.uint8), ((0, 256 - len(shades)), (0, 0)))


def draw_curves(part: Path, history: Sequence[dict]) -> None:
    """Draws losses and accuracies over the epochs, from the rows of metrics.csv, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    for axes, column, name, style in (
        (losses, "train_loss", "training: total", "-"),
        (losses, "train_xent", "training: cross-entropy", "--"),
        (losses, "train_center", "training: λ · center loss", ":"),
        (losses, "val_xent", "validation: cross-entropy", "-o"),
        (losses, "test_xent", "test: cross-entropy", "-o"),
        (accuracies, "train_accuracy", "training: softmax", "-"),
        (accuracies, "val_accuracy", "validation: softmax", "-o"),
        (accuracies, "val_nearest_center_accuracy", "validation: nearest center", "--s"),
        (accuracies, "test_accuracy", "test: softmax", "-o"),
        (accuracies, "nearest_center_accuracy", "test: nearest center", "--s"),
    ):
        measured = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
        if measured and (column != "train_center" or any(value > 0 for _, value in measured)):  # λ = 0 has none
            axes.plot(*zip(*measured, strict=True), style, label=name, markersize=3)
    losses.set(xlabel="epoch", ylabel="loss", yscale="log")
    accuracies.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (losses, accuracies):
        axes.grid(color="0.92")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    figure.savefig(part, format="png")


def draw_confusion(part: Path, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draws a confusion matrix, counts (true class, predicted class), as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = drawable(classes)  # before there are axes, whose text has the fonts of then
    figure = Figure(figsize=(6.4, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="share of the true class (%)")
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if len(classes) <= 25:
        axes.set_xticks(range(len(classes)), names, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), names)
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if shares[row, column] > 50 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=7)
    figure.savefig(part, format="png")


def draw_roc(part: Path, fars: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Draws the true positive rate of each curve over the false accept rate, logarithmic, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(fars, curve, label=name)
    axes.plot(fars, fars, ":", color="0.5", label="chance")
    axes.set(xscale="log", xlim=(fars[0], 1), ylim=(0, 1.01), title="verification")
    axes.set(xlabel="false accept rate (pairs of two classes)", ylabel="true accept rate (pairs of one class)")
    axes.grid(color="0.92")
    axes.legend(fontsize=8)
    figure.savefig(part, format="png")


class Plotter:
    """Draws in background processes, off the training's way; `finish` waits for them, logs and returns their errors.

    An interrupt in its context ends them, as does `finish` when asked to stop.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self.log, self.pool, self.tasks, self.drawers = log, None, [], set()

    def __enter__(self) -> "Plotter":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if kind is KeyboardInterrupt:
            self._kill()

    @property
    def paths(self) -> set[Path]:
        return {path for path, _ in self.tasks}

    def __call__(self, path: Path, draw: Callable, *arguments) -> None:
        """Lets draw(part, *arguments) write `path`."""
        from concurrent.futures import Future, ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool

        if self.pool is None:
            workers = max(1, min(4, (os.cpu_count() or 1) // 2))
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_drawing)
        before = set(active_children())
        try:
            with _without_main():
                task = self.pool.submit(draw_to, path, draw, *arguments)
        except BrokenProcessPool as error:  # a drawer has died: the training is worth more than its pictures
            task = Future()
            task.set_exception(error)
        self.drawers |= set(active_children()) - before
        self.tasks.append((path, task))

    def finish(self, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Waits until all is drawn or `stop` says to leave it; the error of each picture that is missing."""
        from concurrent.futures import wait

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
    """A process spawned in its context does not import the script that runs, main.py, and with it torch: seconds."""
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
        utils.replace_file(path, lambda part: draw(part, *arguments))
    return {str(warning.message) for warning in caught}


def _start_drawing() -> None:
    """Ctrl-C and a cluster's SIGTERM reach all processes of a run, but the pictures in hand are finished; a killed
    run is missed by nobody else, so that its drawers watch for its end themselves."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)  # the training goes first
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
