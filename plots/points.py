"""Points coloured by class: pictures of epochs, films and panels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from plots import report
from plots.looks import *


class Scatter:
    """Points coloured by class, and a mark at each center, in `axes`; `show` sets them, for each frame of a film."""

    def __init__(self, axes, shown: dict, axis_limits: np.ndarray, small: bool = False):
        classes, self.axes = [str(name) for name in shown["classes"]], axes
        self.colors = palette(len(classes))
        axes.set(
            xlabel=shown["axes"][0],
            ylabel=shown["axes"][1],
            xlim=axis_limits[0],
            ylim=axis_limits[1],
        )
        axes.set(aspect="equal", axisbelow=True)
        axes.ticklabel_format(scilimits=(-2, 4))  # with few ticks, so that labels do not overlap
        axes.locator_params("x", nbins=4 if small else 7)
        axes.grid(color="0.92")
        size = float(np.clip(250 / max(len(shown["points"]), 1) ** 0.5, 1.0, 5.0)) * (
            0.6 if small else 1
        )
        styles = [dict(color=color, markersize=size, markeredgewidth=0) for color in self.colors]
        self.points = [axes.plot([], [], ".", rasterized=True, **style)[0] for style in styles]
        self.unknown = axes.plot([], [], "o", rasterized=True, markersize=0.8 * size, **HOLLOW)[0]
        text = (6 if small else 8) * (1 if len(classes) <= 20 else 0.75)
        self.centers = [
            axes.text(
                0,
                0,
                mark,
                fontsize=text,
                ha="center",
                va="center",
                clip_on=True,
                bbox=dict(
                    boxstyle="circle,pad=0.15",
                    facecolor="#ffffffb0",
                    edgecolor=color,
                    linewidth=text / 7,
                ),
            )
            for mark, color in zip(drawable(marks(classes)), self.colors, strict=True)
        ]

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
    handles = [
        axes.plot([], [], "o", color=color, markersize=3 if small else 5)[0] for color in colors
    ]
    handles += axes.plot(
        [], [], "o", markerfacecolor="white", markeredgecolor="black", markersize=4 if small else 6
    )
    names = [
        name if name.startswith(mark) else f"{mark} {name}"
        for mark, name in zip(marks(classes), shorten(classes, 14 if small else 20), strict=True)
    ]
    options = dict(
        handletextpad=0.2, frameon=False, labelspacing=0.3, columnspacing=1.0, borderaxespad=0
    )
    if below:
        columns = max(1, 60 // (max(map(len, names)) + 3))
        options |= dict(loc="outside lower center", ncols=columns)
    else:
        options |= dict(loc="center left", bbox_to_anchor=(1.02, 0.5))
        if not small:
            options |= dict(
                fontsize=min(9, 260 / (len(classes) + 1))
            )  # points; a picture is 374 points high
    names = [*drawable(names), "center"]
    if has_unknown(shown):
        handles += axes.plot([], [], "o", markersize=3 if small else 5, **HOLLOW)
        names.append("unknown")
    owner = axes.figure if below else axes
    owner.legend(handles, names, **options)


def limits_of(clouds: Sequence[dict]) -> np.ndarray:
    """Axis limits around all points and centers of these epochs."""
    return limits(*(shown[name] for shown in clouds for name in ("points", "centers")))


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
    next(frames).save(
        part, format="GIF", save_all=True, append_images=frames, duration=milliseconds, loop=0
    )


def film_palette(colors: Sequence[str]) -> np.ndarray:
    """256 colours, uint8 (256, 3), for all frames of a film: greys, and tints of the colours, "#rrggbb"."""
    values = (
        np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors]) / 255
    )  # (C, 3)
    tints = np.linspace(
        1, 0.25, np.clip(240 // len(values), 1, 4)
    )  # 1: the colour itself, 0: white
    mixed = 1 - tints[:, None, None] * (1 - values)
    shades = np.concatenate([np.linspace(0, 1, 16).repeat(3).reshape(16, 3), mixed.reshape(-1, 3)])[
        :256
    ]
    return np.pad((255 * shades).round().astype(np.uint8), ((0, 256 - len(shades)), (0, 0)))


def draw_panels(
    part: Path,
    panels: Sequence[tuple[str, dict]],
    columns: int,
    format: str,
    own_axes: bool = False,
) -> None:
    """Draws epochs, of one run or several, for print. `panels`: the label and arrays of each."""
    from matplotlib import rc_context

    width, rows = min(columns * 2.3, 6.9) if columns > 1 else COLUMN, -(-len(panels) // columns)
    with rc_context(PRINT_STYLE):
        titles = drawable([label for label, _ in panels])
        figure, grid = new_figure(
            width,
            width / columns * rows + 0.4,
            rows,
            columns,
            layout="compressed",
            sharex=not own_axes,
            sharey=not own_axes,
        )
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


def draw_tsne(part: Path, source: Path, format: str) -> None:
    """Draws t-SNE of test features and centers, for print; seeded, so that it is always the same."""
    from sklearn.manifold import TSNE

    saved = report.read_arrays(source, ("features", "labels", "centers", "classes"))
    together, count = np.concatenate([saved["features"], saved["centers"]]), len(saved["features"])
    points = TSNE(
        init="pca", perplexity=min(30, (len(together) - 1) / 3), random_state=0
    ).fit_transform(together)
    shown = saved | dict(points=points[:count], centers=points[count:], axes=TSNE_AXES)
    draw_panels(part, [("", shown)], 1, format)
