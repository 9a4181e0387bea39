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

    Each of them may be missing. Labels of "unknown" go on from len(classes). `confusion`: count the
    test images by class and prediction, too.

    Returns the contents of evaluation.json, in % but for "auc" and "auroc", and ROC curves: true
    positive rates at metrics.FARS.
    """
    tested = splits.get("test")
    unknown = splits.get("unknown")
    measured = dict(classes=list(classes))
    curves = {}

    def compare(into: dict, features: Tensor, labels: Tensor, what: str) -> None:
        found, tprs = metrics.compare_all(features, labels)
        into.update(found, images=len(labels))
        for name, comparison in metrics.COMPARISONS.items():
            if name in tprs and what:
                curves[f"{what} classes, {comparison.name}"] = tprs[name]

    if tested:
        measured.update((name, tested[name]) for name in TESTED)
        compare(measured, tested["features"], tested["labels"], "trained")
    if unknown:
        measured["unknown"] = dict(classes=list(unseen))
        compare(measured["unknown"], unknown["features"], unknown["labels"], "unknown")
    if tested and unknown:
        measured["unknown"].update(metrics.open_set(tested, unknown, centers))
        measured["all"] = {}
        both = [torch.cat([tested[name], unknown[name]]) for name in ("features", "labels")]
        compare(measured["all"], *both, "")
    if tested and confusion:
        counts = metrics.confusion(tested["labels"], tested["predictions"], len(classes))
        measured["confusion"] = counts
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

    def values(metric: str, source: str = "verification") -> str:
        return " / ".join(f"{measured[source][name][metric]:.2f}" for name in metrics.COMPARISONS)

    by = " / ".join(comparison.name for comparison in metrics.COMPARISONS.values())
    return (
        f"{over} by {by}: EER (%): {values('eer')}\t "
        f"TPR (%) at FAR 0.01: {values('tpr_at_far_1e-2')}\t "
        f"Recall@1 (%): {values('recall_at_1', 'retrieval')}\t "
        f"mAP (%): {values('mean_average_precision', 'retrieval')}"
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
