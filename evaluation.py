"""Metrics of a trained network beyond its accuracy, and their files; the best epoch by validation.

Verification: does the distance of two images' features tell whether they are of the same class? Unknown classes: how
well do distances and probabilities tell images of classes that were left out of the training from the others?
"""

import copy
import gc
import math
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plots
import utils
from center_loss import pairwise
from datasets import Data

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
            below += sum(int(np.searchsorted(self.impostor, some, side).sum()) for side in ("left", "right"))
        return 1 - below / (2 * len(self.genuine) * len(self.impostor))

    def tpr(self, far: float) -> float:
        """True positive rate: the largest share of genuine distances accepted with at most `far` of the impostors."""
        accepted = math.floor(far * len(self.impostor) + 1e-9)
        if accepted >= len(self.impostor):
            return 1.0
        return self._share(self.genuine, self.impostor[accepted], "left")

    def eer(self) -> float:
        """Equal error rate: where the curve, straight between its points, has equal false accepts and false rejects."""

        def excess(threshold: float, side: str = "right") -> float:  # of false accepts over false rejects
            return self._share(self.impostor, threshold, side) + self._share(self.genuine, threshold, side) - 1

        first = min(values[bisect_left(values, 0, key=excess)] for values in (self.genuine, self.impostor))
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
        squares = torch.addmm(sums, features[rows], features.T, alpha=-2)  # accurate enough in float64
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
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MAX_IMAGES].sort().values
        features, labels = features[drawn.to(features.device)], labels[drawn.to(labels.device)]
    measured, counts = dict(images=len(labels), drawn_from=total, pairs=math.comb(len(labels), 2)), labels.bincount()
    if counts.max() < 2:
        return measured | dict(missing="no two images are of the same class"), {}
    if counts.max() == len(labels):
        return measured | dict(missing="all images are of the same class"), {}
    if not features.isfinite().all():
        return measured | dict(missing="the features are not finite"), {}
    curves = {}
    for name, prepare in DISTANCES.items():
        roc, recall = compare(prepare(features.double()), labels)
        measured[name] = {"eer": 100 * roc.eer(), "auc": roc.auc(), "tpr_at_far_1e-3": 100 * roc.tpr(1e-3),
                          "recall_at_1": 100 * recall}  # fmt: skip
        curves[name] = [roc.tpr(far) for far in FARS]
    return measured, curves


def open_set(known: dict, unknown: dict, centers: Tensor) -> dict[str, float]:
    """AUROC of telling unknown images from known ones by the distance from the nearest center and by the softmax.

    `known` and `unknown` have features (N, D) and logits (N, C); the largest softmax probability counts.
    """

    def distance(split: dict) -> Tensor:
        return torch.cat([pairwise(some, centers).amin(1) for some in split["features"].split(4096)])

    def doubt(split: dict) -> Tensor:  # in float64, as float32 would round probabilities near 1 to 1
        return -split["logits"].double().log_softmax(1).amax(1)

    def auroc(score) -> float:
        return Roc(*(np.sort(score(split).cpu().numpy()) for split in (known, unknown))).auc()

    return dict(auroc_distance=auroc(distance), auroc_softmax=auroc(doubt))


def confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> list[list[int]]:
    """The counts of images by true class (rows) and predicted class (columns)."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, -1).tolist()


def confusion_lines(counts: list[list[int]], classes: Sequence[str], width: int = 100) -> list[str]:
    """The accuracy (%) of each class, – without images, and its counts of predictions as each class.

    If these do not fit into `width`, only the three most frequent mistakes of each class.
    """
    accuracies = [f"{100 * row[label] / sum(row):.2f}" if any(row) else "–" for label, row in enumerate(counts)]
    first = max(len("true class"), *map(len, classes))
    columns = [max(len(name), *(len(str(row[label])) for row in counts)) for label, name in enumerate(classes)]
    if first + 12 + sum(columns) + 2 * len(columns) <= width:
        return [
            f"{name:{first}}  {right:>10}" + "".join(f"  {cell:>{n}}" for cell, n in zip(row, columns, strict=True))
            for name, right, row in zip(["true class", *classes], ["accuracy %", *accuracies], [classes, *counts],
                                        strict=True)
        ]  # fmt: skip
    lines = [f"{'true class':{first}}  {'accuracy %':>10}  most frequent mistakes"]
    for label, (name, right, row) in enumerate(zip(classes, accuracies, counts, strict=True)):
        wrong = [(number, other) for other, number in enumerate(row) if number and other != label]
        wrong.sort(key=lambda each: -each[0])
        shown = [f"{classes[other]} {number}" for number, other in wrong[:3]]
        if rest := sum(number for number, _ in wrong[3:]):
            shown.append(f"others {rest}")
        lines.append(f"{name:{first}}  {right:>10}  {', '.join(shown)}".rstrip())
    return lines


def report(splits: dict[str, dict], centers: Tensor, epoch: int, data: Data, args, log: utils.Log) -> None:
    """Logs verification, detection of unknown classes and, for --evaluate, the confusion matrix.

    Writes evaluation.json and, for --plot, roc.png and confusion.png to --save-dir.
    """
    directory, tested, unknown = Path(args.save_dir), splits["test"], splits.get("unknown")
    metrics = ("xent", "accuracy", "nearest_center_accuracy", "intra_distance", "inter_distance")
    measured = dict(epoch=epoch, classes=data.classes, images=len(tested["labels"]), mirror=args.mirror)
    measured |= {name: tested[name] for name in metrics}
    measured["verification"], curves = verification(tested["features"], tested["labels"])
    log_verification("Verification", measured["verification"], log)
    curves = {f"trained classes, {LONG_NAMES[name]}": curve for name, curve in curves.items()}
    if unknown:
        found = measured["unknown"] = dict(classes=data.unseen, images=len(unknown["labels"]))
        found |= open_set(tested, unknown, centers)
        names = ", ".join(data.unseen[:10]) + ", …" * (len(data.unseen) > 10)
        log(f"Unknown classes {names} ({found['images']:,} images): AUROC by distance from the "
            f"nearest center: {found['auroc_distance']:.4f}\t by softmax probability: {found['auroc_softmax']:.4f}")
        found["verification"], more = verification(unknown["features"], unknown["labels"] - len(data.classes))
        log_verification("Verification of the unknown", found["verification"], log)
        curves |= {f"unknown classes, {LONG_NAMES[name]}": curve for name, curve in more.items()}

    pictures = {"roc.png": (plots.draw_roc, FARS, curves)} if curves else {}
    if args.evaluate:
        counts = measured["confusion"] = confusion(tested["labels"], tested["predictions"], len(data.classes))
        log("\n".join(confusion_lines(counts, data.classes)))
        title = f"test: accuracy {tested['accuracy']:.2f} %"
        pictures["confusion.png"] = (plots.draw_confusion, np.array(counts), data.classes, title)
    directory.mkdir(parents=True, exist_ok=True)
    utils.write_json(directory / "evaluation.json", measured)
    if args.plot:
        for name, (draw, *arguments) in pictures.items():
            for warning in plots.draw_to(directory / name, draw, *arguments):
                log(warning)
        gc.collect()  # a figure's cycles keep exceptions, those the callers' frames, and those the loaders' workers


def log_verification(what: str, measured: dict, log: utils.Log) -> None:
    drawn = f" of {measured['drawn_from']:,}, drawn with seed 0" if measured["images"] < measured["drawn_from"] else ""
    over = f"({measured['images']:,} images{drawn}; {measured['pairs']:,} pairs)"
    if "missing" in measured:
        return log(f"{what} {over}: not measured, since {measured['missing']}")
    for name in DISTANCES:
        metrics = measured[name]
        log(f"{what} by {LONG_NAMES[name]} {over}: EER (%): {metrics['eer']:.2f}\t AUC: {metrics['auc']:.5f}\t "
            f"TPR (%) at FAR 0.001: {metrics['tpr_at_far_1e-3']:.2f}\t Recall@1 (%): {metrics['recall_at_1']:.2f}")


def is_best(validated: dict, history: Sequence[dict], save_dir: str) -> bool:
    """Whether the validation accuracy is above that of all earlier epochs, or equal with a lower cross-entropy.

    Earlier epochs do not count if best.pt is missing, as where a checkpoint was moved without it.
    """
    if not Path(save_dir, "best.pt").exists():
        return True
    earlier = [(row["val_accuracy"], -row["val_xent"]) for row in history if row["val_accuracy"] is not None]
    return (validated["accuracy"], -validated["xent"]) > max(earlier, default=(-1.0, 0.0))


def load_best(model: nn.Module, save_dir: str) -> tuple[nn.Module, Tensor, int]:
    """The network, the centers and the epoch of best.pt; `model` itself stays as it is."""
    checkpoint, best = utils.load_checkpoint(Path(save_dir, "best.pt")), copy.deepcopy(model)
    best.load_state_dict(checkpoint["model"])
    return best, checkpoint["centers"].to(next(model.parameters()).device), checkpoint["epoch"]


def save_features(save_dir: Path, tested: dict, centers: Tensor, data: Data) -> None:
    """Writes features/test.npz: the test arrays of --save-features, class names and the images' paths."""
    names = dict(classes=np.array(data.classes))
    if data.test.paths:
        names["test_paths"] = np.array(data.test.paths)
    utils.save_features(save_dir / "features" / "test.npz", dict(test=tested), centers, **names)
