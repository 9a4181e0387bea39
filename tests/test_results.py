"""The table of runs: its figures against those of the runs' files, its flags against what parses to them."""

import csv
import json
import shlex
import statistics
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

import cli
import results

REPOSITORY = Path(results.__file__).parent


@pytest.mark.parametrize("given", [
    "--recipe zhou2018",
    "--recipe zhou2018 --dataset digits --lr-model 0.5 --amp",
    "--recipe wen2016 --milestones 3 4 --no-one-optimizer",
    "--recipe wen2016 --max-iter 20",
    "--recipe fast --max-epoch 7 --weight-cent 0 --no-amp",
])  # fmt: skip
def test_flags_are_the_shortest_that_give_the_run(given):
    """As they stand in args.json, where the seed, paths and what is written do not matter."""
    args = vars(cli.parse_args([*given.split(), "--seed", "5", "--save-dir", "log/x", "--plot", "--eval-freq", "3"]))
    assert set(results.flags(args).split()) == set(given.split())


def make_run(directory, seed, accuracies, elapsed, **flags):
    directory.mkdir()
    args = vars(cli.parse_args(["--seed", str(seed)])) | flags
    (directory / "args.json").write_text(json.dumps(args))
    with open(directory / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "test_accuracy", "nearest_center_accuracy", "intra_distance", "inter_distance"])
        for epoch, accuracy in enumerate(accuracies, 1):
            writer.writerow([epoch, accuracy, *([90, seed, 10] if accuracy else ["", "", ""])])
    text = "Finished. Total elapsed time (h:m:s): 0:00:01\nFinished. Total elapsed time (h:m:s): " + elapsed
    (directory / "log_mnist.txt").write_text(f"Creating dataset: mnist\n{text}\n")
    return directory


def test_runs_of_several_seeds_share_a_row(tmp_path):
    runs = [
        make_run(tmp_path / "a", 1, [97.9, "", 98.2], "0:01:00"),
        make_run(tmp_path / "b", 2, [98.0, "", 98.6], "0:03:00"),
        make_run(tmp_path / "c", 4, ["", "", 97.0], "0:02:00"),
        make_run(tmp_path / "d", 1, [97.0], "1 day, 2:00:05", weight_cent=0.0),
    ]
    header, rule, several, one = results.table(runs).splitlines()
    assert header.count("|") == rule.count("|") == several.count("|") == one.count("|")
    deviation = statistics.stdev([98.2, 98.6, 97.0])
    assert [cell.strip() for cell in several.split("|")[1:-1]] == [
        "`--recipe zhou2018`", "3", "3", f"97.93 ± {deviation:.2f}", "90.00 ± 0.00", "2.33 ± 1.53",
        "10.00 ± 0.00", "0.23 ± 0.15", "1, 3, –", "0:02:00",
    ]  # fmt: skip
    assert one.split("|")[1].strip() == "`--recipe zhou2018 --weight-cent 0`"
    assert one.split("|")[-3:-1] == [" – ", f" {timedelta(days=1, seconds=7205)} "]


def test_the_script_refuses_what_is_no_finished_run(tmp_path):
    run = make_run(tmp_path / "a", 1, [90.0], "0:01:00")
    (run / "log_mnist.txt").write_text("==> Epoch 2/3\n")
    for directory, reason in ((run, "finished"), (tmp_path / "none", "args.json")):
        command = [sys.executable, REPOSITORY / "results.py", directory]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and reason in done.stderr


def test_the_readmes_table_is_that_of_the_reference_runs():
    assert results.table(results.REFERENCE) in (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("directory", results.REFERENCE, ids=lambda directory: directory.name)
def test_a_reference_run_has_the_flags_of_its_row(directory):
    args = json.loads((directory / "args.json").read_text())
    again = vars(cli.parse_args(shlex.split(results.flags(args))))
    free = cli.build_parser().free - {"max_epoch"} | {"seed"} | ({"max_epoch"} if args["max_iter"] else set())
    known = args.keys() - free  # flags that came later have their defaults
    assert {name: again[name] for name in known} == {name: args[name] for name in known}
    assert args["save_dir"] == f"log/reference/{directory.name}"
