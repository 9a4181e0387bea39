"""The table of runs: its metrics against those of the runs' files, its flags against what parses to them."""

import csv
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from tools import results

REPOSITORY = Path(results.__file__).parent


@pytest.mark.parametrize(
    "given",
    [
        "--recipe zhou2018",
        "--recipe zhou2018 --dataset digits --lr-model 0.5 --amp",
        "--recipe wen2016 --milestones 3 4 --no-one-optimizer",
        "--recipe wen2016 --max-iter 20",
        "--recipe fast --max-epoch 7 --weight-cent 0 --no-amp",
        "--recipe images --dataset folder --no-mirror --no-amp",
    ],
)
def test_flags_are_the_shortest_that_give_the_run(given):
    """As they stand in args.json, where the seed, paths and what is written do not matter."""
    args = vars(
        cli.parse_args(
            [*given.split(), "--seed", "5", "--save-dir", "log/x", "--plot", "--eval-freq", "3"]
        )
    )
    assert set(results.flags(args).split()) == set(given.split())


def test_flags_newer_than_a_run_have_the_values_it_had_without_them():
    args = vars(cli.parse_args(["--recipe", "images"]))
    del args["erase"], args["label_smoothing"]
    assert (
        results.flags(args | dict(mirror=True, amp="auto"))
        == "--recipe images --erase 0 --label-smoothing 0"
    )


def make_run(directory, seed, accuracies, device="CPU", **flags):
    directory.mkdir()
    args = vars(cli.parse_args(["--seed", str(seed)])) | flags
    (directory / "args.json").write_text(json.dumps(args))
    with open(directory / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "epoch",
                "test_accuracy",
                "nearest_center_accuracy",
                "intra_distance",
                "inter_distance",
            ]
        )
        for epoch, accuracy in enumerate(accuracies, 1):
            writer.writerow([epoch, accuracy, *([90, seed, 10] if accuracy else ["", "", ""])])
    text = f"Currently using {device}\nCreating dataset: mnist\nFinished. Total elapsed time (h:m:s): 0:00:01\n"
    (directory / "log_mnist.txt").write_text(text)
    return directory


def test_runs_of_several_seeds_share_a_row(tmp_path):
    runs = [
        make_run(tmp_path / "a", 1, [*[97.9] * 9, 98.2]),
        make_run(tmp_path / "b", 2, [97.0, 98.0, *[""] * 7, 98.6]),
        make_run(tmp_path / "c", 4, [*[""] * 9, 97.0]),
        make_run(tmp_path / "d", 3, [90.0] * 10, "GPU: 0"),
        make_run(tmp_path / "e", 1, [97.0], weight_cent=0.0),
    ]
    table = results.table(runs).splitlines()
    assert len({line.count("|") for line in table}) == 1
    several, gpu, softmax = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:])
    deviation = statistics.stdev([98.2, 98.6, 97.0])
    assert several == [
        "`--recipe zhou2018`",
        "CPU",
        "3",
        "10",
        f"97.93 ± {deviation:.2f}",
        "90.00 ± 0.00",
        "2.33 ± 1.53",
        "10.00 ± 0.00",
        "0.23 ± 0.15",
        "2, 10, –",
    ]
    assert gpu[:5] == ["`--recipe zhou2018`", "GPU", "1", "10", "90.00"]
    assert softmax[0] == "`--recipe zhou2018 --weight-cent 0`"


def verified(eer, accuracy):
    among = dict(
        l2={"eer": eer, "tpr_at_far_1e-3": 90, "recall_at_1": 80, "auc": 0.9},
        cosine=dict(eer=2 * eer),
    )
    return dict(epoch=1, accuracy=accuracy, nearest_center_accuracy=0.0, verification=among)


@pytest.fixture
def verified_runs(tmp_path):
    runs = []
    for weight, eer in ((0.5, 2.0), (0, 7.0), (0.05, 3.0)):
        for seed in (1, 2):
            runs.append(
                make_run(
                    tmp_path / f"{weight}-{seed}",
                    seed,
                    [99],
                    "0:01:00",
                    weight_cent=weight,
                    verify=True,
                )
            )
            (runs[-1] / "evaluation.json").write_text(json.dumps(verified(eer + seed, 99 - eer)))
    return runs


def test_verification_has_a_row_for_each_lambda_in_their_order(verified_runs):
    header, _, *rows = results.verification_table(verified_runs).splitlines()
    assert "AUROC" in header
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0].split()[-1] for row in cells] == ["0`", "0.05`", "0.5`"]
    assert cells[1][1:8] == [
        "2",
        "96.00 ± 0.00",
        "0.00 ± 0.00",
        "4.50 ± 0.71",
        "9.00 ± 1.41",
        "90.00 ± 0.00",
        "80.00 ± 0.00",
    ]
    assert all(row[8:] == ["–"] * 3 for row in cells)  # without --unseen
    path = verified_runs[-1] / "evaluation.json"
    path.write_text(path.read_text().replace('"epoch": 1', '"epoch": 0'))  # of an earlier test
    assert results.verification_table(verified_runs).splitlines()[-2].split("|")[3].strip() == "–"


def test_the_curve_shows_means_and_deviations_over_lambda_times_d(verified_runs, tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    results.draw_line(axes, {0.0: [7.0, 9.0], 0.1: [3.0, 5.0], 1.0: [2.0]}, "D = 2", "C0", "o")
    alone, line = axes.get_lines()
    assert list(alone.get_ydata()) == [8, 8] and line.get_xydata().tolist() == [[0.1, 4], [1, 2]]
    shade = axes.collections[0].get_paths()[0].vertices
    assert (shade[:, 1].min(), shade[:, 1].max()) == pytest.approx((2, 4 + 2**0.5))
    with pytest.raises(results.RunError, match="--verify"):
        results.draw_curve(
            [make_run(tmp_path / "other", 1, [99], "0:01:00")], tmp_path / "curve.png"
        )
    results.draw_curve(verified_runs, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_the_script_refuses_what_is_no_finished_run(tmp_path):
    run = make_run(tmp_path / "a", 1, [90.0])
    (run / "log_mnist.txt").write_text("==> Epoch 2/3\n")
    for directory, reason in ((run, "finished"), (tmp_path / "none", "args.json")):
        command = [sys.executable, REPOSITORY / "results.py", directory]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and reason in done.stderr


def test_the_pages_tables_are_those_of_the_reference_runs():
    table = results.table(results.REFERENCE)
    page = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    assert table in page and results.verification_table(results.LAMBDA) in page
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    first = readme.index(table.splitlines()[0])
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), readme[first:]))
    assert len(rows) > 7 and set(rows) <= set(table.splitlines())


def test_reference_runs_have_the_flags_of_their_rows():
    parser = cli.build_parser()
    for directory in (*results.REFERENCE, *results.LAMBDA):
        args = json.loads((directory / "args.json").read_text())
        again = vars(cli.parse_args(shlex.split(results.flags(args))))
        free = (
            parser.free - {"max_epoch"} | {"seed"} | ({"max_epoch"} if args["max_iter"] else set())
        )
        known = args.keys() - free  # flags that came later have their defaults
        assert {name: again[name] for name in known} == {name: args[name] for name in known}, (
            directory
        )
        assert args["save_dir"] == directory.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize(
    "name, text",
    [
        ("args.json", '{"dataset": "mn'),
        ("args.json", "[]"),
        ("args.json", "{}"),
        ("metrics.csv", ""),
        ("metrics.csv", "epoch,test_accuracy\n1,x\n"),
    ],
)
def test_files_that_are_cut_or_edited_are_one_line(name, text, tmp_path):
    run = make_run(tmp_path / "a", 1, [97.0], "0:01:00")
    (run / name).write_text(text)
    with pytest.raises(results.RunError, match=f"cannot read the run in {run}") as error:
        results.table([run])
    assert "\n" not in str(error.value)
