"""Curves, confusion matrices and ROC curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plots.looks import *


def draw_curves(part: Path, history: Sequence[dict], format: str = "") -> None:
    """Draws losses and error rates over the epochs, from the rows of metrics.csv: as PNG, or for print in `format`."""
    from matplotlib import rc_context

    with rc_context(PRINT_STYLE if format else {}):
        figure, grid = (
            new_figure(COLUMN, 4.2, 2, 1, sharex=True) if format else new_figure(9, 4.2, 1, 2)
        )
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
            measured = [
                (row["epoch"], row[column]) for row in history if row.get(column) is not None
            ]
            if axes is errors:
                measured = [(epoch, 100 - accuracy) for epoch, accuracy in measured]
            if measured and (
                column != "train_center" or any(value > 0 for _, value in measured)
            ):  # λ = 0 has none
                color = COLORS[dict(train=0, val=8, test=6).get(column[: column.find("_")], 4)]
                axes.plot(
                    *zip(*measured, strict=True),
                    style,
                    label=name,
                    color=color,
                    markersize=2 if format else 3,
                )
        losses.set(ylabel="loss")
        errors.set(xlabel="epoch", ylabel="error rate (%)")
        if not format:
            losses.set(xlabel="epoch")
        for axes in (losses, errors):
            log_axis(axes)
            axes.grid(color="0.92")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 1),
                ncols=2,
                frameon=False,
                fontsize="small",
            )
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


def draw_confusion(
    part: Path, counts: np.ndarray, classes: Sequence[str], title: str = "", format: str = ""
) -> None:
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
            size = min(
                72 * 0.75 * side / count * 0.62, 7 if format else 9
            )  # points; a cell has room for one line
            axes.set_xticks(
                range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size
            )
            axes.set_yticks(range(count), names, fontsize=size)
        if count <= 25:
            for row, column in zip(*counts.nonzero(), strict=True):
                color, number = (
                    "white" if shares[row, column] > 50 else "black",
                    str(counts[row, column]),
                )
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
    axes.set(
        xlabel="false accept rate (pairs of two classes)",
        ylabel="true accept rate (pairs of one class)",
    )
    axes.grid(color="0.92")
    axes.legend(fontsize="small", frameon=False)
    save(figure, part)
