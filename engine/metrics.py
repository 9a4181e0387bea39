"""Metrics of features and predictions: pure functions."""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from center_loss import pairwise

MAX_IMAGES = 20_000  # whose pairs, 200 million, take 0.8 GB
BLOCK = 4_000_000  # distances computed at once
FARS = [10 ** (exponent / 50) for exponent in range(-300, 1)]  # false accept rates of a curve
# False accept rates in files: by name, with the impostor pairs that the rate needs.
RATES = {"1e-2": (1e-2, 0), "1e-3": (1e-3, 0), "1e-4": (1e-4, 10_000)}


@torch.no_grad()
def center_metrics(features: Tensor, labels: Tensor, centers: Tensor) -> dict[str, float]:
    """Accuracy (%) of the nearest center, mean distance from one's own, smallest of two centers."""
    nearest = [pairwise(some, centers).argmin(1) for some in features.split(4096)]
    return dict(
        nearest_center_accuracy=percentage(torch.cat(nearest) == labels),
        intra_distance=(features - centers[labels]).norm(dim=1).mean().item(),
        inter_distance=torch.pdist(centers).min().item(),
    )


def percentage(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean feature of each class (num_classes, D); 0 for a class without features."""
    sums = torch.zeros(num_classes, features.shape[1], device=features.device)
    sums.index_add_(0, labels, features)
    counts = torch.bincount(labels, minlength=num_classes)
    return sums / counts.clamp(min=1).unsqueeze(1)


def confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> list[list[int]]:
    """The counts of images by true class (rows) and predicted class (columns)."""
    cells = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.view(num_classes, -1).tolist()


class Comparison(NamedTuple):
    """Features are compared by the Euclidean distance of what `prepare` makes of them.

    `threshold` turns a distance into the number that a user compares.
    """

    name: str
    prepare: Callable[[Tensor], Tensor]
    threshold: Callable[[float], float]


def centred(features: Tensor) -> Tensor:
    """Features with the same distances, in which less is rounded."""
    return features - features.mean(0)


def cosine_of(distance: float) -> float:
    """The cosine similarity of two features whose unit vectors are at this distance."""
    return 1 - distance**2 / 2


# By L2 distance the same class is at most the threshold apart, by cosine it is at least as similar.
COMPARISONS = {
    "l2": Comparison("L2 distance", centred, float),
    "cosine": Comparison("cosine", F.normalize, cosine_of),
}


class Roc:
    """ROC metrics of two sorted arrays of distances, exact: a threshold accepts those up to it."""

    def __init__(self, genuine: np.ndarray, impostor: np.ndarray):
        self.genuine = genuine
        self.impostor = impostor

    def rates(self, distance: float, side: str) -> tuple[float, float]:
        """False and true accepts of a threshold just below ("left") or at ("right") a distance."""
        far = np.searchsorted(self.impostor, distance, side) / len(self.impostor)
        tpr = np.searchsorted(self.genuine, distance, side) / len(self.genuine)
        return float(far), float(tpr)

    def threshold(self, distance: float, side: str) -> float | None:
        """That threshold, halfway to the next distance; None if it accepts nothing."""
        accepted, refused = [], []
        for values in (self.genuine, self.impostor):
            count = np.searchsorted(values, distance, side)
            accepted += values[:count][-1:].tolist()
            refused += values[count:][:1].tolist()
        return (max(accepted) + min(refused or accepted)) / 2 if accepted else None

    def auc(self) -> float:
        """Area under the curve: how often a genuine distance is the smaller; ties count half."""
        below = np.searchsorted(self.impostor, self.genuine, "left").sum()
        below += np.searchsorted(self.impostor, self.genuine, "right").sum()
        return 1 - float(below) / (2 * len(self.genuine) * len(self.impostor))

    def at_far(self, far: float) -> tuple[float, float | None]:
        """The largest true positive rate with at most this rate of false accepts; the threshold."""
        accepted = math.floor(far * len(self.impostor) + 1e-9)
        if accepted >= len(self.impostor):
            return 1.0, None
        first_refused = self.impostor[accepted]
        return self.rates(first_refused, "left")[1], self.threshold(first_refused, "left")

    def eer(self) -> tuple[float, float]:
        """The rate of false accepts where it is that of false rejects, and the threshold there.

        The curve is straight between its points.
        """

        def excess(distance: float, side: str = "right") -> float:  # over false rejects
            return sum(self.rates(distance, side)) - 1

        both = (self.genuine, self.impostor)
        crossing = min(values[bisect_left(values, 0, key=excess)] for values in both)
        before = excess(crossing, "left")
        share = before / (before - excess(crossing))
        far = (1 - share) * self.rates(crossing, "left")[0] + share * self.rates(crossing, "right")[
            0
        ]
        return far, self.threshold(crossing, "right")

    def metrics(self, limit: Callable[[float], float]) -> dict[str, float | None]:
        """EER and TPR at RATES in %, their thresholds as `limit` of distances; AUC in [0, 1]."""
        rate, distance = self.eer()
        measured = {"eer": 100 * rate, "threshold_at_eer": limit(distance), "auc": self.auc()}
        for name, (far, needed) in RATES.items():
            if len(self.impostor) >= needed:
                rate, distance = self.at_far(far)
                measured[f"tpr_at_far_{name}"] = 100 * rate
                found = None if distance is None else limit(distance)
                measured[f"threshold_at_far_{name}"] = found
        return measured

    def curve(self) -> list[float]:
        """The TPR at each of FARS."""
        return [self.at_far(far)[0] for far in FARS]


def rank(distances: np.ndarray, own: np.ndarray) -> list[tuple[float, int]]:
    """Every image asks for the others of its class, by (Q, N) distances, infinite from itself.

    Returns, for each that has others, the average precision and how many of other classes come
    before the first of its own. Of equal distances other classes come first.
    """
    ordered = np.sort(distances, axis=1)
    ranked = []
    for row, chosen in enumerate(own):
        wanted = np.sort(distances[row][chosen])[:-1]  # the last is the image itself
        if len(wanted):
            found = np.searchsorted(wanted, wanted, "right")
            seen = np.searchsorted(ordered[row], wanted, "right")
            ranked.append(((found / seen).mean(), seen[0] - found[0]))
    return ranked


def compare(features: Tensor, labels: Tensor) -> tuple[Roc, dict[str, float]]:
    """The Euclidean distances of all pairs of features (N, D), and retrieval by them in %."""
    count = len(labels)
    sizes = labels.bincount()
    same = int((sizes * (sizes - 1) // 2).sum())
    pairs = {True: np.empty(same, np.float32)}
    pairs[False] = np.empty(math.comb(count, 2) - same, np.float32)
    filled = {True: 0, False: 0}
    ranked = []
    norms = features.square().sum(1)
    for rows in torch.arange(count, device=features.device).split(max(BLOCK // count, 1)):
        sums = norms[rows, None] + norms
        squares = torch.addmm(sums, features[rows], features.T, alpha=-2)  # exact enough: float64
        squares[squares < 1e-14 * sums] = 0  # closer than the float32 of the network resolves
        squares[torch.arange(len(rows)), rows] = torch.inf
        distances = squares.sqrt().float().cpu().numpy()
        own = (labels[rows, None] == labels).cpu().numpy()
        ranked += rank(distances, own)
        later = np.arange(count) > rows.cpu().numpy()[:, None]  # each pair once
        for kind, array in pairs.items():
            values = distances[(own == kind) & later]
            array[filled[kind] : filled[kind] + len(values)] = values
            filled[kind] += len(values)
    for array in pairs.values():
        array.sort()
    precisions, wrong = np.array(ranked).T
    retrieval = dict(
        recall_at_1=100 * float((wrong < 1).mean()),
        recall_at_5=100 * float((wrong < 5).mean()),
        mean_average_precision=100 * float(precisions.mean()),
    )
    return Roc(pairs[True], pairs[False]), retrieval


def compare_all(features: Tensor, labels: Tensor) -> tuple[dict, dict[str, list[float]]]:
    """Verification and retrieval over all pairs of features (N, D), for each of COMPARISONS.

    Of more than MAX_IMAGES images a fixed sample is taken. Also returns the curves, the TPR at each
    of FARS. Without pairs to compare, both have the reason as "missing", and there are no curves.
    """
    total = len(labels)
    if total > MAX_IMAGES:
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MAX_IMAGES]
        drawn = drawn.sort().values.to(features.device)
        features = features[drawn]
        labels = labels[drawn.to(labels.device)]
    size = dict(images=len(labels), drawn_from=total, pairs=math.comb(len(labels), 2))
    counts = labels.unique(return_counts=True)[1]
    missing = None
    if counts.max() < 2:
        missing = "no two images are of the same class"
    elif len(counts) == 1:
        missing = "all images are of the same class"
    elif not features.isfinite().all():
        missing = "the features are not finite"
    if missing:
        return dict(verification=size | dict(missing=missing), retrieval=dict(missing=missing)), {}
    verification = dict(size)
    retrieval = dict(queries=int(counts[counts > 1].sum()))
    curves = {}
    for name, comparison in COMPARISONS.items():
        roc, retrieval[name] = compare(comparison.prepare(features.double()), labels)
        verification[name] = roc.metrics(comparison.threshold)
        curves[name] = roc.curve()
    return dict(verification=verification, retrieval=retrieval), curves


def open_set(known: dict, unknown: dict, centers: Tensor) -> dict[str, float]:
    """AUROC of telling unknown images from known ones, by the nearest center and by the softmax.

    `known` and `unknown` have features (N, D) and logits (N, C); what counts is the distance from
    the nearest center, and the largest softmax probability.
    """

    def distance(split: dict) -> Tensor:
        parts = split["features"].split(4096)
        return torch.cat([pairwise(some, centers).amin(1) for some in parts])

    def doubt(split: dict) -> Tensor:  # float32 would round probabilities near 1 to 1
        return -split["logits"].double().log_softmax(1).amax(1)

    def auroc(score: Callable[[dict], Tensor]) -> float:
        return Roc(np.sort(score(known).cpu().numpy()), np.sort(score(unknown).cpu().numpy())).auc()

    return dict(auroc_distance=auroc(distance), auroc_softmax=auroc(doubt))
