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
from tools.run_files import RunFiles


def report(
    args: argparse.Namespace,
    data: Data,
    splits: dict[str, dict],
    centers: Tensor,
    epoch: int,
    log: utils.Log,
    files: RunFiles,
) -> None:
    """Writes evaluation.json, for --plot its pictures, and features for --save-features."""
    evaluate = bool(args.evaluate)
    if evaluate:
        utils.start_list(files.directory)
    measured, curves = evaluation.measure(
        splits, centers, data.classes, data.unseen, confusion=evaluate
    )
    for line in evaluation.lines(measured):
        log(line)
    facts = dict(epoch=epoch, mirror=bool(args.mirror))
    write_measured(args, measured | facts, curves, files)
    if evaluate and args.plot and "test" in splits:
        title = f"test: accuracy {splits['test']['accuracy']:.2f} %"
        counts = np.array(measured["confusion"])
        drawing = (plots.draw_confusion, counts, data.classes, title)
        files.write(plots.draw_to, "confusion.png", *drawing)
    if evaluate and args.save_features:
        names = dict(classes=np.array(data.classes), unseen=np.array(data.unseen))
        for name in splits:
            paths = getattr(data, name).paths
            if paths:
                names[f"{name}_paths"] = np.array(paths)
        files.write(save_features, "features/test.npz", splits, centers, names)


def write_measured(
    args: argparse.Namespace, measured: dict, curves: dict[str, list[float]], files: RunFiles
) -> None:
    """evaluation.json and roc.png."""
    files.write(utils.write_json, "evaluation.json", measured)
    if args.plot and curves:
        files.write(plots.draw_to, "roc.png", plots.draw_roc, FARS, curves)


def save_features(path: Path, splits: dict[str, dict], centers: Tensor, names: dict) -> None:
    """The arrays of --save-features, class names, and the paths of image files."""
    utils.save_features(path, splits, centers, **names)
