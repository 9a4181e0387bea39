"""What main.py --evaluate and --verify measure, log and write."""

import argparse
from pathlib import Path

import numpy as np
from torch import Tensor

import plots
import utils
from datasets import Data
from engine import evaluation
from engine.metrics import FARS


def report(
    args: argparse.Namespace,
    data: Data,
    splits: dict[str, dict],
    centers: Tensor,
    epoch: int,
    log: utils.Log,
) -> None:
    """Writes evaluation.json, for --plot its pictures, and features for --save-features."""
    directory = Path(args.save_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / utils.FILES).touch()
    measured, curves = evaluation.measure(
        splits, centers, data.classes, data.unseen, confusion=bool(args.evaluate)
    )
    for line in evaluation.lines(measured):
        log(line)
    facts = dict(epoch=epoch, mirror=bool(args.mirror))
    utils.write_json(directory / "evaluation.json", measured | facts)
    if args.plot and curves:
        draw(directory / "roc.png", log, plots.draw_roc, FARS, curves)
    if args.plot and args.evaluate and "test" in splits:
        title = f"test: accuracy {splits['test']['accuracy']:.2f} %"
        counts = np.array(measured["confusion"])
        draw(directory / "confusion.png", log, plots.draw_confusion, counts, data.classes, title)
    if args.evaluate and args.save_features:
        save_features(directory, data, splits, centers)


def draw(path: Path, log: utils.Log, function, *arguments) -> None:
    for warning in plots.draw_to(path, function, *arguments):
        log(warning)


def save_features(directory: Path, data: Data, splits: dict[str, dict], centers: Tensor) -> None:
    """features/test.npz: arrays of --save-features, class names, and the paths of image files."""
    names = dict(classes=np.array(data.classes), unseen=np.array(data.unseen))
    for name in splits:
        paths = getattr(data, name).paths
        if paths:
            names[f"{name}_paths"] = np.array(paths)
    utils.save_features(directory / "features" / "test.npz", splits, centers, **names)
