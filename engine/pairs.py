"""Verification of given pairs of images, those of datasets.read_pairs, as LFW's protocol asks."""

import numpy as np
import torch
from torch import Tensor

from engine.images import DatasetError
from engine.metrics import COMPARISONS, Roc, prepare, threshold

NAMES = COMPARISONS | {"cosine_pca": "cosine after PCA"}


def pair_metrics(features: Tensor, pairs) -> tuple[dict, dict[str, list[float]]]:
    """How well distances of features (N, D) tell pairs of one class from pairs of two.

    Accuracy and threshold are means over the folds, where the threshold and the PCA of a fold come
    from the others. All else is of all pairs together. Returns the "pairs" of evaluation.json, in %
    but for "auc", and the ROC curves. DatasetError if features are not finite.
    """
    features = features.double().cpu()
    if not features.isfinite().all():
        raise DatasetError("--pairs: the network's features are not finite")
    folds = np.unique(pairs.folds)
    measured = dict(images=len(features), pairs=len(pairs.same), folds=len(folds))
    measured["same"] = int(pairs.same.sum())
    curves = {}
    for name, what in NAMES.items():
        distances = pair_distances(name, features, pairs)
        scores = np.empty(len(pairs.same))
        accuracies = []
        thresholds = []
        for fold in folds:
            within = pairs.folds == fold
            if name == "cosine_pca":
                others = np.unique([pairs.first[~within], pairs.second[~within]])
                distances = pair_distances(name, after_pca(features, others), pairs)
            limit = best_threshold(distances[~within], pairs.same[~within])
            accuracies.append(100 * np.mean((distances[within] <= limit) == pairs.same[within]))
            thresholds.append(threshold(name, limit))
            scores[within] = distances[within]
        roc = Roc(scores[pairs.same], scores[~pairs.same])
        measured[name] = dict(
            accuracy=float(np.mean(accuracies)),
            standard_error=float(np.std(accuracies, ddof=1) / len(folds) ** 0.5),
            threshold=float(np.mean(thresholds)),
            **roc.metrics(name),
        )
        curves[f"pairs, {what}"] = roc.curve()
    return measured, curves


def lines(measured: dict) -> list[str]:
    """What the log says of pair_metrics."""
    said = []
    for name, what in NAMES.items():
        found = measured[name]
        said.append(
            f"Pairs ({measured['pairs']:,} of {measured['images']:,} images) by {what}: "
            f"accuracy (%) over {measured['folds']} folds: "
            f"{found['accuracy']:.2f} ± {found['standard_error']:.2f}\t "
            f"threshold: {found['threshold']:.4f}\t EER (%): {found['eer']:.2f}\t "
            f"TPR (%) at FAR 0.01: {found['tpr_at_far_1e-2']:.2f}\t AUC: {found['auc']:.5f}"
        )
    return said


def pair_distances(name: str, features: Tensor, pairs) -> np.ndarray:
    prepared = prepare(name, features).numpy()
    return np.linalg.norm(prepared[pairs.first] - prepared[pairs.second], axis=1)


def after_pca(features: Tensor, rows: np.ndarray) -> Tensor:
    """All features (N, D) in all the principal components of some rows, without whitening."""
    from sklearn.decomposition import PCA  # takes a second to load

    components = min(features.shape[1], len(rows) - 1)
    fitted = PCA(components).fit(features[rows].numpy())
    return torch.from_numpy(fitted.transform(features.numpy()))


def best_threshold(distances: np.ndarray, same: np.ndarray) -> float:
    """The most accurate threshold, which accepts distances up to it; of several the middle one."""
    values = np.unique(distances)
    none = np.nextafter(values[:1], -np.inf)
    limits = np.concatenate([none, (values[1:] + values[:-1]) / 2, values[-1:]])
    genuine = np.searchsorted(np.sort(distances[same]), limits, "right")
    impostors = np.searchsorted(np.sort(distances[~same]), limits, "right")
    correct = genuine - impostors  # and all impostors, less those accepted
    best = np.flatnonzero(correct == correct.max())
    return float(limits[best[len(best) // 2]])
