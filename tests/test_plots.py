"""The command `python -m plots`, on the files of a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import utils
from plots.__main__ import figures, main, tsne
from plots.charts import draw_confusion
from plots.points import draw_tsne
from plots.saved import read_run
from tests.epochs import SETTINGS, cloud, record_figures, write_epoch


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to look at."""
    return record_figures(monkeypatch)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run with --plot: two epochs of five dimensions, of which the second alone was tested."""
    root = tmp_path_factory.mktemp("runs") / "one"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
    for epoch, split in ((1, "train"), (2, "train"), (2, "test")):
        write_epoch(root / split / f"epoch_{epoch}.npz", *cloud(seed=epoch))
    utils.write_json(root / "args.json", SETTINGS)
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
        ),
    )
    return root


@pytest.fixture
def command(directory, tmp_path, capsys):
    """command(*flags) draws a copy of the run; gives status, files printed, standard error."""
    copy = Path(shutil.copytree(directory, tmp_path / "one"))

    def call(*flags):
        try:
            status = main([*map(str, [copy, *flags])])
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
        for name in ("curves", "train_epoch_1_2", "test_epoch_2", "confusion")
    ]
    assert all((tmp_path / file).read_text().startswith("<?xml") for file in files)


def test_unknown_classes_are_left_out_of_the_confusion_matrix(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "one"))
    features, labels, centers = cloud(4)
    write_epoch(copy / "test" / "epoch_2.npz", features, labels, centers[:3])
    *_, (path, draw, counts, *_) = figures(read_run(copy), None, "pdf")
    assert (path.name, draw) == ("confusion.pdf", draw_confusion) and (
        counts == 20 * np.eye(3)
    ).all()


def test_a_run_that_validates_has_figures_of_its_validation_images(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "one"))
    (copy / "test").rename(copy / "val")
    run = read_run(copy)
    names = [path.name for path, *_ in (*figures(run, None, "png"), tsne(run, "png"))]
    epochs = ["train_epoch_2.png", "val_epoch_2.png", "confusion.png", "val_tsne_epoch_2.png"]
    assert names == ["curves.png", *epochs]


def test_command_compares_runs(command, directory, tmp_path):
    shutil.copytree(directory, tmp_path / "two")
    status, files, err = command(tmp_path / "two", "--compare", "--same-axes")
    assert (status, err) == (0, "") and files == ["one/compare.html", "one/figures/compare.png"]
    assert '/two"' in (tmp_path / "one" / "compare.html").read_text(encoding="utf-8")


def test_tsne_keeps_clusters_together_is_seeded_and_says_what_it_is(directory, drawn, tmp_path):
    for name in ("one", "two"):
        draw_tsne(tmp_path / name, directory / "test" / "features.npz", "png")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (axes,) = drawn[0][1].flat
    assert "distances between clusters mean little" in axes.get_xlabel()
    points = [np.column_stack(line.get_data()) for line in axes.lines[:3]]
    assert [len(each) for each in points] == [10, 10, 10]
    for own, center in zip(points, axes.texts, strict=True):
        assert np.linalg.norm(own - center.xy, axis=1).max() < min(
            np.linalg.norm(other - center.xy, axis=1).min() for other in points if other is not own
        )


@pytest.mark.parametrize(
    "flags, rule",
    [
        (["missing"], "missing is no run of main.py: "),
        (["--format", "pdf", "--epochs", "7"], "--epochs must be among 1, 2 of "),
        (["--compare"], "--compare needs two runs or more"),
        (
            ["--projection", "tsne", "--compare"],
            "--projection tsne goes without --compare",
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
        and err.startswith("plots: error: ")
        and rule in err
    )
    assert not (tmp_path / "one" / "figures").exists()


def test_tsne_of_two_dimensions_is_refused(command, tmp_path):
    (tmp_path / "one" / "test" / "features.npz").unlink()  # which only more dimensions have
    status, _, err = command("--projection", "tsne")
    assert (
        status == 2 and err.count("\n") == 1 and "needs features of more than two dimensions" in err
    )
