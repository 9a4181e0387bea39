"""Names as text of pictures."""

import os

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager

from plots.charts import draw_confusion
from plots.fonts import drawable, fonts_for
from plots.plotter import draw_to
from plots.points import draw_panels, draw_points
from plots.saved import read_epoch
from tests.epochs import cloud, write_epoch


@pytest.fixture
def system_fonts(monkeypatch):
    """system_fonts(*paths): the fonts that the system has, besides matplotlib's default."""

    def have(*paths):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(paths))
        fonts_for.cache_clear()

    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    yield have
    fonts_for.cache_clear()


def test_names_are_shown_letter_by_letter_and_escaped_where_that_cannot_be(system_fonts):
    system_fonts()
    not_utf8 = os.fsdecode(b"caf\xe9")
    with pytest.warns(UserWarning, match="No font of this system has 中 文: "):
        names = drawable(["naïve", "a$x_$b", not_utf8, "two\nlines", "中文"])
    assert names == ["naïve", r"a\$x_\$b", r"caf\xe9", r"two\nlines", r"\u4e2d\u6587"]


def test_a_font_of_the_system_is_chosen_for_letters_that_the_default_lacks(system_fonts, tmp_path):
    letter, path = (
        "\ue001",
        matplotlib.get_data_path() + "/fonts/ttf/STIXNonUni.ttf",
    )  # of the private use area
    assert ord(letter) in font_manager.get_font(path).get_charmap()
    assert (
        ord(letter) not in font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    )
    (tmp_path / "broken.ttf").write_text("no font")
    system_fonts(str(tmp_path / "broken.ttf"), path)
    names = [
        letter,
        os.fsdecode(b"\xff"),
        "c",
    ]  # as tick labels and in a legend; matplotlib warns of boxes
    assert draw_to(tmp_path / "c.png", draw_confusion, np.eye(3, dtype=int), names, "test") == set()
    source = write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names)
    assert draw_to(tmp_path / "d.png", draw_points, source) == set()
    assert matplotlib.rcParams["font.family"] == ["sans-serif", "STIXNonUnicode"]
    panels = [(letter, read_epoch(source))] * 2  # with settings of their own, for a while
    matplotlib.rcParams["font.family"] = ["sans-serif"]
    for _ in range(2):
        assert draw_to(tmp_path / "f.png", draw_panels, panels, 2, "png") == set()


def test_class_names_are_no_formulas(tmp_path):
    names = ["a$x_$b", "US$", "c"]
    draw_points(
        tmp_path / "epoch_1.png", write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names)
    )
    draw_confusion(tmp_path / "c.png", np.eye(3, dtype=int), names, "test")
