"""A trained network, without the data set that it was trained on: features, logits and predictions of image files.

network = prediction.load("log/checkpoint.pt")      # its .centers (C, D) and .classes
features, logits = network(["a.jpg", "b.jpg"])      # (2, D), (2, C)
"""

import argparse
import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import datasets
import models
import utils
from center_loss import pairwise


class Trained:
    """A trained network in evaluation mode; called with image files, it returns their features and logits."""

    def __init__(
        self, checkpoint: dict, device: str | torch.device = "cpu", mirror: bool | None = None
    ):
        args, data = checkpoint["args"], checkpoint["data"]
        self.classes, self.size, self.mode = (
            data["classes"],
            data["image_size"],
            datasets.MODES[data["in_channels"]],
        )
        self.amp, self.device = args["amp"], torch.device(device)
        self.model = models.create(
            args["model"], len(self.classes), data["in_channels"], self.size, args["feat_dim"]
        )
        self.model.load_state_dict(checkpoint["model"])
        self.mirror = args.get("mirror", False) if mirror is None else mirror
        self.model.to(self.device, memory_format=torch.channels_last).eval()
        self.centers = checkpoint["centers"].to(self.device)  # (C, D)
        spec = datasets.SPECS[args["dataset"]]
        scaling = (
            models.pretrained_scaling(args["model"]) if args.get("pretrained") else args["scaling"]
        )
        self.normalise = datasets.Normalise(
            *datasets.moments(spec, scaling, data["in_channels"]), self.device
        )

    def read(self, paths: Sequence[str | Path]) -> Tensor:
        """The network's input (N, C, H, W): images in its channels, resized and cropped to its size, normalised."""
        load, square = datasets.ReadImage(self.mode), datasets.square(self.size)
        with ThreadPoolExecutor() as pool:
            images = torch.stack(list(pool.map(lambda path: square(load(str(path))), paths)))
        return self.normalise(images.to(self.device))

    @torch.no_grad()
    def __call__(self, paths: Sequence[str | Path]) -> tuple[Tensor, Tensor]:
        """features (N, D) and logits (N, C) of image files."""
        model = models.Mirrored(self.model) if self.mirror else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return model(self.read(paths))


def load(
    path: str | Path, device: str | torch.device = "cpu", mirror: bool | None = None
) -> Trained:
    """The network of a checkpoint, which needs no data set. Raises RunError if it is damaged or not one of main.py.

    `mirror`: return the means over images and their mirror images; None: as the run did in its tests.
    """
    checkpoint = utils.load_checkpoint(path)
    if not {"in_channels", "image_size"} <= checkpoint["data"].keys():
        raise utils.RunError(
            f"the checkpoint {path} lacks the shape of its images, which a resumed run adds"
        )
    return Trained(checkpoint, device, mirror)


def predict(args: argparse.Namespace, device: torch.device, log: utils.Log) -> None:
    """Writes predictions.csv for the images of --predict, and logs how many are of which class."""
    network, paths = load(args.evaluate, device, args.mirror), image_paths(args.predict)
    rows = list(predictions(network, paths, args.batch_size))
    target = Path(args.save_dir, "predictions.csv")
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(part: Path) -> None:
        with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
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
    """The files among `roots`, and all images below the directories among them. RunError if there are none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths = []
    for root in roots:
        if not os.path.exists(root):
            raise utils.RunError(
                f"--predict must name images and directories, but there is no {root or 'empty path'}"
            )
        found = sorted(
            os.path.join(base, file) for base, _, files in os.walk(root) for file in files
        )
        found = (
            [path for path in found if path.lower().endswith(IMG_EXTENSIONS)]
            if os.path.isdir(root)
            else [root]
        )
        if not found:
            raise utils.RunError(
                f"--predict must name images and directories of images, but {root} holds none"
            )
        paths += found
    return paths


def predictions(network: Trained, paths: Sequence[str], batch_size: int) -> Iterator[dict]:
    """For each image its path, class, the probability of that, the nearest center's class and the distance from it."""
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        features, logits = network(batch)
        probabilities, classes = logits.softmax(1).max(1)
        distances, nearest = pairwise(features, network.centers, "euclidean").min(1)
        values = (each.tolist() for each in (classes, probabilities, nearest, distances))
        for path, label, probability, center, distance in zip(batch, *values, strict=True):
            yield {
                "path": path,
                "class": network.classes[label],
                "probability": round(probability, 6),
                "nearest_center": network.classes[center],
                "distance": round(distance, 6),
            }
