"""Class names as text of pictures, with a font for every letter that the system has one for."""

import functools
import os
from collections.abc import Sequence


def drawable(names: Sequence[str]) -> list[str]:
    r"""The names as text for matplotlib, without formulas; bytes that are not UTF-8 become \xe9.

    Call this before axes and texts are made, since that is when they get their fonts.
    """
    from matplotlib import rcParams

    names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
    rcParams["font.family"] = fonts_for(frozenset("".join(names)), tuple(rcParams["font.family"]))
    return [name.replace("$", r"\$") for name in names]


@functools.cache
def fonts_for(letters: frozenset[str], families: tuple[str, ...]) -> list[str]:
    """The font families, and fonts of the system that have what these lack."""
    from matplotlib import font_manager

    families = list(families)
    missing = {ord(letter) for letter in letters if letter >= " "}
    for family in families:
        default = font_manager.FontProperties(family=[family])
        missing -= charmap(font_manager.findfont(default))
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        found = missing & charmap(font.fname)
        if found and font.weight == 400 and font.style == "normal":
            missing -= found
            families.append(font.name)
    return families


def charmap(path: str) -> set[int]:
    """The letters that a font file has."""
    from matplotlib import font_manager

    try:
        return set(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # FreeType cannot use the font
        return set()
