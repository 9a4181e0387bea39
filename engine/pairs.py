"""Verification of given pairs of images, fold by fold, as LFW's protocol asks: pure functions.

Pairs are those of datasets.read_pairs: `first` and `second` (P,) are rows of the features, `same`
(P,) tells whether both are of one class, `folds` (P,) in which fold the pair is.
"""

import math

import numpy as np
import torch
from torch import Tensor

from engine.metrics import COMPARISONS, Roc

NAMES = {name: comparison.name for name, comparison in COMPARISONS.items()}
NAMES["cosine_pca"] = "cosine after PCA"


def pair_metrics(features: Tensor, pairs) -> tuple[dict, dict[str, list[float]]]:
    """How well distances of features (N, D) tell pairs of one class from pairs of two.

    For each of NAMES, the accuracy is the mean over the folds, with its standard error, where the
    threshold, and the PCA, of a fold come from the other folds; `threshold` is their mean. EER,
    AUC and TPR are of all pairs together.

    Returns the "pairs" of evaluation.json, in % but for "auc", and the ROC curves. Where nothing
    can be measured, it has the reason as "missing".
    """
    features = features.double()
    folds = np.unique(pairs.folds)
    measured = dict(
        images=len(features), pairs=len(pairs.same), same=int(pairs.same.sum()), folds=len(folds)
    )
    if len(folds) < 2:
        return measured | dict(missing="there is one fold alone"), {}
    if not features.isfinite().all():
        return measured | dict(missing="the features are not finite"), {}
    curves = {}
    for name, what in NAMES.items():
        comparison = COMPARISONS["cosine" if name == "cosine_pca" else name]
        distances = pair_distances(comparison.prepare(features), pairs)
        scores = np.empty(len(pairs.same))
        accuracies = []
        thresholds = []
        for fold in folds:
            within = pairs.folds == fold
            if name == "cosine_pca":
                rotated = after_pca(features, rows_of(pairs, ~within))
                distances = pair_distances(comparison.prepare(rotated), pairs)
            limit = best_threshold(distances[~within], pairs.same[~within])
            accuracies.append(np.mean((distances[within] <= limit) == pairs.same[within]))
            thresholds.append(comparison.threshold(limit))
            scores[within] = distances[within]
        roc = Roc(np.sort(scores[pairs.same]), np.sort(scores[~pairs.same]))
        measured[name] = dict(
            accuracy=100 * float(np.mean(accuracies)),
            standard_error=100 * float(np.std(accuracies, ddof=1)) / math.sqrt(len(folds)),
            threshold=float(np.mean(thresholds)),
            **roc.metrics(comparison.threshold),
        )
        curves[f"pairs, {what}"] = roc.curve()
    return measured, curves


def lines(measured: dict) -> list[str]:
    """What the log says of pair_metrics."""
    over = f"Pairs ({measured['pairs']:,} of {measured['images']:,} images)"
    if "missing" in measured:
        return [f"{over}: not measured, since {measured['missing']}"]
    said = []
    for name, what in NAMES.items():
        found = measured[name]
        said.append(
            f"{over} by {what}: accuracy (%) over {measured['folds']} folds: "
            f"{found['accuracy']:.2f} ± {found['standard_error']:.2f}\t "
            f"threshold: {found['threshold']:.4f}\t EER (%): {found['eer']:.2f}\t "
            f"TPR (%) at FAR 0.01: {found['tpr_at_far_1e-2']:.2f}\t AUC: {found['auc']:.5f}"
        )
    return said


def pair_distances(features: Tensor, pairs) -> np.ndarray:
    """The Euclidean distance of each pair (P,)."""
    first = features[torch.as_tensor(pairs.first, device=features.device)]
    second = features[torch.as_tensor(pairs.second, device=features.device)]
    return (first - second).norm(dim=1).cpu().numpy()


def rows_of(pairs, chosen: np.ndarray) -> np.ndarray:
    """The images of the chosen pairs, each once."""
    return np.unique(np.concatenate([pairs.first[chosen], pairs.second[chosen]]))


def after_pca(features: Tensor, rows: np.ndarray) -> Tensor:
    """All features (N, D) in the principal components of some of them, without whitening.

    All components are kept. If these rows are more than D, that turns the centred features, which
    changes no distance and no angle, and they are returned as they are.
    """
    fitted = features[torch.as_tensor(rows, device=features.device)]
    mean = fitted.mean(0)
    if len(fitted) > fitted.shape[1]:
        return features - mean
    components = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[: len(fitted) - 1]
    return (features - mean) @ components.T


def best_threshold(distances: np.ndarray, same: np.ndarray) -> float:
    """The most accurate threshold, which accepts distances up to it; of several the middle one."""
    order = np.argsort(distances, kind="stable")
    distances = distances[order]
    genuine = np.concatenate([[0], np.cumsum(same[order])])
    impostors = np.arange(len(order) + 1) - genuine
    correct = genuine - impostors  # and all impostors, less those accepted
    tied = np.flatnonzero(distances[1:] == distances[:-1]) + 1
    correct[tied] = correct.min() - 1  # no threshold lies between equal distances
    best = np.flatnonzero(correct == correct.max())
    accepted = best[len(best) // 2]
    if accepted == 0:
        return float(np.nextafter(distances[0], -math.inf))
    return float(distances[accepted - 1 : accepted + 1].mean())
