"""Pictures: what they are given is what they show."""

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

import plots
from tests import drawers


def cloud(classes=3, per_class=20, dim=2, seed=0):
    random = np.random.default_rng(seed)
    centers = random.normal(size=(classes, dim)) * 5
    labels = np.repeat(np.arange(classes), per_class)
    return centers[labels] + random.normal(size=(len(labels), dim)) * 0.1, labels, centers


def write_epoch(path, features, labels, centers, title="train, epoch 1: accuracy 9.99 %", classes=None):
    project, axes = plots.plane(features)
    classes = classes or [str(c) for c in range(len(centers))]
    plots.save_points(features, labels, centers, classes, project, axes, title, path)
    return path


def test_plane_of_two_dimensions_is_the_features_themselves():
    features = cloud()[0]
    project, axes = plots.plane(features)
    assert np.array_equal(project(features), features) and axes == ("feature 1", "feature 2")


def test_plane_of_many_dimensions_is_that_of_the_largest_variance():
    features = cloud(dim=7)[0]
    project, axes = plots.plane(features)
    centered = features - features.mean(0)
    _, singular, rows = np.linalg.svd(centered)  # the oracle
    points = project(features)
    assert np.abs(points) == pytest.approx(np.abs(centered @ rows[:2].T), abs=1e-6)
    shares = 100 * singular[:2] ** 2 / (singular**2).sum()
    assert axes == tuple(f"principal component {i + 1} ({shares[i]:.0f} % of the variance)" for i in (0, 1))
    again = plots.plane(features[::-1])[0](features)  # the sign does not depend on chance
    assert again == pytest.approx(points, abs=1e-6)


def test_plane_of_one_dimension_is_a_line():
    project, _ = plots.plane(np.array([[1.0], [3.0]]))
    assert project(np.array([[2.0]])).tolist() == [[2.0, 0.0]]


def test_limits_hold_all_points_and_ignore_what_is_not_finite():
    points = np.array([[0.0, 0.0], [10.0, 1.0], [np.nan, 5.0], [np.inf, 0.0]])
    (x0, x1), (y0, y1) = plots.limits(points)
    assert x0 < 0 and x1 > 10 and y0 < 0 and y1 > 1
    assert (y1 - y0) >= (x1 - x0) / 2 - 1e-9


@pytest.mark.parametrize("classes", [1, 10, 12, 20, 25, 26, 100])
def test_every_class_has_its_own_colour_and_all_points_are_drawn(classes, tmp_path):
    features, labels, centers = cloud(classes)
    shown = dict(np.load(write_epoch(tmp_path / "epoch_1.npz", features, labels, centers)))
    scatter = plots.Scatter(shown, plots.limits(features, centers), dpi=50)
    scatter.show(shown)
    assert len({line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())
                for line in scatter.points}) == classes  # fmt: skip
    drawn = [np.column_stack(line.get_data()) for line in scatter.points]
    for label, points in enumerate(drawn):
        assert points == pytest.approx(features[labels == label], abs=1e-5)
    assert scatter.centers.get_offsets() == pytest.approx(centers, abs=1e-5)
    assert scatter.axes.get_aspect() == 1
    legend = scatter.axes.get_legend()
    names = [text.get_text() for text in legend.get_texts()] if legend else []
    assert names == ([*map(str, range(classes)), "center"] if classes <= 25 else [])
    assert scatter.axes.get_title() == "train, epoch 1: accuracy 9.99 %"


def test_unknown_classes_are_hollow_and_grey(tmp_path):
    features, labels, centers = cloud(4)
    write_epoch(tmp_path / "epoch_1.npz", features, labels, centers[:3])
    shown = dict(np.load(tmp_path / "epoch_1.npz"))
    scatter = plots.Scatter(shown, plots.limits(features), dpi=50)
    scatter.show(shown)
    assert np.column_stack(scatter.unknown.get_data()) == pytest.approx(features[labels == 3], abs=1e-5)
    assert (scatter.unknown.get_markerfacecolor(), scatter.unknown.get_markeredgecolor()) == ("none", "0.5")
    assert sum(len(line.get_data()[0]) for line in scatter.points) == 60
    assert [text.get_text() for text in scatter.axes.get_legend().get_texts()] == ["0", "1", "2", "center", "unknown"]


def test_picture_of_an_epoch(tmp_path):
    source = write_epoch(tmp_path / "epoch_1.npz", *cloud())
    plots.draw_points(tmp_path / "epoch_1.png", source)
    with Image.open(tmp_path / "epoch_1.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.size == (960, 780)
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # the first of matplotlib's ten colours
        assert (pixels == color).all(1).sum() > 50


def test_film_has_a_frame_an_epoch_in_their_order_with_the_same_axes(tmp_path):
    for epoch in (1, 2, 10):
        features, labels, centers = cloud(seed=epoch)
        write_epoch(tmp_path / f"epoch_{epoch}.npz", features * epoch, labels, centers * epoch, f"epoch {epoch}")
    plots.draw_film(tmp_path / "film.gif", tmp_path)
    frames = []
    with Image.open(tmp_path / "film.gif") as film:
        for index in range(film.n_frames):
            film.seek(index)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
        assert film.info.get("loop") == 0
    assert len(frames) == 3
    ticks = [frame[-45:] for frame in frames]  # the axis labels below the points
    assert (ticks[0] == ticks[1]).all() and (ticks[1] == ticks[2]).all()
    assert not (frames[0] == frames[1]).all()


def test_film_of_a_single_epoch(tmp_path):
    write_epoch(tmp_path / "epoch_3.npz", *cloud())
    plots.draw_film(tmp_path / "film.gif", tmp_path)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 1


def test_curves_leave_out_what_was_not_measured(tmp_path):
    row = dict(epoch=1, train_loss=2.0, train_xent=2.0, train_center=0.0, train_accuracy=10.0, test_xent=None,
               test_accuracy=None, nearest_center_accuracy=None)  # fmt: skip
    plots.draw_curves(tmp_path / "curves.png", [row, row | dict(epoch=2, test_accuracy=50.0, test_xent=1.0)])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1350, 540)


def test_class_names_are_no_formulas(tmp_path):
    names = ["a$x_$b", "US$", "c"]
    plots.draw_points(tmp_path / "epoch_1.png", write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names))
    plots.draw_confusion(tmp_path / "c.png", np.eye(3, dtype=int), names, "test")


@pytest.fixture
def system_fonts(monkeypatch):
    """system_fonts(*paths): the fonts that the system has, besides matplotlib's default."""

    def have(*paths):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(paths))
        plots._letters_without_font.cache_clear()

    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    yield have
    plots._letters_without_font.cache_clear()


def test_names_are_shown_letter_by_letter_and_escaped_where_that_cannot_be(system_fonts):
    system_fonts()
    not_utf8 = os.fsdecode(b"caf\xe9")
    with pytest.warns(UserWarning, match="No font of this system has 中 文: "):
        names = plots.drawable(["naïve", "a$x_$b", not_utf8, "two\nlines", "中文", "a" * 15], length=14)
    assert names == ["naïve", r"a\$x_\$b", r"caf\xe9", r"two\nlines", r"\u4e2d\u6587", "a" * 13 + "…"]


def test_a_font_of_the_system_is_chosen_for_letters_that_the_default_lacks(system_fonts, tmp_path):
    letter, path = "\ue001", matplotlib.get_data_path() + "/fonts/ttf/STIXNonUni.ttf"  # of the private use area
    assert ord(letter) in font_manager.get_font(path).get_charmap()
    assert ord(letter) not in font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    (tmp_path / "broken.ttf").write_text("no font")
    system_fonts(str(tmp_path / "broken.ttf"), path)
    names = [letter, os.fsdecode(b"\xff"), "c"]  # as tick labels and in a legend; matplotlib warns of boxes
    assert plots.draw_to(tmp_path / "c.png", plots.draw_confusion, np.eye(3, dtype=int), names, "test") == set()
    source = write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names)
    assert plots.draw_to(tmp_path / "d.png", plots.draw_points, source) == set()
    assert matplotlib.rcParams["font.family"] == ["sans-serif", "STIXNonUnicode"]


@pytest.mark.parametrize("classes", [3, 60])
def test_confusion_matrix(classes, tmp_path):
    plots.draw_confusion(tmp_path / "c.png", np.eye(classes, dtype=int), [f"class {i}" for i in range(classes)], "test")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (960, 840)


def test_plotter_draws_in_the_background_and_reports_what_failed(tmp_path):
    plotter = plots.Plotter()
    plotter(tmp_path / "good", drawers.write, "drawn")
    plotter(tmp_path / "bad", drawers.fail)
    assert plotter.finish() == [f"{tmp_path / 'bad'}: no ink"]
    assert (tmp_path / "good").read_text() == "drawn" and not (tmp_path / "bad").exists()
    assert plotter.finish() == []


def test_warnings_of_all_pictures_are_logged_once(tmp_path):
    lines = []
    plotter = plots.Plotter(lines.append)
    for name in "abc":
        plotter(tmp_path / name, drawers.warn)
    assert plotter.finish() == [] and lines == ["pale ink"]


def wait_for_part(directory):
    while not list(directory.glob(".*.part")):
        time.sleep(0.01)


def test_a_plotter_that_is_asked_to_stop_leaves_no_process_and_no_half_picture(tmp_path):
    plotter = plots.Plotter()
    plotter(tmp_path / "slow", drawers.hang)
    plotter(tmp_path / "next", drawers.write, "drawn")
    wait_for_part(tmp_path)
    began = time.monotonic()
    assert plotter.finish(lambda: True) == [f"{tmp_path / name}: stopped" for name in ("slow", "next")]
    assert time.monotonic() - began < 5 and os.listdir(tmp_path) == []
    assert not any(drawer.is_alive() for drawer in plotter.drawers)


def test_an_interrupt_ends_what_is_being_drawn(tmp_path):
    with pytest.raises(KeyboardInterrupt), plots.Plotter() as plotter:
        plotter(tmp_path / "slow", drawers.hang)
        wait_for_part(tmp_path)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == [] and not any(drawer.is_alive() for drawer in plotter.drawers)


def test_a_drawing_process_loads_neither_the_script_that_runs_nor_torch(tmp_path, monkeypatch):
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("import torch")
    monkeypatch.setitem(sys.modules, "__main__", script)
    plotter = plots.Plotter()
    plotter(tmp_path / "modules", drawers.name_modules)
    assert plotter.finish() == [] and sys.modules["__main__"] is script
    modules = (tmp_path / "modules").read_text().split()
    assert "plots" in modules and "torch" not in modules


def test_a_drawer_that_dies_costs_pictures_but_not_the_run(tmp_path):
    plotter = plots.Plotter()
    plotter(tmp_path / "first", drawers.die)
    plotter.tasks[0][1].exception()
    plotter(tmp_path / "second", drawers.write, "drawn")
    errors = plotter.finish()
    assert [error.partition(":")[0] for error in errors] == [str(tmp_path / "first"), str(tmp_path / "second")]


def test_drawers_outlive_the_signals_that_a_whole_run_gets(tmp_path):
    plotter = plots.Plotter()
    for number in (signal.SIGINT, signal.SIGTERM):
        plotter(tmp_path / str(number), drawers.signal_oneself, number)
    assert plotter.finish() == [] and len(os.listdir(tmp_path)) == 2
