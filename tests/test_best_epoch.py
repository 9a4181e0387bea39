"""The best epoch by validation is kept and alone is tested; what a training says of itself."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, program

import datasets
import models
from engine.state import State

FLAGS = "--dataset folder --image-size 8 --batch-size 10 --max-epoch 4 --eval-freq 1 --use-cpu"
FLAGS = [*FLAGS.split(), "--lr-model", "0.1", "--init", "xavier", "--weight-cent", "0.1"]
FLAGS += ["--feat-dim", "3", "--val-share", "0.25"]
SMALL = ["--dataset", "folder", "--image-size", "8", "--use-cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on colour images with --val-share and --plot; its directory and that of its images."""
    base = tmp_path_factory.mktemp("trained")
    root = make_folder(base / "images", mode="RGB", size=(9, 12))
    flags = [*FLAGS, "--data-root", root, "--save-dir", base / "run", "--plot", "--save-features"]
    assert program(flags) == 0
    return base / "run", root


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def network_of(path):
    checkpoint = torch.load(path, weights_only=True)
    model = models.create("cnn", 3, 3, 8, 3).eval()
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def outputs_of(model, root):
    images, labels, _ = next(iter(datasets.create("folder", root, 99, image_size=8).test))
    with torch.no_grad():
        return *model(images), labels


def test_the_best_epoch_by_validation_is_kept_and_alone_is_tested(trained):
    run, root = trained
    history = rows(run / "metrics.csv")
    assert [row["test_accuracy"] == "" for row in history] == [True, True, True, False]
    scores = [(float(row["val_accuracy"]), -float(row["val_xent"])) for row in history]
    model, best = network_of(run / "best.pt")
    assert best["epoch"] == 1 + scores.index(max(scores))
    features, logits, labels = outputs_of(model, root)
    assert float(history[-1]["test_accuracy"]) == pytest.approx(
        100 * (logits.argmax(1) == labels).double().mean()
    )
    nearest = torch.cdist(features, best["centers"]).argmin(1)
    assert float(history[-1]["nearest_center_accuracy"]) == pytest.approx(
        100 * (nearest == labels).double().mean()
    )
    log = (run / "log_folder.txt").read_text()
    assert log.count("==> Validation\n") == 4 and log.count("==> Test\n") == 1
    assert f"Best epoch by validation: {best['epoch']}\n==> Test\n" in log
    assert (
        (run / "val" / "epoch_4.png").exists()
        and (run / "val.gif").exists()
        and not (run / "test").exists()
    )
    assert (
        "validation" in (run / "report.html").read_text()
        and (run / "val" / "features.npz").exists()
    )
    assert np.load(run / "val" / "images.npz")["images"].shape == (6, 3, 8, 8)
    assert {"train_features", "val_features"} <= set(np.load(run / "features" / "epoch_4.npz"))


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([], True),
        ([(None, None)], True),
        ([(80, 0.3)], True),
        ([(90, 0.3)], False),
        ([(90, 0.5)], True),
        ([(95, 0.9), (80, 0.1)], False),
        ([(90, 0.4)], False),
    ],
)
def test_an_epoch_is_the_best_if_more_accurate_or_as_accurate_at_less_loss(scores, expected):
    rows = tuple(dict(val_accuracy=accuracy, val_xent=xent) for accuracy, xent in scores)
    state = State(torch.zeros(3, 2), torch.get_rng_state(), history=rows)
    assert state.is_best(dict(accuracy=90, xent=0.4)) == expected


def test_the_best_epoch_is_found_again_where_a_run_goes_on_elsewhere(
    trained, tmp_path, monkeypatch
):
    run, _ = trained
    monkeypatch.setattr(State, "is_best", lambda *_: False)  # else the fifth epoch might be it
    assert (
        program(["--resume", run / "checkpoint.pt", "--save-dir", tmp_path, "--max-epoch", "5"])
        == 0
    )
    assert (tmp_path / "best.pt").read_bytes() == (run / "best.pt").read_bytes()
    final = {
        name: value
        for name, value in rows(tmp_path / "metrics.csv")[-1].items()
        if name.startswith("test")
    }
    assert final == {name: rows(run / "metrics.csv")[-1][name] for name in final}


def test_evaluating_test_images_alone_gives_their_features_with_paths(trained, tmp_path):
    run, root = trained
    shutil.copytree(root / "test", tmp_path / "alone" / "test")
    shutil.rmtree(tmp_path / "alone" / "test" / "ant")
    flags = ["--evaluate", run / "checkpoint.pt", "--save-dir", tmp_path / "out", "--data-root"]
    assert program([*flags, root]) == 0 and not (tmp_path / "out" / "features").exists()
    assert program([*flags, tmp_path / "alone", "--save-features"]) == 0
    saved = np.load(tmp_path / "out" / "features" / "test.npz")
    features, logits, labels = (
        each.numpy()[4:] for each in outputs_of(network_of(run / "checkpoint.pt")[0], root)
    )
    assert saved["test_features"] == pytest.approx(features, abs=1e-5)
    assert saved["test_predictions"].tolist() == logits.argmax(1).tolist()
    assert saved["test_labels"].tolist() == labels.tolist() and saved["classes"].tolist() == [
        "ant",
        "bee",
        "cat",
    ]
    names = [Path(path).parent.name for path in saved["test_paths"]]
    assert (
        names == [("ant", "bee", "cat")[label] for label in labels] and len(saved["centers"]) == 3
    )


def test_a_training_that_stays_at_chance_is_told_once_with_what_helps(folder, tmp_path, capsys):
    flags = [
        "--dataset",
        "folder",
        "--data-root",
        folder,
        "--image-size",
        "8",
        "--use-cpu",
        "--save-dir",
        tmp_path,
    ]
    notice = "The training accuracy is still about 33.3 %"
    assert program([*flags, "--batch-size", "1", "--max-epoch", "10", "--lr-model", "1e-9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (told,) = [number for number, line in enumerate(lines) if line.startswith(notice)]
    assert "--recipe images" in lines[told] and "==> Epoch 10/10" in lines[told + 1 :]
    assert (
        lines[told - 1] == "==> Epoch 9/10" or "Batch" in lines[told - 1]
    )  # 24 steps an epoch: 200 are in the ninth
    assert (
        program(
            [
                *flags,
                "--batch-size",
                "1",
                "--max-epoch",
                "9",
                "--weight-cent",
                "0.1",
                "--init",
                "xavier",
            ]
        )
        == 0
    )
    assert notice not in capsys.readouterr().out


def test_a_one_cycle_schedule_of_few_steps_is_named(folder, tmp_path, capsys):
    flags = [
        "--dataset",
        "folder",
        "--data-root",
        folder,
        "--image-size",
        "8",
        "--use-cpu",
        "--save-dir",
        tmp_path,
    ]
    for steps, told in ((9, True), (10, False)):
        assert program([*flags, "--schedule", "onecycle", "--max-iter", steps]) == 0
        assert (f"has only {steps} steps" in capsys.readouterr().out) == told
