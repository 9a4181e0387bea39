"""Curves, confusion matrices and ROC curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plots.looks import COLORS, COLUMN, new_figure, printable, shorten

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
    """Draws losses and error rates, from the rows of metrics.csv: as PNG, or for print."""
    size = (COLUMN, 4.2, 2, 1) if format else (9, 4.2, 1, 2)
    figure, grid = new_figure(*size, format)
    losses, errors = grid.flat
    losses.set_ylabel("loss")
    errors.set_ylabel("error rate (%)")
    for axes, lines in ((losses, LOSSES), (errors, ACCURACIES)):
        for column, name, color, line in lines:
            add_line(axes, history, column, line, label=name, color=color)
        log_axis(axes)
        axes.set_xlabel("epoch")
        axes.grid(color="0.92")
        axes.xaxis.get_major_locator().set_params(integer=True)
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2}
        axes.legend(frameon=False, fontsize="small", **place)
    figure.savefig(part, format=format or "png")


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

    axes.set_yscale("log", nonpositive="clip")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high > 5 * low else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_confusion(
    part: Path, counts: np.ndarray, classes: Sequence[str], title: str = "", format: str = ""
) -> None:
    """Draws a confusion matrix, counts (true class, predicted class): as PNG, or for print."""
    count = len(classes)
    side = 0.26 * np.clip(count, 20, 40)
    if format:
        side = COLUMN if count <= 12 else 2 * COLUMN
    figure, ((axes,),) = new_figure(side * 1.15, side, format=format)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    room = 72 * side / count  # points that a cell has
    size = min(0.46 * room, 7 if format else 9)
    if count <= 40:
        names = shorten(printable(classes), 20)
        turned = 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(count), names, rotation=turned, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    if count <= 25:
        for row, column in zip(*counts.nonzero(), strict=True):
            text = str(counts[row, column])
            color = "white" if shares[row, column] > 50 else "black"
            looks = {"color": color, "fontsize": min(size, 0.97 * room / len(text))}
            axes.text(column, row, text, ha="center", va="center", **looks)
    figure.savefig(part, format=format or "png")


def draw_roc(part: Path, fars: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Draws the true accept rate of each curve over the false accept rate, as PNG.

    Curves called "images, distance" have a colour for the images and a line for the distance.
    """
    figure, ((axes,),) = new_figure(6.4, 4.8)
    colors = {}
    lines = {}
    for name, curve in curves.items():
        images, _, distance = name.partition(", ")
        color = colors.setdefault(images, COLORS[len(colors) % len(COLORS)])
        line = lines.setdefault(distance, DASHES[len(lines) % len(DASHES)])
        axes.plot(fars, curve, line, label=name, color=color)
    axes.plot(fars, fars, color="0.6", linewidth=0.8, label="chance")
    axes.set(xscale="log", xlim=(fars[0], 1), ylim=(0, 1.01), title="verification")
    axes.set_xlabel("false accept rate (pairs of two classes)")
    axes.set_ylabel("true accept rate (pairs of one class)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="0.92")
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(part, format="png")
