"""A table of finished runs: python results.py log/a log/b; without directories, of the runs in log/reference.

Runs on the same kind of device that differ in nothing but their seed share a row: the mean of each metric, ± its
standard deviation.
"""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

from cli import build_parser
from recipes import RECIPES
from utils import RunError

REFERENCE = [metrics.parent for metrics in sorted(Path(__file__).parent.glob("log/reference/*/metrics.csv"))]
COLUMNS = (
    "`python main.py` with", "device", "seeds", "epochs", "test accuracy, %", "nearest center, %", "intra", "inter",
    "intra/inter", "98 % at epoch",
)  # fmt: skip


def flags(args: dict) -> str:
    """The recipe and the flags that are not its defaults; without the seed and what changes no metric."""
    parser = build_parser()
    parser.set_defaults(**RECIPES[args["recipe"]])
    defaults = vars(parser.parse_args([]))
    silent = parser.free - {"max_epoch"} | {"recipe", "seed"} | ({"max_epoch"} if args["max_iter"] else set())
    given = [f"--recipe {args['recipe']}"]
    for name, default in defaults.items():
        value, flag = args[name], name.replace("_", "-")
        if name in silent or value == default:
            continue
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            given.append(f"--{flag} " + " ".join(map(short, value if isinstance(value, list) else [value])))
    return " ".join(given)


def short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read(directory: Path) -> dict:
    """A run's flags, device and metrics, from its args.json, metrics.csv and log."""
    args = json.loads((directory / "args.json").read_text())
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    log = (directory / f"log_{args['dataset']}.txt").read_text()
    if "\nFinished. " not in log:
        raise RunError(f"the run in {directory} must be finished")
    last = {name: float(value) for name, value in rows[-1].items() if value}
    return dict(
        flags=flags(args),
        device="GPU" if "Currently using GPU" in log else "CPU",
        epochs=len(rows),
        metrics=[last[name] for name in ("test_accuracy", "nearest_center_accuracy", "intra_distance",
                                         "inter_distance")],  # fmt: skip
        passed=next((int(row["epoch"]) for row in rows if float(row["test_accuracy"] or 0) >= 98), None),
    )


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def table(directories: list[Path]) -> str:
    """The runs' metrics after the last epoch, as Markdown."""
    rows = {}
    for run in map(read, directories):
        rows.setdefault((run["flags"], run["device"], run["epochs"]), []).append(run)
    lines = [COLUMNS, [":---"] + ["---:"] * (len(COLUMNS) - 1)]
    for (given, device, epochs), runs in rows.items():
        metrics = list(zip(*(run["metrics"] for run in runs), strict=True))
        ratio = [intra / inter if inter else math.inf for intra, inter in zip(*metrics[2:], strict=True)]
        passed = sorted({run["passed"] or "–" for run in runs}, key=lambda epoch: (epoch == "–", epoch))
        lines.append([f"`{given}`", device, str(len(runs)), str(epochs), *map(spread, [*metrics, ratio]),
                      ", ".join(map(str, passed))])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, default=REFERENCE, help="--save-dir of each run")
    try:
        print(table(parser.parse_args().directories))
    except (RunError, OSError) as error:
        parser.exit(2, f"results.py: error: {error}\n")
