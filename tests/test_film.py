"""Films."""

import numpy as np
import pytest
from PIL import Image

from plots.film import draw_film
from tests.epochs import cloud, inside, record_figures, write_epoch


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to look at."""
    return record_figures(monkeypatch)


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


def test_film_of_a_single_epoch(tmp_path):
    write_epoch(tmp_path / "epoch_3.npz", *cloud())
    draw_film(tmp_path / "film.gif", tmp_path)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 1
