"""Tables of finished runs; those that differ in nothing but their seed share a row: mean ± standard deviation.

python results.py log/a log/b              accuracy and compactness; without directories, the runs of log/reference
python results.py --verification           what --verify has measured; the runs of log/reference/lambda
python results.py --curve lambda.png       the same over λ, as a picture
"""

import argparse
import csv
import functools
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import cli
from recipes import RECIPES
from utils import RunError

REFERENCE = sorted(
    path.parent for path in Path(__file__).parents[1].glob("log/reference/*/metrics.csv")
)
LAMBDA = sorted(
    path.parent for path in Path(__file__).parents[1].glob("log/reference/lambda/*/metrics.csv")
)
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
# The columns of --verification: path in evaluation.json, and decimals.
VERIFICATION = {
    "accuracy, %": (("accuracy",), 2),
    "nearest center, %": (("nearest_center_accuracy",), 2),
    "EER, %": (("verification", "l2", "eer"), 2),
    "EER by cosine, %": (("verification", "cosine", "eer"), 2),
    "TPR at FAR 0.001, %": (("verification", "l2", "tpr_at_far_1e-3"), 2),
    "recall@1, %": (("verification", "l2", "recall_at_1"), 2),
    "unknown: AUROC by distance": (("unknown", "auroc_distance"), 3),
    "by softmax": (("unknown", "auroc_softmax"), 3),
    "EER among them, %": (("unknown", "verification", "l2", "eer"), 1),
}
# The panels of --curve, by their y label: columns of --verification.
PANELS = {
    "accuracy (%)": "accuracy, %",
    "EER (%)": "EER, %",
    "AUROC of the unknown": "unknown: AUROC by distance",
    "EER among the unknown (%)": "EER among them, %",
}


def flags(args: dict) -> str:
    """The recipe and the flags that are not its defaults, without the seed and flags that change no metric."""
    parser = cli.build_parser()
    args = vars(parser.parse_args([])) | args  # flags that are newer than the run
    parser.set_defaults(**RECIPES[args["recipe"]])
    defaults = vars(parser.parse_args([]))
    silent = (
        parser.free - {"max_epoch"}
        | {"recipe", "seed"}
        | ({"max_epoch"} if args["max_iter"] else set())
    )
    given = [f"--recipe {args['recipe']}"]
    for name, default in defaults.items():
        value, flag = args[name], name.replace("_", "-")
        if name in silent or value == default:
            continue
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            given.append(
                f"--{flag} " + " ".join(map(short, value if isinstance(value, list) else [value]))
            )
    return " ".join(given)


def short(value) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def read(directory: Path) -> dict:
    """A run's flags, device and metrics, from its args.json, metrics.csv and log; RunError if one cannot be read."""
    try:
        return _read(directory)
    except (
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # cut or edited by hand
        raise RunError(
            f"cannot read the run in {directory}: {type(error).__name__}: {error}"
        ) from error


def _read(directory: Path) -> dict:
    args = json.loads((directory / "args.json").read_text())
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    log = (directory / f"log_{args['dataset']}.txt").read_text()
    if "\nFinished. " not in log:
        raise RunError(f"the run in {directory} must be finished")
    last = {name: float(value) for name, value in rows[-1].items() if value}
    path = directory / "evaluation.json"
    evaluation = json.loads(path.read_text()) if path.exists() else {}
    return dict(
        args=args,
        title=directory.name.partition("-d")[0],
        evaluation=evaluation if evaluation.get("epoch") == last["epoch"] else {},
        flags=flags(args),
        device="GPU" if "Currently using GPU" in log else "CPU",
        epochs=len(rows),
        metrics=[
            last[name]
            for name in (
                "test_accuracy",
                "nearest_center_accuracy",
                "intra_distance",
                "inter_distance",
            )
        ],
        passed=next(
            (int(row["epoch"]) for row in rows if float(row["test_accuracy"] or 0) >= 98), None
        ),
    )


def spread(values: list[float], digits: int = 2) -> str:
    if not all(map(math.isfinite, values)):
        return "–"
    shown = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{shown}"


def grouped(directories: list[Path]) -> dict[tuple[str, str, int], list[dict]]:
    """The runs by their flags, device and epochs."""
    groups = {}
    for run in map(read, directories):
        groups.setdefault((run["flags"], run["device"], run["epochs"]), []).append(run)
    return groups


def measured(run: dict, path: tuple[str, ...]) -> float:
    """The value at a path of the run's evaluation.json; NaN if it was not measured."""
    value = functools.reduce(lambda values, key: values.get(key, {}), path, run["evaluation"])
    return math.nan if value == {} else value


def without_weight(run: dict) -> str:
    return re.sub(r" --weight-cent \S+", "", run["flags"])


def markdown(rows: list[Sequence[str]]) -> str:
    rows = [rows[0], [":---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def verification_table(directories: list[Path]) -> str:
    """What --verify has measured in the last test, as Markdown."""

    def by_weight(group) -> tuple:
        return without_weight(group[1][0]), group[1][0]["args"]["weight_cent"]

    rows = [(COLUMNS[0], "seeds", *VERIFICATION)]
    for (given, *_), runs in sorted(grouped(directories).items(), key=by_weight):
        cells = [
            spread([measured(run, path) for run in runs], digits)
            for path, digits in VERIFICATION.values()
        ]
        rows.append([f"`{given}`", str(len(runs)), *cells])
    return markdown(rows)


def table(directories: list[Path]) -> str:
    """The runs' metrics after the last epoch, as Markdown."""
    lines = [COLUMNS]
    for (given, device, epochs), runs in grouped(directories).items():
        metrics = list(zip(*(run["metrics"] for run in runs), strict=True))
        ratio = [
            intra / inter if inter else math.inf for intra, inter in zip(*metrics[2:], strict=True)
        ]
        passed = sorted(
            {run["passed"] or "–" for run in runs}, key=lambda epoch: (epoch == "–", epoch)
        )
        lines.append(
            [
                f"`{given}`",
                device,
                str(len(runs)),
                str(epochs),
                *map(spread, [*metrics, ratio]),
                ", ".join(map(str, passed)),
            ]
        )
    return markdown(lines)


def draw_curve(directories: list[Path], path: Path) -> None:
    """Draws what --verify has measured over λ · D: mean and standard deviation over the seeds, a row a data set.

    A run's directory is named <title of its row>-d<D>-…; a row shows the largest group of its runs that differ in
    nothing but λ, D and seed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    series = {}  # by title, by the other flags
    runs = [run for run in map(read, directories) if run["evaluation"]]
    if not runs:
        raise RunError("--curve needs runs with --verify, got none")
    for run in runs:
        others = re.sub(r" --feat-dim \S+", "", without_weight(run))
        series.setdefault(run["title"], {}).setdefault(others, []).append(run)
    series = {
        title: max(by_flags.values(), key=len)
        for title, by_flags in sorted(series.items(), reverse=True)
    }
    dims = sorted({run["args"]["feat_dim"] for runs in series.values() for run in runs})
    figure = Figure(figsize=(12, 0.6 + 2.6 * len(series)), dpi=110, layout="constrained")
    grid, legend = figure.subplots(len(series), len(PANELS), squeeze=False, sharex=True), {}
    for (title, runs), row in zip(series.items(), grid, strict=True):
        for axes, (name, column) in zip(row, PANELS.items(), strict=True):
            for number, dim in enumerate(dims):
                by_weight = {}
                for run in runs:
                    value = measured(run, VERIFICATION[column][0])
                    if run["args"]["feat_dim"] == dim and math.isfinite(value):
                        by_weight.setdefault(run["args"]["weight_cent"] * dim, []).append(value)
                draw_line(axes, by_weight, f"D = {dim}", f"C{number}", "os^v"[number % 4])
            axes.set(xscale="log", ylabel=name)
            axes.grid(color="0.92")
            axes.xaxis.set_major_formatter("{x:g}")
            if column == "EER, %":
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            legend |= {
                label: mark for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)
            }
        row[0].set_title(title, loc="left", fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("λ · D")
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=6,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path)


def draw_line(
    axes, by_weight: dict[float, list[float]], label: str, color: str, marker: str
) -> None:
    """Draws values over λ · D, and softmax alone (0) as a horizontal line, with their standard deviations."""
    if alone := by_weight.pop(0.0, []):
        mean, spread = statistics.mean(alone), deviation(alone)
        axes.axhspan(mean - spread, mean + spread, color=color, alpha=0.1, linewidth=0)
        axes.axhline(
            mean, color=color, linestyle="--", linewidth=1, label=f"{label}, softmax alone"
        )
    if weights := sorted(by_weight):
        means = np.array([statistics.mean(by_weight[weight]) for weight in weights])
        spreads = np.array([deviation(by_weight[weight]) for weight in weights])
        axes.fill_between(
            weights, means - spreads, means + spreads, color=color, alpha=0.2, linewidth=0
        )
        axes.plot(
            weights,
            means,
            color=color,
            marker=marker,
            markersize=4,
            label=f"{label}, with center loss",
        )


def deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="*", type=Path, help="--save-dir of each run")
    parser.add_argument(
        "--verification", action="store_true", help="the table of what --verify has measured"
    )
    parser.add_argument(
        "--curve", type=Path, metavar="FILE", help="draw what --verify has measured over λ"
    )
    return parser


if __name__ == "__main__":
    parser = build_parser()
    args = parser.parse_args()
    try:
        if args.curve:
            draw_curve(args.directories or LAMBDA, args.curve)
        elif args.verification:
            print(verification_table(args.directories or LAMBDA))
        else:
            print(table(args.directories or REFERENCE))
    except (RunError, OSError) as error:
        parser.exit(2, f"results.py: error: {error}\n")
