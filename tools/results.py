"""Tables of finished runs; those that differ in nothing but their seed share a row.

python -m tools.results log/a log/b          accuracy and compactness; by default of log/reference
python -m tools.results --verification       what --verify has measured; of log/reference/lambda
python -m tools.results --curve lambda.png   the same over λ, as a picture

Cells are mean ± standard deviation over the seeds.
"""

import argparse
import csv
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import cli
import datasets
from recipes import RECIPES
from utils import RunError

ROOT = Path(__file__).parents[1]
REFERENCE = sorted(path.parent for path in ROOT.glob("log/reference/*/metrics.csv"))
LAMBDA = sorted(path.parent for path in ROOT.glob("log/reference/lambda/*/metrics.csv"))
COLUMNS = (
    "`python main.py` with",
    "device",
    "seeds",
    "epochs",
    "test accuracy, %",
    "nearest center, %",
    "intra",
    "inter",
    "intra/inter",
    "98 % at epoch",
)
METRICS = ("test_accuracy", "nearest_center_accuracy", "intra_distance", "inter_distance")
# The columns of --verification: where the value is in evaluation.json, and its decimals.
VERIFICATION = {
    "accuracy, %": ("accuracy", 2),
    "nearest center, %": ("nearest_center_accuracy", 2),
    "EER, %": ("verification/l2/eer", 2),
    "EER by cosine, %": ("verification/cosine/eer", 2),
    "TPR at FAR 0.001, %": ("verification/l2/tpr_at_far_1e-3", 2),
    "recall@1, %": ("verification/l2/recall_at_1", 2),
    "unknown: AUROC by distance": ("unknown/auroc_distance", 3),
    "by softmax": ("unknown/auroc_softmax", 3),
    "EER among them, %": ("unknown/verification/l2/eer", 1),
}
# The panels of --curve.
PANELS = ("accuracy, %", "EER, %", "unknown: AUROC by distance", "EER among them, %")


def flags(args: dict) -> str:
    """The recipe and what differs from it, without the seed and flags that change no metric.

    Raises ValueError unless each is a value that the flag takes: the files may be of anyone.
    """
    parser = cli.build_parser()
    args = {**vars(parser.parse_args([])), **args}  # flags that are newer than the run
    if args["mirror"] is True:  # before there was concat
        args["mirror"] = "mean"
    parser.set_defaults(**RECIPES[args["recipe"]])
    silent = parser.free | {"recipe", "seed"}
    if not args["max_iter"]:
        silent.remove("max_epoch")
    given = ["--recipe", args["recipe"]]
    for name, default in vars(parser.parse_args([])).items():
        if name not in silent and args[name] != default:
            given += words(name.replace("_", "-"), args[name])

    def refuse(message: str):
        raise ValueError(message)

    parser.error = refuse
    parser.parse_args(given)
    return shlex.join(given)


def words(flag: str, value) -> list[str]:
    """A flag and its value, as on a command line."""
    if value is True:
        return [f"--{flag}"]
    if value is False:
        return [f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *(f"{v:.10g}" if isinstance(v, float) else str(v) for v in values)]


def read(directory: Path) -> dict:
    """A finished run's flags, device and metrics; RunError if its files cannot be read."""
    try:
        return read_files(directory)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # cut or edited by hand
        raise RunError(f"cannot read the run in {directory}: {error!r}") from error


def read_files(directory: Path) -> dict:
    args = json.loads((directory / "args.json").read_text(encoding="utf-8"))
    given = flags(args)
    dataset = args["dataset"]
    if dataset not in datasets.SPECS:  # before it becomes part of a path
        raise ValueError(f"unknown data set {dataset!r}")
    with open(directory / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    log = (directory / f"log_{dataset}.txt").read_text(encoding="utf-8", errors="replace")
    if "\nFinished. " not in log:
        raise RunError(f"the run in {directory} must be finished")
    accuracies = {int(row["epoch"]): float(row["test_accuracy"] or 0) for row in rows}
    path = directory / "evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(
        args=args,
        flags=given,
        title=directory.name.partition("-d")[0],
        device="GPU" if "Currently using GPU" in log else "CPU",
        epochs=len(rows),
        metrics=[float(rows[-1][name] or "nan") for name in METRICS],
        passed=next((epoch for epoch, value in accuracies.items() if value >= 98), None),
        evaluation=evaluation if evaluation.get("epoch") == max(accuracies) else {},
    )


def measured(run: dict, column: str) -> float:
    """What a run has in a column of --verification; NaN if it was not measured."""
    value = run["evaluation"]
    for key in VERIFICATION[column][0].split("/"):
        value = value.get(key, {})
    return math.nan if value == {} else value


def grouped(directories: list[Path]) -> dict[tuple[str, str, int], list[dict]]:
    """The runs by their flags, device and epochs."""
    groups = {}
    for run in map(read, directories):
        groups.setdefault((run["flags"], run["device"], run["epochs"]), []).append(run)
    return groups


def without(flag: str, given: str) -> str:
    return re.sub(rf" --{flag} \S+", "", given)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: list[float], digits: int = 2) -> str:
    """A cell: the values' mean and standard deviation."""
    if not all(map(math.isfinite, values)):
        return "–"
    shown = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{shown}"


def markdown(header: Sequence[str], rows: list[Sequence[str]]) -> str:
    lines = [header, [":---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(directories: list[Path]) -> str:
    """The runs' metrics after the last epoch, as Markdown."""
    rows = []
    for (given, device, epochs), runs in grouped(directories).items():
        accuracy, nearest, intra, inter = zip(*(run["metrics"] for run in runs), strict=True)
        ratio = [a / b if b else math.inf for a, b in zip(intra, inter, strict=True)]
        passed = sorted({run["passed"] for run in runs if run["passed"]})
        never = ["–"] if any(run["passed"] is None for run in runs) else []
        cells = [spread(values) for values in (accuracy, nearest, intra, inter, ratio)]
        numbers = [str(len(runs)), str(epochs)]
        rows.append(
            [f"`{given}`", device, *numbers, *cells, ", ".join([*map(str, passed), *never])]
        )
    return markdown(COLUMNS, rows)


def verification_table(directories: list[Path]) -> str:
    """What --verify has measured in the last test, as Markdown."""
    groups = {given: runs for (given, *_), runs in grouped(directories).items()}

    def by_weight(given: str) -> tuple[str, float]:
        return without("weight-cent", given), groups[given][0]["args"]["weight_cent"]

    rows = []
    for given in sorted(groups, key=by_weight):
        runs = groups[given]
        cells = [
            spread([measured(run, column) for run in runs], digits)
            for column, (_, digits) in VERIFICATION.items()
        ]
        rows.append([f"`{given}`", str(len(runs)), *cells])
    return markdown([COLUMNS[0], "seeds", *VERIFICATION], rows)


def series_of(directories: list[Path]) -> dict[str, list[dict]]:
    """By title, the largest group of runs with --verify that differ in nothing but λ, D and seed.

    A run's title is the name of its directory up to "-d<D>".
    """
    groups = {}
    for run in map(read, directories):
        if run["evaluation"]:
            others = without("feat-dim", without("weight-cent", run["flags"]))
            groups.setdefault(run["title"], {}).setdefault(others, []).append(run)
    if not groups:
        raise RunError("--curve needs runs with --verify, got none")
    return {title: max(groups[title].values(), key=len) for title in sorted(groups, reverse=True)}


def draw_curve(directories: list[Path], path: Path) -> None:
    """Draws what --verify has measured over λ · D: a row a title, a color a D."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    series = series_of(directories)
    dims = sorted({run["args"]["feat_dim"] for runs in series.values() for run in runs})
    figure = Figure(figsize=(12, 0.6 + 2.6 * len(series)), dpi=110, layout="constrained")
    grid = figure.subplots(len(series), len(PANELS), squeeze=False, sharex=True)
    for (title, runs), row in zip(series.items(), grid, strict=True):
        for axes, column in zip(row, PANELS, strict=True):
            for number, dim in enumerate(dims):
                if by_weight := values_of(column, runs, dim):
                    draw_line(axes, by_weight, f"D = {dim}", f"C{number}")
            axes.set(xscale="log", ylabel=column)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(color="0.92")
        row[0].set_title(title, loc="left", fontsize=11)
        row[1].set_yscale("log")  # EER
        row[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        row[1].yaxis.set_major_formatter("{x:g}")
        row[1].yaxis.set_minor_formatter("")
    for axes in grid[-1]:
        axes.set_xlabel("λ · D")
    marks = {}
    for axes in grid[:, 0]:
        handles, labels = axes.get_legend_handles_labels()
        marks.update(zip(labels, handles, strict=True))
    place = dict(loc="outside lower center", ncols=len(marks), frameon=False)
    figure.legend(marks.values(), marks.keys(), **place)
    figure.savefig(path)


def values_of(column: str, runs: list[dict], dim: int) -> dict[float, list[float]]:
    """What the runs of one D have measured, by λ · D."""
    by_weight = {}
    for run in runs:
        value = measured(run, column)
        if run["args"]["feat_dim"] == dim and math.isfinite(value):
            by_weight.setdefault(run["args"]["weight_cent"] * dim, []).append(value)
    return by_weight


def draw_line(axes, by_weight: dict[float, list[float]], label: str, color: str) -> None:
    """Draws means and deviations over λ · D; softmax alone (0) as a horizontal line."""
    weights = sorted(by_weight.keys() - {0.0})
    means = [statistics.mean(by_weight[weight]) for weight in weights]
    widths = [deviation(by_weight[weight]) for weight in weights]
    style = dict(color=color, capsize=3, marker="o", markersize=4)
    axes.errorbar(weights, means, widths, label=f"{label}, with center loss", **style)
    if alone := by_weight.get(0.0):
        mean = statistics.mean(alone)
        width = deviation(alone)
        axes.axhspan(mean - width, mean + width, color=color, alpha=0.1, linewidth=0)
        axes.axhline(mean, color=color, linestyle="--", label=f"{label}, softmax alone")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("directories", nargs="*", type=Path, help="--save-dir of each run")
    add("--verification", action="store_true", help="the table of what --verify has measured")
    add("--curve", type=Path, metavar="FILE", help="draw what --verify has measured over λ")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.curve:
            draw_curve(args.directories or LAMBDA, args.curve)
        elif args.verification:
            print(verification_table(args.directories or LAMBDA))
        else:
            print(table(args.directories or REFERENCE))
    except (RunError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # also where the system's encoding lacks ± or λ
    sys.stderr.reconfigure(encoding="utf-8")
    main()
