"""Curves, confusion matrices and ROC curves."""

import itertools

import numpy as np
import pytest

from plots.charts import draw_confusion, draw_curves, draw_roc
from plots.looks import shorten
from tests.epochs import inside, record_figures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to look at."""
    return record_figures(monkeypatch)


@pytest.mark.parametrize("print_format", ["", "pdf"])
def test_all_of_forty_names_stand_at_a_confusion_matrix_without_overlap(
    print_format, drawn, tmp_path
):
    names = [f"class number {i} of many" for i in range(40)]
    draw_confusion(tmp_path / "c.png", np.eye(40, dtype=int), names, format=print_format)
    figure, ((axes,),) = drawn[0]
    for axis, side in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        labels = axis.get_ticklabels()
        assert [text.get_text() for text in labels] == shorten(names, 20)
        edges = sorted(
            (getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in inside(figure, labels)
        )
        assert all(end <= start + 0.5 for (_, end), (start, _) in itertools.pairwise(edges))


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
    draw_curves(
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


@pytest.mark.filterwarnings("ignore:Data has no positive values")
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
    draw_curves(tmp_path / "curves.png", [row])
    assert (tmp_path / "curves.png").stat().st_size > 2000


@pytest.mark.parametrize("classes", [3, 60])
def test_confusion_matrix(classes, drawn, tmp_path):
    draw_confusion(
        tmp_path / "c.png",
        np.eye(classes, dtype=int),
        [f"class {i}" for i in range(classes)],
        "test",
    )
    _, ((axes,),) = drawn[0]
    assert len(axes.texts) == (3 if classes == 3 else 0) and axes.get_title() == "test"


def test_roc_curves_have_a_colour_for_the_images_and_a_line_for_the_distance(drawn, tmp_path):
    fars = [1e-3, 1e-2, 1e-1, 1.0]
    names = [f"{images}, {distance}" for images in ("known", "pairs") for distance in ("L2", "cos")]
    curves = {name: [0.1 * place, 0.5, 0.8, 1.0] for place, name in enumerate(names)}
    draw_roc(tmp_path / "roc.png", fars, curves | {"alone": fars})
    axes = drawn[0][1][0, 0]
    lines = axes.lines[:4]
    assert [line.get_label() for line in lines] == names
    assert [line.get_ydata().tolist() for line in lines] == list(curves.values())
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert looks[0][0] == looks[1][0] != looks[2][0] == looks[3][0]
    assert looks[0][1] == looks[2][1] != looks[1][1] == looks[3][1]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [*names, "alone", "chance"]
