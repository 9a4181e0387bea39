"""Metrics are scikit-learn's and those of slow loops, ties and thresholds included."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from engine import metrics


def all_pairs(features, labels):
    """L2 distances of all pairs, one by one, and which are of one class."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(i)]
    distances = [np.linalg.norm(features[i] - features[j]) for i, j in pairs]
    return np.array(distances, np.float32), np.array([labels[i] == labels[j] for i, j in pairs])


def slow_verification(distances, same):
    """EER, AUC and TPR of pairs, from scikit-learn's curve."""
    far, tpr, _ = roc_curve(same, -distances, drop_intermediate=False)
    after = np.argmax(far + tpr >= 1)
    before = after - 1
    excess = far + tpr - 1
    weight = excess[before] / (excess[before] - excess[after])
    measured = {
        "eer": 100 * (far[before] + weight * (far[after] - far[before])),
        "auc": roc_auc_score(same, -distances),
        "tpr_at_far_1e-2": 100 * tpr[far <= 1e-2].max(),
        "tpr_at_far_1e-3": 100 * tpr[far <= 1e-3].max(),
    }
    if (~same).sum() >= 10_000:
        measured["tpr_at_far_1e-4"] = 100 * tpr[far <= 1e-4].max()
    return measured


def slow_retrieval(features, labels):
    """Of equal distances those of other classes come first; who is alone asks for nothing."""
    precisions, hits_at_1, hits_at_5 = [], [], []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        relevant = np.array([labels[j] == labels[i] for j in others])
        if not relevant.any():
            continue
        distances = [np.float32(np.linalg.norm(features[i] - features[j])) for j in others]
        ranking = sorted(range(len(others)), key=lambda k: (distances[k], relevant[k]))
        hits_at_1.append(relevant[ranking[:1]].any())
        hits_at_5.append(relevant[ranking[:5]].any())
        precisions.append(average_precision_score(relevant, -np.array(distances)))
    return dict(
        recall_at_1=100 * np.mean(hits_at_1),
        recall_at_5=100 * np.mean(hits_at_5),
        mean_average_precision=100 * np.mean(precisions),
    )


def unit(features):
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


@pytest.mark.parametrize(
    "count, dim, spread, kind",
    [
        (90, 1, 1.0, int),
        (90, 2, 0.3, float),
        (90, 64, 3.0, int),
        (90, 64, 3.0, float),
        (170, 2, 1.0, float),
    ],
)
def test_verification_and_retrieval_are_scikit_learns(count, dim, spread, kind, monkeypatch):
    """Whole numbers make ties; the images are several blocks; one is alone in its class."""
    monkeypatch.setattr(metrics, "BLOCK", 1000)
    random = np.random.default_rng(dim)
    labels = random.integers(0, 4, count)
    labels[7] = 4
    middles = random.normal(size=(5, dim)) * 2
    features = middles[labels] + random.normal(size=(count, dim)) * spread + 5
    features = features.astype(kind).astype(np.float32)
    measured, curves = metrics.compare_all(torch.tensor(features), torch.tensor(labels))
    verification = measured["verification"]
    retrieval = measured["retrieval"]
    assert (verification["images"], verification["pairs"]) == (count, math.comb(count, 2))
    assert retrieval["queries"] == count - 1
    assert json.loads(json.dumps(measured)) == measured
    compared = {"l2": features.astype(float), "cosine": unit(features.astype(float))}
    if kind is int:
        del compared["cosine"]  # where ties are broken by rounding
    for name, prepared in compared.items():
        distances, same = all_pairs(prepared, labels)
        found = verification[name]
        thresholds = {key: found.pop(key) for key in list(found) if "threshold" in key}
        assert found == pytest.approx(slow_verification(distances, same), abs=1e-4)
        assert retrieval[name] == pytest.approx(slow_retrieval(prepared, labels), abs=1e-4)
        shown = distances if name == "l2" else 1 - distances**2 / 2
        for key, limit in thresholds.items():
            if limit is None:
                assert found[key.replace("threshold", "tpr")] == 0
                continue
            accepted = shown <= limit if name == "l2" else shown >= limit
            # The distances are rounded otherwise here, by which a pair may change sides.
            far, tpr = accepted[~same].mean(), accepted[same].mean()
            rounding = 1 / (~same).sum(), 1 / same.sum()
            if key == "threshold_at_eer":
                tied = np.mean(distances == distances[accepted].max())
                assert abs(far - (1 - tpr)) <= tied * len(distances) * sum(rounding) + 1e-9
            else:
                expected = found[key.replace("threshold", "tpr")] / 100
                assert abs(tpr - expected) <= rounding[1] + 1e-9
                assert far <= float(key.rpartition("_")[2]) + rounding[0]
        nearest_far = min(metrics.FARS, key=lambda far: abs(far - 1e-2))
        at = metrics.FARS.index(nearest_far)
        assert 100 * curves[name][at] == pytest.approx(found["tpr_at_far_1e-2"], abs=1e-4)
        assert curves[name] == sorted(curves[name]) and curves[name][-1] == 1


def test_a_small_far_is_measured_where_there_are_impostors_enough():
    for count, known in ((142, False), (143, True)):
        labels = torch.arange(count) % 100
        measured, _ = metrics.compare_all(torch.randn(count, 2), labels)
        impostors = measured["verification"]["pairs"] - (count - 100)
        assert known == (impostors >= 10_000)
        assert known == ("tpr_at_far_1e-4" in measured["verification"]["cosine"])


def test_features_that_have_collapsed_are_told_apart_by_chance():
    measured, _ = metrics.compare_all(torch.full((40, 64), 0.1), torch.arange(40) % 4)
    found = measured["verification"]["l2"]
    assert (found["eer"], found["auc"], found["tpr_at_far_1e-3"]) == (50, 0.5, 0)
    assert found["threshold_at_far_1e-3"] is None
    assert measured["verification"]["cosine"]["threshold_at_eer"] == 1
    assert measured["retrieval"]["l2"]["recall_at_5"] == 0


def test_of_many_images_a_sample_is_drawn(monkeypatch):
    features = torch.randn(80, 3)
    labels = torch.arange(80) % 3
    monkeypatch.setattr(metrics, "MAX_IMAGES", 50)
    measured, curves = metrics.compare_all(features, labels)
    torch.rand(7)  # the sample does not depend on torch's generator
    assert metrics.compare_all(features, labels) == (measured, curves)
    size = {name: measured["verification"][name] for name in ("images", "drawn_from", "pairs")}
    assert size == dict(images=50, drawn_from=80, pairs=1225)


@pytest.mark.parametrize(
    "labels, features, reason",
    [
        (range(6), 1.0, "no two images are of the same class"),
        ([2] * 6, 1.0, "all images are of the same class"),
        ([0, 0, 1, 1, 2, 2], torch.nan, "the features are not finite"),
    ],
)
def test_where_there_is_nothing_to_compare_the_reason_is_told(labels, features, reason):
    labels = torch.tensor(list(labels))
    measured, curves = metrics.compare_all(torch.full((6, 2), features), labels)
    assert curves == {}
    assert measured["verification"]["missing"] == measured["retrieval"]["missing"] == reason


def test_unknown_classes_are_found_as_scikit_learn_says():
    torch.manual_seed(0)
    centers = torch.randn(3, 2) * 3
    known = dict(features=torch.randn(50, 2) * 2, logits=torch.randn(50, 3) * 15)
    unknown = dict(features=torch.randn(30, 2) * 2, logits=torch.randn(30, 3) * 15)
    measured = metrics.open_set(known, unknown, centers)
    truth = [0] * 50 + [1] * 30
    features = torch.cat([known["features"], unknown["features"]]).numpy()
    distances = [min(np.linalg.norm(x - c) for c in centers.numpy()) for x in features]
    logits = torch.cat([known["logits"], unknown["logits"]]).double()
    others = 1 - logits.softmax(1).max(1).values  # in float32, many are 0
    by_distance = roc_auc_score(truth, distances)
    by_softmax = roc_auc_score(truth, others.numpy())
    assert measured["auroc_distance"] == pytest.approx(by_distance, abs=1e-6)
    assert measured["auroc_softmax"] == pytest.approx(by_softmax, abs=1e-6)
    assert others.min() < 1e-9


def test_counts_and_means_are_those_of_a_loop():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (50,))
    predictions = torch.randint(0, 5, (50,))
    features = torch.randn(50, 3)
    counts = metrics.confusion(labels, predictions, 5)
    means = metrics.class_means(features, labels, 5)
    for label in range(5):
        own = [features[i] for i in range(50) if labels[i] == label]
        expected = sum(own) / len(own) if own else torch.zeros(3)
        assert torch.allclose(means[label], expected, atol=1e-6)
        for other in range(5):
            pairs = zip(labels, predictions, strict=True)
            assert counts[label][other] == sum(a == label and b == other for a, b in pairs)
    assert metrics.percentage(predictions == labels) == pytest.approx(
        100 * sum(counts[label][label] for label in range(5)) / 50
    )
