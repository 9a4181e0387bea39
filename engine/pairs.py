"""Verification of given pairs of images, those of datasets.read_pairs, as LFW's protocol asks."""

import math

import numpy as np
import torch
from torch import Tensor

from engine.metrics import COMPARISONS, Roc

NAMES = {name: comparison.name for name, comparison in COMPARISONS.items()}
NAMES["cosine_pca"] = "cosine after PCA"


def pair_metrics(features: Tensor, pairs) -> tuple[dict, dict[str, list[float]]]:
    """How well distances of features (N, D) tell pairs of one class from pairs of two.

    The accuracy is the mean over the folds, with its standard error, where the threshold and the
    PCA of a fold come from the others; `threshold` is the mean. All else is of all pairs together.
    Returns the "pairs" of evaluation.json, in % but for "auc", and the ROC curves.
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
                rows = np.unique([pairs.first[~within], pairs.second[~within]])
                rotated = after_pca(features, rows)
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


def after_pca(features: Tensor, rows: np.ndarray) -> Tensor:
    """All features (N, D) in all the principal components of some rows, without whitening.

    With more rows than D that only turns the centred features, which changes no angle: it is left
    out.
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
