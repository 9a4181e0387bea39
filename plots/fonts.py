"""Class names as text of pictures, with a font for every letter."""

import functools
import os
import unicodedata
import warnings
from collections.abc import Iterable, Sequence


def drawable(names: Sequence[str]) -> list[str]:
    r"""The names as text for matplotlib: without formulas, and with a font for every letter.

    Letters that no font of the system has become \u4e2d, with a warning; bytes that are not UTF-8
    become \xe9. Call this before axes and texts are made, since that is when they get their fonts.
    """
    from matplotlib import rcParams

    names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
    families, missing = fonts_for(frozenset("".join(names)), tuple(rcParams["font.family"]))
    rcParams["font.family"] = list(families)
    if missing:
        some = " ".join(sorted(missing)[:10]) + " …" * (len(missing) > 10)
        message = f"No font of this system has {some}: pictures show their numbers, such as \\u4e2d"
        warnings.warn(message, stacklevel=2)

    def show(letter: str) -> str:
        odd = letter in missing or is_control(letter)
        return letter.encode("unicode_escape").decode() if odd else letter

    return ["".join(map(show, name)).replace("$", r"\$") for name in names]


def is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc"


@functools.cache
def fonts_for(
    letters: frozenset[str], families: tuple[str, ...]
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The font families, with those of the system that add letters; and the letters none has."""
    from matplotlib import font_manager

    missing = {letter for letter in letters if not is_control(letter)}
    for family in families:
        missing -= letters_of(default_font(family), missing)
    paths = font_manager.findSystemFonts() if missing else []
    for path in sorted(paths, key=lambda path: ("Regular" not in path, path)):
        if not letters_of(path, missing):
            continue
        font_manager.fontManager.addfont(path)
        family = font_manager.get_font(path).family_name
        found = letters_of(default_font(family), missing)
        if found:  # not in its bold alone
            missing -= found
            families = (*families, family)
    return families, frozenset(missing)


def default_font(family: str) -> str:
    from matplotlib import font_manager

    return font_manager.findfont(font_manager.FontProperties(family=[family]))


def letters_of(path: str, letters: Iterable[str]) -> set[str]:
    """Those of the letters that a font file has."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        known = font.get_charmap() if font.scalable else {}
    except (OSError, RuntimeError):  # FreeType cannot use the font
        return set()
    return {letter for letter in letters if ord(letter) in known}
