"""Verification and unknown classes: the metrics of scikit-learn and of slow loops, for the images that were meant."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from engine import evaluation

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def slow_verification(features, labels):
    """EER, AUC, TPR at a FAR of 1e-3 and recall@1 by L2 distance, pair by pair."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(i)]
    distances = np.array([np.linalg.norm(features[i] - features[j]) for i, j in pairs], np.float32)
    same = np.array([labels[i] == labels[j] for i, j in pairs])
    far, tpr, _ = roc_curve(same, -distances, drop_intermediate=False)
    after = np.argmax(far + tpr >= 1)
    before, excess = after - 1, far + tpr - 1
    weight = excess[before] / (excess[before] - excess[after])
    nearest = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        nearest.append(
            labels[min(others, key=lambda j: np.linalg.norm(features[i] - features[j]))]
            == labels[i]
        )
    return {
        "eer": 100 * (far[before] + weight * (far[after] - far[before])),
        "auc": roc_auc_score(same, -distances),
        "tpr_at_far_1e-3": 100 * tpr[far <= 1e-3].max(),
        "recall_at_1": 100 * np.mean(nearest),
    }


@pytest.mark.parametrize(
    "dim, spread, kind",
    [
        (1, 1.0, int),
        (2, 0.3, float),
        (2, 3.0, int),
        (2, 1.0, float),
        (64, 1.0, float),
        (64, 3.0, int),
    ],
)
def test_verification_is_scikit_learns_over_all_pairs(dim, spread, kind, monkeypatch):
    """Whole numbers make ties; 90 images are several blocks."""
    monkeypatch.setattr(evaluation, "BLOCK", 1000)
    random = np.random.default_rng(dim)
    labels = random.integers(0, 4, 90)
    features = (
        (random.normal(size=(4, dim)) * 2)[labels] + random.normal(size=(90, dim)) * spread + 5
    )
    features = features.astype(kind).astype(np.float32)
    measured, curves = evaluation.verification(torch.tensor(features), torch.tensor(labels))
    assert (measured["images"], measured["pairs"]) == (90, 90 * 89 // 2)
    normalised = features / np.maximum(
        np.linalg.norm(features.astype(float), axis=1, keepdims=True), 1e-12
    )
    for name, compared in (("l2", features), ("cosine", normalised))[: 1 if kind is int else 2]:
        expected = slow_verification(compared.astype(float), labels)
        if kind is int:  # which of several nearest ones is taken is open
            del expected["recall_at_1"], measured[name]["recall_at_1"]
        assert measured[name] == pytest.approx(expected, abs=1e-4)
        at = evaluation.FARS.index(min(evaluation.FARS, key=lambda far: abs(far - 1e-3)))
        assert 100 * curves[name][at] == pytest.approx(expected["tpr_at_far_1e-3"], abs=1e-4)
        assert curves[name] == sorted(curves[name]) and curves[name][-1] == 1


def test_features_that_have_collapsed_are_told_apart_by_chance():
    measured, _ = evaluation.verification(torch.full((40, 64), 0.1), torch.arange(40) % 4)
    assert (measured["l2"]["eer"], measured["l2"]["auc"], measured["l2"]["tpr_at_far_1e-3"]) == (
        50,
        0.5,
        0,
    )


def test_of_many_images_a_sample_is_drawn_which_is_said(monkeypatch):
    features, labels = torch.randn(80, 3), torch.arange(80) % 3
    monkeypatch.setattr(evaluation, "MAX_IMAGES", 50)
    measured, curves = evaluation.verification(features, labels)
    torch.rand(7)  # the sample does not depend on torch's generator
    assert evaluation.verification(features, labels) == (measured, curves)
    assert (measured["images"], measured["drawn_from"], measured["pairs"]) == (50, 80, 1225)
    lines = []
    evaluation.log_verification("Verification", measured, lines.append)
    assert len(lines) == 2 and all(
        "50 images of 80, drawn with seed 0; 1,225 pairs" in line for line in lines
    )


@pytest.mark.parametrize(
    "labels, features, reason",
    [
        (range(6), 1.0, "no two images are of the same class"),
        ([2] * 6, 1.0, "all images are of the same class"),
        ([0, 0, 1, 1, 2, 2], torch.nan, "not finite"),
    ],
)
def test_where_there_is_nothing_to_compare_the_reason_is_told(labels, features, reason):
    measured, curves = evaluation.verification(
        torch.full((6, 2), features), torch.tensor(list(labels))
    )
    lines = []
    evaluation.log_verification("Verification", measured, lines.append)
    assert (
        curves == {}
        and len(lines) == 1
        and reason in lines[0]
        and json.loads(json.dumps(measured)) == measured
    )


def test_unknown_classes_are_found_as_scikit_learn_says():
    torch.manual_seed(0)
    centers = torch.randn(3, 2) * 3
    known, unknown = (
        dict(features=torch.randn(n, 2) * 2, logits=torch.randn(n, 3) * 15) for n in (50, 30)
    )
    measured = evaluation.open_set(known, unknown, centers)
    truth = [0] * 50 + [1] * 30
    distances = [
        min(np.linalg.norm(x - c) for c in centers.numpy())
        for x in torch.cat([known["features"], unknown["features"]]).numpy()
    ]
    logits = torch.cat([known["logits"], unknown["logits"]]).double()
    others = 1 - logits.softmax(1).max(1).values  # in float32, many are 0
    assert measured["auroc_distance"] == pytest.approx(roc_auc_score(truth, distances), abs=1e-6)
    assert measured["auroc_softmax"] == pytest.approx(
        roc_auc_score(truth, others.numpy()), abs=1e-6
    )
    assert others.min() < 1e-9


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
    for split, found in (("test", measured), ("unknown", measured["unknown"])):
        expected = slow_verification(
            saved[f"{split}_features"].astype(float), saved[f"{split}_labels"]
        )
        assert found["verification"]["l2"] == pytest.approx(expected, abs=1e-4)
    distances = np.concatenate(
        [
            [
                min(np.linalg.norm(x - c) for c in saved["centers"])
                for x in saved[f"{split}_features"]
            ]
            for split in ("test", "unknown")
        ]
    )
    assert measured["unknown"]["auroc_distance"] == pytest.approx(
        roc_auc_score([0] * 12 + [1] * 8, distances)
    )
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
