"""What --evaluate and --verify measure, as lines of the log and as files."""

import copy
import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import plots
import utils
from engine.metrics import DISTANCES, FARS, LONG_NAMES, confusion, open_set, verification


def confusion_lines(counts: list[list[int]], classes: Sequence[str], width: int = 100) -> list[str]:
    """The accuracy (%) of each class, – without images, and its counts of predictions as each class.

    If these do not fit into `width`, only the three most frequent mistakes of each class.
    """
    accuracies = [
        f"{100 * row[label] / sum(row):.2f}" if any(row) else "–"
        for label, row in enumerate(counts)
    ]
    first = max(len("true class"), *map(len, classes))
    columns = [
        max(len(name), *(len(str(row[label])) for row in counts))
        for label, name in enumerate(classes)
    ]
    if first + 12 + sum(columns) + 2 * len(columns) <= width:
        return [
            f"{name:{first}}  {right:>10}"
            + "".join(f"  {cell:>{n}}" for cell, n in zip(row, columns, strict=True))
            for name, right, row in zip(
                ["true class", *classes],
                ["accuracy %", *accuracies],
                [classes, *counts],
                strict=True,
            )
        ]
    lines = [f"{'true class':{first}}  {'accuracy %':>10}  most frequent mistakes"]
    for label, (name, right, row) in enumerate(zip(classes, accuracies, counts, strict=True)):
        wrong = [(number, other) for other, number in enumerate(row) if number and other != label]
        wrong.sort(key=lambda each: -each[0])
        shown = [f"{classes[other]} {number}" for number, other in wrong[:3]]
        if rest := sum(number for number, _ in wrong[3:]):
            shown.append(f"others {rest}")
        lines.append(f"{name:{first}}  {right:>10}  {', '.join(shown)}".rstrip())
    return lines


def report(
    splits: dict[str, dict], centers: Tensor, epoch: int, data, args, log: utils.Log
) -> None:
    """Logs verification, detection of unknown classes and, for --evaluate, the confusion matrix.

    Writes evaluation.json and, for --plot, roc.png and confusion.png to --save-dir.
    """
    directory, tested, unknown = Path(args.save_dir), splits["test"], splits.get("unknown")
    metrics = ("xent", "accuracy", "nearest_center_accuracy", "intra_distance", "inter_distance")
    measured = dict(
        epoch=epoch, classes=data.classes, images=len(tested["labels"]), mirror=args.mirror
    )
    measured |= {name: tested[name] for name in metrics}
    measured["verification"], curves = verification(tested["features"], tested["labels"])
    log_verification("Verification", measured["verification"], log)
    curves = {f"trained classes, {LONG_NAMES[name]}": curve for name, curve in curves.items()}
    if unknown:
        found = measured["unknown"] = dict(classes=data.unseen, images=len(unknown["labels"]))
        found |= open_set(tested, unknown, centers)
        names = ", ".join(data.unseen[:10]) + ", …" * (len(data.unseen) > 10)
        log(
            f"Unknown classes {names} ({found['images']:,} images): AUROC by distance from the "
            f"nearest center: {found['auroc_distance']:.4f}\t by softmax probability: {found['auroc_softmax']:.4f}"
        )
        found["verification"], more = verification(
            unknown["features"], unknown["labels"] - len(data.classes)
        )
        log_verification("Verification of the unknown", found["verification"], log)
        curves |= {f"unknown classes, {LONG_NAMES[name]}": curve for name, curve in more.items()}

    pictures = {"roc.png": (plots.draw_roc, FARS, curves)} if curves else {}
    if args.evaluate:
        counts = measured["confusion"] = confusion(
            tested["labels"], tested["predictions"], len(data.classes)
        )
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
    drawn = (
        f" of {measured['drawn_from']:,}, drawn with seed 0"
        if measured["images"] < measured["drawn_from"]
        else ""
    )
    over = f"({measured['images']:,} images{drawn}; {measured['pairs']:,} pairs)"
    if "missing" in measured:
        return log(f"{what} {over}: not measured, since {measured['missing']}")
    for name in DISTANCES:
        metrics = measured[name]
        log(
            f"{what} by {LONG_NAMES[name]} {over}: EER (%): {metrics['eer']:.2f}\t AUC: {metrics['auc']:.5f}\t "
            f"TPR (%) at FAR 0.001: {metrics['tpr_at_far_1e-3']:.2f}\t Recall@1 (%): {metrics['recall_at_1']:.2f}"
        )


def is_best(validated: dict, history: Sequence[dict], save_dir: str) -> bool:
    """Whether the validation accuracy is above that of all earlier epochs, or equal with a lower cross-entropy.

    Earlier epochs do not count if best.pt is missing, as where a checkpoint was moved without it.
    """
    if not Path(save_dir, "best.pt").exists():
        return True
    earlier = [
        (row["val_accuracy"], -row["val_xent"])
        for row in history
        if row["val_accuracy"] is not None
    ]
    return (validated["accuracy"], -validated["xent"]) > max(earlier, default=(-1.0, 0.0))


def load_best(model: nn.Module, save_dir: str) -> tuple[nn.Module, Tensor, int]:
    """The network, the centers and the epoch of best.pt; `model` itself stays as it is."""
    checkpoint, best = utils.load_checkpoint(Path(save_dir, "best.pt")), copy.deepcopy(model)
    best.load_state_dict(checkpoint["model"])
    return best, checkpoint["centers"].to(next(model.parameters()).device), checkpoint["epoch"]


def save_features(save_dir: Path, tested: dict, centers: Tensor, data) -> None:
    """Writes features/test.npz: the test arrays of --save-features, class names and the images' paths."""
    names = dict(classes=np.array(data.classes))
    if data.test.paths:
        names["test_paths"] = np.array(data.test.paths)
    utils.save_features(save_dir / "features" / "test.npz", dict(test=tested), centers, **names)
