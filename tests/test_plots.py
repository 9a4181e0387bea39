"""Pictures: what they are given is what they show."""

import itertools
import os
import re
import shutil
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
import utils
from plots import report
from tests import drawers


def cloud(classes=3, per_class=20, dim=2, seed=0):
    random = np.random.default_rng(seed)
    centers = random.normal(size=(classes, dim)) * 5
    labels = np.repeat(np.arange(classes), per_class)
    return centers[labels] + random.normal(size=(len(labels), dim)) * 0.1, labels, centers


def write_epoch(
    path, features, labels, centers, title="train, epoch 1: accuracy 9.99 %", classes=None
):
    classes = classes or [str(c) for c in range(len(centers))]
    utils.save_arrays(
        path,
        dict(
            points=features,
            labels=labels,
            predictions=labels,
            centers=centers,
            classes=classes,
            axes=["feature 1", "feature 2"],
            title=title,
        ),
    )
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
    assert axes == tuple(
        f"principal component {i + 1} ({shares[i]:.0f} % of the variance)" for i in (0, 1)
    )
    again = plots.plane(features[::-1])[0](features)  # the sign does not depend on chance
    assert again == pytest.approx(points, abs=1e-6)


def test_plane_of_one_dimension_is_a_line():
    project, _ = plots.plane(np.array([[1.0], [3.0]]))
    assert project(np.array([[2.0]])).tolist() == [[2.0, 0.0]]


def test_limits_hold_all_points_and_ignore_what_is_not_finite():
    points = np.array([[0.0, 0.0], [10.0, 1.0], [np.nan, 5.0], [np.inf, 0.0]])
    (x0, x1), (y0, y1) = plots.limits(points)
    assert x0 < 0 and x1 > 10 and y0 < 0 and y1 > 1
    assert (y1 - y0) >= 0.85 * (x1 - x0) - 1e-9


@pytest.mark.parametrize("classes", [1, 10, 12, 40, 41, 100])
def test_every_class_has_its_own_colour_and_mark_and_all_points_are_drawn(classes, tmp_path):
    features, labels, centers = cloud(classes)
    shown = dict(np.load(write_epoch(tmp_path / "epoch_1.npz", features, labels, centers)))
    figure, ((axes,),) = plots.new_figure(6, 5)
    scatter = plots.Scatter(axes, shown, plots.limits(features, centers))
    plots.add_legend(axes, shown)
    scatter.show(shown)
    assert len({line.get_color() for line in scatter.points}) == classes
    drawn = [np.column_stack(line.get_data()) for line in scatter.points]
    for label, points in enumerate(drawn):
        assert points == pytest.approx(features[labels == label], abs=1e-5)
    assert [text.get_position() for text in scatter.centers] == pytest.approx(centers, abs=1e-5)
    assert [text.get_text() for text in scatter.centers] == list(map(str, range(classes)))
    assert axes.get_aspect() == 1
    legend = axes.get_legend()
    names = [text.get_text() for text in legend.get_texts()] if legend else []
    assert names == ([*map(str, range(classes)), "center"] if classes <= 40 else [])


def seen_by(kind: str, color: str) -> np.ndarray:
    """CIELAB of a colour "#rrggbb" as a reader sees it who lacks a cone (matrices of Machado et al., 2009)."""
    matrix = dict(
        normal=np.eye(3),
        deuteranopia=[
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        protanopia=[
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
    )[kind]
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(
        matrix @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1
    )
    xyz = (
        np.array(
            [
                [0.4124564, 0.3575761, 0.1804375],
                [0.2126729, 0.7151522, 0.072175],
                [0.0193339, 0.119192, 0.9503041],
            ]
        )
        @ linear
        / (0.95047, 1, 1.08883)
    )
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", ["normal", "deuteranopia", "protanopia"])
def test_readers_who_are_red_green_blind_can_tell_ten_classes_apart(kind):
    seen = [seen_by(kind, color) for color in plots.palette(10)]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 17


def test_names_are_cut_in_the_middle_but_never_alike():
    assert plots.shorten(["short", "a_very_long_class_name"], 12) == ["short", "a_ver…s_name"]
    for names in (
        [f"image_set_{i}_of_the_third_kind" for i in range(40)],
        [f"the_same_start_of_{i}" for i in range(9)],
        [f"{i} and the same end as all" for i in range(12)],
    ):
        short = plots.shorten(names, 14)
        assert len(set(short)) == len(names) and max(map(len, short)) < max(map(len, names))
    assert len(set(plots.shorten(["x" * 30 + str(i) + "y" * 30 for i in range(3)], 14))) == 3


def inside(figure, texts) -> list:
    """The boxes of these texts, in pixels, all of them within the figure."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    width, height = figure.canvas.get_width_height()
    assert all(
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes
    )
    return boxes


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to look at."""
    figures, original = [], plots.new_figure
    monkeypatch.setattr(
        plots,
        "new_figure",
        lambda *args, **options: figures.append(original(*args, **options)) or figures[-1],
    )
    return figures


def test_nothing_is_cut_at_the_edges_of_a_film(drawn, tmp_path):
    features, labels, centers = cloud(per_class=5)
    points = features * 1e4 - 9e4, labels, centers * 1e4 - 9e4
    write_epoch(tmp_path / "epoch_1.npz", *points, classes=["a" * 60, "b", "c"])
    plots.draw_film(tmp_path / "film.gif", tmp_path)
    figure, ((axes,),) = drawn[0]
    texts = [
        *axes.get_yticklabels(),
        axes.yaxis.label,
        axes.xaxis.label,
        *axes.get_legend().get_texts(),
    ]
    inside(figure, [text for text in texts if text.get_text()])


@pytest.mark.parametrize("scale", [150, 6e4])
def test_tick_labels_never_overlap(scale, drawn, tmp_path):
    features, labels, centers = cloud()
    path = write_epoch(tmp_path / "epoch_1.npz", features * scale, labels, centers * scale)
    plots.draw_points(tmp_path / "p.png", path)
    shown = report.read_arrays(path, report.ARRAYS)
    plots.draw_panels(
        tmp_path / "f.png", [("one", shown), ("two", shown), ("three", shown)], 3, "png"
    )
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
    plots.draw_points(
        tmp_path / "p.png", write_epoch(tmp_path / "epoch_1.npz", *cloud(40), classes=names)
    )
    figure, ((axes,),) = drawn[0]
    texts = axes.get_legend().get_texts()
    assert len(texts) == 41
    boxes = inside(figure, texts)
    assert all(above.y0 >= below.y1 - 0.5 for above, below in itertools.pairwise(boxes))


@pytest.mark.parametrize("print_format", ["", "pdf"])
def test_all_of_forty_names_stand_at_a_confusion_matrix_without_overlap(
    print_format, drawn, tmp_path
):
    names = [f"class number {i} of many" for i in range(40)]
    plots.draw_confusion(tmp_path / "c.png", np.eye(40, dtype=int), names, format=print_format)
    figure, ((axes,),) = drawn[0]
    for axis, side in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        labels = axis.get_ticklabels()
        assert [text.get_text() for text in labels] == plots.shorten(names, 20)
        edges = sorted(
            (getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in inside(figure, labels)
        )
        assert all(end <= start + 0.5 for (_, end), (start, _) in itertools.pairwise(edges))


def test_figures_for_print_have_no_title_embedded_fonts_and_points_as_pixels(drawn, tmp_path):
    features, labels, centers = cloud(per_class=4000)
    shown = report.read_arrays(
        write_epoch(tmp_path / "epoch_1.npz", features, labels, centers), report.ARRAYS
    )
    plots.draw_panels(tmp_path / "f.pdf", [("", shown)], 1, "pdf")
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
    plots.draw_panels(tmp_path / "again.pdf", [("", shown)], 1, "pdf")
    assert (tmp_path / "again.pdf").read_bytes() == written


def test_panels_have_the_same_axes(drawn, tmp_path):
    shown = []
    for scale in (1, 20):
        features, labels, centers = cloud()
        path = write_epoch(
            tmp_path / f"epoch_{scale}.npz", features * scale, labels, centers * scale
        )
        shown.append((f"{scale}", report.read_arrays(path, report.ARRAYS)))
    plots.draw_panels(tmp_path / "f.png", shown, 2, "png")
    first, second = drawn[0][1].flat
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    assert (first.get_title(), second.get_title()) == ("1", "20")
    plots.draw_panels(tmp_path / "f.png", shown, 2, "png", own_axes=True)
    first, second = drawn[1][1].flat
    assert np.ptp(second.get_xlim()) == pytest.approx(20 * np.ptp(first.get_xlim()))


def test_unknown_classes_are_hollow_and_grey(tmp_path):
    features, labels, centers = cloud(4)
    write_epoch(tmp_path / "epoch_1.npz", features, labels, centers[:3])
    shown = dict(np.load(tmp_path / "epoch_1.npz"))
    _, ((axes,),) = plots.new_figure(6, 5)
    plots.add_legend(axes, shown)
    scatter = plots.Scatter(axes, shown, plots.limits(features))
    scatter.show(shown)
    assert np.column_stack(scatter.unknown.get_data()) == pytest.approx(
        features[labels == 3], abs=1e-5
    )
    assert (scatter.unknown.get_markerfacecolor(), scatter.unknown.get_markeredgecolor()) == (
        "none",
        "0.5",
    )
    assert sum(len(line.get_data()[0]) for line in scatter.points) == 60
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "0",
        "1",
        "2",
        "center",
        "unknown",
    ]


def test_picture_of_an_epoch(tmp_path):
    source = write_epoch(tmp_path / "epoch_1.npz", *cloud())
    plots.draw_points(tmp_path / "epoch_1.png", source)
    with Image.open(tmp_path / "epoch_1.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.size == (960, 780)
    for color in plots.COLORS[:3]:
        assert (pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum() > 50


def test_film_has_a_frame_an_epoch_in_their_order_with_the_same_axes(tmp_path):
    for epoch in (1, 2, 10):
        features, labels, centers = cloud(seed=epoch)
        write_epoch(
            tmp_path / f"epoch_{epoch}.npz",
            features * epoch,
            labels,
            centers * epoch,
            f"epoch {epoch}",
        )
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


def test_curves_leave_out_what_was_not_measured_and_show_error_rates(drawn, tmp_path):
    row = dict(
        epoch=1,
        train_loss=2.0,
        train_xent=2.0,
        train_center=0.0,
        train_accuracy=10.0,
        test_xent=None,
        test_accuracy=None,
        nearest_center_accuracy=None,
    )
    plots.draw_curves(
        tmp_path / "curves.png", [row, row | dict(epoch=2, test_accuracy=99.5, test_xent=1.0)]
    )
    figure, ((losses, errors),) = drawn[0]
    assert {
        line.get_label(): np.column_stack(line.get_data()).tolist() for line in errors.lines
    } == {"training: softmax": [[1, 90], [2, 90]], "test: softmax": [[2, 0.5]]}
    assert "training: λ · center loss" not in [line.get_label() for line in losses.lines]
    assert errors.get_yscale() == "log"
    for axes in (losses, errors):
        figure.draw_without_rendering()
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_curves_without_any_error_are_drawn(tmp_path):
    row = dict(
        epoch=1,
        train_loss=0.0,
        train_xent=0.0,
        train_center=0.0,
        train_accuracy=100.0,
        test_xent=0.0,
        test_accuracy=100.0,
        nearest_center_accuracy=100.0,
    )
    plots.draw_curves(tmp_path / "curves.png", [row])
    assert (tmp_path / "curves.png").stat().st_size > 2000


def test_class_names_are_no_formulas(tmp_path):
    names = ["a$x_$b", "US$", "c"]
    plots.draw_points(
        tmp_path / "epoch_1.png", write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names)
    )
    plots.draw_confusion(tmp_path / "c.png", np.eye(3, dtype=int), names, "test")


@pytest.fixture
def system_fonts(monkeypatch):
    """system_fonts(*paths): the fonts that the system has, besides matplotlib's default."""

    def have(*paths):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(paths))
        plots._fonts_for.cache_clear()

    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    yield have
    plots._fonts_for.cache_clear()


def test_names_are_shown_letter_by_letter_and_escaped_where_that_cannot_be(system_fonts):
    system_fonts()
    not_utf8 = os.fsdecode(b"caf\xe9")
    with pytest.warns(UserWarning, match="No font of this system has 中 文: "):
        names = plots.drawable(["naïve", "a$x_$b", not_utf8, "two\nlines", "中文"])
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
    assert (
        plots.draw_to(tmp_path / "c.png", plots.draw_confusion, np.eye(3, dtype=int), names, "test")
        == set()
    )
    source = write_epoch(tmp_path / "epoch_1.npz", *cloud(), classes=names)
    assert plots.draw_to(tmp_path / "d.png", plots.draw_points, source) == set()
    assert matplotlib.rcParams["font.family"] == ["sans-serif", "STIXNonUnicode"]
    panels = [
        (letter, report.read_arrays(source, report.ARRAYS))
    ] * 2  # with settings of their own, for a while
    matplotlib.rcParams["font.family"] = ["sans-serif"]
    for _ in range(2):
        assert plots.draw_to(tmp_path / "f.png", plots.draw_panels, panels, 2, "png") == set()


@pytest.mark.parametrize("classes", [3, 60])
def test_confusion_matrix(classes, drawn, tmp_path):
    plots.draw_confusion(
        tmp_path / "c.png",
        np.eye(classes, dtype=int),
        [f"class {i}" for i in range(classes)],
        "test",
    )
    _, ((axes,),) = drawn[0]
    assert len(axes.texts) == (3 if classes == 3 else 0) and axes.get_title() == "test"


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The files of a run with --plot: two epochs of five dimensions, of which the second alone was tested."""
    root = tmp_path_factory.mktemp("runs") / "one"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
    for epoch, split in ((1, "train"), (2, "train"), (2, "test")):
        write_epoch(root / split / f"epoch_{epoch}.npz", *cloud(seed=epoch))
    utils.write_json(root / "args.json", dict(dataset="folder", feat_dim=5))
    row = dict(
        epoch=1,
        train_loss=2.0,
        train_xent=1.9,
        train_center=0.1,
        train_accuracy=90.0,
        test_xent=None,
        test_accuracy=None,
        nearest_center_accuracy=None,
        intra_distance=None,
        inter_distance=None,
    )
    utils.write_metrics(root / "metrics.csv", [row, row | dict(epoch=2, test_accuracy=80.0)])
    features, labels, centers = cloud(dim=5)
    utils.save_arrays(
        root / "test" / "features.npz",
        dict(
            features=features[::2],
            labels=labels[::2],
            centers=centers,
            classes=["0", "1", "2"],
            epoch=2,
        ),
    )
    return root


@pytest.fixture
def command(directory, tmp_path, capsys):
    """command(*flags) runs plots.py on a copy of the run; gives exit status, the files printed, standard error."""
    copy = Path(shutil.copytree(directory, tmp_path / "one"))

    def call(*flags):
        try:
            status = plots.main([*map(str, [copy, *flags])])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return (
            status,
            [
                str(Path(line).relative_to(tmp_path))
                for line in out.splitlines()
                if line.startswith("/")
            ],
            err,
        )

    return call


def test_command_draws_a_run_again(command, tmp_path):
    assert command() == (0, [], "")
    written = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.*")}
    assert written >= {
        "report.html",
        "curves.png",
        "train.gif",
        "test.gif",
        "train/epoch_1.png",
        "test/epoch_2.png",
    }


def test_command_draws_chosen_epochs_for_print(command, tmp_path):
    status, files, err = command("--format", "svg", "--epochs", "1", "2")
    assert (status, err) == (0, "")
    assert files == [
        f"one/figures/{name}.svg"
        for name in ("train_epoch_1_2", "test_epoch_2", "curves", "confusion")
    ]
    assert all((tmp_path / file).read_text().startswith("<?xml") for file in files)


def test_unknown_classes_are_left_out_of_the_confusion_matrix(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "one"))
    features, labels, centers = cloud(4)
    write_epoch(copy / "test" / "epoch_2.npz", features, labels, centers[:3])
    *_, (path, draw, counts, *_) = plots.figures(report.read_run(copy), None, "pdf")
    assert (path.name, draw) == ("confusion.pdf", plots.draw_confusion) and (
        counts == 20 * np.eye(3)
    ).all()


def test_command_draws_a_run_that_validates(command, tmp_path):
    (tmp_path / "one" / "test").rename(tmp_path / "one" / "val")
    names = ("train_epoch_2", "val_epoch_2", "curves", "confusion")
    assert command("--format", "png") == (0, [f"one/figures/{name}.png" for name in names], "")
    assert command("--projection", "tsne", "--format", "png") == (
        0,
        ["one/figures/val_tsne_epoch_2.png"],
        "",
    )
    assert all(
        re.fullmatch(utils.FIGURE, path.name) for path in (tmp_path / "one" / "figures").iterdir()
    )


def test_command_compares_runs(command, directory, tmp_path):
    shutil.copytree(directory, tmp_path / "two")
    status, files, err = command(tmp_path / "two", "--compare", "--own-axes")
    assert (status, err) == (0, "") and files == ["one/compare.html", "one/figures/compare.png"]
    assert '"name":"two"' in (tmp_path / "one" / "compare.html").read_text(encoding="utf-8")


def test_tsne_keeps_clusters_together_is_seeded_and_says_what_it_is(directory, drawn, tmp_path):
    for name in ("one", "two"):
        plots.draw_tsne(tmp_path / name, directory / "test" / "features.npz", "png")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (axes,) = drawn[0][1].flat
    assert "distances between clusters mean little" in axes.get_xlabel()
    points = [np.column_stack(line.get_data()) for line in axes.lines[:3]]
    assert [len(each) for each in points] == [10, 10, 10]
    for own, center in zip(points, axes.texts, strict=True):
        assert np.linalg.norm(own - center.get_position(), axis=1).max() < min(
            np.linalg.norm(other - center.get_position(), axis=1).min()
            for other in points
            if other is not own
        )


@pytest.mark.parametrize(
    "flags, rule",
    [
        (["missing"], "missing is no run: "),
        (["--format", "pdf", "--epochs", "7"], "--epochs must be among those of "),
        (["--epochs", "1"], "--epochs goes with --format or --compare"),
        (["--own-axes", "--format", "pdf"], "--own-axes goes with --compare"),
        (["--compare"], "--compare needs two runs or more"),
        (
            ["--projection", "tsne", "--compare"],
            "--projection tsne shows a run's last tested epoch",
        ),
        (["--format", "gif"], "invalid choice: 'gif'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_mistakes_are_one_line(flags, rule, command, tmp_path):
    status, files, err = command(*flags)
    assert (
        (status, files) == (2, [])
        and err.count("\n") == 1
        and err.startswith("plots.py: error: ")
        and rule in err
    )
    assert not (tmp_path / "one" / "figures").exists()


def test_tsne_of_two_dimensions_is_refused(command, tmp_path):
    utils.write_json(tmp_path / "one" / "args.json", dict(dataset="folder", feat_dim=2))
    status, _, err = command("--projection", "tsne")
    assert status == 2 and err.count("\n") == 1 and "needs more than two dimensions, got 2" in err


# ---------------------------------------------------------------------------------------------- background processes


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
    assert plotter.finish(lambda: True) == [
        f"{tmp_path / name}: stopped" for name in ("slow", "next")
    ]
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
    assert [error.partition(":")[0] for error in errors] == [
        str(tmp_path / "first"),
        str(tmp_path / "second"),
    ]


def test_drawers_outlive_the_signals_that_a_whole_run_gets(tmp_path):
    plotter = plots.Plotter()
    for number in (signal.SIGINT, signal.SIGTERM):
        plotter(tmp_path / str(number), drawers.signal_oneself, number)
    assert plotter.finish() == [] and len(os.listdir(tmp_path)) == 2
