"""Classes left out of the training are tested as unknown ones, and measured apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder
from sklearn.metrics import roc_auc_score

from engine import metrics

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def test_unseen_classes_are_left_out_of_the_training_and_measured_as_unknown(run, tmp_path):
    root = make_folder(tmp_path / "insects", CLASSES, train=6, test=4)
    flags = ["--data-root", root, "--lr-model", "0.05", "--unseen", "bee", "4", "--max-iter", "4"]
    assert run(*flags, "--verify", "--save-features")[0] == 0
    saved = dict(np.load("log/features/epoch_2.npz"))
    measured = json.loads(Path("log/evaluation.json").read_text())
    trained = [int((saved["train_labels"] == label).sum()) for label in range(5)]
    assert trained == [6, 6, 6, 0, 0] and saved["centers"].shape == (3, 2)
    assert sorted(saved["test_labels"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted(saved["unknown_labels"]) == [3] * 4 + [4] * 4
    assert measured["classes"] == ["ant", "cat", "dog"]
    assert measured["unknown"]["classes"] == ["bee", "eel"]
    distances = []
    for split, found in (("test", measured), ("unknown", measured["unknown"])):
        features, labels = (
            torch.from_numpy(saved[f"{split}_{name}"]) for name in ("features", "labels")
        )
        expected, _ = metrics.compare_all(features, labels)
        assert found["verification"] == expected["verification"]
        assert found["retrieval"] == expected["retrieval"]
        distances += torch.cdist(features, torch.from_numpy(saved["centers"])).amin(1).tolist()
    auroc = roc_auc_score([0] * 12 + [1] * 8, distances)
    assert measured["unknown"]["auroc_distance"] == pytest.approx(auroc)


def test_one_image_of_each_class_is_no_reason_to_fail(run, tmp_path):
    root = make_folder(tmp_path / "few", test=1)
    status, out, _ = run("--data-root", root, "--verify", "--max-epoch", "1")
    assert status == 0 and out.count("(3 images; 3 pairs): not measured, since no two images") == 1
