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
    """How two features are compared: by the Euclidean distance of what `prepare` makes of them.

    `threshold` turns that distance into the number that a user compares.
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
    """ROC metrics of two sorted arrays of distances: a threshold accepts the distances up to it.

    Exact, ties included, and without the arrays of a whole curve.
    """

    def __init__(self, genuine: np.ndarray, impostor: np.ndarray):
        self.genuine = genuine
        self.impostor = impostor

    def auc(self) -> float:
        """Area under the curve: how often a genuine distance is the smaller; ties count half."""
        below = 0
        for some in np.array_split(self.genuine, max(len(self.genuine) // BLOCK, 1)):
            below += int(np.searchsorted(self.impostor, some, "left").sum())
            below += int(np.searchsorted(self.impostor, some, "right").sum())
        return 1 - below / (2 * len(self.genuine) * len(self.impostor))

    def tpr(self, far: float) -> tuple[float, float | None]:
        """The largest share of genuine distances accepted with at most `far` of the impostors.

        And the threshold of it, None where nothing may be accepted.
        """
        accepted = math.floor(far * len(self.impostor) + 1e-9)
        if accepted >= len(self.impostor):
            return 1.0, float(max(self.genuine[-1], self.impostor[-1]))
        refused = self.impostor[accepted]
        return self._share(self.genuine, refused, "left"), self._threshold(refused, "left")

    def eer(self) -> tuple[float, float]:
        """The rate of false accepts where it is that of false rejects, and the threshold there.

        The curve is straight between its points.
        """
        crossings = []
        for values in (self.genuine, self.impostor):
            crossings.append(values[bisect_left(values, 0, key=self._excess)])
        first = min(crossings)
        before = self._excess(first, "left")
        after = self._excess(first)
        far_before = self._share(self.impostor, first, "left")
        far_after = self._share(self.impostor, first, "right")
        rate = far_before + (far_after - far_before) * before / (before - after)
        return rate, self._threshold(first, "right")

    def _excess(self, distance: float, side: str = "right") -> float:
        """False accepts over false rejects, of a threshold just below or at a distance."""
        far = self._share(self.impostor, distance, side)
        return far + self._share(self.genuine, distance, side) - 1

    def _threshold(self, distance: float, side: str) -> float | None:
        """Halfway from the last distance below ("left") or up to ("right") this one to the next."""
        accepted, refused = [], []
        for values in (self.genuine, self.impostor):
            count = np.searchsorted(values, distance, side)
            accepted += values[:count][-1:].tolist()
            refused += values[count:][:1].tolist()
        if not accepted:
            return None
        return (max(accepted) + min(refused, default=max(accepted))) / 2

    @staticmethod
    def _share(values: np.ndarray, distance: float, side: str) -> float:
        return float(np.searchsorted(values, distance, side)) / len(values)

    def metrics(self, threshold: Callable[[float], float]) -> dict[str, float | None]:
        """EER and TPR at RATES in %, the area under the curve in [0, 1], and the thresholds."""
        rate, distance = self.eer()
        measured = {"eer": 100 * rate, "threshold_at_eer": threshold(distance), "auc": self.auc()}
        for name, (far, needed) in RATES.items():
            if len(self.impostor) >= needed:
                rate, distance = self.tpr(far)
                measured[f"tpr_at_far_{name}"] = 100 * rate
                found = None if distance is None else threshold(distance)
                measured[f"threshold_at_far_{name}"] = found
        return measured

    def curve(self) -> list[float]:
        return [self.tpr(far)[0] for far in FARS]


class Retrieval:
    """Every image asks for the others of its class; those of equal distance count as of others."""

    def __init__(self):
        self.precisions = []  # average precision of each query
        self.wrong = []  # images of other classes that come before the first of its own

    def add(self, distances: np.ndarray, equal: np.ndarray) -> None:
        """Queries (Q, N): the distances from all images, infinite from itself; whose class it is.

        Images that are alone in their class ask for nothing.
        """
        ordered = np.sort(distances, axis=1)
        for row, own in enumerate(equal):
            wanted = np.sort(distances[row][own])[:-1]  # the last is the image itself
            if len(wanted):
                found = np.searchsorted(wanted, wanted, "right")
                seen = np.searchsorted(ordered[row], wanted, "right")
                self.precisions.append((found / seen).mean())
                self.wrong.append(seen[0] - found[0])

    def metrics(self) -> dict[str, float]:
        """In %."""
        wrong = np.array(self.wrong)
        return dict(
            recall_at_1=100 * float((wrong < 1).mean()),
            recall_at_5=100 * float((wrong < 5).mean()),
            mean_average_precision=100 * float(np.mean(self.precisions)),
        )


def compare(features: Tensor, labels: Tensor) -> tuple[Roc, Retrieval]:
    """The Euclidean distances of all pairs of features (N, D)."""
    count = len(labels)
    sizes = labels.bincount()
    genuine = np.empty(int((sizes * (sizes - 1) // 2).sum()), np.float32)
    impostor = np.empty(math.comb(count, 2) - len(genuine), np.float32)
    filled = filled_impostor = 0
    retrieval = Retrieval()
    norms = features.square().sum(1)
    step = max(BLOCK // count, 1)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        sums = norms[rows, None] + norms
        squares = torch.addmm(sums, features[rows], features.T, alpha=-2)  # exact enough: float64
        squares[squares < 1e-14 * sums] = 0  # closer than the float32 of the network resolves
        squares[:, rows].fill_diagonal_(torch.inf)
        distances = squares.sqrt().float().cpu().numpy()
        equal = (labels[rows, None] == labels).cpu().numpy()
        retrieval.add(distances, equal)
        later = np.arange(count) > np.arange(start, start + len(equal))[:, None]  # each pair once
        values = distances[equal & later]
        genuine[filled : filled + len(values)] = values
        filled += len(values)
        values = distances[~equal & later]
        impostor[filled_impostor : filled_impostor + len(values)] = values
        filled_impostor += len(values)
    genuine.sort()
    impostor.sort()
    return Roc(genuine, impostor), retrieval


class Compared(NamedTuple):
    verification: dict  # how well distances tell pairs of one class from pairs of two
    retrieval: dict  # how well they find the other images of a class
    curves: dict[str, list[float]]  # the TPR at each of FARS


def compare_all(features: Tensor, labels: Tensor) -> Compared:
    """Verification and retrieval over all pairs of features (N, D), for each of COMPARISONS.

    Of more than MAX_IMAGES images a fixed sample is taken. Without pairs to compare, both have the
    reason as "missing", and there are no curves.
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
        return Compared(size | dict(missing=missing), size | dict(missing=missing), {})
    verification = dict(size)
    retrieval = dict(queries=int(counts[counts > 1].sum()))
    curves = {}
    for name, comparison in COMPARISONS.items():
        roc, ranking = compare(comparison.prepare(features.double()), labels)
        verification[name] = roc.metrics(comparison.threshold)
        retrieval[name] = ranking.metrics()
        curves[name] = roc.curve()
    return Compared(verification, retrieval, curves)


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
