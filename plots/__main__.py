"""Plots, drawn in background processes: features of each epoch, films, curves, confusion matrices, and the page.

python plots.py log/a                     draw missing pictures of a run with --plot, and log/a/report.html
python plots.py log/a --format pdf        figures for print, in log/a/figures; --epochs 1 5 30: panels in a row
python plots.py log/a log/b --compare     runs side by side with the same axes: log/a/compare.html, figures/compare.png
python plots.py log/a --projection tsne   t-SNE of the test features, where they have more than two dimensions
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from plots import report
from plots.charts import *
from plots.looks import *
from plots.plotter import Plotter
from plots.points import *
from plots.run import *


def figures(run: report.Run, epochs: Sequence[int] | None, format: str) -> list[tuple]:
    """The figures for print of a run: points of the epochs, by default of the last, curves and confusion matrix.

    Each is a tuple, as in the functions below: the path, the function that draws it, and its further arguments.
    """
    directory, drawings = run.directory / "figures", []
    for split, files in run.files.items():
        numbers = [
            number for number in epochs or [max(files)] if split == "train" or number in files
        ]
        if panels := [(f"epoch {number}", run.epoch(split, number)) for number in numbers]:
            path = directory / f"{split}_epoch_{'_'.join(map(str, numbers))}.{format}"
            drawings.append((path, draw_panels, panels, min(len(panels), 3), format))
    last, count = run.last(), len(run.classes)
    known = last["labels"] < count
    pairs = last["labels"][known] * count + last["predictions"][known]
    confusion = np.bincount(pairs, minlength=count**2).reshape(count, count)
    drawings.append((directory / f"curves.{format}", draw_curves, run.history, format))
    drawings.append(
        (directory / f"confusion.{format}", draw_confusion, confusion, run.classes, "", format)
    )
    return drawings


def tsne(run: report.Run, format: str) -> list[tuple]:
    if run.args["feat_dim"] in (1, 2):
        raise utils.RunError(
            f"--projection tsne needs more than two dimensions, got {run.args['feat_dim']} in "
            f"{run.directory}, which are drawn as they are"
        )
    source = run.directory / run.tested / "features.npz"
    epoch = int(report.read_arrays(source, ["epoch"])["epoch"])
    return [
        (
            run.directory / "figures" / f"{run.tested}_tsne_epoch_{epoch}.{format}",
            draw_tsne,
            source,
            format,
        )
    ]


def compared(
    runs: Sequence[report.Run], epochs: Sequence[int] | None, format: str, own_axes: bool
) -> list[tuple]:
    """The page and the figure of several runs: a column each, a row for each epoch, by default for the last ones."""
    report.check_comparable(runs)
    directory, names = runs[0].directory, report.names(runs)
    chosen = [[number] * len(runs) for number in epochs or ()] or [
        [max(run.files[run.tested]) for run in runs]
    ]
    panels = [
        (f"{name}, epoch {number}" if epochs else name, run.epoch(run.tested, number))
        for numbers in chosen
        for run, name, number in zip(runs, names, numbers, strict=True)
    ]
    page = (directory / "compare.html", write_page, [run.directory for run in runs])
    return [
        page,
        (
            directory / "figures" / f"compare.{format}",
            draw_panels,
            panels,
            len(runs),
            format,
            own_axes,
        ),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plots.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"plots.py: error: {message}\n")
    add = parser.add_argument
    add("directories", nargs="+", type=Path, metavar="DIR", help="--save-dir of a run with --plot")
    add(
        "--compare",
        action="store_true",
        help="one page and one figure of all the runs, with the same axes",
    )
    add(
        "--own-axes",
        action="store_true",
        help="give each panel of the figure of --compare its own axes",
    )
    add("--format", choices=("pdf", "svg", "png"), help="draw figures for print, in DIR/figures")
    add(
        "--epochs",
        nargs="+",
        type=int,
        metavar="N",
        help="epochs to draw; several become panels (default: last)",
    )
    add(
        "--projection",
        choices=("pca", "tsne"),
        default="pca",
        help="of features with more than two dimensions in the "
        "figures; pca is that of the pictures (default: %(default)s)",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.epochs and not (args.format or args.compare):
        parser.error("--epochs goes with --format or --compare")
    if args.projection == "tsne" and (args.compare or args.epochs):
        parser.error(
            "--projection tsne shows a run's last tested epoch: it goes without --compare and --epochs"
        )
    if args.own_axes and not args.compare:
        parser.error("--own-axes goes with --compare")
    if args.compare and len(args.directories) < 2:
        parser.error(f"--compare needs two runs or more, got {args.directories[0]} alone")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    errors, drawings, format = [], [], args.format or "png"
    try:
        with Plotter(lambda line: print(f"plots.py: {line}", file=sys.stderr)) as plotter:
            runs = [report.read_run(directory) for directory in args.directories]
            if args.compare:
                drawings = compared(runs, args.epochs, format, args.own_axes)
            elif args.projection == "tsne":
                drawings = [drawing for run in runs for drawing in tsne(run, format)]
            elif args.format:
                drawings = [
                    drawing for run in runs for drawing in figures(run, args.epochs, format)
                ]
            else:
                for run in runs:
                    errors += plot_run(plotter, run.directory, run.history)
                    print(f"Pictures in {run.directory}, page {run.directory / 'report.html'}")
            for path, *drawing in drawings:
                path.parent.mkdir(exist_ok=True)
                plotter(path, *drawing)
            errors += plotter.finish()
    except KeyboardInterrupt:
        print("plots.py: interrupted", file=sys.stderr)
        return 130
    except (utils.RunError, OSError) as error:
        print(f"plots.py: error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    for path, *_ in drawings:
        print(path)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
