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


def draw_curves(part: Path, history: Sequence[dict], format: str = "") -> None:
    """Draws losses and error rates over the epochs, from the rows of metrics.csv.

    As PNG, or for print in `format`.
    """
    with style(format):
        if format:
            figure, grid = new_figure(COLUMN, 4.2, 2, 1, sharex=True)
        else:
            figure, grid = new_figure(9, 4.2, 1, 2)
        losses, errors = grid.flat
        size = 2 if format else 3
        for column, name, color, line in LOSSES:
            values = measured(history, column)
            if column == "train_center" and not any(value > 0 for value in values.values()):
                continue  # λ = 0 has none
            add_line(losses, values, line, label=name, color=color, markersize=size)
        for column, name, color, line in ACCURACIES:
            values = {epoch: 100 - value for epoch, value in measured(history, column).items()}
            add_line(errors, values, line, label=name, color=color, markersize=size)
        losses.set(ylabel="loss", xlabel="" if format else "epoch")
        errors.set(ylabel="error rate (%)", xlabel="epoch")
        for axes in (losses, errors):
            log_axis(axes)
            axes.grid(color="0.92")
            axes.xaxis.get_major_locator().set_params(integer=True)
            place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2}
            axes.legend(frameon=False, fontsize="small", **place)
        save(figure, part, format)


def measured(history: Sequence[dict], column: str) -> dict[int, float]:
    """The values of a column of metrics.csv by epoch, where it was measured."""
    return {row["epoch"]: row[column] for row in history if row.get(column) is not None}


def add_line(axes, values: dict[int, float], line: str, **looks) -> None:
    if values:
        axes.plot(list(values), list(values.values()), line, **looks)


def log_axis(axes) -> None:
    """A logarithmic y axis with plain numbers; a value of 0 lies below it."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.ones(1)])
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return
    low = positive.min() / 1.3
    high = positive.max() * 1.3
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low, high)
    decades = np.log10(high / low)
    subs = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    if decades > 3:
        subs = [1]
    elif decades > 0.7:
        subs = [1, 2, 5]
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def draw_confusion(
    part: Path, counts: np.ndarray, classes: Sequence[str], title: str = "", format: str = ""
) -> None:
    """Draws a confusion matrix, counts (true class, predicted class).

    As PNG, or for print in `format`.
    """
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
            write_counts(axes, counts, shares, room, size)
        save(figure, part, format)


def write_counts(axes, counts: np.ndarray, shares: np.ndarray, room: float, size: float) -> None:
    """Writes the counts into the cells, each of `room` points."""
    for row, column in zip(*counts.nonzero(), strict=True):
        text = str(counts[row, column])
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            color="white" if shares[row, column] > 50 else "black",
            fontsize=min(size, 0.97 * room / len(text)),
        )


def draw_roc(part: Path, fars: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Draws the true positive rate of each curve over the false accept rate, as PNG."""
    figure, ((axes,),) = new_figure(6.4, 4.8)
    for (name, curve), color in zip(curves.items(), palette(len(curves)), strict=True):
        axes.plot(fars, curve, label=name, color=color)
    axes.plot(fars, fars, ":", color="black", label="chance")
    axes.set(xscale="log", xlim=(fars[0], 1), ylim=(0, 1.01), title="verification")
    axes.set_xlabel("false accept rate (pairs of two classes)")
    axes.set_ylabel("true accept rate (pairs of one class)")
    axes.grid(color="0.92")
    axes.legend(fontsize="small", frameon=False)
    save(figure, part)
