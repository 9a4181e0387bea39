"""A trained network, without the data set that it was trained on.

python predict.py log/best.pt photos/ a.jpg              classes of images: predictions.csv
python predict.py log/best.pt people/ --embed out.npz    their features
python predict.py log/best.pt a.jpg b.jpg --same         are two images of one class?

from predict import load                            # with this directory on sys.path
network = load("log/best.pt")                       # its .centers (C, D) and .classes
features, logits = network(["a.jpg", "b.jpg"])      # (2, D), (2, C)
"""

import argparse
import csv
import os
import runpy
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

own_modules = runpy.run_path(str(Path(__file__).with_name("engine") / "own.py"))["own_modules"]
with own_modules():  # others may have modules of these names
    import datasets
    import models
    import utils
    from center_loss import pairwise
    from engine.device import choose_device
    from engine.images import MODES, DatasetError, ReadImage, find_images

COLUMNS = ["path", "class", "probability", "nearest_center", "distance", "error"]


class Outputs(NamedTuple):
    """What a network makes of image files, of which some may be unreadable."""

    paths: list[str]  # of those that could be read
    features: Tensor  # (N, D)
    logits: Tensor  # (N, C)
    errors: dict[str, str]  # why others could not, by path


class Trained:
    """A trained network in evaluation mode: image files to their features and logits.

    Attributes: `classes`, the names of those trained; their `centers` (C, D); `size` (H, W) of the
    network's images; read(path), an image of that size, uint8 (C, H, W).
    """

    def __init__(self, checkpoint: dict, device: str | torch.device, mirror: bool | str | None):
        args = checkpoint["args"]
        data = checkpoint["data"]
        channels = data["in_channels"]
        size = data["image_size"]
        self.classes = data["classes"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.amp = args["amp"]
        self.device = torch.device(device)
        self.model = models.create(
            args["model"], len(self.classes), channels, self.size, args["feat_dim"]
        )
        self.model.load_state_dict(checkpoint["model"])
        self.model.to(self.device, memory_format=torch.channels_last).eval()
        self.net = self.model
        self.centers = checkpoint["centers"].to(self.device)
        mirror = args.get("mirror") if mirror is None else mirror
        if mirror:
            self.net = models.Mirrored(self.model, "mean" if mirror is True else mirror)
            self.centers = self.net.centers(self.centers)
        scaling = args["scaling"]
        if args.get("pretrained"):
            scaling = models.pretrained_scaling(args["model"])
        moments = datasets.moments(datasets.SPECS[args["dataset"]], scaling, channels)
        self._normalise = datasets.Normalise(*moments, self.device)
        self.read = ReadImage(MODES[channels], self.size)

    def __call__(self, paths: str | Path | Sequence[str | Path]) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, C) of image files. DatasetError if one cannot be read."""
        found = self.outputs([paths] if isinstance(paths, str | os.PathLike) else paths)
        for error in found.errors.values():
            raise DatasetError(error)
        return found.features, found.logits

    def scale(self, images: Sequence[Tensor]) -> Tensor:
        """The network's input (N, C, H, W), from images that have been read."""
        return self._normalise(torch.stack(list(images)).to(self.device))

    @torch.no_grad()
    def outputs(self, paths: Sequence[str | Path], batch_size: int = 128) -> Outputs:
        """The same, but for files that cannot be read."""
        whole = []
        features = [self.centers[:0]]
        logits = [self.centers.new_empty(0, len(self.classes))]
        errors = {}
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), batch_size):
                batch = paths[start : start + batch_size]
                images = []
                for path, image in zip(batch, pool.map(self._read_or_say, batch), strict=True):
                    if isinstance(image, str):
                        errors[str(path)] = image
                    else:
                        whole.append(str(path))
                        images.append(image)
                if images:
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                        found = self.net(self.scale(images))
                    features.append(found[0])
                    logits.append(found[1])
        return Outputs(whole, torch.cat(features), torch.cat(logits), errors)

    def _read_or_say(self, path: str | Path) -> Tensor | str:
        try:
            return self.read(path)
        except DatasetError as error:
            return str(error)


def load(
    path: str | Path, device: str | torch.device = "cpu", mirror: bool | str | None = None
) -> Trained:
    """The network of a checkpoint, which needs no data set. RunError if it is none of main.py's.

    `mirror`: True or "mean" for the means over images and their mirror images, "concat" for both
    features side by side, False for neither; None: as the run did in its tests.

    Features are as the network gives them, of no fixed scale. Center loss makes L2 distances small
    within the trained classes; for other classes, or after F.normalize (cosine), evaluation.json
    has the error rates and thresholds of both, from which to choose.
    """
    checkpoint = utils.load_checkpoint(path)
    try:
        return Trained(checkpoint, device, mirror)
    except Exception as error:  # whatever an entry that is missing or of another kind raises
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise utils.RunError(f"{path} is no whole checkpoint of main.py: {reason}") from error


def predictions(network: Trained, outputs: Outputs) -> list[dict]:
    """A row of predictions.csv for each image that could be read."""
    probabilities, labels = outputs.logits.softmax(1).max(1)
    distances, nearest = pairwise(outputs.features, network.centers, "euclidean").min(1)
    columns = (labels, probabilities, nearest, distances)
    rows = []
    for path, *values in zip(outputs.paths, *(each.tolist() for each in columns), strict=True):
        label, probability, center, distance = values
        row = {"path": path, "class": network.classes[label], "probability": round(probability, 6)}
        rows.append(row)
        row["nearest_center"] = network.classes[center]
        row["distance"] = round(distance, 6)
    return rows


def image_paths(roots: Sequence[str]) -> list[str]:
    """The files among `roots`, and the images below the directories among them."""
    paths = []
    for root in roots:
        if not os.path.exists(root):
            raise utils.RunError(f"PATH must be an image or a directory, but there is no {root}")
        found = find_images(Path(root), levels=0).paths() if os.path.isdir(root) else [root]
        if not found:
            raise utils.RunError(f"PATH must be an image or a directory of them, got {root}")
        paths += found
    return paths


def write_predictions(network: Trained, outputs: Outputs, target: Path) -> None:
    """Writes predictions.csv, in which images that could not be read come last; and a summary."""
    rows = predictions(network, outputs)
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(part: Path) -> None:
        with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            unreadable = [dict(path=path, error=error) for path, error in outputs.errors.items()]
            for row in rows + unreadable:
                writer.writerow({name: utils.spreadsheet_text(str(row[name])) for name in row})

    utils.replace_file(target, write)
    counts = Counter(row["class"] for row in rows).most_common()
    unsure = sum(row["probability"] < 0.5 for row in rows)
    apart = sum(row["class"] != row["nearest_center"] for row in rows)
    print(f"{len(rows)} images: " + ", ".join(f"{name} {count}" for name, count in counts))
    print(f"Probability below 0.5: {unsure}\t Nearest center of another class: {apart}")
    print(f"Predictions: {target}")


def write_features(outputs: Outputs, roots: Sequence[str], target: Path) -> None:
    """Writes paths, features and, of a directory of directories, these as classes and labels."""
    arrays = dict(paths=np.array(outputs.paths), features=outputs.features.float().cpu().numpy())
    names = [Path(os.path.relpath(path, roots[0])).parts[0] for path in outputs.paths]
    if len(roots) == 1 and all(os.path.isdir(os.path.join(roots[0], name)) for name in names):
        arrays["classes"], arrays["labels"] = np.unique(names, return_inverse=True)
    utils.save_arrays(target, arrays)
    print(f"{target}: " + ", ".join(f"{name} {array.shape}" for name, array in arrays.items()))


def compare(args: argparse.Namespace) -> None:
    """Prints the distances of two images, and what the thresholds of evaluation.json say.

    These are of pairs or of unknown classes, where it has them, or else of the trained classes.
    """
    source = Path(args.checkpoint).with_name("evaluation.json")
    measured = utils.read_json(source)
    unknown = measured.get("unknown", {}).get("verification", {})
    places = {
        "the pairs": measured.get("pairs", {}),
        "the unknown classes": unknown,
        "the trained classes": measured.get("verification", {}),
    }
    mirror = measured.get("mirror") if args.mirror is None else args.mirror
    features = load(args.checkpoint, args.device, mirror)(args.paths)[0].double()
    distance = (features[0] - features[1]).norm().item()
    cosine = F.cosine_similarity(features[0], features[1], dim=0).item()
    print(f"L2 distance: {distance:.4f}\t cosine: {cosine:.4f}")
    found = [name for name, values in places.items() if "l2" in values]
    if not found:
        print(f"no thresholds in {source}: main.py --evaluate {args.checkpoint} measures them")
        return
    print(f"By the thresholds of {found[0]} in {source}:")
    for name in ("l2", "cosine"):
        for metric, limit in places[found[0]][name].items():
            if metric.startswith("threshold_at") and limit is not None:
                same = distance <= limit if name == "l2" else cosine >= limit
                at = metric.removeprefix("threshold_at_").replace("_", " ").upper()
                print(f"{name} at {at}, {limit:.4f}: {'the same' if same else 'different'}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"predict.py: error: {message}\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("predict.py", description=__doc__, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of main.py: best.pt or checkpoint.pt")
    add("paths", metavar="PATH", nargs="+", help="image, or directory of images")
    add("--save-dir", help="directory of predictions.csv (default: that of the checkpoint)")
    add("--embed", metavar="FILE.npz", help="write features instead of predictions")
    add("--same", action="store_true", help="compare two images instead of predicting classes")
    add("--batch-size", type=int, default=128, help="images at a time (default: 128)")
    switch = argparse.BooleanOptionalAction
    add("--mirror", action=switch, help="means with mirror images (default: as the run did)")
    add("--gpu", type=int, default=0, help="index of the GPU (default: 0)")
    add("--use-cpu", action="store_true", help="use the CPU, as happens without a GPU")
    args = parser.parse_args(argv)
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if "" in (args.checkpoint, args.save_dir, args.embed, *args.paths):
        parser.error("a path must not be empty")
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.same and (
        args.embed or len(args.paths) != 2 or not all(map(os.path.isfile, args.paths))
    ):
        parser.error(f"--same must have two image files alone, got {' '.join(args.paths)}")
    if gpus and not 0 <= args.gpu < gpus:
        parser.error(f"--gpu must be below {gpus}, the number of GPUs here, got {args.gpu}")
    args.device = choose_device(args.gpu, args.use_cpu)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status, 1 if some images could not be read."""
    args = parse_args(argv)
    try:
        if args.same:
            compare(args)
            return 0
        paths = image_paths(args.paths)
        network = load(args.checkpoint, args.device, args.mirror)
        outputs = network.outputs(paths, args.batch_size)
        if args.embed:
            write_features(outputs, args.paths, Path(args.embed))
        else:
            directory = args.save_dir or Path(args.checkpoint).parent
            write_predictions(network, outputs, Path(directory, "predictions.csv"))
    except (utils.RunError, DatasetError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt:
        return 130
    errors = list(outputs.errors.values())
    if errors:
        print(f"{len(errors)} could not be read; the first: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
