"""Metrics of features and predictions: pure functions."""

import math
from bisect import bisect_left

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from center_loss import pairwise

MAX_IMAGES = 20_000  # whose pairs, 200 million, take 0.8 GB, and for a moment twice that
BLOCK = 4_000_000  # distances computed at once
FARS = [10 ** (exponent / 50) for exponent in range(-300, 1)]  # false accept rates of a curve
COMPARISONS = {"l2": "L2 distance", "cosine": "cosine"}  # of features


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
    """Counts of images by true class (rows) and predicted class (columns)."""
    cells = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.view(num_classes, -1).tolist()


def prepare(name: str, features: Tensor) -> Tensor:
    """Features whose Euclidean distances rank pairs by COMPARISONS[name]."""
    return features if name == "l2" else F.normalize(features)


def threshold(name: str, distance: float) -> float:
    """What a user compares: the distance, or the cosine of unit vectors so far apart."""
    return distance if name == "l2" else 1 - distance**2 / 2


class Roc:
    """ROC metrics of two arrays of distances, exact: a threshold accepts those up to it.

    It sorts them in place: scikit-learn's roc_curve needs several copies of 50 million pairs.
    """

    def __init__(self, genuine: np.ndarray, impostor: np.ndarray):
        genuine.sort()
        impostor.sort()
        self.both = (genuine, impostor)

    def rates(self, distance: float, side: str) -> np.ndarray:
        """True and false accepts of a threshold just below ("left") or at ("right") a distance."""
        return np.array([np.searchsorted(each, distance, side) / len(each) for each in self.both])

    def auc(self) -> float:
        """Area under the curve: how often a genuine distance is the smaller; ties count half."""
        genuine, impostor = self.both
        below = np.searchsorted(impostor, genuine, "left").sum()
        below += np.searchsorted(impostor, genuine, "right").sum()
        return 1 - float(below) / (2 * len(genuine) * len(impostor))

    def at_far(self, far: float) -> tuple[float, float | None]:
        """The largest rate of true accepts with at most this rate of false ones; the threshold.

        That is halfway between the last distance accepted and the next; None if it accepts none.
        """
        impostor = self.both[1]
        accepted = math.floor(far * len(impostor) + 1e-9)
        if accepted >= len(impostor):
            return 1.0, None
        refused = impostor[accepted]
        below = [each[: np.searchsorted(each, refused)][-1:] for each in self.both]
        last = np.concatenate([*below, [-1.0]]).max()
        limit = float(last + refused) / 2 if last >= 0 else None
        return float(self.rates(refused, "left")[0]), limit

    def eer(self) -> tuple[float, float]:
        """The rate of false accepts where it is that of false rejects, and the threshold there."""

        def excess(distance: float) -> float:  # of false accepts over false rejects
            return self.rates(distance, "right").sum() - 1

        crossing = min(each[bisect_left(each, 0, key=excess)] for each in self.both)
        before = self.rates(crossing, "left")
        step = self.rates(crossing, "right") - before
        share = (1 - before.sum()) / step.sum()  # the curve is straight between its points
        above = [each[np.searchsorted(each, crossing, "right") :][:1] for each in self.both]
        following = np.concatenate([*above, [np.inf]]).min()
        limit = (crossing + following) / 2 if following < np.inf else crossing
        return float(before[1] + share * step[1]), float(limit)

    def metrics(self, name: str) -> dict[str, float | None]:
        """EER and TPR at small FAR in %, their thresholds for COMPARISONS[name]; AUC in [0, 1]."""
        rate, distance = self.eer()
        measured = {"eer": 100 * rate, "threshold_at_eer": threshold(name, distance)}
        measured["auc"] = self.auc()
        for far in ("1e-2", "1e-3", "1e-4"):
            if far != "1e-4" or len(self.both[1]) >= 10_000:
                rate, distance = self.at_far(float(far))
                measured[f"tpr_at_far_{far}"] = 100 * rate
                limit = None if distance is None else threshold(name, distance)
                measured[f"threshold_at_far_{far}"] = limit
        return measured

    def curve(self) -> list[float]:
        """The TPR at each of FARS."""
        return [self.at_far(far)[0] for far in FARS]


def rank(distances: np.ndarray, own: np.ndarray) -> list[tuple[float, int]]:
    """Images ask for the others of their class, by distances (Q, N), infinite from themselves.

    Returns, where there are others, the average precision and how many of other classes come before
    the first of its own. Of equal distances other classes come first.
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
    genuine = []  # distances
    impostor = []
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
        genuine.append(distances[own & later])
        impostor.append(distances[~own & later])
    precisions, wrong = np.array(ranked).T
    retrieval = dict(recall_at_1=wrong < 1, recall_at_5=wrong < 5)
    retrieval["mean_average_precision"] = precisions
    retrieval = {name: 100 * float(values.mean()) for name, values in retrieval.items()}
    return Roc(np.concatenate(genuine), np.concatenate(impostor)), retrieval


def compare_all(features: Tensor, labels: Tensor) -> tuple[dict, dict[str, list[float]]]:
    """Verification and retrieval over all pairs of features (N, D), and the curves of COMPARISONS.

    Of more than MAX_IMAGES images a fixed sample is taken. Without pairs to compare, both have the
    reason as "missing", and there are no curves.
    """
    total = len(labels)
    if total > MAX_IMAGES:
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MAX_IMAGES]
        drawn = drawn.sort().values.to(features.device)
        features = features[drawn]
        labels = labels[drawn.to(labels.device)]
    verification = dict(images=len(labels), drawn_from=total, pairs=math.comb(len(labels), 2))
    counts = labels.unique(return_counts=True)[1]
    obstacles = {
        "no two images are of the same class": counts.max() < 2,
        "all images are of the same class": len(counts) == 1,
        "the features are not finite": not features.isfinite().all(),
    }
    for missing, holds in obstacles.items():
        if holds:
            verification["missing"] = missing
            return dict(verification=verification, retrieval=dict(missing=missing)), {}
    retrieval = dict(queries=int(counts[counts > 1].sum()))
    curves = {}
    for name in COMPARISONS:
        roc, retrieval[name] = compare(prepare(name, features.double()), labels)
        verification[name] = roc.metrics(name)
        curves[name] = roc.curve()
    return dict(verification=verification, retrieval=retrieval), curves


def open_set(known: dict, unknown: dict, centers: Tensor) -> dict[str, float]:
    """AUROC of telling unknown from known images, of features (N, D) and logits (N, C).

    By the distance from the nearest center, and by the largest softmax probability.
    """
    distances = []
    doubts = []
    for split in (known, unknown):
        parts = split["features"].split(4096)
        nearest = torch.cat([pairwise(some, centers).amin(1) for some in parts])
        distances.append(nearest.cpu().numpy())
        # float32 would round probabilities near 1 to 1.
        doubt = -split["logits"].double().log_softmax(1).amax(1)
        doubts.append(doubt.cpu().numpy())
    return dict(auroc_distance=Roc(*distances).auc(), auroc_softmax=Roc(*doubts).auc())
