"""A trained network, without the data set that it was trained on.

python predict.py log/best.pt photos/ a.jpg              classes of images: predictions.csv
python predict.py log/best.pt photos/ --embed out.npz    their features
python predict.py log/best.pt a.jpg b.jpg --same         are two images of one class?

In Python, with this directory on sys.path:

from predict import load
network = load("log/best.pt")                       # its .centers (C, D) and .classes
features, logits = network(["a.jpg", "b.jpg"])      # (2, D), (2, C)
"""

import argparse
import csv
import json
import os
import runpy
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
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

COLUMNS = ["path", "class", "probability", "nearest_center", "distance", "error"]


class Trained:
    """A trained network in evaluation mode: image files to their features and logits.

    Attributes: `classes`, the names of the trained ones; `centers` (C, D); `size` (H, W) of the
    network's images; `mirror`, None or a mode of models.Mirrored.
    """

    def __init__(
        self,
        checkpoint: dict,
        device: str | torch.device = "cpu",
        mirror: bool | str | None = None,
    ):
        args = checkpoint["args"]
        data = checkpoint["data"]
        size = data["image_size"]
        channels = data["in_channels"]
        self.epoch = checkpoint["epoch"]
        self.classes = data["classes"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.amp = args["amp"]
        self.device = torch.device(device)
        self.model = models.create(
            args["model"], len(self.classes), channels, self.size, args["feat_dim"]
        )
        self.model.load_state_dict(checkpoint["model"])
        self.model.to(self.device, memory_format=torch.channels_last).eval()
        self._centers = checkpoint["centers"].to(self.device)
        self.mirror = args.get("mirror") if mirror is None else mirror
        scaling = args["scaling"]
        if args.get("pretrained"):
            scaling = models.pretrained_scaling(args["model"])
        moments = datasets.moments(datasets.SPECS[args["dataset"]], scaling, channels)
        self._normalise = datasets.Normalise(*moments, self.device)
        self._read = datasets.ReadImage(datasets.MODES[channels])
        self._crop = datasets.square(self.size[0])

    @property
    def centers(self) -> Tensor:
        return self._centers

    def __call__(self, paths: str | Path | Sequence[str | Path]) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, C) of image files. DatasetError if one cannot be read."""
        if isinstance(paths, str | os.PathLike):
            paths = [paths]
        return self.outputs(self.read(paths))

    def read(self, paths: Sequence[str | Path]) -> Tensor:
        """The network's input (N, C, H, W): the images resized, cropped and normalised."""
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(self.decode, paths))
        return self.normalise(images)

    def decode(self, path: str | Path) -> Tensor:
        """An image file, uint8 (C, H, W)."""
        return self._crop(self._read(str(path)))

    def normalise(self, images: Sequence[Tensor]) -> Tensor:
        return self._normalise(torch.stack(list(images)).to(self.device))

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of the network's input."""
        model = models.Mirrored(self.model) if self.mirror else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return model(images)


def load(
    path: str | Path, device: str | torch.device = "cpu", mirror: bool | str | None = None
) -> Trained:
    """The network of a checkpoint, which needs no data set. RunError if it is none of main.py's.

    `mirror`: True, for the means over images and their mirror images, or False; None: as the run
    did in its tests.

    Features are as the network gives them: their scale is what the training made of it. Within the
    trained classes compare them by L2 distance, which center loss trains; for other classes see
    evaluation.json, which has the error rates and thresholds of L2 distance and of the cosine.
    """
    checkpoint = utils.load_checkpoint(path)
    try:
        return Trained(checkpoint, device, mirror)
    except Exception as error:  # whatever an entry that is missing or of another kind raises
        reason = str(error).strip().partition("\n")[0]
        raise utils.RunError(
            f"{path} is not a checkpoint that main.py wrote, or one of an older version: "
            f"{type(error).__name__}: {reason}"
        ) from error


class Batch(NamedTuple):
    """Some images: outputs of those that could be read, and why the others could not."""

    paths: list[str]
    features: Tensor  # (N, D)
    logits: Tensor  # (N, C)
    errors: dict[str, str]  # by path


def in_batches(network: Trained, paths: Sequence[str], batch_size: int) -> Iterator[Batch]:
    """The outputs of a network for image files, of which some may be unreadable."""

    def decode(path: str) -> Tensor | str:
        try:
            return network.decode(path)
        except datasets.DatasetError as error:
            return str(error)

    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        with ThreadPoolExecutor() as pool:
            decoded = dict(zip(batch, pool.map(decode, batch), strict=True))
        errors = {path: image for path, image in decoded.items() if isinstance(image, str)}
        images = {path: image for path, image in decoded.items() if path not in errors}
        width = network.centers.shape[1]
        outputs = torch.empty(0, width), torch.empty(0, len(network.classes))
        if images:
            outputs = network.outputs(network.normalise(list(images.values())))
        yield Batch(list(images), *outputs, errors)


def predictions(network: Trained, batch: Batch) -> list[dict]:
    """For each image its path, class, the probability of it, the nearest center and the distance.

    Images that could not be read come last, with the reason as "error".
    """
    probabilities, labels = batch.logits.softmax(1).max(1)
    distances, nearest = pairwise(batch.features, network.centers, "euclidean").min(1)
    rows = []
    for number, path in enumerate(batch.paths):
        rows.append(
            {
                "path": path,
                "class": network.classes[labels[number]],
                "probability": round(probabilities[number].item(), 6),
                "nearest_center": network.classes[nearest[number]],
                "distance": round(distances[number].item(), 6),
            }
        )
    return rows + [{"path": path, "error": error} for path, error in batch.errors.items()]


def find_images(roots: Sequence[str]) -> list[str]:
    """The files among `roots`, and all images below the directories, but for hidden ones.

    RunError if one of them is missing or holds none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths = []
    for root in roots:
        if not os.path.exists(root):
            raise utils.RunError(f"PATH must be an image or a directory, got {root or 'none'}")
        if not os.path.isdir(root):
            paths.append(root)
            continue
        found = []
        for base, directories, files in os.walk(root):
            directories[:] = [name for name in directories if not name.startswith(".")]
            names = [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]
            found += [os.path.join(base, name) for name in names if not name.startswith(".")]
        if not found:
            raise utils.RunError(f"a directory must hold images, but {root} holds none")
        paths += sorted(found)
    return list(dict.fromkeys(paths))


def write_predictions(network: Trained, paths: Sequence[str], args: argparse.Namespace) -> int:
    """Writes predictions.csv and prints a summary; the exit status."""
    target = Path(args.save_dir or Path(args.checkpoint).parent, "predictions.csv")
    check_replaceable(target)
    rows = []
    for batch in in_batches(network, paths, args.batch_size):
        rows += predictions(network, batch)
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(part: Path) -> None:
        with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({name: cell(value) for name, value in row.items()})

    utils.replace_file(target, write)
    read = [row for row in rows if "error" not in row]
    counts = Counter(row["class"] for row in read).most_common()
    unsure = sum(row["probability"] < 0.5 for row in read)
    apart = sum(row["class"] != row["nearest_center"] for row in read)
    print(f"{len(read)} images: " + ", ".join(f"{name} {count}" for name, count in counts))
    print(f"Probability below 0.5: {unsure}\t Nearest center of another class: {apart}")
    print(f"Predictions: {target}")
    return report_errors({row["path"]: row["error"] for row in rows if "error" in row})


def check_replaceable(target: Path) -> None:
    """RunError if the file is not of predict.py."""
    first = utils.read_start(target, 200).decode(errors="replace").partition("\n")[0]
    if first and not first.startswith(",".join(COLUMNS[:-1])):
        raise utils.RunError(f"{target} is not of predict.py: give another --save-dir")


def cell(value: object) -> object:
    """A value of a table that no spreadsheet takes for a formula."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value


def report_errors(errors: dict[str, str]) -> int:
    """Prints how many images could not be read; the exit status."""
    if errors:
        first = next(iter(errors.values()))
        print(f"{len(errors)} could not be read; the first: {first}", file=sys.stderr)
    return 1 if errors else 0


def write_features(network: Trained, paths: Sequence[str], args: argparse.Namespace) -> int:
    """Writes paths, features and, of a directory of classes, labels; the exit status."""
    read, features, errors = [], [], {}
    for batch in in_batches(network, paths, args.batch_size):
        read += batch.paths
        features.append(batch.features.float().cpu().numpy())
        errors.update(batch.errors)
    arrays = dict(paths=np.array(read), features=np.concatenate(features))
    names = [class_of(path, args.paths) for path in read]
    if all(names):
        arrays["classes"], arrays["labels"] = np.unique(names, return_inverse=True)
    utils.save_arrays(Path(args.embed), arrays)
    labelled = f" of {len(arrays['classes'])} classes" if "labels" in arrays else ""
    print(f"{len(read)} images{labelled}, {arrays['features'].shape[1]} dimensions: {args.embed}")
    return report_errors(errors)


def class_of(path: str, roots: Sequence[str]) -> str | None:
    """The directory of an image right below its root; None without one."""
    for root in roots:
        if os.path.isdir(root) and Path(path).is_relative_to(root):
            within = Path(path).relative_to(root).parts
            return within[0] if len(within) > 1 else None
    return None


def compare(network: Trained, args: argparse.Namespace) -> int:
    """Prints the distances of two images, and what the thresholds of evaluation.json say."""
    source = Path(args.checkpoint).with_name("evaluation.json")
    measured = read_thresholds(source, network.epoch)
    if measured and args.mirror is None:
        network.mirror = measured["mirror"]
    features = network(args.paths)[0].double()
    distance = (features[0] - features[1]).norm().item()
    similarity = F.cosine_similarity(features[0], features[1], dim=0).item()
    print(f"L2 distance: {distance:.4f}\t cosine: {similarity:.4f}")
    if not measured:
        print(f"no thresholds: python main.py --evaluate {args.checkpoint} measures them")
        return 0
    print(f"Thresholds of {source}, {measured['of']}:")
    verdicts = {"l2": lambda limit: distance <= limit, "cosine": lambda limit: similarity >= limit}
    for name, is_same in verdicts.items():
        said = []
        for metric, limit in measured["values"][name].items():
            if metric.startswith("threshold_at") and limit is not None:
                at = metric.removeprefix("threshold_at_").replace("_", " ").upper()
                verdict = "same" if is_same(limit) else "different"
                said.append(f"{verdict} at {at} ({limit:.4f})")
        print(f"by {name}: " + ", ".join(said))
    return 0


def read_thresholds(path: Path, epoch: int) -> dict | None:
    """What evaluation.json has of pairs, of unknown or else of trained classes; None if nothing.

    RunError if it is of another epoch than the network.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        places = {
            "of the pairs": found.get("pairs", {}),
            "of classes that were not trained": found.get("unknown", {}).get("verification", {}),
            "of the trained classes": found.get("verification", {}),
        }
        if found["epoch"] != epoch:
            raise utils.RunError(f"{path} is of epoch {found['epoch']}, the network of {epoch}")
        for of, values in places.items():
            if "l2" in values:
                return dict(of=of, values=values, mirror=found["mirror"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise utils.RunError(f"{path} is not an evaluation.json of main.py") from error
    return None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of main.py: best.pt or checkpoint.pt")
    add("paths", metavar="PATH", nargs="+", help="image, or directory of images")
    add("--save-dir", help="directory of predictions.csv (default: that of the checkpoint)")
    add("--embed", metavar="FILE.npz", help="write features instead of predictions")
    add("--same", action="store_true", help="compare two images instead of predicting classes")
    add("--batch-size", type=int, default=128, help="images at a time (default: 128)")
    add(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="take the means over images and mirror images (default: as the run did)",
    )
    add("--gpu", type=int, default=0, help="index of the GPU (default: 0)")
    add("--use-cpu", action="store_true", help="use the CPU, as happens without a GPU")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.save_dir == "" or args.embed == "":
        parser.error("--save-dir and --embed must be paths, got an empty one")
    if args.same and (len(args.paths) != 2 or not all(map(os.path.isfile, args.paths))):
        parser.error(f"--same must have two image files, got {' '.join(args.paths)}")
    if args.embed and args.same:
        parser.error("--embed and --same do different things: give one of them")
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if gpus and not 0 <= args.gpu < gpus:
        parser.error(f"--gpu must be below {gpus}, the number of GPUs here, got {args.gpu}")
    args.device = torch.device("cuda", args.gpu) if gpus else torch.device("cpu")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status: 1 if some images could not be read."""
    args = parse_args(argv)
    try:
        network = load(args.checkpoint, args.device, args.mirror)
        if args.same:
            return compare(network, args)
        paths = find_images(args.paths)
        if args.embed:
            return write_features(network, paths, args)
        return write_predictions(network, paths, args)
    except (utils.RunError, datasets.DatasetError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt:
        print("predict.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
