"""A table of finished runs: python results.py log/a log/b; without directories, the README's, of log/reference.

Runs that differ in nothing but their seed share a row: the mean of each figure, ± its standard deviation.
"""

import argparse
import csv
import json
import math
import re
import statistics
from datetime import timedelta
from pathlib import Path

from cli import build_parser
from recipes import RECIPES
from utils import RunError

REFERENCE = [metrics.parent for metrics in sorted(Path(__file__).parent.glob("log/reference/*/metrics.csv"))]
COLUMNS = (
    "`python main.py` with", "seeds", "epochs", "test accuracy, %", "nearest center, %", "intra", "inter",
    "intra/inter", "98 % at epoch", "h:m:s",
)  # fmt: skip


def flags(args: dict) -> str:
    """The recipe and the flags that are not its defaults; without the seed and what changes no figure."""
    parser = build_parser()
    parser.set_defaults(**RECIPES[args["recipe"]])
    defaults = vars(parser.parse_args([]))
    silent = parser.free - {"max_epoch"} | {"recipe", "seed"} | ({"max_epoch"} if args["max_iter"] else set())
    given = [f"--recipe {args['recipe']}"]
    for name, default in defaults.items():
        value, flag = args.get(name, default), name.replace("_", "-")
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
    """A run's flags and figures, from its args.json, metrics.csv and log."""
    args = json.loads((directory / "args.json").read_text())
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    log = (directory / f"log_{args['dataset']}.txt").read_text()
    elapsed = re.findall(r"^Finished\. .*: (?:(\d+) days?, )?(\d+):(\d+):(\d+)$", log, re.MULTILINE)
    if not elapsed:
        raise RunError(f"the run in {directory} must be finished")
    days, hours, minutes, seconds = (int(number or 0) for number in elapsed[-1])
    last = {name: float(value) for name, value in rows[-1].items() if value}
    return dict(
        flags=flags(args),
        epochs=len(rows),
        figures=[last[name] for name in ("test_accuracy", "nearest_center_accuracy", "intra_distance",
                                         "inter_distance")],  # fmt: skip
        passed=next((int(row["epoch"]) for row in rows if float(row["test_accuracy"] or 0) >= 98), None),
        seconds=timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds(),
    )


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def table(directories: list[Path]) -> str:
    """The runs' figures after the last epoch, and the median of their times, as Markdown."""
    rows = {}
    for run in map(read, directories):
        rows.setdefault((run["flags"], run["epochs"]), []).append(run)
    lines = [COLUMNS, [":---"] + ["---:"] * (len(COLUMNS) - 1)]
    for (given, epochs), runs in rows.items():
        figures = list(zip(*(run["figures"] for run in runs), strict=True))
        ratio = [intra / inter if inter else math.inf for intra, inter in zip(*figures[2:], strict=True)]
        passed = sorted({run["passed"] or "–" for run in runs}, key=str)
        seconds = round(statistics.median(run["seconds"] for run in runs))
        lines.append([f"`{given}`", str(len(runs)), str(epochs), *map(spread, [*figures, ratio]),
                      ", ".join(map(str, passed)), str(timedelta(seconds=seconds))])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, default=REFERENCE, help="--save-dir of each run")
    try:
        print(table(parser.parse_args().directories))
    except (RunError, OSError) as error:
        parser.exit(2, f"results.py: error: {error}\n")
