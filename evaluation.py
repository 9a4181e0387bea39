"""What is measured of a trained network beyond its accuracy, and what is done with it.

Verification: do two images show the same class? The distance of their features decides. And how well do distances and
probabilities tell images of unknown classes from those of the trained ones? After the training: the best epoch, the
features of the test images, and predictions for other images.

network = evaluation.load("log/checkpoint.pt")      # its .centers (C, D) and .classes
features, logits = network(["a.jpg", "b.jpg"])      # (2, D), (2, C)
"""

import argparse
import copy
import csv
import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datasets
import models
import plots
import utils
from datasets import Data

MAX_IMAGES = 20_000  # whose pairs, 200 million, take 0.8 GB
BLOCK = 4_000_000  # distances that are computed at once
FARS = [10 ** (exponent / 50) for exponent in range(-300, 1)]  # of a curve

# What is done to features before their Euclidean distance is taken: that of normalised ones ranks as the cosine does.
DISTANCES = {"l2": lambda features: features - features.mean(0), "cosine": F.normalize}
LONG_NAMES = {"l2": "L2 distance", "cosine": "cosine"}


class Roc:
    """Two sorted arrays of distances, told apart by a threshold: what is at most as far is accepted.

    Exact, ties included, and without the arrays of a whole ROC curve.
    """

    def __init__(self, genuine: np.ndarray, impostor: np.ndarray):
        self.genuine, self.impostor = genuine, impostor

    def auc(self) -> float:
        """Area under the curve: the share of (genuine, impostor) in which the genuine one is nearer; equal: half."""
        below = 0
        for some in np.array_split(self.genuine, max(len(self.genuine) // BLOCK, 1)):
            below += sum(int(np.searchsorted(self.impostor, some, side).sum()) for side in ("left", "right"))
        return 1 - below / (2 * len(self.genuine) * len(self.impostor))

    def tpr(self, far: float) -> float:
        """The largest share of genuine ones accepted while at most the share `far` of impostors is."""
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
    """The distances of all pairs of features (N, D), and recall@1: the share whose nearest other has their label."""
    count, each = len(labels), labels.bincount()
    same = int((each * (each - 1) // 2).sum())
    distances = np.empty(same, np.float32), np.empty(math.comb(count, 2) - same, np.float32)
    filled, hits, norms = [0, 0], 0, features.square().sum(1)
    for start in range(0, count, step := max(BLOCK // count, 1)):
        rows = slice(start, start + step)
        sums = norms[rows, None] + norms
        squares = torch.addmm(sums, features[rows], features.T, alpha=-2)  # in float64, which has digits enough
        squares[squares < 1e-14 * sums] = 0  # closer than the network's float32 resolves
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
    at each of FARS. Of more than MAX_IMAGES as many are drawn, always the same. Where there are no pairs to tell apart,
    it returns the reason, as "missing", and no curves.
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
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cat([torch.cdist(x, centers, compute_mode=exact).amin(1) for x in split["features"].split(4096)])

    def doubt(split: dict) -> Tensor:  # in float64, as float32 would round probabilities near 1 to 1
        return -split["logits"].double().log_softmax(1).amax(1)

    def auroc(score) -> float:
        return Roc(*(np.sort(score(split).cpu().numpy()) for split in (known, unknown))).auc()

    return dict(auroc_distance=auroc(distance), auroc_softmax=auroc(doubt))


def confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> list[list[int]]:
    """The counts of images by true class (rows) and predicted class (columns)."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, -1).tolist()


def report(splits: dict[str, dict], centers: Tensor, epoch: int, data: Data, args, log: utils.Log) -> None:
    """Logs verification, how unknown classes are found and, for --evaluate, the confusion matrix.

    Writes evaluation.json and, for --plot, roc.png and confusion.png to --save-dir.
    """
    directory, tested, unknown = Path(args.save_dir), splits["test"], splits.get("unknown")
    metrics = ("xent", "accuracy", "nearest_center_accuracy", "intra_distance", "inter_distance")
    measured = dict(epoch=epoch, classes=data.classes, images=len(tested["labels"]))
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
        log("\n".join(utils.confusion_lines(counts, data.classes)))
        title = f"test: accuracy {tested['accuracy']:.2f} %"
        pictures["confusion.png"] = (plots.draw_confusion, np.array(counts), data.classes, title)
    directory.mkdir(parents=True, exist_ok=True)
    utils.write_json(directory / "evaluation.json", measured)
    for name, (draw, *arguments) in pictures.items() if args.plot else ():
        for warning in plots.draw_to(directory / name, draw, *arguments):
            log(warning)


def log_verification(what: str, measured: dict, log: utils.Log) -> None:
    drawn = f" of {measured['drawn_from']:,}, drawn with seed 0" if measured["images"] < measured["drawn_from"] else ""
    over = f"({measured['images']:,} images{drawn}; {measured['pairs']:,} pairs)"
    if "missing" in measured:
        log(f"{what} {over}: not measured, since {measured['missing']}")
    for name in [name for name in DISTANCES if name in measured]:
        metrics = measured[name]
        log(f"{what} by {LONG_NAMES[name]} {over}: EER (%): {metrics['eer']:.2f}\t AUC: {metrics['auc']:.5f}\t "
            f"TPR (%) at FAR 0.001: {metrics['tpr_at_far_1e-3']:.2f}\t Recall@1 (%): {metrics['recall_at_1']:.2f}")


def is_best(validated: dict, history: Sequence[dict], save_dir: str) -> bool:
    """Whether no earlier epoch has a higher validation accuracy, or the same with a lower cross-entropy.

    Earlier epochs do not count where their best.pt has not come along with the checkpoint.
    """
    earlier = [(row["val_accuracy"], -row["val_xent"]) for row in history if row["val_accuracy"] is not None]
    if not Path(save_dir, "best.pt").exists():
        return True
    return (validated["accuracy"], -validated["xent"]) > max(earlier, default=(-1.0, 0.0))


def load_best(model: nn.Module, save_dir: str) -> tuple[nn.Module, Tensor, int]:
    """The network, the centers and the epoch of best.pt; `model` itself stays as it is."""
    checkpoint, best = utils.load_checkpoint(Path(save_dir, "best.pt")), copy.deepcopy(model)
    best.load_state_dict(checkpoint["model"])
    return best, checkpoint["centers"].to(next(model.parameters()).device), checkpoint["epoch"]


def save_features(save_dir: Path, tested: dict, centers: Tensor, data: Data) -> None:
    """Writes features/test.npz: what --save-features writes in training, the class names and the images' paths."""
    names = dict(classes=np.array(data.classes))
    if data.test.paths:
        names["test_paths"] = np.array(data.test.paths)
    utils.save_features(save_dir / "features" / "test.npz", dict(test=tested), centers, **names)


class Trained:
    """A trained network in evaluation mode; called with image files, gives their features and logits."""

    def __init__(self, checkpoint: dict, device: str | torch.device = "cpu"):
        args, data = checkpoint["args"], checkpoint["data"]
        self.classes, self.size, self.mode = data["classes"], data["image_size"], datasets.MODES[data["in_channels"]]
        self.amp, self.device = args["amp"], torch.device(device)
        self.model = models.create(args["model"], len(self.classes), data["in_channels"], self.size, args["feat_dim"])
        self.model.load_state_dict(checkpoint["model"])
        self.model.to(self.device, memory_format=torch.channels_last).eval()
        self.centers = checkpoint["centers"].to(self.device)  # (C, D)
        spec = datasets.SPECS[args["dataset"]]
        scaling = models.pretrained_scaling(args["model"]) if args.get("pretrained") else args["scaling"]
        self.normalise = datasets.Normalise(*datasets.moments(spec, scaling, data["in_channels"]), self.device)

    def read(self, paths: Sequence[str | Path]) -> Tensor:
        """The images as the network takes them, (N, C, H, W): in its channels, and resized and cropped to its size."""
        load, square = datasets.ReadImage(self.mode), datasets.square(self.size)
        with ThreadPoolExecutor() as pool:
            images = torch.stack(list(pool.map(lambda path: square(load(str(path))), paths)))
        return self.normalise(images.to(self.device))

    @torch.no_grad()
    def __call__(self, paths: Sequence[str | Path]) -> tuple[Tensor, Tensor]:
        """features (N, D) and logits (N, C) of image files."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(self.read(paths))


def load(path: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The network of a checkpoint, which needs no data set. Raises RunError where it is not a whole one of ours."""
    checkpoint = utils.load_checkpoint(path)
    if not {"in_channels", "image_size"} <= checkpoint["data"].keys():
        raise utils.RunError(f"the checkpoint {path} lacks the shape of its images, which a resumed run adds")
    return Trained(checkpoint, device)


def predict(args: argparse.Namespace, device: torch.device, log: utils.Log) -> None:
    """Writes predictions.csv for the images of --predict, and logs how many are of which class."""
    network, paths = load(args.evaluate, device), image_paths(args.predict)
    rows = list(predictions(network, paths, args.batch_size))
    target = Path(args.save_dir, "predictions.csv")
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(part: Path) -> None:
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    utils.replace_file(target, write)
    counts = Counter(row["class"] for row in rows).most_common()
    log(f"{len(rows)} images: " + ", ".join(f"{name} {count}" for name, count in counts))
    unsure = sum(row["probability"] < 0.5 for row in rows)
    apart = sum(row["class"] != row["nearest_center"] for row in rows)
    log(f"Probability below 0.5: {unsure}\t Nearest center of another class: {apart}")
    log(f"Predictions: {target}")


def image_paths(roots: Sequence[str]) -> list[str]:
    """The files among `roots`, and all images below the directories among them. RunError where there are none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths = []
    for root in roots:
        if not os.path.exists(root):
            raise utils.RunError(f"--predict must name images and directories, but there is no {root}")
        found = sorted(os.path.join(base, file) for base, _, files in os.walk(root, followlinks=True) for file in files)
        found = [path for path in found if path.lower().endswith(IMG_EXTENSIONS)] if os.path.isdir(root) else [root]
        if not found:
            raise utils.RunError(f"--predict must name images and directories of images, but {root} holds none")
        paths += found
    return paths


def predictions(network: Trained, paths: Sequence[str], batch_size: int) -> Iterator[dict]:
    """For each image its path, class, the probability of that, the nearest center's class and the distance from it."""
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        features, logits = network(batch)
        probabilities, classes = logits.softmax(1).max(1)
        distances, nearest = torch.cdist(features, network.centers).min(1)
        for path, *values in zip(batch, *(each.tolist() for each in (classes, probabilities, nearest, distances)),
                                 strict=True):  # fmt: skip
            label, probability, center, distance = values
            yield {"path": path, "class": network.classes[label], "probability": round(probability, 6),
                   "nearest_center": network.classes[center], "distance": round(distance, 6)}  # fmt: skip
