"""Classes left out of the training are tested as unknown ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image

from engine import metrics

CLASSES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def insects(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("unseen") / "insects", CLASSES, train=6, test=4)


@pytest.fixture
def train(run, insects):
    return lambda *flags, **more: run("--data-root", insects, "--lr-model", "0.05", *flags, **more)


def features(epoch=2, directory="log"):
    return dict(np.load(Path(directory, "features", f"epoch_{epoch}.npz")))


def test_unseen_classes_are_left_out_of_the_training_and_measured_as_unknown(train, insects):
    status, out, _ = train(
        "--unseen", "bee", "4", "--verify", "--save-features", "--plot", "--max-iter", "4"
    )
    assert status == 0
    saved, measured = features(), json.loads(Path("log/evaluation.json").read_text())
    assert {label: (saved["train_labels"] == label).sum() for label in range(5)} == {
        0: 6,
        1: 6,
        2: 6,
        3: 0,
        4: 0,
    }
    assert sorted(saved["test_labels"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted(saved["unknown_labels"]) == [3] * 4 + [4] * 4 and saved["centers"].shape == (3, 2)
    assert measured["classes"] == ["ant", "cat", "dog"] and measured["unknown"]["classes"] == [
        "bee",
        "eel",
    ]
    test, unknown = (
        {name: torch.from_numpy(saved[f"{split}_{name}"]) for name in ("features", "labels")}
        for split in ("test", "unknown")
    )
    for split, found in ((test, measured), (unknown, measured["unknown"])):
        expected, _ = metrics.compare_all(split["features"], split["labels"])
        assert found["verification"]["l2"] == pytest.approx(expected["verification"]["l2"])
        assert found["retrieval"] == expected["retrieval"]
    shown = np.load("log/test/epoch_2.npz")
    assert sorted(shown["labels"]) == sorted([*saved["test_labels"], *saved["unknown_labels"]])
    images = np.load("log/test/images.npz")["images"]  # in the order of the points
    files = [
        path
        for name in ("ant", "cat", "dog", "bee", "eel")
        for path in sorted(insects.glob(f"test/{name}/*"))
    ]
    assert (images[:, 0] == [np.asarray(Image.open(path)) for path in files]).all()
    assert shown["labels"].tolist() == [label for label in range(5) for _ in range(4)]
    assert Path("log/roc.png").stat().st_size > 2000
    # The test of the run is that of --evaluate, which tells the flags of the run from its checkpoint.
    told = [
        line
        for line in out.splitlines()
        if line.startswith(("Accuracy", "Nearest", "Verif", "Unknown"))
    ][-7:]
    status, out, _ = train("--evaluate", "log/checkpoint.pt", base=False)
    assert status == 0 and out.splitlines()[4:11] == told
    again = json.loads(Path("log/evaluation.json").read_text())
    assert np.sum(again.pop("confusion")) == 12 and again == measured


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_resumed_run_with_unseen_classes_is_the_same_to_the_bit(workers, train):
    flags = ["--unseen", "bee", "eel", "-j", workers]
    train(*flags, "--save-dir", "whole", "-j", "0")
    train(*flags, "--max-epoch", "1")
    assert train("--resume", "--max-epoch", "2", base=False)[0] == 0
    whole, resumed = (
        torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("whole", "log")
    )
    assert whole["history"] == resumed["history"] and torch.equal(
        whole["centers"], resumed["centers"]
    )
    assert train("--resume", "--unseen", "bee", "--max-epoch", "3", base=False)[::2] == (
        2,
        "main.py: error: --unseen must be ['bee', 'eel'], as in log/checkpoint.pt, got ['bee']\n",
    )


@pytest.mark.parametrize(
    "unseen, error",
    [
        (
            ["fly"],
            "--unseen must be names or numbers of classes, got fly; the classes are ant, bee, cat, dog, eel",
        ),
        (
            ["5"],
            "--unseen must be names or numbers of classes, got 5; the classes are ant, bee, cat, dog, eel",
        ),
        (CLASSES, "--unseen must leave at least two classes, got 5 of 5"),
        (["ant", "0", "1", "2", "3"], "--unseen must leave at least two classes, got 4 of 5"),
    ],
)
def test_unseen_classes_that_cannot_be_left_out_are_one_line(unseen, error, train):
    assert train("--unseen", *unseen)[::2] == (2, f"main.py: error: {error}\n")
    assert not Path("log").exists()


def test_one_image_of_each_class_is_no_reason_to_fail(run, tmp_path):
    make_folder(tmp_path / "few", test=1)
    status, out, _ = run("--data-root", "few", "--verify", "--max-epoch", "1")
    line = (
        "Verification (3 images; 3 pairs): not measured, since no two images are of the same class"
    )
    assert status == 0 and out.count(line) == 1
