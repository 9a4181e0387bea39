"""Class names as text of pictures, with a font for every letter."""

import functools
import os
import unicodedata
import warnings
from collections.abc import Sequence


def drawable(names: Sequence[str]) -> list[str]:
    r"""The names as text for matplotlib: without formulas, and with a font for every letter.

    Letters that no font of the system has become \u4e2d, with a warning; bytes that are not UTF-8
    become \xe9. Call this before axes and texts are made, since that is when they get their fonts.
    """
    from matplotlib import rcParams

    names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
    letters = {letter for letter in "".join(names) if unicodedata.category(letter) != "Cc"}
    families, missing = fonts_for(frozenset(letters), tuple(rcParams["font.family"]))
    rcParams["font.family"] = list(families)
    if missing:
        some = " ".join(sorted(missing)[:10])
        message = f"No font of this system has {some}: pictures show their numbers, such as \\u4e2d"
        warnings.warn(message, stacklevel=2)

    def show(letter: str) -> str:
        if letter in letters - missing:
            return letter
        return letter.encode("unicode_escape").decode()

    return ["".join(map(show, name)).replace("$", r"\$") for name in names]


@functools.cache
def fonts_for(letters: frozenset, families: tuple[str, ...]) -> tuple[tuple[str, ...], set[str]]:
    """The font families, with those of the system that add letters; and the letters none has."""
    from matplotlib import font_manager

    missing = set(letters)
    for family in families:
        default = font_manager.FontProperties(family=[family])
        missing -= letters_of(font_manager.findfont(default), missing)
    for font in font_manager.fontManager.ttflist:
        is_regular = font.weight == 400 and font.style == "normal"
        found = letters_of(font.fname, missing) if missing and is_regular else set()
        if found:
            missing -= found
            families = (*families, font.name)
    return families, missing


def letters_of(path: str, letters: set[str]) -> set[str]:
    """Those of the letters that a font file has."""
    from matplotlib import font_manager

    try:
        known = font_manager.get_font(path).get_charmap()
    except (OSError, RuntimeError):  # FreeType cannot use the font
        return set()
    return {letter for letter in letters if ord(letter) in known}
