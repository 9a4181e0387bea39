"""Pairs fold by fold: a slow loop's thresholds and accuracies, scikit-learn's PCA and curves."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from engine import metrics, pairs
from engine.images import DatasetError


def make_pairs(people=12, images=4, folds=4, dim=6, seed=0):
    """Features of people and pairs of them; no person is in two folds."""
    random = np.random.default_rng(seed)
    features = np.repeat(random.normal(size=(people, dim)), images, 0)
    features += 0.7 * random.normal(size=features.shape) + 3
    rows = []
    for fold in range(folds):
        own = [p for p in range(people) if p % folds == fold]
        for _ in range(15):
            a, b = random.choice(own, 2, replace=False)
            i, j = random.choice(images, 2, replace=False)
            rows += [(a * images + i, a * images + j, True, fold)]
            rows += [(a * images + i, b * images + j, False, fold)]
    first, second, same, numbers = map(np.array, zip(*rows, strict=True))
    paths = [f"{number}.png" for number in range(len(features))]
    return torch.tensor(features, dtype=torch.float32), SimpleNamespace(
        paths=paths, first=first, second=second, same=same, folds=numbers
    )


def slow_accuracy(scores_of_fold, drawn):
    """The lowest and highest accuracy (%) and threshold of each fold, of all that are best."""
    accuracies, thresholds = [], []
    for fold in np.unique(drawn.folds):
        scores = scores_of_fold(fold)  # larger: rather the same
        others, within = drawn.folds != fold, drawn.folds == fold
        values = np.unique(scores[others])
        candidates = [*(values[1:] + values[:-1]) / 2, values[0] - 1e-9, values[-1] + 1e-9]
        found = {c: np.mean((scores[others] >= c) == drawn.same[others]) for c in candidates}
        best = [c for c in candidates if found[c] == max(found.values())]
        right = [100 * np.mean((scores[within] >= c) == drawn.same[within]) for c in best]
        accuracies.append((min(right), max(right)))
        thresholds.append((min(best), max(best)))
    return np.array(accuracies).T, np.array(thresholds).T


@pytest.mark.parametrize("dim", [6, 60])  # in 60, there are more dimensions than images to fit
def test_thresholds_and_pca_come_from_the_other_folds(dim):
    features, drawn = make_pairs(dim=dim)
    measured, curves = pairs.pair_metrics(features, drawn)
    assert json.loads(json.dumps(measured)) == measured
    counts = dict(images=48, pairs=120, same=60, folds=4)
    assert {name: measured[name] for name in counts} == counts
    array = features.double().numpy()

    def cosines(values, chosen=slice(None)):
        a, b = values[drawn.first[chosen]], values[drawn.second[chosen]]
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    def after_pca(fold):
        others = drawn.folds != fold
        rows = np.unique(np.r_[drawn.first[others], drawn.second[others]])
        fitted = PCA(min(dim, len(rows) - 1)).fit(array[rows])
        return cosines(fitted.transform(array))

    distances = np.linalg.norm(array[drawn.first] - array[drawn.second], axis=1)
    scores = dict(
        l2=lambda fold: -distances, cosine=lambda fold: cosines(array), cosine_pca=after_pca
    )
    for name, scores_of_fold in scores.items():
        found = measured[name]
        (lowest, highest), thresholds = slow_accuracy(scores_of_fold, drawn)
        assert lowest.mean() - 1e-9 <= found["accuracy"] <= highest.mean() + 1e-9
        if (lowest == highest).all():
            error = lowest.std(ddof=1) / math.sqrt(4)
            assert found["standard_error"] == pytest.approx(error)
        pooled = np.empty(120)
        for fold in range(4):
            pooled[drawn.folds == fold] = scores_of_fold(fold)[drawn.folds == fold]
        assert found["auc"] == pytest.approx(roc_auc_score(drawn.same, pooled), abs=1e-6)
        sign = -1 if name == "l2" else 1
        accepted = pooled >= sign * found["threshold_at_far_1e-2"]
        assert 100 * accepted[drawn.same].mean() == pytest.approx(found["tpr_at_far_1e-2"])
        assert not accepted[~drawn.same].any()  # a hundredth of 60 pairs is none
        gap = 1e-9 if name == "l2" else 0.02  # halfway between distances, not cosines
        low, high = thresholds.mean(1)
        assert low - gap <= sign * found["threshold"] <= high + gap
    assert list(curves) == ["pairs, L2 distance", "pairs, cosine", "pairs, cosine after PCA"]
    assert all(len(curve) == len(metrics.FARS) for curve in curves.values())
    assert len(set(measured["cosine"].items()) & set(measured["cosine_pca"].items())) < 5


def test_the_threshold_of_a_fold_does_not_see_that_fold():
    """A fold whose pairs are the other way round is all wrong; the best threshold has it right."""
    features, drawn = make_pairs()
    features = torch.cat([torch.zeros(24, 1), torch.ones(24, 1)])
    drawn.first = np.zeros(120, int)
    drawn.second = np.where(drawn.same, 1, 30)
    turned = drawn.folds == 2
    drawn.second[turned] = np.where(drawn.same[turned], 30, 1)
    measured, _ = pairs.pair_metrics(features, drawn)
    assert measured["l2"]["accuracy"] == 75
    assert measured["l2"]["standard_error"] == pytest.approx(25)
    assert measured["l2"]["threshold"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "distances, same, expected",
    [
        ([1, 2, 3, 4], [1, 1, 0, 0], 2.5),
        ([4, 1, 3, 2], [0, 1, 0, 1], 2.5),
        ([1, 2, 2, 3], [1, 1, 0, 0], 2.5),  # no threshold parts equal distances
        ([1, 2, 3], [1, 1, 1], 3),
        ([1, 2, 3], [0, 0, 0], np.nextafter(1, 0)),
    ],
)
def test_the_best_threshold_lies_between_distances(distances, same, expected):
    found = pairs.best_threshold(np.array(distances, float), np.array(same, bool))
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_log_says_accuracy_with_its_error():
    measured, _ = pairs.pair_metrics(*make_pairs())
    lines = pairs.lines(measured)
    assert len(lines) == 3
    found = measured["cosine_pca"]
    expected = f"over 4 folds: {found['accuracy']:.2f} ± {found['standard_error']:.2f}\t"
    assert lines[2].startswith("Pairs (120 of 48 images) by cosine after PCA: accuracy (%) ")
    assert expected in lines[2] and f"threshold: {found['threshold']:.4f}" in lines[2]


def test_features_that_are_not_finite_are_refused():
    features, drawn = make_pairs()
    features[3, 1] = torch.inf
    with pytest.raises(DatasetError, match="not finite"):
        pairs.pair_metrics(features, drawn)
