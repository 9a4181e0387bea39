"""Metrics of features and predictions: pure functions."""

import math
from bisect import bisect_left

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from center_loss import pairwise


@torch.no_grad()
def center_metrics(features: Tensor, labels: Tensor, centers: Tensor) -> dict[str, float]:
    """Accuracy (%) of the nearest center, mean distance from one's own center, smallest distance of two centers."""
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
    sums = torch.zeros(num_classes, features.shape[1], device=features.device).index_add_(
        0, labels, features
    )
    return sums / torch.bincount(labels, minlength=num_classes).clamp(min=1).unsqueeze(1)


MAX_IMAGES = 20_000  # whose pairs, 200 million, take 0.8 GB


BLOCK = 4_000_000  # distances computed at once


FARS = [10 ** (exponent / 50) for exponent in range(-300, 1)]  # false accept rates of a curve


# Applied to features before Euclidean distances are taken; those of normalised features rank as the cosine does.
DISTANCES = {"l2": lambda features: features - features.mean(0), "cosine": F.normalize}


LONG_NAMES = {"l2": "L2 distance", "cosine": "cosine"}


class Roc:
    """ROC metrics of two sorted arrays of distances: a threshold accepts the distances up to it.

    Exact, ties included, and without the arrays of a whole curve.
    """

    def __init__(self, genuine: np.ndarray, impostor: np.ndarray):
        self.genuine, self.impostor = genuine, impostor

    def auc(self) -> float:
        """Area under the curve: the share of (genuine, impostor) whose genuine distance is smaller; ties count half."""
        below = 0
        for some in np.array_split(self.genuine, max(len(self.genuine) // BLOCK, 1)):
            below += sum(
                int(np.searchsorted(self.impostor, some, side).sum()) for side in ("left", "right")
            )
        return 1 - below / (2 * len(self.genuine) * len(self.impostor))

    def tpr(self, far: float) -> float:
        """True positive rate: the largest share of genuine distances accepted with at most `far` of the impostors."""
        accepted = math.floor(far * len(self.impostor) + 1e-9)
        if accepted >= len(self.impostor):
            return 1.0
        return self._share(self.genuine, self.impostor[accepted], "left")

    def eer(self) -> float:
        """Equal error rate: where the curve, straight between its points, has equal false accepts and false rejects."""

        def excess(
            threshold: float, side: str = "right"
        ) -> float:  # of false accepts over false rejects
            return (
                self._share(self.impostor, threshold, side)
                + self._share(self.genuine, threshold, side)
                - 1
            )

        first = min(
            values[bisect_left(values, 0, key=excess)] for values in (self.genuine, self.impostor)
        )
        before, after = excess(first, "left"), excess(first)
        far = [self._share(self.impostor, first, side) for side in ("left", "right")]
        return far[0] + (far[1] - far[0]) * before / (before - after)

    @staticmethod
    def _share(values: np.ndarray, threshold: float, side: str) -> float:
        return float(np.searchsorted(values, threshold, side)) / len(values)


def compare(features: Tensor, labels: Tensor) -> tuple[Roc, float]:
    """The distances of all pairs of features (N, D), and recall@1: the share whose nearest neighbor has their label."""
    count, each = len(labels), labels.bincount()
    same = int((each * (each - 1) // 2).sum())
    distances = np.empty(same, np.float32), np.empty(math.comb(count, 2) - same, np.float32)
    filled, hits, norms = [0, 0], 0, features.square().sum(1)
    for start in range(0, count, step := max(BLOCK // count, 1)):
        rows = slice(start, start + step)
        sums = norms[rows, None] + norms
        squares = torch.addmm(
            sums, features[rows], features.T, alpha=-2
        )  # accurate enough in float64
        squares[squares < 1e-14 * sums] = 0  # closer than the float32 of the network resolves
        squares[:, rows].fill_diagonal_(torch.inf)
        equal = labels[rows, None] == labels
        hits += int(equal.gather(1, squares.argmin(1, keepdim=True)).sum())
        once = torch.ones_like(equal[:, start:]).triu_(1)
        for number, chosen in enumerate((equal[:, start:] & once, ~equal[:, start:] & once)):
            values = squares[:, start:][chosen].float().sqrt_().cpu().numpy()
            distances[number][filled[number] : filled[number] + len(values)] = values
            filled[number] += len(values)
    for values in distances:
        values.sort()
    return Roc(*distances), hits / count


def verification(features: Tensor, labels: Tensor) -> tuple[dict, dict[str, list[float]]]:
    """How well distances tell pairs of one class from pairs of two, over all pairs of features (N, D).

    Returns, for each of DISTANCES, eer, tpr_at_far_1e-3 and recall_at_1 in % and auc in [0, 1]; and the curves, the TPR
    at each of FARS. Of more than MAX_IMAGES images a fixed sample is taken. Without pairs to compare, it returns the
    reason, as "missing", and no curves.
    """
    total = len(labels)
    if total > MAX_IMAGES:
        drawn = (
            torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MAX_IMAGES]
            .sort()
            .values
        )
        features, labels = features[drawn.to(features.device)], labels[drawn.to(labels.device)]
    measured, counts = (
        dict(images=len(labels), drawn_from=total, pairs=math.comb(len(labels), 2)),
        labels.bincount(),
    )
    if counts.max() < 2:
        return measured | dict(missing="no two images are of the same class"), {}
    if counts.max() == len(labels):
        return measured | dict(missing="all images are of the same class"), {}
    if not features.isfinite().all():
        return measured | dict(missing="the features are not finite"), {}
    curves = {}
    for name, prepare in DISTANCES.items():
        roc, recall = compare(prepare(features.double()), labels)
        measured[name] = {
            "eer": 100 * roc.eer(),
            "auc": roc.auc(),
            "tpr_at_far_1e-3": 100 * roc.tpr(1e-3),
            "recall_at_1": 100 * recall,
        }
        curves[name] = [roc.tpr(far) for far in FARS]
    return measured, curves


def open_set(known: dict, unknown: dict, centers: Tensor) -> dict[str, float]:
    """AUROC of telling unknown images from known ones by the distance from the nearest center and by the softmax.

    `known` and `unknown` have features (N, D) and logits (N, C); the largest softmax probability counts.
    """

    def distance(split: dict) -> Tensor:
        return torch.cat(
            [pairwise(some, centers).amin(1) for some in split["features"].split(4096)]
        )

    def doubt(
        split: dict,
    ) -> Tensor:  # in float64, as float32 would round probabilities near 1 to 1
        return -split["logits"].double().log_softmax(1).amax(1)

    def auroc(score) -> float:
        return Roc(*(np.sort(score(split).cpu().numpy()) for split in (known, unknown))).auc()

    return dict(auroc_distance=auroc(distance), auroc_softmax=auroc(doubt))


def confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> list[list[int]]:
    """The counts of images by true class (rows) and predicted class (columns)."""
    return (
        torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
        .view(num_classes, -1)
        .tolist()
    )
