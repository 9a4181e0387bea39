"""Curves, confusion matrices and ROC curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plots.fonts import drawable
from plots.looks import COLORS, COLUMN, new_figure, palette, save, shorten, style

# The lines of the two charts: column of metrics.csv, name, colour and style.
LOSSES = (
    ("train_loss", "training: total", COLORS[0], "-"),
    ("train_xent", "training: cross-entropy", COLORS[0], "--"),
    ("train_center", "training: λ · center loss", COLORS[0], ":"),
    ("val_xent", "validation: cross-entropy", COLORS[8], "-o"),
    ("test_xent", "test: cross-entropy", COLORS[6], "-o"),
)
ACCURACIES = (
    ("train_accuracy", "training: softmax", COLORS[0], "-"),
    ("val_accuracy", "validation: softmax", COLORS[8], "-o"),
    ("val_nearest_center_accuracy", "validation: nearest center", COLORS[8], "--s"),
    ("test_accuracy", "test: softmax", COLORS[6], "-o"),
    ("nearest_center_accuracy", "test: nearest center", COLORS[4], "--s"),
)
DASHES = ("-", "--", ":", "-.")  # of distances in ROC curves


def draw_curves(part: Path, history: Sequence[dict], format: str = "") -> None:
    """Draws losses and error rates, from the rows of metrics.csv: as PNG, or in `format`."""
    with style(format):
        if format:
            figure, grid = new_figure(COLUMN, 4.2, 2, 1, sharex=True)
        else:
            figure, grid = new_figure(9, 4.2, 1, 2)
        losses, errors = grid.flat
        losses.set(ylabel="loss", xlabel="" if format else "epoch")
        errors.set(ylabel="error rate (%)", xlabel="epoch")
        for axes, lines in ((losses, LOSSES), (errors, ACCURACIES)):
            for column, name, color, line in lines:
                add_line(axes, history, column, line, label=name, color=color)
            log_axis(axes)
            axes.grid(color="0.92")
            axes.xaxis.get_major_locator().set_params(integer=True)
            place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2}
            axes.legend(frameon=False, fontsize="small", **place)
        save(figure, part, format)


def add_line(axes, history: Sequence[dict], column: str, line: str, **looks) -> None:
    """Draws a column where it was measured, an accuracy as an error rate."""
    rows = [row for row in history if row.get(column) is not None]
    values = np.array([row[column] for row in rows])
    if column.endswith("accuracy"):
        values = 100 - values
    if rows and (column != "train_center" or values.any()):  # λ = 0 has no center loss
        axes.plot([row["epoch"] for row in rows], values, line, markersize=3, **looks)


def log_axis(axes) -> None:
    """A logarithmic y axis with plain numbers; a value of 0 lies below it."""
    from matplotlib.ticker import LogLocator

    values = np.concatenate([line.get_ydata() for line in axes.lines] or [[1]])
    positive = values[values > 0]
    if not len(positive):
        return
    low = positive.min() / 1.3
    high = positive.max() * 1.3
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low, high)
    subs = (1, 2, 5) if high > 5 * low else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_confusion(
    part: Path, counts: np.ndarray, classes: Sequence[str], title: str = "", format: str = ""
) -> None:
    """Draws a confusion matrix, counts (true class, predicted class): as PNG, or in `format`."""
    count = len(classes)
    side = 0.26 * count if 20 < count <= 40 else 5.2
    if format:
        side = COLUMN if count <= 12 else 2 * COLUMN
    with style(format):
        names = drawable(shorten(classes, 20))
        figure, ((axes,),) = new_figure(side * 1.15, side, layout="compressed")
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
        axes.set(xlabel="predicted class", ylabel="true class", title=title)
        room = 72 * side / count  # points that a cell has
        size = min(0.46 * room, 7 if format else 9)
        if count <= 40:
            turned = 90 if max(map(len, names)) > 2 else 0
            axes.set_xticks(range(count), names, rotation=turned, fontsize=size)
            axes.set_yticks(range(count), names, fontsize=size)
        if count <= 25:
            for row, column in zip(*counts.nonzero(), strict=True):
                text = str(counts[row, column])
                color = "white" if shares[row, column] > 50 else "black"
                looks = {"color": color, "fontsize": min(size, 0.97 * room / len(text))}
                axes.text(column, row, text, ha="center", va="center", **looks)
        save(figure, part, format)


def draw_roc(part: Path, fars: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Draws the true positive rate of each curve over the false accept rate, as PNG.

    Curves called "images, distance" have a colour for the images and a line for the distance.
    """
    figure, ((axes,),) = new_figure(6.4, 4.8)
    parts = [name.partition(", ") for name in curves]
    images = list(dict.fromkeys(first for first, _, _ in parts))
    distances = list(dict.fromkeys(last for _, _, last in parts))
    for (name, curve), (first, _, last) in zip(curves.items(), parts, strict=True):
        line = DASHES[distances.index(last) % len(DASHES)]
        color = palette(len(images))[images.index(first)]
        axes.plot(fars, curve, line, label=name, color=color)
    axes.plot(fars, fars, color="0.6", linewidth=0.8, label="chance")
    axes.set(xscale="log", xlim=(fars[0], 1), ylim=(0, 1.01), title="verification")
    axes.set_xlabel("false accept rate (pairs of two classes)")
    axes.set_ylabel("true accept rate (pairs of one class)")
    axes.grid(color="0.92")
    axes.legend(fontsize="small", frameon=False)
    save(figure, part)
