"""What an evaluation measures of known and unknown classes, and how it says it."""

import json
import re

import pytest
import torch

from engine import evaluation, metrics

CLASSES = ["ant", "bee", "cat"]
UNSEEN = ["dog", "eel"]
CENTERS = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, 0.0]])


def split(labels, seed, **more):
    """Features near the centers of their classes, and predictions of which some are wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(labels)
    features = CENTERS[labels % 3] + 3 * torch.randn(len(labels), 2, generator=generator)
    logits = -(features[:, None] - CENTERS).square().sum(2)
    found = dict(features=features, labels=labels, logits=logits, predictions=logits.argmax(1))
    return found | more


@pytest.fixture
def splits():
    test = split([0] * 8 + [1] * 8 + [2] * 8, 1)
    test |= dict(xent=0.5, accuracy=90.0, nearest_center_accuracy=80.0)
    test |= dict(intra_distance=1.0, inter_distance=9.0)
    return dict(test=test, unknown=split([3] * 6 + [4] * 6, 2))


def test_known_unknown_and_all_images_are_measured_apart(splits):
    measured, curves = evaluation.measure(splits, CENTERS, CLASSES, UNSEEN, confusion=True)
    assert json.loads(json.dumps(measured)) == measured
    assert measured["accuracy"] == 90 and measured["inter_distance"] == 9
    assert measured["classes"] == CLASSES and measured["unknown"]["classes"] == UNSEEN
    everything = {
        name: torch.cat([splits["test"][name], splits["unknown"][name]])
        for name in ("features", "labels")
    }
    for part, images in ((measured, splits["test"]), (measured["all"], everything)):
        expected, _ = metrics.compare_all(images["features"], images["labels"])
        assert part["images"] == len(images["labels"])
        assert {name: part[name] for name in expected} == expected
    unknown = splits["unknown"]
    expected, _ = metrics.compare_all(unknown["features"], unknown["labels"])
    expected |= metrics.open_set(splits["test"], unknown, CENTERS)
    assert measured["unknown"] == dict(classes=UNSEEN, images=12, **expected)
    for metric in ("eer", "threshold_at_eer", "tpr_at_far_1e-2", "threshold_at_far_1e-2", "auc"):
        assert metric in measured["unknown"]["verification"]["l2"]
    for metric in ("recall_at_1", "recall_at_5", "mean_average_precision"):
        assert metric in measured["retrieval"]["cosine"]
    assert list(curves) == [
        f"{what} classes, {by}"
        for what in ("trained", "unknown")
        for by in ("L2 distance", "cosine")
    ]
    assert all(len(curve) == len(metrics.FARS) for curve in curves.values())
    assert torch.tensor(measured["confusion"]).sum() == 24


def test_each_split_may_be_missing(splits):
    measured, curves = evaluation.measure(dict(test=splits["test"]), CENTERS, CLASSES, [])
    assert not {"unknown", "all", "confusion"} & measured.keys() and len(curves) == 2
    measured, curves = evaluation.measure(dict(unknown=splits["unknown"]), CENTERS, CLASSES, UNSEEN)
    assert measured.keys() == {"classes", "unknown"} and len(curves) == 2
    assert "auroc_distance" not in measured["unknown"]
    (line,) = evaluation.lines(measured)
    assert line.startswith("Unknown classes (12 images; 66 pairs) by L2 distance / cosine: EER (%)")


def test_the_log_has_a_line_for_each_and_the_unknown_last(splits):
    measured, _ = evaluation.measure(splits, CENTERS, CLASSES, UNSEEN, confusion=True)
    lines = evaluation.lines(measured)
    starts = ["Least accurate", "Trained classes (24", "Told from the trained", "Unknown classes ("]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert "dog, eel: AUROC by distance from the nearest center: " in lines[2]
    for line, part in ((lines[1], measured), (lines[3], measured["unknown"])):
        values = [float(number) for number in re.findall(r"\d+\.\d\d\b(?! \()", line)]
        expected = []
        for source, metric in (
            ("verification", "eer"),
            ("verification", "tpr_at_far_1e-2"),
            ("retrieval", "recall_at_1"),
            ("retrieval", "mean_average_precision"),
        ):
            expected += [round(part[source][name][metric], 2) for name in ("l2", "cosine")]
        assert [value for value in values if value != 0.01] == pytest.approx(
            [value for value in expected if value != 0.01]
        )


def test_a_sample_and_what_is_missing_are_said(splits, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_IMAGES", 20)
    measured, _ = evaluation.measure(dict(test=splits["test"]), CENTERS, CLASSES, [])
    assert "(20 images of 24, drawn with seed 0; 190 pairs)" in evaluation.lines(measured)[0]
    few = {name: values[[0, 8, 16]] for name, values in splits["test"].items() if name[-1] == "s"}
    few |= {name: value for name, value in splits["test"].items() if name not in few}
    measured, curves = evaluation.measure(dict(test=few), CENTERS, CLASSES, [])
    assert curves == {} and evaluation.lines(measured) == [
        "Trained classes (3 images; 3 pairs): not measured, since no two images are of the same "
        "class"
    ]


def test_at_most_five_classes_are_named():
    names = [f"class {label}" for label in range(9)]
    counts = [[0] * 9 for _ in names]
    for label in range(1, 9):
        counts[label][label] = 10 * label
        counts[label][label - 1] = 8
        counts[label][(label + 3) % 9] += label  # of class 6, class 0: no row of its own
    line = evaluation.worst_line(counts, names)
    assert line.startswith("Least accurate of 8 classes (%): class 1 52.63, 8 taken for class 0; ")
    assert line.count(" taken for ") == 5
