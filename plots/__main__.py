"""Draws a run with --plot again, or for print, or beside others.

python -m plots log/a                     missing pictures, and the page log/a/report.html
python -m plots log/a --format pdf        figures for print, in log/a/figures
python -m plots log/a --format pdf --epochs 1 5 30             the same, several epochs in a row
python -m plots log/a log/b --compare     side by side: log/a/compare.html, figures/compare.png
python -m plots log/a --projection tsne   t-SNE of test features of more than two dimensions
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import utils
from plots.charts import draw_confusion, draw_curves
from plots.plotter import Plotter
from plots.points import draw_panels, draw_tsne
from plots.report import write_page
from plots.run import plot_run
from plots.saved import Run, check_comparable, read_run

# A drawing is a tuple: the path, the function that draws it, and its further arguments.


def figures(run: Run, epochs: Sequence[int] | None, format: str) -> list[tuple]:
    """The figures for print of a run: points of the epochs, by default the last; the charts."""
    from sklearn.metrics import confusion_matrix

    directory = run.directory / "figures"
    drawings = [(directory / f"curves.{format}", draw_curves, run.history, format)]
    for split, files in run.files.items():
        chosen = epochs or [max(files)]
        if split != "train":  # not each epoch is tested
            chosen = [number for number in chosen if number in files]
        if chosen:
            title = "epoch {}" if len(chosen) > 1 else ""
            panels = [(title.format(number), run.epoch(split, number)) for number in chosen]
            path = directory / f"{split}_epoch_{'_'.join(map(str, chosen))}.{format}"
            drawings.append((path, draw_panels, panels, min(len(panels), 3), format))
    last = run.last()
    known = range(len(last["classes"]))
    if last["labels"].min() in known:  # not all are of unknown classes
        confusion = confusion_matrix(last["labels"], last["predictions"], labels=known)
        path = directory / f"confusion.{format}"
        drawings.append((path, draw_confusion, confusion, last["classes"], "", format))
    return drawings


def tsne(run: Run, format: str) -> tuple:
    source = run.directory / run.tested / "features.npz"
    if not source.exists():
        raise utils.RunError(
            f"--projection tsne needs features of more than two dimensions, got {run.directory}"
        )
    name = f"{run.tested}_tsne_epoch_{run.last_epoch()}.{format}"
    return run.directory / "figures" / name, draw_tsne, source, format


def compared(
    runs: Sequence[Run], epochs: Sequence[int] | None, format: str, same_axes: bool
) -> list[tuple]:
    """The page and the figure of several runs: a column each, a row an epoch."""
    check_comparable(runs)
    panels = []
    for number in epochs or [0]:
        for run in runs:
            epoch = number or run.last_epoch()
            panels.append((f"{run.name}, epoch {epoch}", run.epoch(run.tested, epoch)))
    directory = runs[0].directory
    path = directory / "figures" / f"compare.{format}"
    page = (directory / "compare.html", write_page, [run.directory for run in runs])
    return [page, (path, draw_panels, panels, len(runs), format, not same_axes)]


def build_parser() -> argparse.ArgumentParser:
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="plots", description=__doc__, **options)
    parser.error = lambda message: parser.exit(2, f"plots: error: {message}\n")
    add = parser.add_argument
    add("directories", nargs="+", type=Path, metavar="DIR", help="--save-dir of a run with --plot")
    add("--compare", action="store_true", help="one page and one figure of all the runs")
    add("--same-axes", action="store_true", help="give all compared panels the same axes")
    add("--format", choices=("pdf", "svg", "png"), help="draw figures for print, in DIR/figures")
    help = "epochs to draw; several become panels (default: last)"
    add("--epochs", nargs="+", type=int, metavar="N", help=help)
    help = "features of more than two dimensions in figures; pca as in pictures (default: pca)"
    add("--projection", choices=("pca", "tsne"), default="pca", help=help)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.projection == "tsne" and (args.compare or args.epochs):
        parser.error("--projection tsne goes without --compare and --epochs")
    if args.compare and len(args.directories) < 2:
        parser.error(f"--compare needs two runs or more, got {args.directories[0]} alone")
    return args


def draw(args: argparse.Namespace, plotter: Plotter) -> list[str]:
    """Draws what the flags ask for, and prints where it is; returns the errors."""
    runs = [read_run(directory) for directory in args.directories]
    format = args.format or "png"
    drawings = []
    errors = []
    if args.compare:
        drawings = compared(runs, args.epochs, format, args.same_axes)
    elif args.projection == "tsne":
        drawings = [tsne(run, format) for run in runs]
    elif args.format or args.epochs:
        drawings = [drawing for run in runs for drawing in figures(run, args.epochs, format)]
    else:
        for run in runs:
            errors += plot_run(plotter, run.directory, run.history)
            print(f"Pictures in {run.directory}, page {run.directory / 'report.html'}")
    for path, *drawing in drawings:
        path.parent.mkdir(exist_ok=True)
        plotter(path, *drawing)
        print(path)
    return errors + plotter.finish()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with Plotter(lambda line: print(f"plots: {line}", file=sys.stderr)) as plotter:
            return 1 if draw(args, plotter) else 0
    except KeyboardInterrupt:
        return 130
    except (utils.RunError, OSError) as error:
        print(f"plots: error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)


if __name__ == "__main__":
    sys.exit(main())
