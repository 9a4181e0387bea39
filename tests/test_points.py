"""Pictures of points: what they are given is what they show."""

import itertools
import os

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from plots import looks
from plots.looks import COLORS, new_figure
from plots.points import Scatter, add_legend, draw_film, draw_panels, draw_points, limits, plane
from plots.saved import read_epoch
from tests.epochs import cloud, inside, record_figures, write_epoch


def points_of(line) -> np.ndarray:
    return np.column_stack(line.get_data())


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to look at."""
    return record_figures(monkeypatch)


def test_plane_of_two_dimensions_is_the_features_themselves():
    features = cloud()[0]
    project, axes = plane(features)
    assert np.array_equal(project(features), features) and axes == ("feature 1", "feature 2")


def test_plane_of_many_dimensions_is_that_of_the_largest_variance():
    features = cloud(dim=7)[0]
    project, axes = plane(features)
    centered = features - features.mean(0)
    _, singular, rows = np.linalg.svd(centered)  # the oracle
    points = project(features)
    assert np.abs(points) == pytest.approx(np.abs(centered @ rows[:2].T), abs=1e-6)
    shares = 100 * singular[:2] ** 2 / (singular**2).sum()
    assert axes == tuple(f"PC {i + 1} ({shares[i]:.0f} % of the variance)" for i in (0, 1))
    again = plane(features[::-1])[0](features)  # the sign does not depend on chance
    assert again == pytest.approx(points, abs=1e-6)


def test_plane_of_one_dimension_is_a_line():
    project, _ = plane(np.array([[1.0], [3.0]]))
    assert project(np.array([[2.0]])).tolist() == [[2.0, 0.0]]


def test_limits_hold_all_points_and_neither_side_is_much_shorter():
    points = np.array([[0.0, 0.0], [10.0, 1.0]])
    (x0, x1), (y0, y1) = limits([{"points": points, "centers": points[:0]}])
    assert x0 < 0 and x1 > 10 and y0 < 0 and y1 > 1
    assert (y1 - y0) >= 0.85 * (x1 - x0) - 1e-9


@pytest.mark.parametrize("classes", [1, 12, 40, 41, 100])
def test_every_class_has_its_own_colour_and_mark_and_all_points_are_drawn(classes, tmp_path):
    features, labels, centers = cloud(classes)
    shown = read_epoch(write_epoch(tmp_path / "epoch_1.npz", features, labels, centers))
    figure, ((axes,),) = new_figure(6, 5)
    scatter = Scatter(axes, shown, limits([shown]))
    add_legend(axes, shown)
    assert len({line.get_color() for line in scatter.points}) == classes
    for label, line in enumerate(scatter.points):
        assert points_of(line) == pytest.approx(features[labels == label], abs=1e-5)
    assert points_of(scatter.crosses) == pytest.approx(centers, abs=1e-5)
    assert [text.xy for text in scatter.marks] == pytest.approx(centers, abs=1e-5)
    assert [text.get_text() for text in scatter.marks] == list(map(str, range(classes)))
    assert axes.get_aspect() == 1
    legend = axes.get_legend()
    names = [text.get_text() for text in legend.get_texts()] if legend else []
    assert names == ([*map(str, range(classes)), "center"] if classes <= 40 else [])


@pytest.mark.parametrize("scale", [150, 6e4])
def test_tick_labels_never_overlap(scale, drawn, tmp_path):
    features, labels, centers = cloud()
    path = write_epoch(tmp_path / "epoch_1.npz", features * scale, labels, centers * scale)
    draw_points(tmp_path / "p.png", path)
    shown = read_epoch(path)
    draw_panels(tmp_path / "f.png", [("one", shown), ("two", shown), ("three", shown)], 3, "png")
    for figure, grid in drawn:
        for axes in grid.flat:
            low, high = axes.get_xlim()
            texts = [
                text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high
            ]
            assert len(texts) >= 3
            figure.draw_without_rendering()
            boxes = sorted(
                (text.get_window_extent().x0, text.get_window_extent().x1) for text in texts
            )
            assert all(end < start for (_, end), (start, _) in itertools.pairwise(boxes))


def test_the_legend_of_forty_classes_is_not_cut(drawn, tmp_path):
    names = [f"class number {i} of many" for i in range(40)]
    draw_points(
        tmp_path / "p.png", write_epoch(tmp_path / "epoch_1.npz", *cloud(40), classes=names)
    )
    figure, ((axes,),) = drawn[0]
    texts = axes.get_legend().get_texts()
    assert len(texts) == 41
    boxes = inside(figure, texts)
    assert all(above.y0 >= below.y1 - 0.5 for above, below in itertools.pairwise(boxes))


def test_figures_for_print_have_no_title_embedded_fonts_and_points_as_pixels(drawn, tmp_path):
    features, labels, centers = cloud(per_class=4000)
    shown = read_epoch(write_epoch(tmp_path / "epoch_1.npz", features, labels, centers))
    draw_panels(tmp_path / "f.pdf", [("", shown)], 1, "pdf")
    figure, ((axes,),) = drawn[0]
    assert axes.get_title() == "" and figure.get_figwidth() == pytest.approx(8 / 2.54, abs=0.02)
    assert (
        min(
            text.get_fontsize() for text in (*axes.texts, *axes.get_xticklabels(), axes.xaxis.label)
        )
        >= 6
    )
    written = (tmp_path / "f.pdf").read_bytes()
    assert (
        b"/FontFile2" in written and b"/Image" in written and len(written) < 300_000
    )  # 12,000 paths are more


def test_panels_have_the_same_axes(drawn, tmp_path):
    shown = []
    for scale in (1, 20):
        features, labels, centers = cloud()
        path = write_epoch(
            tmp_path / f"epoch_{scale}.npz", features * scale, labels, centers * scale
        )
        shown.append((f"{scale}", read_epoch(path)))
    draw_panels(tmp_path / "f.png", shown, 2, "png")
    first, second = drawn[0][1].flat
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    assert (first.get_title(), second.get_title()) == ("1", "20")
    draw_panels(tmp_path / "f.png", shown, 2, "png", own_axes=True)
    first, second = drawn[1][1].flat
    assert np.ptp(second.get_xlim()) == pytest.approx(20 * np.ptp(first.get_xlim()))


def scatter_of(shown: dict) -> tuple[Scatter, list[str]]:
    """The points of an epoch and the names of its legend."""
    _, ((axes,),) = new_figure(6, 5)
    add_legend(axes, shown)
    scatter = Scatter(axes, shown, limits([shown]))
    return scatter, [text.get_text() for text in axes.get_legend().get_texts()]


def test_unknown_classes_are_hollow_in_their_own_colours_and_named(tmp_path):
    features, labels, centers = cloud(5)
    source = write_epoch(tmp_path / "e.npz", features, labels, centers[:3], unseen=["cat", "dog"])
    scatter, names = scatter_of(read_epoch(source))
    assert names == ["0", "1", "2", "cat", "dog", "center"]
    for label, line in enumerate(scatter.points):
        assert points_of(line) == pytest.approx(features[labels == label], abs=1e-5)
        assert (line.get_markerfacecolor() == "none") == (label >= 3)
    assert len({line.get_markeredgecolor() for line in scatter.points}) == 5


def test_a_test_of_unknown_classes_alone_shows_them_in_the_best_colours(tmp_path):
    features, labels, centers = cloud(3)
    source = write_epoch(
        tmp_path / "e.npz", features, labels + 30, cloud(30)[2], unseen=["ant", "bee", "cat"]
    )
    scatter, names = scatter_of(read_epoch(source))
    assert names == ["ant", "bee", "cat", "trained center"]
    unknown = scatter.points[30:]
    assert [line.get_markeredgecolor() for line in unknown] == list(COLORS[:3])
    assert sum(len(points_of(line)) for line in unknown) == len(features)
    assert scatter.marks == []


def test_many_unknown_classes_are_counted(tmp_path):
    features, labels, centers = cloud(60)
    names = [f"class {label}" for label in range(50)]
    shown = write_epoch(tmp_path / "many.npz", features, labels, centers[:10], unseen=names)
    assert scatter_of(read_epoch(shown))[1][10:] == ["50 unknown classes", "center"]


def test_no_mark_hides_the_points_at_its_center(drawn, tmp_path):
    labels = np.repeat([0, 1, 2], 50)
    centers = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = centers[labels] + np.random.default_rng(0).normal(size=(150, 2)) * 0.1
    shown = read_epoch(write_epoch(tmp_path / "e.npz", points, labels, centers))
    draw_panels(tmp_path / "f.png", [("", shown), ("", shown)], 2, "png")
    figure, grid = drawn[0]
    pixels = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).reshape(-1, 3)
    for color in COLORS[:3]:
        distance = np.abs(pixels / 255 - to_rgb(color)).max(1)
        assert (distance < 0.02).sum() > 300  # of 600 dpi, in each panel
    figure.draw_without_rendering()
    for axes in grid.flat:
        for text, center in zip(axes.texts, centers, strict=True):
            x, y = axes.transData.transform(center)
            assert not text.get_window_extent().contains(x, y)


def test_picture_of_an_epoch(tmp_path):
    source = write_epoch(tmp_path / "epoch_1.npz", *cloud())
    draw_points(tmp_path / "epoch_1.png", source)
    with Image.open(tmp_path / "epoch_1.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.size == (960, 780)
    for color in COLORS[:3]:
        assert (pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum() > 50


def test_nothing_is_cut_at_the_edges_of_a_film(drawn, tmp_path):
    features, labels, centers = cloud(per_class=5)
    points = features * 1e4 - 9e4, labels, centers * 1e4 - 9e4
    write_epoch(tmp_path / "epoch_1.npz", *points, classes=["a" * 60, "b", "c"])
    draw_film(tmp_path / "film.gif", tmp_path)
    figure, ((axes,),) = drawn[0]
    texts = [
        *axes.get_yticklabels(),
        axes.yaxis.label,
        axes.xaxis.label,
        *axes.get_legend().get_texts(),
    ]
    inside(figure, [text for text in texts if text.get_text()])


def test_film_has_a_frame_an_epoch_in_their_order_with_the_same_axes(tmp_path):
    for epoch in (1, 2, 10):
        features, labels, centers = cloud(seed=epoch)
        write_epoch(
            tmp_path / f"epoch_{epoch}.npz",
            features * epoch,
            labels,
            centers * epoch,
            title=f"epoch {epoch}",
        )
    draw_film(tmp_path / "film.gif", tmp_path)
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


def test_colours_of_all_classes_are_in_every_frame_of_a_film(tmp_path):
    for epoch in (1, 2):
        write_epoch(tmp_path / f"epoch_{epoch}.npz", *cloud(10, seed=epoch))
    draw_film(tmp_path / "film.gif", tmp_path)
    with Image.open(tmp_path / "film.gif") as film:
        for index in range(2):
            film.seek(index)
            pixels = np.asarray(film.convert("RGB")).reshape(-1, 3).astype(int)
            assert len(set(pixels[0])) == 1 and pixels[0, 0] >= 254  # white, not tinted
            for color in COLORS:
                distance = np.abs(pixels - 255 * np.array(to_rgb(color))).max(1)
                assert (distance < 12).sum() > 20


def test_names_are_no_formulas_and_bytes_that_are_not_utf8_are_escaped(tmp_path):
    names = ["a$x_$b", "US$", os.fsdecode(b"caf\xe9")]
    source = write_epoch(tmp_path / "e.npz", *cloud(), classes=names)
    draw_points(tmp_path / "e.png", source)
    _, legend = scatter_of(read_epoch(source))
    assert legend == ["0 a$x_$b", "1 US$", r"2 caf\xe9", "center"]


def test_letters_that_the_default_font_lacks_are_of_another_that_is_installed(
    tmp_path, monkeypatch
):
    letter = "\ue001"  # of the private use area, which STIXNonUnicode has
    source = write_epoch(tmp_path / "e.npz", *cloud(), classes=[letter, "b", "c"])
    with pytest.warns(UserWarning, match="missing from font"):
        draw_points(tmp_path / "e.png", source)
    monkeypatch.setattr(looks, "FONTS", ("no such font", "STIXNonUnicode"))
    draw_points(tmp_path / "e.png", source)  # a warning is an error
