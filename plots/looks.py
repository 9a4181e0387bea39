"""Colours, names, projection and figures, common to all pictures."""

import contextlib
import functools
import os
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

COLUMN = 3.15  # inches, 8 cm: the width of a paper's column


# Petroff's ten colours: at least 17 CIELAB units apart for red-green blind readers, too (matplotlib's own: 4.6).
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


HOLLOW = dict(color="0.5", markerfacecolor="none", markeredgewidth=0.5)  # points of unknown classes


TSNE_AXES = ("t-SNE 1\n(distances between clusters mean little)", "t-SNE 2")


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
    shares, components = (
        100 * variances[:-3:-1] / max(variances.sum(), 1e-30),
        components[:, :-3:-1],
    )  # (D, 2)
    largest = np.abs(components).argmax(0)
    components = components * np.sign(
        components[largest, [0, 1]]
    )  # else their arbitrary sign may flip
    names = tuple(
        f"principal component {i} ({share:.0f} % of the variance)"
        for i, share in enumerate(shares, 1)
    )
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
    return (
        list(classes)
        if max(map(len, classes)) <= 3
        else [str(label) for label in range(len(classes))]
    )


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Cuts the names to at most `width` characters, near the middle, so that different names stay different.

    If no cut does that, all get as many more characters as it takes.
    """
    for room in range(width, max(map(len, names), default=0)):
        for tail in sorted(range(room), key=lambda tail: abs(tail - room // 2)):
            short = [
                name
                if len(name) <= room
                else name[: room - 1 - tail] + "…" + name[len(name) - tail :]
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
        warnings.warn(
            f"No font of this system has {some}: pictures show their numbers, such as \\u4e2d",
            stacklevel=2,
        )

    def show(letter: str) -> str:
        odd = letter in missing or unicodedata.category(letter) == "Cc"
        return letter.encode("unicode_escape").decode() if odd else letter

    return ["".join(map(show, name)).replace("$", r"\$") for name in names]


@functools.cache
def _fonts_for(
    letters: frozenset[str], families: tuple[str, ...]
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The font families, plus those of the system that have further letters; and the letters that none has."""
    from matplotlib import font_manager

    def letters_of(path: str) -> set[str]:
        with contextlib.suppress(OSError, RuntimeError):  # FreeType cannot use the font
            font = font_manager.get_font(path)
            return {
                letter for letter in missing if font.scalable and ord(letter) in font.get_charmap()
            }
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
    figure.savefig(
        part, format=format, dpi=600, bbox_inches="tight", pad_inches=0.01, metadata=undated
    )
