"""The pictures of a run: what main.py hands over is what they show."""

import os
from types import SimpleNamespace

import numpy as np
import torch

import plots.run
import utils
from plots import Plotter, plot_run
from plots.saved import read_epoch
from tests.epochs import Images, make_run


def test_each_epoch_has_its_points_pictures_and_the_run_its_films_and_page_also_later(tmp_path):
    run = make_run(tmp_path / "run", epochs=2, plotter=Plotter())
    written = {str(path.relative_to(run)) for path in run.rglob("*.*")}
    epochs = {
        f"{s}/epoch_{n}.{e}" for s in ("train", "test") for n in (1, 2) for e in ("npz", "png")
    }
    further = {"train.gif", "test.gif", "curves.png", "report.html", "test/images.npz"}
    assert written >= epochs | further and "test/features.npz" not in written
    os.unlink(run / "train" / "epoch_1.png")  # as a killed run leaves it undrawn
    before = (run / "test" / "epoch_1.png").stat().st_mtime_ns
    with Plotter() as plotter:
        assert plot_run(plotter, run, [{"epoch": 1}]) == []
    assert (run / "train" / "epoch_1.png").exists()
    assert (run / "test" / "epoch_1.png").stat().st_mtime_ns == before


def test_unknown_classes_follow_the_test_in_points_and_images(tmp_path):
    run = make_run(tmp_path / "run", "ab", "cd", ("train", "test", "unknown"), epochs=1, dim=5)
    shown = read_epoch(run / "test" / "epoch_1.npz")
    assert shown["labels"].tolist() == np.arange(4).repeat(5).tolist()
    assert (shown["classes"].tolist(), shown["unseen"].tolist()) == (["a", "b"], ["c", "d"])
    assert shown["title"] == "test, epoch 1: accuracy 76.00 %"
    images = np.load(run / "test" / "images.npz")["images"]
    assert (images == np.concatenate([Images(10, 0).images, Images(10, 2).images])).all()
    assert read_epoch(run / "train" / "epoch_1.npz")["unseen"].tolist() == []
    latest = np.load(run / "test" / "features.npz")
    assert latest["features"].shape == (20, 5) and latest["unseen"].tolist() == ["c", "d"]


def test_with_unknown_classes_alone_the_test_has_no_accuracy(tmp_path):
    run = make_run(tmp_path / "run", "ab", "cd", ("train", "unknown"), epochs=1)
    shown = read_epoch(run / "test" / "epoch_1.npz")
    assert shown["labels"].tolist() == [2] * 5 + [3] * 5 and shown["title"] == "test, epoch 1"
    assert (np.load(run / "test" / "images.npz")["images"] == Images(10, 2).images).all()


def test_validation_images_have_pictures_of_their_own(tmp_path):
    run = make_run(tmp_path / "run", "ab", "cd", ("train", "val", "unknown"), epochs=1)
    assert read_epoch(run / "val" / "epoch_1.npz")["unseen"].tolist() == []
    assert read_epoch(run / "test" / "epoch_1.npz")["labels"].min() == 2


def test_points_that_cannot_be_written_do_not_end_the_run(tmp_path):
    lines = []
    plotter = Plotter(lines.append)
    cloud = {"features": torch.randn(6, 2), "labels": torch.arange(6) % 2, "accuracy": 50.0}
    cloud["predictions"] = cloud["labels"]
    data = SimpleNamespace(classes=["a", "b"], unseen=[], test=Images(6, 0))
    splits = {"train": cloud, "test": cloud}
    (tmp_path / "train").touch()  # where the directory of the pictures would be
    for epoch in (1, 2):
        plots.run.plot_epoch(plotter, tmp_path, epoch, splits, torch.zeros(2, 2), data)
        assert len(lines) == 1
    (tmp_path / "train").unlink()
    with plotter:
        (error,) = plot_run(plotter, tmp_path, [{"epoch": 1, "train_loss": 1.0}])
    assert error.startswith(f"{tmp_path / 'report.html'}: ")  # here, it lacks args.json
    pictures = utils.epoch_files(tmp_path / "train", ["epoch_*.png"])
    assert [epoch for epoch, _ in pictures] == [1, 2]
