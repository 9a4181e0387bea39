"""What --evaluate and --verify measure, and how they say it: pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import metrics
from engine.images import some

TESTED = ("xent", "accuracy", "nearest_center_accuracy", "intra_distance", "inter_distance")


def measure(
    splits: dict[str, dict],
    centers: Tensor,
    classes: Sequence[str],
    unseen: Sequence[str],
    confusion: bool = False,
) -> tuple[dict, dict[str, list[float]]]:
    """Verification, retrieval and detection of unknown classes, of the splits "test" and "unknown".

    Each of them may be missing. Labels of "unknown" go on from len(classes).
    Returns the contents of evaluation.json, in % but for "auc" and "auroc", and ROC curves: true
    positive rates at metrics.FARS.
    """
    tested = splits.get("test")
    unknown = splits.get("unknown")
    measured = dict(classes=list(classes))
    curves = {}

    def compare(split: dict, what: str = "") -> dict:
        found, tprs = metrics.compare_all(split["features"], split["labels"])
        for name in tprs if what else ():
            curves[f"{what} classes, {metrics.COMPARISONS[name]}"] = tprs[name]
        return found | dict(images=len(split["labels"]))

    if tested:
        measured.update((name, tested[name]) for name in TESTED)
        measured.update(compare(tested, "trained"))
    if unknown:
        measured["unknown"] = dict(classes=list(unseen), **compare(unknown, "unknown"))
    if tested and unknown:
        measured["unknown"].update(metrics.open_set(tested, unknown, centers))
        both = {name: torch.cat([tested[name], unknown[name]]) for name in ("features", "labels")}
        measured["all"] = compare(both)
    if tested and confusion:
        found = (tested["labels"], tested["predictions"])
        measured["confusion"] = metrics.confusion(*found, len(classes))
    return measured, curves


def lines(measured: dict) -> list[str]:
    """What the log says of it, the most important last."""
    said = []
    if "confusion" in measured:
        said.append(worst_line(measured["confusion"], measured["classes"]))
    if "verification" in measured:
        said.append(compared_line("Trained classes", measured))
    if unknown := measured.get("unknown"):
        if "auroc_distance" in unknown:
            said.append(
                f"Told from the trained classes: {some(unknown['classes'])}: AUROC by distance "
                f"from the nearest center: {unknown['auroc_distance']:.4f}\t "
                f"by softmax probability: {unknown['auroc_softmax']:.4f}"
            )
        said.append(compared_line("Unknown classes", unknown))
    return said


def compared_line(what: str, measured: dict) -> str:
    verification = measured["verification"]
    images = f"{verification['images']:,} images"
    if verification["images"] < verification["drawn_from"]:
        images += f" of {verification['drawn_from']:,}, drawn with seed 0"
    over = f"{what} ({images}; {verification['pairs']:,} pairs)"
    if "missing" in verification:
        return f"{over}: not measured, since {verification['missing']}"

    def values(source: str, metric: str) -> str:
        return " / ".join(f"{measured[source][name][metric]:.2f}" for name in metrics.COMPARISONS)

    return (
        f"{over} by {' / '.join(metrics.COMPARISONS.values())}: "
        f"EER (%): {values('verification', 'eer')}\t "
        f"TPR (%) at FAR 0.01: {values('verification', 'tpr_at_far_1e-2')}\t "
        f"Recall@1 (%): {values('retrieval', 'recall_at_1')}\t "
        f"mAP (%): {values('retrieval', 'mean_average_precision')}"
    )


def worst_line(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """The least accurate classes, with what they are taken for most often."""
    accuracies = []
    for label, row in enumerate(counts):
        if any(row):
            mistaken = max((number, other) for other, number in enumerate(row) if other != label)
            accuracies.append((100 * row[label] / sum(row), label, mistaken))
    said = []
    for accuracy, label, (number, other) in sorted(accuracies)[:5]:
        taken = f", {number} taken for {classes[other]}" if number else ""
        said.append(f"{classes[label]} {accuracy:.2f}{taken}")
    return f"Least accurate of {len(accuracies)} classes (%): {'; '.join(said)}"
