"""--evaluate tells the figures of the run's last test and changes nothing; its table counts every image."""

import csv
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, make_folder
from hypothesis import given
from hypothesis import strategies as st

import datasets
import models
import utils
from engine import evaluation


def files(directory="log"):
    return {path: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--weight-cent", "0"],
        ["--amp"],
        ["--recipe", "zahn2024-v1.1", "--model", "cnn"],
        ["-j", "1", "--feat-dim", "3"],
        ["--mirror"],
    ],
)
def test_figures_are_those_of_the_runs_last_test(flags, run):
    _, trained, _ = run("--lr-model", "0.05", *flags)
    before = files()
    status, out, err = run("--evaluate", "log/checkpoint.pt", base=False)
    Path("log/evaluation.json").unlink()
    lines = trained.splitlines()
    assert (status, err) == (0, "")
    assert out.splitlines()[3:6] == lines[-4:-1]
    assert files() == before


@pytest.mark.mnist
def test_the_committed_weights_have_the_metrics_of_their_run(run):
    """Within what bfloat16 differs by from one CPU to another."""
    directory = Path(utils.__file__).parent / "log" / "reference" / "fast"
    flags = [
        "--evaluate",
        directory / "checkpoint.pt",
        "--data-root",
        SHARED_DATA,
        "--save-dir",
        "evaluated",
    ]
    status, _, err = run(*flags, base=False)
    assert (status, err) == (0, "")
    tested = json.loads(Path("evaluated/evaluation.json").read_text())
    with open(directory / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert tested["accuracy"] == pytest.approx(float(last["test_accuracy"]), abs=0.05)
    assert tested["nearest_center_accuracy"] == pytest.approx(
        float(last["nearest_center_accuracy"]), abs=0.05
    )
    assert tested["intra_distance"] == pytest.approx(float(last["intra_distance"]), rel=0.01)
    assert tested["inter_distance"] == pytest.approx(float(last["inter_distance"]), rel=1e-4)


def test_classes_have_their_accuracy_and_predictions_as_counted_one_by_one(run, folder):
    run("--lr-model", "0.05", "--max-epoch", "4")
    _, out, _ = run("--evaluate", "log/checkpoint.pt", base=False)
    model = models.create("cnn", 3, 1, 8)
    model.load_state_dict(torch.load("log/checkpoint.pt", weights_only=True)["model"])
    counts = np.zeros((3, 3), int)
    for images, labels, _ in datasets.create("folder", folder, 1, image_size=8).test:
        counts[labels.item(), model(images)[1].argmax().item()] += 1
    rows = [line.split() for line in out.splitlines()[-4:]]
    assert rows[0] == ["true", "class", "accuracy", "%", "ant", "bee", "cat"]
    for name, row, shown in zip(("ant", "bee", "cat"), counts, rows[1:], strict=True):
        assert shown == [name, f"{100 * row['abc'.index(name[0])] / 4:.2f}", *map(str, row)]


@given(
    st.lists(st.lists(st.integers(0, 9999), min_size=4, max_size=4), min_size=4, max_size=4),
    st.integers(0, 120),
)
def test_no_image_is_lost_in_the_table(counts, width):
    classes = ["a", "bb", "a longer name", "d"]
    lines = evaluation.confusion_lines(counts, classes, width)
    assert len(lines) == 5
    for label, line in enumerate(lines[1:]):
        right, total = counts[label][label], sum(counts[label])
        name, accuracy, rest = re.fullmatch(r"(.{13})  +(\d+\.\d\d|–)(.*)", line).groups()
        assert name.strip() == classes[label]
        assert (
            accuracy == "–"
            if not total
            else float(accuracy) == pytest.approx(100 * right / total, abs=0.006)
        )
        numbers = [int(number) for number in re.findall(r"\d+", rest)]
        if "mistakes" in lines[0]:
            assert sum(numbers) == total - right and numbers == sorted(numbers, reverse=True)
        else:
            assert numbers == counts[label] and max(map(len, lines)) <= width


def test_a_hundred_classes_stay_readable():
    random = np.random.default_rng(0)
    counts = random.integers(0, 3, (100, 100)) + 60 * np.eye(100, dtype=int)
    lines = evaluation.confusion_lines(
        counts.tolist(), [f"class number {label}" for label in range(100)]
    )
    assert len(lines) == 101 and max(map(len, lines)) <= 100
    for row, line in zip(counts, lines[1:], strict=True):
        assert (
            int(line.rpartition("others ")[2]) == row.sum() - row.max() - 6
        )  # 6: the three most frequent ones


def test_the_confusion_matrix_is_drawn_where_it_is_asked_for_and_nothing_else_changes(run):
    run("--plot", "--max-epoch", "1", "--save-dir", "runs/one")
    before = files("runs")
    assert run("--evaluate", "runs/one/checkpoint.pt", base=False)[0] == 0
    written = [Path("runs/one", name) for name in ("evaluation.json", "confusion.png", "roc.png")]
    assert files("runs").keys() == before.keys() | {written[0]}
    assert run("--evaluate", "runs/one/checkpoint.pt", "--plot", base=False)[0] == 0
    assert files("runs") == before | {path: path.read_bytes() for path in written}
    assert all(path.stat().st_size > 2000 for path in written[1:])
    assert (
        run(
            "--evaluate",
            "runs/one/checkpoint.pt",
            "--plot",
            "--save-dir",
            "pictures/of",
            base=False,
        )[0]
        == 0
    )
    assert (
        sorted(os.listdir("pictures/of")) == sorted(path.name for path in written)
        and not Path("log").exists()
    )


def test_an_evaluation_that_draws_leaves_no_worker_for_pythons_exit_to_wait_for(run):
    run("--max-epoch", "1")
    others = set(multiprocessing.active_children())
    assert run(
        "--evaluate", "log/checkpoint.pt", "--plot", "-j", "1", "--batch-size", "3", base=False
    )[::2] == (0, "")
    assert set(multiprocessing.active_children()) <= others


def test_a_checkpoint_is_enough(run):
    run("--max-epoch", "1")
    shutil.move("log/checkpoint.pt", "network.pt")
    shutil.rmtree("log")
    assert run("--evaluate", "network.pt", base=False)[0] == 0
    assert sorted(os.listdir()) == ["evaluation.json", "network.pt"]


def test_a_checkpoint_of_a_compiled_run_needs_no_compiler(run, monkeypatch):
    _, trained, _ = run("--max-epoch", "1")
    checkpoint = torch.load("log/checkpoint.pt", weights_only=True)
    checkpoint["args"]["compile"] = True
    torch.save(checkpoint, "log/checkpoint.pt")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiles"))
    status, out, _ = run("--evaluate", "log/checkpoint.pt", base=False)
    assert status == 0 and trained.splitlines()[-2] in out


def test_a_run_that_goes_on_can_be_evaluated_meanwhile(run):
    run("--max-epoch", "1")
    with utils.claim(Path("log")):
        assert run("--evaluate", "log/checkpoint.pt", "--plot", base=False)[0] == 0


def test_other_classes_are_refused_and_other_images_are_not(run, tmp_path):
    run("--max-epoch", "1")
    make_folder(tmp_path / "names", classes=("ant", "bee", "cow"))
    make_folder(tmp_path / "more", train=9, test=30)
    make_folder(tmp_path / "two", classes=("ant", "bee"))
    make_folder(tmp_path / "colour", mode="RGB")
    assert run("--evaluate", "log/checkpoint.pt", "--data-root", "names", base=False)[::2] == (
        2,
        "main.py: error: the training classes must be ['ant', 'bee', 'cat'], as in log/checkpoint.pt, "
        "got ['ant', 'bee', 'cow']\n",
    )
    assert run("--evaluate", "log/checkpoint.pt", "--data-root", "two", base=False)[0] == 2
    assert run("--evaluate", "log/checkpoint.pt", "--data-root", "colour", base=False)[::2] == (
        2,
        "main.py: error: the images' channels must be 1, as in log/checkpoint.pt, got 3\n",
    )
    status, out, _ = run("--evaluate", "log/checkpoint.pt", "--data-root", "more", base=False)
    assert (
        status == 0
        and sum(int(number) for line in out.splitlines()[-3:] for number in line.split()[2:]) == 90
    )
