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
    """system_fonts(*fonts): what matplotlib knows of the fonts of the system."""

    def have(*fonts):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(fonts))
        fonts_for.cache_clear()

    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["DejaVu Sans"])
    original = font_manager.fontManager.ttflist
    yield lambda *fonts: have(*original, *fonts) if fonts else have(*only_dejavu(original))
    fonts_for.cache_clear()


def only_dejavu(fonts) -> list:
    return [font for font in fonts if font.name == "DejaVu Sans"]


def test_names_are_no_formulas_and_bytes_that_are_not_utf8_are_escaped(system_fonts):
    system_fonts()
    names = drawable(["naïve", "a$x_$b", os.fsdecode(b"caf\xe9"), "two\nlines", "中文"])
    assert names == ["naïve", r"a\$x_\$b", r"caf\xe9", "two\nlines", "中文"]


def test_letters_that_no_font_has_are_said_and_stop_no_picture(system_fonts, tmp_path):
    system_fonts()
    drawing = (draw_confusion, np.eye(2, dtype=int), ["中", "a"], "test")
    notes = draw_to(tmp_path / "c.png", *drawing)
    assert len(notes) == 1 and "missing from font" in notes.pop()


def test_a_font_of_the_system_is_chosen_for_letters_that_the_default_lacks(system_fonts, tmp_path):
    letter = "\ue001"  # of the private use area, which STIXNonUnicode has
    (tmp_path / "broken.ttf").write_text("no font")
    broken = font_manager.FontEntry(str(tmp_path / "broken.ttf"), "broken", weight=400)
    system_fonts(broken)
    names = [letter, os.fsdecode(b"\xff"), "c"]  # matplotlib would warn of boxes
    drawing = (draw_confusion, np.eye(3, dtype=int), names, "test")  # as tick labels
    assert draw_to(tmp_path / "c.png", *drawing) == set()
    source = write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names)
    assert draw_to(tmp_path / "d.png", draw_points, source) == set()  # in a legend
    assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "STIXNonUnicode"]
    panels = [(letter, read_epoch(source))] * 2  # with settings of their own, for a while
    matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
    for _ in range(2):
        assert draw_to(tmp_path / "f.png", draw_panels, panels, 2, "png") == set()


def test_class_names_are_no_formulas(tmp_path):
    names = ["a$x_$b", "US$", "c"]
    draw_points(
        tmp_path / "epoch_1.png", write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names)
    )
    draw_confusion(tmp_path / "c.png", np.eye(3, dtype=int), names, "test")
