"""The table of runs: its metrics against the runs' files, its flags against what parses to them."""

import csv
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from tools import results
from utils import RunError

REPOSITORY = Path(results.__file__).parents[1]


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
    text = f"Currently using {device}\nCreating dataset: mnist\nFinished. Total elapsed time: 1\n"
    (directory / "log_mnist.txt").write_text(text, encoding="utf-8")
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


def test_a_run_that_tests_unknown_classes_alone_has_no_accuracy(tmp_path):
    run = make_run(tmp_path / "a", 1, [""])
    cells = [cell.strip() for cell in results.table([run]).splitlines()[-1].split("|")[1:-1]]
    assert cells[2:] == ["1", "1", *["–"] * 6]


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
    runs = [
        dict(args=dict(weight_cent=weight, feat_dim=2), evaluation=evaluation)
        for weight, evaluation in (
            (0.0, dict(accuracy=7.0)),
            (0.5, dict(accuracy=2.0)),
            (0.05, dict(accuracy=3.0)),
            (0.05, dict(accuracy=5.0)),
            (0.0, dict(accuracy=9.0)),
            (5.0, dict(unknown={})),
        )
    ]
    results.draw_line(axes, runs, "accuracy, %", "D = 2", "C0")
    assert axes.containers[0][0].get_xydata().tolist() == [[0.1, 4], [1, 2]]
    bars = axes.containers[0][2][0].get_segments()
    assert bars[0][:, 1] == pytest.approx([4 - 2**0.5, 4 + 2**0.5])
    assert list(axes.get_lines()[-1].get_ydata()) == [8, 8]
    unlike = make_run(tmp_path / "other", 1, [99], model="bn-fast", verify=True)
    (unlike / "evaluation.json").write_text(json.dumps(verified(9, 9)))
    with pytest.raises(RunError, match="--verify"):
        results.draw_curve([unlike], tmp_path / "curve.png")
    series = results.series_of([*verified_runs, unlike])
    assert [len(runs) for runs in series.values()] == [len(verified_runs)]
    results.draw_curve([*verified_runs, unlike], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_what_is_no_finished_run_ends_with_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "a", 1, [90.0])
    (run / "log_mnist.txt").write_text("==> Epoch 2/3\n")
    for directory, reason in ((run, "finished"), (tmp_path / "none", "args.json")):
        with pytest.raises(SystemExit) as end:
            results.main([str(directory)])
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and reason in lines[0]


def test_a_table_in_an_encoding_without_its_letters(tmp_path):
    """Windows' cp1252 or a container's ASCII: files and output are UTF-8 all the same."""
    run = make_run(tmp_path / "a", 1, [97.0], dataset="folder", unseen=["ő"])
    (run / "log_mnist.txt").rename(run / "log_folder.txt")
    with open(run / "log_folder.txt", "a", encoding="utf-8") as file:
        file.write("classes: ő\n")
    args = (run / "args.json").read_text(encoding="utf-8")
    (run / "args.json").write_text(args.replace("\\u0151", "ő"), encoding="utf-8")
    encoding = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    command = [sys.executable, "-m", "tools.results", str(run), str(run)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | encoding, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "--unseen 'ő'" in done.stdout and "97.00 ± 0.00" in done.stdout


def test_the_pages_tables_are_those_of_the_reference_runs():
    table = results.table(results.REFERENCE)
    page = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    assert table in page and results.verification_table(results.LAMBDA) in page
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    first = readme.index(table.splitlines()[0])
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), readme[first:]))
    assert len(rows) > 7 and set(rows) <= set(table.splitlines())


def test_reference_runs_have_the_flags_of_their_rows():
    """Also those of earlier versions, without newer flags."""
    parser = cli.build_parser()
    for directory in (*results.REFERENCE, *results.LAMBDA):
        args = json.loads((directory / "args.json").read_text(encoding="utf-8"))
        again = vars(cli.parse_args(shlex.split(results.read(directory)["flags"])))
        silent = parser.free | {"seed"}
        if not args["max_iter"]:
            silent.remove("max_epoch")
        if args.get("mirror") is True:
            args["mirror"] = "mean"
        # Flags that came later have their defaults; some have gone since.
        for name in (args.keys() & again.keys()) - silent:
            assert again[name] == args[name], (directory, name)
        assert args["save_dir"] == directory.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize(
    "name, text",
    [
        ("args.json", '{"dataset": "mn'),
        ("args.json", "[]"),
        ("metrics.csv", ""),
        ("metrics.csv", "epoch,test_accuracy\n1,x\n"),
    ],
)
def test_files_that_are_cut_or_edited_are_one_line(name, text, tmp_path):
    run = make_run(tmp_path / "a", 1, [97.0], "0:01:00")
    (run / name).write_text(text)
    with pytest.raises(RunError, match=f"{run / name}") as error:
        results.table([run])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        dict(dataset="../b/log"),
        dict(recipe="mine"),
        dict(model="cnn; rm -rf log"),
        dict(weight_cent="1 --seed 2"),
    ],
)
def test_what_no_flag_takes_becomes_neither_path_nor_command(flags, tmp_path):
    run = make_run(tmp_path / "a", 1, [97.0], **flags)
    with pytest.raises(RunError, match=f"{run / 'args.json'} is not as main.py wrote it"):
        results.table([run])
