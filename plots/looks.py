"""Colours, names and figures, common to all pictures."""

import os
from collections.abc import Sequence

import numpy as np

COLUMN = 3.15  # inches, 8 cm: the width of a paper's column

# Petroff's ten colours, which red-green blind readers can tell apart: at least 17 CIELAB units.
COLORS = "#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 #a96b59 #e76300 #b9ac70 #717581 #92dadd".split()

# Of Linux, Windows and macOS, for letters that matplotlib's own font lacks.
FONTS = ("Noto Sans CJK JP", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS")
PRINT_STYLE = {
    "font.size": 7,
    "axes.titlesize": "medium",
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,
    "savefig.dpi": 600,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.01,
}


def palette(count: int) -> list[str]:
    """A colour for each class: the ten of COLORS, then darker and lighter shades of them."""
    from matplotlib.colors import to_hex, to_rgb

    ten = np.array([to_rgb(color) for color in COLORS])
    shades = -(-count // len(COLORS))
    colors = []
    for shade in range(shades):  # darker and lighter in turn, ever further from the ten
        kept = 1 - 0.7 * (shade + shade % 2) / (shades + 1)
        target = 1 - shade % 2
        colors += [to_hex(color) for color in target + kept * (ten - target)]
    return colors[:count]


class Looks:
    """Names and colours of an epoch's classes: the trained ones, `known`, then others, `unseen`.

    Where no point is of a known class, the unknown ones have the best colours anew.
    """

    def __init__(self, shown: dict):
        self.known = printable(shown["classes"])
        self.unseen = printable(shown["unseen"])
        self.names = self.known + self.unseen
        count = len(self.known)
        self.has_known = bool((shown["labels"] < count).any())
        self.colors = palette(len(self.names))
        if not self.has_known:
            self.colors[count:] = palette(len(self.unseen))
        # The text at each center: the names if all are short, else numbers.
        is_short = max(map(len, self.known)) <= 3
        self.marks = self.known if is_short else [str(label) for label in range(count)]

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


def printable(names: Sequence[str]) -> list[str]:
    r"""The names, where bytes that are not UTF-8 become \xe9."""
    return [os.fsencode(str(name)).decode(errors="backslashreplace") for name in names]


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Cuts the middle out of names of more than `width` characters, unless that makes two alike."""
    half = width // 2
    short = [
        name if len(name) <= width else f"{name[:half]}…{name[1 + half - width :]}"
        for name in names
    ]
    return short if len(set(short)) == len(set(names)) else list(names)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, format: str = ""):
    """A figure, in inches, and its axes (rows, columns); in the style of print for a `format`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    matplotlib.rcdefaults()
    matplotlib.rcParams.update(PRINT_STYLE if format else {})
    installed = set(get_font_names())
    fonts = [font for font in FONTS if font in installed]
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *fonts]
    matplotlib.rcParams["text.parse_math"] = False  # a class may be called a$x_$b
    figure = Figure(figsize=(width, height), dpi=150, layout="compressed")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
