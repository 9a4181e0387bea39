"""Tables of finished runs; those that differ in nothing but their seed share a row.

python -m tools.results log/a log/b          accuracy and compactness; by default of log/reference
python -m tools.results --verification       what --verify has measured; of log/reference/lambda
python -m tools.results --curve lambda.png   the same over λ, as a picture

Cells are mean ± standard deviation over the seeds.
"""

import argparse
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import cli
import datasets
import utils
from plots.saved import read_history
from recipes import RECIPES

ROOT = Path(__file__).parents[1]
REFERENCE = sorted(path.parent for path in ROOT.glob("log/reference/*/metrics.csv"))
LAMBDA = sorted(path.parent for path in ROOT.glob("log/reference/lambda/*/metrics.csv"))
COMMAND = "`python main.py` with"
# Columns, and those of metrics.csv.
METRICS = {
    "test accuracy, %": "test_accuracy",
    "nearest center, %": "nearest_center_accuracy",
    "intra": "intra_distance",
    "inter": "inter_distance",
}
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
PANELS = ("accuracy, %", "EER, %", "unknown: AUROC by distance", "EER among them, %")


def flags(args: dict) -> str:
    """The recipe and what differs from it, without the seed and flags that change no metric."""
    parser = cli.build_parser()
    parser.set_defaults(**RECIPES[args["recipe"]])
    silent = parser.free | {"recipe", "seed"}
    if not args["max_iter"]:
        silent.remove("max_epoch")
    given = ["--recipe", args["recipe"]]
    for name, default in vars(parser.parse_args([])).items():
        if name not in silent and args[name] != default:
            given += words(name.replace("_", "-"), args[name])
    return shlex.join(given)


def words(flag: str, value) -> list[str]:
    """A flag and its value, as on a command line."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *(f"{v:.10g}" if isinstance(v, float) else str(v) for v in values)]


def read_args(directory: Path) -> dict:
    """The flags of a run, with none that main.py would refuse: they become paths and commands."""
    path = directory / "args.json"

    def refuse(message: str):
        raise utils.RunError(f"{path} is not as main.py wrote it: {message}")

    args = utils.read_args(directory)
    if args.get("dataset") not in datasets.SPECS or args.get("recipe") not in RECIPES:
        refuse("no data set or recipe that is known")
    args = cli.upgrade(args)
    parser = cli.build_parser()
    parser.error = refuse
    parser.parse_args(shlex.split(flags(args)))
    return args


def read(directory: Path) -> dict:
    """What the tables show of a finished run; RunError if its files cannot be read."""
    args = read_args(directory)
    log = (directory / f"log_{args['dataset']}.txt").read_text(encoding="utf-8", errors="replace")
    if "\nFinished. " not in log:
        raise utils.RunError(f"the run in {directory} must be finished")
    path = directory / "metrics.csv"
    try:
        history = read_history(path)
        last = {column: history[-1][name] for column, name in METRICS.items()}
        tested = {row["epoch"]: row["test_accuracy"] or 0 for row in history}
    except (LookupError, TypeError, ValueError) as error:
        raise utils.RunError(f"cannot read {path}: {error!r}") from error
    evaluation = utils.read_json(directory / "evaluation.json")
    return dict(
        args=args,
        flags=flags(args),
        device="GPU" if "Currently using GPU" in log else "CPU",
        epochs=len(history),
        metrics=last,
        passed=min([epoch for epoch in tested if tested[epoch] >= 98], default=math.inf),
        evaluation=evaluation if evaluation.get("epoch") == max(tested) else {},
    )


def measured(run: dict, column: str) -> float | None:
    """What a run has in a column of --verification."""
    value = run["evaluation"]
    for key in VERIFICATION[column][0].split("/"):
        value = value.get(key, {})
    return None if value == {} else value


def grouped(runs: Iterable[dict], *varying: str) -> dict[tuple[str, str, int], list[dict]]:
    """The runs by their flags, without those that vary, device and epochs."""
    groups = {}
    for run in runs:
        key = (without(run, *varying), run["device"], run["epochs"])
        groups.setdefault(key, []).append(run)
    return groups


def without(run: dict, *flags: str) -> str:
    return re.sub(rf" --({'|'.join(flags)}) \S+", "", run["flags"])


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: list[float | None], digits: int = 2) -> str:
    """A cell: the values' mean and standard deviation."""
    if None in values:
        return "–"
    shown = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{shown}"


def markdown(header: Sequence[str], rows: list[Sequence[str]]) -> str:
    lines = [header, [":---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(directories: list[Path]) -> str:
    """The runs' metrics after the last epoch, as Markdown."""
    rows = []
    for (given, device, epochs), runs in grouped(map(read, directories)).items():
        metrics = {column: [run["metrics"][column] for run in runs] for column in METRICS}
        pairs = zip(metrics["intra"], metrics["inter"], strict=True)
        ratio = [intra / inter if inter else None for intra, inter in pairs]
        cells = [spread(values) for values in (*metrics.values(), ratio)]
        passed = map(str, sorted({run["passed"] for run in runs}))
        cells.append(", ".join(passed).replace("inf", "–"))
        rows.append([f"`{given}`", device, str(len(runs)), str(epochs), *cells])
    header = [COMMAND, "device", "seeds", "epochs", *METRICS, "intra/inter", "98 % at epoch"]
    return markdown(header, rows)


def verification_table(directories: list[Path]) -> str:
    """What --verify has measured in the last test, as Markdown."""

    def by_weight(run: dict) -> tuple[str, float]:
        return without(run, "weight-cent"), pull(run)

    rows = []
    for (given, *_), runs in grouped(sorted(map(read, directories), key=by_weight)).items():
        cells = [
            spread([measured(run, column) for run in runs], digits)
            for column, (_, digits) in VERIFICATION.items()
        ]
        rows.append([f"`{given}`", str(len(runs)), *cells])
    return markdown([COMMAND, "seeds", *VERIFICATION], rows)


def pull(run: dict) -> float:
    """λ · D."""
    return run["args"]["weight_cent"] * run["args"]["feat_dim"]


def series_of(directories: list[Path]) -> dict[str, list[dict]]:
    """Runs with --verify that differ in nothing but λ, D and seed, by their other flags."""
    runs = [run for run in map(read, directories) if run["evaluation"]]
    groups = grouped(runs, "weight-cent", "feat-dim").items()
    series = {given: runs for (given, *_), runs in groups if len(set(map(pull, runs))) > 1}
    if not series:
        raise utils.RunError("--curve needs runs with --verify and two values of --weight-cent")
    return series


def draw_curve(directories: list[Path], path: Path) -> None:
    """Draws what --verify has measured over λ · D: a row a series, a color a D."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    series = series_of(directories)
    dims = sorted({run["args"]["feat_dim"] for runs in series.values() for run in runs})
    figure = Figure(figsize=(12, 0.8 + 2.6 * len(series)), dpi=110, layout="constrained")
    grid = figure.subplots(len(series), len(PANELS), squeeze=False, sharex=True)
    for (given, runs), row in zip(series.items(), grid, strict=True):
        row[0].set_title(given, loc="left", fontsize=11)
        for axes, column in zip(row, PANELS, strict=True):
            for number, dim in enumerate(dims):
                chosen = [run for run in runs if run["args"]["feat_dim"] == dim]
                draw_line(axes, chosen, column, label=f"D = {dim}", color=f"C{number}")
            axes.set(xscale="log", ylabel=column)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(color="0.92")
            if column == "EER, %":
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
    lines = grid[0, 0].get_legend_handles_labels()
    title = "over λ · D; dashed: softmax alone"
    figure.legend(*lines, title=title, loc="outside lower center", ncols=len(dims), frameon=False)
    figure.savefig(path)


def draw_line(axes, runs: list[dict], column: str, label: str, color: str) -> None:
    """Draws means and deviations over λ · D; softmax alone (0) as a horizontal line."""
    by_pull = {}
    for run in sorted(runs, key=pull):
        value = measured(run, column)
        if value is not None:
            by_pull.setdefault(pull(run), []).append(value)
    alone = by_pull.pop(0.0, [])
    means = [statistics.mean(values) for values in by_pull.values()]
    widths = [deviation(values) for values in by_pull.values()]
    style = dict(label=label, color=color, capsize=3, fmt="o-", markersize=4)
    axes.errorbar(by_pull.keys(), means, widths, **style)
    if alone:
        mean = statistics.mean(alone)
        width = deviation(alone)
        axes.axhspan(mean - width, mean + width, color=color, alpha=0.1, linewidth=0)
        axes.axhline(mean, color=color, linestyle="--")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("directories", nargs="*", type=utils.directory, help="--save-dir of each run")
    add("--verification", action="store_true", help="the table of what --verify has measured")
    add(
        "--curve",
        type=utils.directory,
        metavar="FILE",
        help="draw what --verify has measured over λ",
    )
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
    except (utils.RunError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # also where the system's encoding lacks ± or λ
    main()
