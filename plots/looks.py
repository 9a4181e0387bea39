"""Colours, names and figures, common to all pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMN = 3.15  # inches, 8 cm: the width of a paper's column

# Petroff's ten colours, which red-green blind readers can tell apart: at least 17 CIELAB units.
COLORS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)

PRINT_STYLE = {
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,
    "svg.hashsalt": "center-loss",
}


def rgb(colors: Sequence[str]) -> np.ndarray:
    """Colours "#rrggbb" as numbers from 0 to 1, (N, 3)."""
    return np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors]) / 255


def palette(count: int) -> list[str]:
    """A colour for each class: the ten of COLORS, then darker and lighter shades of them."""
    base = rgb(COLORS)
    shades = -(-count // len(base))
    colors = []
    for label in range(count):
        color = base[label % len(base)]
        shade = label // len(base)
        if shade % 2:  # darker and lighter in turn, ever further from the colour itself
            color = color * (1 - 0.7 * (shade + 1) / (shades + 1))
        else:
            color = 1 - (1 - color) * (1 - 0.7 * shade / (shades + 1))
        colors.append("#" + "".join(f"{round(255 * part):02x}" for part in color))
    return colors


class Looks:
    """How the classes of an epoch look; first the trained ones, `known`, then the others, `unseen`.

    Unknown classes are hollow. They get colours of their own, or where no point is of a known class
    the best ones anew.
    """

    def __init__(self, shown: dict):
        self.known = [str(name) for name in shown["classes"]]
        self.unseen = [str(name) for name in shown["unseen"]]
        count = len(self.known)
        self.has_known = bool((shown["labels"] < count).any())
        self.colors = palette(count + len(self.unseen))
        if not self.has_known:
            self.colors = palette(count) + palette(len(self.unseen))
        self.marks = marks(self.known)
        self.cross = "black" if self.has_known else "0.6"  # at a center

    def short(self, width: int) -> list[str]:
        return shorten(self.known + self.unseen, width)


def hollow(color: str) -> dict:
    """How points of an unknown class are drawn."""
    return {"color": color, "markerfacecolor": "none", "markeredgewidth": 0.6}


def marks(classes: Sequence[str]) -> list[str]:
    """The text at each center: the names of the classes if all are short, else their numbers."""
    if max(map(len, classes)) <= 3:
        return list(classes)
    return [str(label) for label in range(len(classes))]


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Cuts the names to `width` characters, near the middle, so that different ones stay so.

    If no cut does that, all get as many more characters as it takes.
    """
    for room in range(width, max(map(len, names), default=0)):
        for tail in sorted(range(room), key=lambda tail: abs(tail - room // 2)):
            short = [cut(name, room, tail) for name in names]
            if len(set(short)) == len(set(names)):
                return short
    return list(names)


def cut(name: str, room: int, tail: int) -> str:
    """A name in at most `room` characters, of which the last `tail` are those of its end."""
    if len(name) <= room:
        return name
    return name[: room - 1 - tail] + "…" + name[len(name) - tail :]


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure, in inches, and its axes (rows, columns); without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = options.pop("layout", "constrained")
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def style(format: str):
    """The context of a figure: that of print for a `format`, matplotlib's own without."""
    from matplotlib import rc_context

    return rc_context(PRINT_STYLE if format else {})


def save(figure, part: Path, format: str = "") -> None:
    """Saves a figure as PNG or, for print, in `format`, cropped, at 600 dpi.

    The same data give the same file.
    """
    if not format:
        figure.savefig(part, format="png")
        return
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(format)
    options = {"dpi": 600, "bbox_inches": "tight", "pad_inches": 0.01}
    figure.savefig(part, format=format, metadata=metadata, **options)
