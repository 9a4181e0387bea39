"""Colours, names and figures, common to all pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMN = 3.15  # inches, 8 cm: the width of a paper's column

# Petroff's ten colours, which red-green blind readers can tell apart: at least 17 CIELAB units.
COLORS = "#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 #a96b59 #e76300 #b9ac70 #717581 #92dadd".split()

PRINT_STYLE = {
    "font.size": 7,
    "axes.titlesize": "medium",
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,
    "svg.hashsalt": "center-loss",
}


def rgb(colors: Sequence[str]) -> np.ndarray:
    """Colours "#rrggbb" as numbers from 0 to 1, (N, 3)."""
    return np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors]) / 255


def palette(count: int) -> list[str]:
    """A colour for each class: the ten of COLORS, then darker and lighter shades of them."""
    shades = -(-count // len(COLORS))
    colors = []
    for shade in range(shades):  # darker and lighter in turn, ever further from the ten
        kept = 1 - 0.7 * (shade + shade % 2) / (shades + 1)
        target = 1 - shade % 2
        mixed = 255 * (target + kept * (rgb(COLORS) - target))
        colors += ["#" + bytes(color).hex() for color in mixed.round().astype(np.uint8)]
    return colors[:count]


class Looks:
    """Names and colours of an epoch's classes: the trained ones, `known`, then others, `unseen`.

    Where no point is of a known class, the unknown ones have the best colours anew.
    """

    def __init__(self, shown: dict):
        self.known = [str(name) for name in shown["classes"]]
        self.unseen = [str(name) for name in shown["unseen"]]
        count = len(self.known)
        self.has_known = bool((shown["labels"] < count).any())
        self.colors = palette(count + len(self.unseen))
        if not self.has_known:
            self.colors[count:] = palette(len(self.unseen))
        # The text at each center: the names if all are short, else numbers.
        is_short = max(map(len, self.known)) <= 3
        self.marks = self.known if is_short else [str(label) for label in range(count)]

    def short(self, width: int) -> list[str]:
        return shorten(self.known + self.unseen, width)

    def styles(self) -> list[dict]:
        """How the points of each class are drawn; those of unknown ones are hollow."""
        known = {"marker": "o", "linestyle": "", "markeredgewidth": 0}
        unknown = known | {"markerfacecolor": "none", "markeredgewidth": 0.6}
        kinds = [known] * len(self.known) + [unknown] * len(self.unseen)
        return [kind | {"color": color} for kind, color in zip(kinds, self.colors, strict=True)]

    def cross(self, size: float) -> dict:
        """How centers are drawn: thin, so that they hide no cluster."""
        color = "black" if self.has_known else "0.6"
        looks = {"marker": "+", "linestyle": "", "markersize": 1.2 * size, "color": color}
        return looks | {"markeredgewidth": size / 6, "path_effects": edge(size / 2)}


def edge(width: float) -> list:
    """A white edge, in points, around what is to be seen on points of all colours."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="white")]


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Cuts the middle out of names of more than `width` characters, unless that makes two alike."""
    half = width // 2
    short = [
        name if len(name) <= width else f"{name[:half]}…{name[1 + half - width :]}"
        for name in names
    ]
    return short if len(set(short)) == len(set(names)) else list(names)


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
    """Saves a figure as PNG or, for print, in `format`: cropped, undated, at 600 dpi."""
    if not format:
        figure.savefig(part, format="png")
        return
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(format)
    options = {"dpi": 600, "bbox_inches": "tight", "pad_inches": 0.01}
    figure.savefig(part, format=format, metadata=undated, **options)
