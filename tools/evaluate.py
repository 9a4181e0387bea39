"""What main.py --evaluate and --verify measure, log and write."""

import argparse

import numpy as np
import torch
from torch import Tensor

import plots
import predict
import recipes
import utils
from datasets import Data, read_pairs
from engine import evaluation
from engine.metrics import FARS
from engine.pairs import lines, pair_metrics
from engine.ranks import Ranks
from tools.run_files import RunFiles


def report(
    args: argparse.Namespace,
    data: Data,
    splits: dict[str, dict],
    centers: Tensor,
    epoch: int,
    files: RunFiles,
) -> None:
    """Writes evaluation.json, for --plot its pictures, and features for --save-features."""
    evaluate = bool(args.evaluate)
    measured, curves = evaluation.measure(
        splits, centers, data.classes, data.unseen, confusion=evaluate
    )
    files.log(*evaluation.lines(measured))
    write(measured | dict(epoch=epoch, mirror=bool(args.mirror)), curves, files)
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
        files.write(utils.save_features, "features/test.npz", splits, centers, names)


def test_pairs(args: argparse.Namespace) -> None:
    """Tests the pairs of images in the file --pairs with the network of --evaluate."""
    if Ranks.of_environment().rank > 0:
        return
    log = utils.Log()
    device = recipes.prepare_device(args, log)
    pairs = read_pairs(args.pairs, args.data_root)
    network = predict.load(args.evaluate, device, args.mirror)
    starts = range(0, len(pairs.paths), args.batch_size)
    features = []
    for start in utils.progress_bar(starts, "pairs", len(starts)):
        features.append(network(pairs.paths[start : start + args.batch_size])[0])
    measured, curves = pair_metrics(torch.cat(features), pairs)
    log(*lines(measured))
    files = RunFiles(args, log)
    # Beside the thresholds of --evaluate, which predict.py reads.
    earlier = utils.read_json(files.directory / "evaluation.json")
    write(earlier | dict(pairs=measured, mirror=args.mirror), curves, files)
    files.write_rest()


def write(measured: dict, curves: dict[str, list[float]], files: RunFiles) -> None:
    """evaluation.json and roc.png."""
    utils.start_list(files.directory)
    files.write(utils.write_json, "evaluation.json", measured)
    if files.args.plot and curves:
        files.write(plots.draw_to, "roc.png", plots.draw_roc, FARS, curves)
