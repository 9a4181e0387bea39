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
import io
import os
import runpy
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

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
    from engine.images import (
        MODES,
        DatasetError,
        ReadImage,
        find_images,
        height_and_width,
        one_line,
    )

COLUMNS = ["path", "class", "probability", "nearest_center", "distance", "error"]
PIXELS = 1_000_000  # of the images that the network takes at once


class Trained:
    """A trained network in evaluation mode: image files to their features and logits.

    `classes` are the names of those trained, `centers` (C, D) theirs; read(path) gives an image of
    the network's `size` (H, W), uint8 (C, H, W).
    """

    def __init__(self, checkpoint: dict, device: str | torch.device, mirror: bool | str | None):
        args = checkpoint["args"]
        data = checkpoint["data"]
        channels = data["in_channels"]
        self.classes = data["classes"]
        self.size = height_and_width(data["image_size"])
        self.amp = args["amp"]
        self.device = torch.device(device)
        shape = (len(self.classes), channels, self.size, args["feat_dim"])
        self.model = models.create(args["model"], *shape)
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

    def scale(self, images: Sequence[Tensor]) -> Tensor:
        """The network's input (N, C, H, W), from images that have been read."""
        return self._normalise(torch.stack(list(images)).to(self.device))

    @torch.no_grad()
    def __call__(
        self, paths: str | Path | Sequence[str | Path], errors: dict[str, str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, C) of image files.

        DatasetError if one cannot be read; or else `errors` gets the reason, by path.
        """
        paths = [paths] if isinstance(paths, str | os.PathLike) else paths
        count = max(1, PIXELS // (self.size[0] * self.size[1]))
        features = [self.centers[:0]]
        logits = [self.centers.new_empty(0, len(self.classes))]
        read = partial(self._read, errors=errors)
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), count):
                images = list(filter(torch.is_tensor, pool.map(read, paths[start : start + count])))
                if images:
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                        found = self.net(self.scale(images))
                    features.append(found[0])
                    logits.append(found[1])
        return torch.cat(features), torch.cat(logits)

    def _read(self, path: str | Path, errors: dict[str, str] | None) -> Tensor | None:
        try:
            return self.read(path)
        except DatasetError as error:
            if errors is None:
                raise
            errors[str(path)] = str(error)


def load(
    path: str | Path, device: str | torch.device = "cpu", mirror: bool | str | None = None
) -> Trained:
    """The network of a checkpoint, which needs no data set. RunError if it is none of main.py's.

    `mirror`: True or "mean" for the means over images and their mirror images, "concat" for both
    features side by side, False for neither; None: as the run did in its tests.

    Features are of no fixed scale. Center loss makes L2 distances small within the trained classes;
    for others evaluation.json has the error rates of L2 and cosine, from which to choose.
    """
    checkpoint = utils.load_checkpoint(path)
    try:
        return Trained(checkpoint, device, mirror)
    except Exception as error:  # whatever an entry that is missing or of another kind raises
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise utils.RunError(f"{path} is no whole checkpoint of main.py: {reason}") from error


def image_paths(roots: Sequence[str]) -> list[str]:
    """The files among `roots`, and the images below the directories."""
    paths = []
    for root in roots:
        found = [root]
        if os.path.isdir(root):
            found = find_images(Path(root), levels=0)[0].get("", [])
        if not found or not os.path.exists(root):
            raise utils.RunError(f"there is no image {root}")
        paths += found
    return paths


def predictions(
    network: Trained, paths: Sequence[str], features: Tensor, logits: Tensor
) -> list[list[str]]:
    """Rows of predictions.csv."""
    probabilities, labels = logits.softmax(1).max(1)
    distances, nearest = pairwise(features, network.centers, "euclidean").min(1)
    columns = [each.tolist() for each in (labels, probabilities, nearest, distances)]
    rows = []
    for path, label, probability, center, distance in zip(paths, *columns, strict=True):
        names = network.classes[label], network.classes[center]
        rows.append([path, names[0], f"{probability:.6f}", names[1], f"{distance:.6f}", ""])
    return rows


def write_predictions(rows: Sequence[Sequence[str]], target: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    for row in [COLUMNS, *rows]:
        writer.writerow(map(utils.spreadsheet_text, row))
    written = table.getvalue().encode(errors="surrogateescape")
    if not (target.parent / utils.FILES).exists():
        utils.start_list(target.parent)
    utils.replace_file(target, lambda part: part.write_bytes(written))


def write_features(
    paths: Sequence[str], features: Tensor, roots: Sequence[str], target: Path
) -> None:
    """Writes paths, features and, of a directory of directories, these as classes and labels."""
    arrays = dict(paths=np.array(paths), features=features.float().cpu().numpy())
    names = [os.path.relpath(path, roots[0]).split(os.sep)[0] for path in paths]
    if len(roots) == 1 and all(os.path.isdir(os.path.join(roots[0], name)) for name in names):
        arrays["classes"], arrays["labels"] = np.unique(names, return_inverse=True)
    utils.save_arrays(target, arrays)
    print(f"{len(paths)} images\nFeatures: {target}")


def compare(args: argparse.Namespace, paths: Sequence[str]) -> None:
    """Prints the distances of two images, and what the thresholds of evaluation.json say."""
    if len(paths) != 2:
        raise utils.RunError(f"--same must have two images, got {len(paths)}")
    source = Path(args.checkpoint).with_name("evaluation.json")
    measured = utils.read_json(source)
    mirror = measured.get("mirror") if args.mirror is None else args.mirror
    first, second = load(args.checkpoint, args.device, mirror)(paths)[0].double()
    l2 = (first - second).norm().item()
    cosine = F.cosine_similarity(first, second, dim=0).item()
    print(f"L2 distance: {l2:.4f}\t cosine: {cosine:.4f}")
    places = {  # the first that was measured counts
        "pairs": measured.get("pairs", {}),
        "unknown classes": measured.get("unknown", {}).get("verification", {}),
        "trained classes": measured.get("verification", {}),
    }
    place = next((name for name, values in places.items() if "l2" in values), None)
    if place is None:
        print(f"no thresholds in {source}: main.py --evaluate {args.checkpoint} measures them")
        return
    print(f"By the thresholds of the {place} in {source}:")
    for name in ("l2", "cosine"):
        for metric, limit in places[place][name].items():
            if metric.startswith("threshold_at") and limit is not None:
                same = l2 <= limit if name == "l2" else cosine >= limit
                print(f"{name}, {metric} {limit:.4f}: {'the same' if same else 'different'}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("predict.py", description=__doc__, formatter_class=style)
    parser.error = lambda message: parser.exit(2, f"predict.py: error: {message}\n")
    add = parser.add_argument
    add("checkpoint", type=utils.path, help="of main.py: best.pt or checkpoint.pt")
    add("paths", type=utils.path, nargs="+", help="images, and directories of images")
    add("--save-dir", type=utils.path, help="of predictions.csv (default: that of the checkpoint)")
    add("--overwrite", action="store_true", help="also replace a file of somebody else's")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead(
        "--embed", metavar="FILE.npz", type=utils.path, help="write features instead of classes"
    )
    instead("--same", action="store_true", help="compare two images instead")
    switch = argparse.BooleanOptionalAction
    add("--mirror", action=switch, help="means with mirror images (default: as in the run)")
    add("--use-cpu", action="store_true", help="use the CPU, as happens without a GPU")
    args = parser.parse_args(argv)
    args.device = choose_device(0, args.use_cpu)
    return args


def run(args: argparse.Namespace) -> int:
    """The exit status, 1 if some images could not be read."""
    paths = image_paths(args.paths)
    if args.same:
        compare(args, paths)
        return 0
    directory = args.save_dir or os.path.dirname(args.checkpoint)
    target = Path(args.embed or os.path.join(directory, "predictions.csv"))
    if not args.overwrite and target.exists() and target.name not in utils.recorded(target.parent):
        raise utils.RunError(f"{target} is somebody else's: --overwrite replaces it")
    network = load(args.checkpoint, args.device, args.mirror)
    errors = {}
    features, logits = network(paths, errors)
    whole = [each for each in paths if each not in errors]
    if args.embed:
        write_features(whole, features, args.paths, target)
    else:
        rows = predictions(network, whole, features, logits)
        unreadable = [[each, "", "", "", "", error] for each, error in errors.items()]
        write_predictions(rows + unreadable, target)
        counts = Counter(row[1] for row in rows).most_common()
        print(f"{len(rows)} images: " + ", ".join(f"{name} {count}" for name, count in counts))
        print(f"Predictions: {target}")
    if not errors:
        return 0
    first = next(iter(errors.values()))
    print(f"{len(errors)} could not be read; the first: {first}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    utils.prepare_output()
    args = parse_args(argv)
    try:
        return run(args)
    except OSError as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 1
    except (utils.RunError, DatasetError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
